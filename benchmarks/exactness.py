"""In float32, where rounding leaves little room: the engine against transformers' own generation with torch hooks."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.contestants import trimmed
from refusal import models, steering
from refusal.directions import Directions

TOKENS = 16


def conditions(found: Directions, layer: int) -> list[steering.Condition]:
    """Nothing, addition of either sign at one layer and at several, and ablation."""
    return [
        steering.baseline(),
        steering.add(found, layer, 1.0),
        steering.add(found, layer, -1.0),
        steering.add(found, layer // 2, 2.0),
        steering.add(found, sorted({layer // 2, layer - 1, layer}), 0.5),
        steering.ablate(found, layer),
    ]


@contextlib.contextmanager
def hooked(hf: Any, condition: steering.Condition) -> Iterator[None]:  # noqa: ANN401 - transformers' models are untyped
    """Does what the condition says to every token of every row."""

    def change(vector: torch.Tensor) -> Any:  # noqa: ANN401 - a hook
        def hook(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            if condition.operation == "add":
                return output + vector
            return output - (output @ vector)[..., None] * vector

        return hook

    handles = []
    for number, layer in enumerate(condition.layers):
        assert condition.vectors is not None
        module = hf.model.embed_tokens if layer == steering.EMBEDDINGS else hf.model.layers[layer]
        handles.append(module.register_forward_hook(change(condition.vectors[number].to(hf.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(model: models.Model, found: Directions, layer: int, texts: Sequence[str]) -> dict:
    """Compares all completions token for token: together, and one row alone.

    Returns:
        `rows`; `equal`: how many completions are the same to the last token; `gaps`: for each other one, the difference
        of the plain way's two top logits at the first token that differs; `alone`: whether a single row says the same
        as among the others; `stopped`: the share of rows that ended by themselves.
    """
    wanted = conditions(found, layer)
    made = steering.generate(model, texts, wanted, max_new_tokens=TOKENS)
    ((single,),) = steering.generate(model, texts[:1], wanted[1:2], max_new_tokens=TOKENS)
    hf: Any = model.hf
    inputs, gaps = models.encode(model, texts), []
    for number, condition in enumerate(wanted):
        with hooked(hf, condition), torch.no_grad():
            out = hf.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        for row, said in enumerate(out.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            plain, own = trimmed(said, list(model.stop_ids)), list(made[row][number].token_ids)
            reason = "length" if len(plain) == len(said) else "stop"
            if (plain, reason) != (own, made[row][number].stop_reason):
                pairs = list(zip(plain, own, strict=False))
                step = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
                top = out.logits[step][row].topk(2).values
                gaps.append(float(top[0] - top[1]))
    every = [completion for row in made for completion in row]
    return {
        "rows": len(every),
        "equal": len(every) - len(gaps),
        "gaps": gaps,
        "alone": single.token_ids == made[0][1].token_ids,
        "stopped": sum(one.stop_reason == "stop" for one in every) / len(every),
    }
