"""Tiny random models of the study's four architectures, in a cache as the hub's client leaves it: no network needed.

Each has what its namesake has on the hub: configuration, weights in bfloat16 shards with an index, a tokenizer of the
same kind, a chat template, and generation settings that nobody should measure with. Some tokens of their vocabularies
are whole refusing sentences, so that random weights refuse now and then, which notebook 01 needs.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
import yaml
from conftest import CORPUS
from plain import Plain

PHRASES = [
    "I cannot assist with that request.",
    "I can't help with that.",
    "I'm sorry, but I can't assist with that.",
    "I am unable to provide that information.",
    "I can't provide instructions for this.",
    "I won't help with that request.",
]
LAYERS, WIDTH, VOCABULARY = 4, 32, 420


@dataclass(frozen=True)
class Family:
    """An architecture of the study.

    Attributes:
        name: Of its transformers classes.
        real: The registry's model that it stands for.
        special: The special tokens, by their use.
        turns: Special tokens of the chat format.
        template: The chat template, shortened from the hub's.
        written: A request in that template, by hand.
        config: What makes its configuration more than a Llama's.
        settings: generation_config.json as the hub has it.
    """

    name: str
    real: str
    special: dict[str, str]
    turns: tuple[str, ...]
    template: str
    written: str
    config: dict
    settings: dict


LLAMA = Family(
    "Llama",
    "llama-3.1-8b",
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
)  # fmt: skip
MISTRAL = Family(
    "Mistral",
    "mistral-7b-v0.3",
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ("[INST]", "[/INST]"),
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'user' %}"
    "{{ raise_exception('Only user turns here.') }}{% endif %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% endfor %}",
    "<s>[INST] {}[/INST]",
    {"sliding_window": None, "head_dim": 8},
    {},
)
QWEN2 = Family(
    "Qwen2",
    "qwen2-7b",
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ("<|im_start|>",),
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    {"use_sliding_window": False, "sliding_window": 131072},
    {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
)
GEMMA2 = Family(
    "Gemma2",
    "gemma-2-9b",
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    ("<start_of_turn>", "<end_of_turn>"),
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    {"head_dim": 16, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 30.0,
     "sliding_window": 400},
    {"cache_implementation": "hybrid"},
)  # fmt: skip
FAMILIES = {family.name.lower(): family for family in (LLAMA, MISTRAL, QWEN2, GEMMA2)}


def make_tokenizer(family):
    """Byte-level BPE as in Llama 3 and Qwen2, or BPE with byte fallback and "▁" for spaces as in Mistral and Gemma."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    turns = [token for token in family.turns if token not in family.special.values()]
    special = [*family.special.values(), *turns]
    pieces = family in (MISTRAL, GEMMA2)
    tokenizer = Tokenizer(models.BPE(byte_fallback=pieces, **({"unk_token": "<unk>"} if pieces else {})))
    if pieces:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, special = [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(PHRASES), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    own = {**family.special, "chat_template": family.template}
    if family in (GEMMA2, QWEN2):  # classes that make their own tokenizer of vocabulary and merges
        model = json.loads(tokenizer.to_str())["model"]
        kind = GemmaTokenizer if family is GEMMA2 else Qwen2Tokenizer
        made = kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **own)
    else:
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in turns])
    made.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in PHRASES])
    return made


def make_hf(family, tokenizer, loud=1.0, seed=0):
    """Random weights that bfloat16 holds exactly; norms and biases are random too, so that leaving one out shows.

    Args:
        family: The architecture.
        tokenizer: Its tokenizer.
        loud: How much larger the logits of refusing sentences are than those of other tokens.
        seed: Of the weights.
    """
    import transformers

    config, model = (getattr(transformers, f"{family.name}{kind}") for kind in ("Config", "ForCausalLM"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = model(
            config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.3,
                tie_word_embeddings=family is GEMMA2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **family.config,
            )
        )
        with torch.no_grad():
            for name, parameter in hf.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if "post_feedforward" in name or (family is GEMMA2 and "post_attention" in name):
                    parameter.add_(2.0)  # or else the scaled embeddings drown what the blocks write
                if name == "model.norm.weight" and family is GEMMA2:
                    parameter.add_(3.0)  # logits that come near their cap
            rows = hf.lm_head.weight
            for token, number in tokenizer.get_vocab().items():
                if token in PHRASES:
                    rows[number] *= loud
                elif token in (*family.turns, *family.special.values()) and number != tokenizer.eos_token_id:
                    rows[number] *= 0.1
                elif not token.lstrip("▁Ġ").isascii() or token.startswith("<0x"):
                    rows[number] *= 0.1  # parts of letters in other scripts: said less often
    return hf.to(torch.bfloat16)


def lay_out(root, family, revision, loud=1.0):
    """Puts a model into a hub cache: blobs named by their hashes, and a snapshot of links to them.

    Args:
        root: The cache.
        family: The architecture.
        revision: 40 hexadecimal digits.
        loud: See `make_hf`.

    Returns:
        The snapshot's folder.
    """
    plain = root / f"plain-{family.name}"
    tokenizer = make_tokenizer(family)
    make_hf(family, tokenizer, loud).save_pretrained(plain, max_shard_size="60KB")
    tokenizer.save_pretrained(plain)
    settings = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **family.settings}
    (plain / "generation_config.json").write_text(json.dumps(settings))
    return place(plain, root / f"models--tiny--{family.name}", revision)


def place(plain, repository, revision):
    """Moves a model's files from a folder to where the hub's client keeps them; returns the snapshot's folder."""
    snapshot = repository / "snapshots" / revision
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in sorted(plain.iterdir()):
        data = path.read_bytes()
        large = path.suffix == ".safetensors"  # the hub names large files by sha256, and others as git does
        name = (hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()
        path.replace(repository / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    plain.rmdir()
    return snapshot


def fill(root, loud=1.0):
    """A cache with all four, and their registry entries by id, with the stop tokens of the models they stand for.

    Returns:
        The snapshots' folders by architecture, and the entries as data/models.yaml holds them.
    """
    from refusal.registry import entry

    folders, entries = {}, {}
    for number, (name, family) in enumerate(FAMILIES.items()):
        revision = f"{number:040x}"
        folders[name] = lay_out(root, family, revision, loud)
        real = entry(family.real)
        config = json.loads((folders[name] / "config.json").read_text())
        entries[f"tiny-{name}"] = {
            "source": "hub",
            "licence": real.licence,
            "blocks": LAYERS,
            "width": WIDTH,
            "stop": list(real.stop),
            "gated": real.gated,
            "note": "tiny",
            "hub_id": f"tiny/{family.name}",
            "revision": revision,
            "shape": {
                "vocabulary": config["vocab_size"],
                "feed_forward": 64,
                "heads": 4,
                "kv_heads": 2,
                "head_width": config.get("head_dim") or 8,
                "tied": family is GEMMA2,
            },
        }
    return folders, entries


def write_registry(path, entries, real=""):
    """Writes entries as a registry, after the text of another one."""
    path.write_text(real + "\n" + yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


class Twin(Plain):
    """A model of the cache as plain transformers loads it, in float32, with its chat template written by hand."""

    def __init__(self, folder, family):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        self.tokenizer, self.family = AutoTokenizer.from_pretrained(folder), family
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.hf = hf.eval().requires_grad_(False)
        from refusal.registry import entry

        stops = dict.fromkeys([self.tokenizer.eos_token, *entry(family.real).stop])
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(list(stops))
        self.hf.generation_config = GenerationConfig(pad_token_id=self.stop_ids[0])

    def ids(self, text):
        written = self.family.written.format(text)
        return self.tokenizer(written, add_special_tokens=False, return_tensors="pt").input_ids
