"""The slow, obvious way through nnsight, which the engine is held against: one condition, nothing shared or cached."""

import torch
from nnsight import save

from refusal.models import blocks, embeddings, encode


def _changed(hidden, vector, operation, steered):
    """A hidden state `[1, tokens, width]` with one vector added or ablated at the steered tokens."""
    if operation == "add":
        return hidden + (vector * steered).to(hidden.dtype)
    shadow = (hidden.float() @ vector)[..., None] * vector
    return hidden - (shadow * steered).to(hidden.dtype)


def logits(model, ids, condition, prompt_length):
    """Logits of the next token `[vocabulary]` after the tokens `ids`, from one pass over all of them."""
    steered = torch.ones(1, len(ids), 1, device=model.device)
    if condition.position == "last":
        steered[:, : prompt_length - 1] = 0
    vectors = () if condition.vectors is None else condition.vectors.to(model.device)
    inputs = torch.tensor([ids], device=model.device)
    inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    with torch.no_grad(), model.lm.trace(inputs, use_cache=False):
        for layer, vector in zip(condition.layers, vectors, strict=True):
            point = embeddings(model) if layer == -1 else blocks(model)[layer]
            point.output = _changed(point.output, vector, condition.operation, steered)
        after = save(model.lm.output.logits[0, -1].float())
    return after


def generate(model, text, condition, max_new_tokens):
    """Greedy token ids up to the stop token, why it ended, and the gap of the two top logits at every step."""
    prompt = encode(model, [text])["input_ids"][0].tolist()
    said, gaps = [], []
    for _ in range(max_new_tokens):
        top = logits(model, prompt + said, condition, len(prompt)).topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        token = int(top.indices[0])
        if token in model.stop_ids:
            return tuple(said), "stop", gaps
        said.append(token)
    return tuple(said), "length", gaps


def reference_nll(model, text, ids, condition):
    """Mean NLL of completion tokens after the first 8 under a condition (unsteered: the reference); NaN for none."""
    prompt, costs = encode(model, [text])["input_ids"][0].tolist(), []
    for place in range(8, len(ids)):
        scored = torch.log_softmax(logits(model, [*prompt, *ids[:place]], condition, len(prompt)).double(), -1)
        costs.append(-float(scored[ids[place]]))
    return sum(costs) / len(costs) if costs else float("nan")
