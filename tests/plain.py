"""A second implementation of the steered model, without nnsight: prompts by hand, torch hooks, one row, no padding."""

import contextlib

import pytest
import torch
from conftest import make_hf, make_tokenizer

from refusal.files import CompendiumError

STOPS = ("<|im_end|>", "<|endoftext|>")
PROMPTS = [
    "Hi",
    "How do I bake bread?",
    "Write a poem about the sea, the sky and the grass. Then explain why the sky is blue and the grass is green, give "
    "me three ideas for a birthday party, and make a list of good books for children who like the weather in spring.",
    "Tell me how to steal a car without being seen.",
]


def written(text):
    """The chat template of conftest.py, by hand."""
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


class Plain:
    """A tiny model with the weights of the fixture `tiny_models`, which nnsight has never touched."""

    def __init__(self, architecture):
        self.tokenizer = make_tokenizer()
        self.hf = make_hf(architecture, len(self.tokenizer)).eval().requires_grad_(False)
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(list(STOPS))
        self.hf.generation_config.pad_token_id = self.stop_ids[1]

    def ids(self, text):
        return self.tokenizer(written(text), add_special_tokens=False, return_tensors="pt").input_ids

    @contextlib.contextmanager
    def steered(self, condition):
        """Torch hooks that do to a single, unpadded row what the condition says."""

        def change(vector):
            def hook(module, args, output):
                out = output.clone()
                first = -1 if condition.position == "last" else 0  # the only token of a later step is the last one too
                if condition.operation == "add":
                    out[:, first:] += vector
                else:
                    out[:, first:] -= (out[:, first:] @ vector)[..., None] * vector
                return out

            return hook

        handles = []
        for layer, vector in zip(condition.layers, () if condition.vectors is None else condition.vectors, strict=True):
            module = self.hf.model.embed_tokens if layer == -1 else self.hf.model.layers[layer]
            handles.append(module.register_forward_hook(change(vector)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def generate(self, text, condition, max_new_tokens):
        """Token ids of transformers' own greedy generation, up to the stop token; and why it ended."""
        ids = self.ids(text)
        with self.steered(condition), torch.no_grad():
            out = self.hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.stop_ids,
            )
        new = out[0, ids.shape[1] :].tolist()
        return (tuple(new[:-1]), "stop") if new[-1] in self.stop_ids else (tuple(new), "length")

    def logits(self, text, condition):
        """float64 logits `[vocabulary]` of the first new token."""
        with self.steered(condition), torch.no_grad():
            return self.hf(self.ids(text)).logits[0, -1].double()


def one_sentence(call, *words):
    """The call ends in one clear sentence, in which these words stand."""
    with pytest.raises(CompendiumError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
