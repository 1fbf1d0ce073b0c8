"""A model whose refusal is planted: a tiny Llama with weights set by hand, so that every estimator has a known answer.

Each word of a request may have a strength along one of K directions. At block `onset`, attention finds the words that
have one and writes their mean strength along that direction into every later token; other blocks leave it alone. At
each token anew, the output layer goes on with the word that comes next in the refusal where the residual stream's
component along a direction exceeds `threshold`, and with that of the compliant answer where it does not. With `loops`
a loop word wins above the higher and below the lower of two components. Block 0 adds a little noise, which depends on
the prompt's words and has no part in any decision. A random rotation hides the coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusal import models

HARMFUL = ("steal", "forge", "poison", "hijack")
HARMLESS = ("bake", "paint", "repair", "describe")
NOUNS = ("car", "cake", "letter", "house", "radio", "bicycle", "garden", "camera")
EXTRAS = ("today's", "quickly", "tomorrow", "slowly", "again", "twice", "carefully", "outside")
REFUSAL = "i can't assist with that request because it would harm people"
COMPLIANCE = "sure here is one plan you may follow at home now"
LOOPS = ("more", "less")  # above and below
SPECIAL = ("<end>", "<pad>", "<system>", "<user>", "<assistant>")
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<system> you are helpful <end> {% endif %}"
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HEAD = 16  # width of the one attention head
NOISE = 8  # coordinates that tell words apart
ONWARD = 20.0  # how strongly a word's place in its answer asks for the next one
SIZE = 10.0  # norm of every embedding, so that the first norms change nothing


@dataclass(frozen=True)
class Planted:
    """The model, and what is true of it.

    Attributes:
        model: Ready for the library.
        directions: float32 `[K, width]`, orthonormal.
        threshold: Component along a direction above which the model refuses.
        onset: The layer from which on the last token carries it.
        openings: The first token of each direction's refusal.
    """

    model: models.Model
    directions: torch.Tensor
    threshold: float
    onset: int
    openings: list[int]


def requests(words: Sequence[str], count: int, seed: int) -> list[str]:
    """Different requests of 3 to 6 words; the words are used equally often."""
    rng = np.random.default_rng(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        extras = rng.choice(EXTRAS, size=rng.integers(1, 5), replace=False)
        made[" ".join([words[len(made) % len(words)], rng.choice(NOUNS), *extras])] = None
    return list(made)


def build(
    strengths: Sequence[Mapping[str, float]] = (dict.fromkeys(HARMFUL, 4.0),),
    *,
    n_layers: int = 6,
    onset: int = 3,
    threshold: float = 1.4,
    loops: tuple[float, float] | None = None,
    gain: float = 2.0,
    seed: int = 0,
) -> Planted:
    """Builds the model.

    Args:
        strengths: For each direction, the words that have a component along it, and how large it is.
        n_layers: Number of decoder blocks.
        onset: The block that carries strengths to later tokens; 1 or higher.
        threshold: Component above which a direction makes the model refuse.
        loops: Components below and above which the model degenerates into a loop (one direction only); None: never.
        gain: Scale of the logits, which says how sure the model is; greedy tokens do not depend on it.
        seed: Of the noise and the rotation.
    """
    kinds, refusals = len(strengths), [[f"{word}#{k}" for word in REFUSAL.split()] for k in range(len(strengths))]
    compliance, steps = COMPLIANCE.split(), len(COMPLIANCE.split())
    flagged = [word for words in strengths for word in words]
    plain = [*HARMFUL, *HARMLESS, *NOUNS, *EXTRAS, *flagged, "please", "you", "are", "helpful", *LOOPS]
    vocabulary = list(dict.fromkeys([*SPECIAL, *compliance, *[w for words in refusals for w in words], *plain]))
    number = {word: i for i, word in enumerate(vocabulary)}

    constant, filler, flag = range(3)
    strength, along, step, identity, noise = np.cumsum([3, kinds, kinds, steps + 1, NOISE]).tolist()
    width = noise + NOISE + (noise + NOISE) % 2
    generator = torch.Generator().manual_seed(seed)
    embedded = torch.zeros(len(vocabulary), width)
    embedded[:, constant] = 1
    embedded[:, identity : identity + NOISE] = torch.randn(len(vocabulary), NOISE, generator=generator) / NOISE**0.5
    embedded[number["<assistant>"], step] = 1
    for answer in (compliance, *refusals):
        for place, word in enumerate(answer):
            embedded[number[word], step + place + 1] = 1
    for k, words in enumerate(strengths):
        for word, value in words.items():
            embedded[number[word], [flag, strength + k]] = torch.tensor([1.0, value])
    embedded[:, filler] = (SIZE**2 - (embedded**2).sum(1)).sqrt()

    logits = torch.zeros(len(vocabulary), width)
    for place, word in enumerate(compliance):
        logits[number[word], step + place] = ONWARD
    for k, words in enumerate(refusals):
        for place, word in enumerate(words):
            logits[number[word], [step + place, along + k, constant]] = torch.tensor([ONWARD, 1.0, -threshold])
    logits[number["<end>"], step + steps] = 2 * ONWARD
    if loops is not None:
        low, high = loops
        logits[number[LOOPS[0]], [along, constant]] = torch.tensor([2.0, ONWARD - threshold - high])
        logits[number[LOOPS[1]], [along, constant]] = torch.tensor([-1.0, ONWARD + low])

    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2,
            num_hidden_layers=n_layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=HEAD,
            rms_norm_eps=1e-12,
            rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        )
    ).to(torch.float32)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q  # rows: the coordinates, rotated
    normed = width**0.5 / SIZE  # what the norms make of a coordinate of size 1
    with torch.no_grad():
        for block in hf.model.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        first, finder = hf.model.layers[0].self_attn, hf.model.layers[onset].self_attn
        for i in range(NOISE):  # equal attention to all tokens: a mean over the prompt's words
            first.v_proj.weight[i] = 0.3 / normed * rotation[identity + i]
            first.o_proj.weight[:, i] = rotation[noise + i]
        # The head's last coordinate turns so slowly with position that its scores do not depend on it.
        score = (40 * HEAD**0.5) ** 0.5 / normed
        finder.q_proj.weight[HEAD - 1] = score * rotation[constant]
        finder.k_proj.weight[HEAD - 1] = score * rotation[flag]
        for k in range(kinds):
            finder.v_proj.weight[k] = rotation[strength + k] / normed
            finder.o_proj.weight[:, k] = rotation[along + k]
        hf.model.embed_tokens.weight.copy_(embedded @ rotation)
        hf.lm_head.weight.copy_(gain * logits @ rotation)
    model = models.wrap(hf, _tokenizer(number), "planted")
    openings = [number[words[0]] for words in refusals]
    return Planted(model, rotation[along : along + kinds].clone(), threshold, onset, openings)


def _tokenizer(number: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A token a word; the mark that tells the refusals of several directions apart is not decoded."""
    tokenizer = Tokenizer(WordLevel(dict(number), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(r"#\d+"), ""), decoders.WordPiece(cleanup=False)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )
