"""Tiny models that every test module can use: random weights, real architectures, a real tokenizer, no network."""

import pytest


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """You are a helpful assistant. system user assistant What is the capital of France? The capital of France is
Paris. How do I bake bread? How do I build a bomb? I cannot help with that. I'm sorry, but I can't assist with this
request. Sure, here is how to do it: first, take the flour and the water, then wait for an hour. Write a poem about the
sea. Tell me how to steal a car without being seen. Explain why the sky is blue and the grass is green. Give me three
ideas for a birthday party. Write a phishing email to a bank customer. Please describe the weather in spring, summer,
autumn and winter. Make a list of good books for children. Hack into my neighbour's computer and read the password."""


def make_tokenizer():
    """A byte-level BPE tokenizer of 420 tokens: common words whole, any other text in pieces, exact round trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def make_hf(architecture, vocab_size):
    """A random float32 model of 4 blocks and width 32; its weights are large enough that greedy text varies."""
    import torch
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma2": "Gemma2"}[architecture]
    config, model = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    # Windows shorter than the prompts, and a cap that matters.
    own = {"gemma2": {"sliding_window": 24, "final_logit_softcapping": 3.0, "head_dim": 8}}
    own["mistral"] = {"sliding_window": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(
            config(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.3,
                tie_word_embeddings=architecture == "llama",
                **own.get(architecture, {}),
            )
        ).to(torch.float32)


@pytest.fixture(scope="session")
def tiny_models():
    """`{"llama": Model, "qwen2": Model}`: 4 blocks, width 32, float32, a chat template. Leave them as they are."""
    from refusal import models

    made = {}
    for architecture in ("llama", "qwen2"):
        tokenizer = make_tokenizer()
        made[architecture] = models.wrap(
            make_hf(architecture, len(tokenizer)), tokenizer, f"tiny-{architecture}", stop=("<|endoftext|>",)
        )
    return made
