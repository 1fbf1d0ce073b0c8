"""Steering: add or ablate directions in the residual stream, and generate under many conditions at once.

Prompts and conditions go in, completions come out. Every (prompt, condition) pair is a row of one batch, and each row
carries its own vectors, so that all conditions share the forward passes. The prompts' common beginning is computed once
a condition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import save

from refusal import prefixes
from refusal.directions import Directions
from refusal.files import CompendiumError, progress, sha256_text
from refusal.models import Model, blocks, embeddings

EMBEDDINGS = -1
NLL_SKIP = 8
LEAVE = 8  # ended rows leave the batch once they are an eighth of it: each time, all keys and values are copied
MAX_ALPHA = 100.0
BLOCK = 512  # tokens of the vocabulary


@dataclass(frozen=True, eq=False)
class Condition:
    """One named intervention.

    Attributes:
        name: What the record calls it.
        operation: "none", "add" (`h + alpha * raw_norm * u`) or "ablate" (`h - (h.u) u`).
        direction_id: Which direction, "" for none.
        layers: Layers l whose output is changed; -1 stands for the embeddings.
        alpha: Coefficient in units of raw_norm; 0 where nothing is added.
        vectors: float32 `[len(layers), width]`: what is added (alpha and norm already in it), or the unit vectors to
            ablate.
        alpha_absolute: alpha x raw_norm of the first layer, in activation units.
        alpha_relative: alpha_absolute / mean residual norm of that layer.
        position: "all": every token of the prompt and of the completion; "last": the last prompt token and every
            generated token (the variant of the original study's code).
        seed: None decodes greedily; a number samples at temperature 1 with this seed.
    """

    name: str
    operation: str = "none"
    direction_id: str = ""
    layers: tuple[int, ...] = ()
    alpha: float = 0.0
    vectors: torch.Tensor | None = None
    alpha_absolute: float = 0.0
    alpha_relative: float = 0.0
    position: str = "all"
    seed: int | None = None

    def key(self) -> str:
        """A hash of everything that decides tokens."""
        vectors = "" if self.vectors is None else sha256_text(self.vectors.numpy().tobytes().hex())
        return sha256_text(f"{self.operation}|{self.layers}|{self.position}|{self.seed}|{vectors}")


@dataclass(frozen=True)
class Completion:
    """The generated tokens of one prompt under one condition.

    Attributes:
        token_ids: Without prompt, stop token and padding.
        text: The same, decoded without special tokens.
        stop_reason: "stop" (the model ended it) or "length".
        own_nll: Negative log-likelihood per token under the model as it generated them, first 8 skipped; NaN where
            there are no more. Without an intervention this is the reference NLL.
    """

    token_ids: tuple[int, ...]
    text: str
    stop_reason: str
    own_nll: float = float("nan")


def baseline() -> Condition:
    """No intervention, greedy."""
    return Condition("baseline")


def sampled(seed: int) -> Condition:
    """No intervention, sampled at temperature 1."""
    return Condition(f"sampled[{seed}]", seed=seed)


def add(directions: Directions, layer: int | Sequence[int], alpha: float, position: str = "all") -> Condition:
    """Adds `alpha` mean differences at the output of one or several layers.

    Args:
        directions: Where the vectors come from; each layer gets its own vector.
        layer: A layer, or several.
        alpha: In units of raw_norm: 1 adds exactly one mean difference.
        position: "all" or "last".

    Raises:
        CompendiumError: A layer, alpha or position out of range.
    """
    layers = _checked_layers(directions, layer)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
        raise CompendiumError(f"alpha is {alpha!r}, but must be a number between -{MAX_ALPHA:g} and {MAX_ALPHA:g}.")
    if position not in ("all", "last"):
        raise CompendiumError(f"position is {position!r}, but must be 'all' or 'last'.")
    index = list(layers)
    absolute = float(alpha * directions.raw_norm[index[0]])
    return Condition(
        f"{directions.id} {alpha:+g}",
        "add",
        directions.id,
        layers,
        float(alpha),
        alpha * directions.raw_norm[index, None] * directions.unit[index],
        absolute,
        absolute / float(directions.residual_norm[index[0]]),
        position,
    )


def ablate(directions: Directions, layer: int) -> Condition:
    """Removes the direction of one layer everywhere: at the embeddings and at every block's output.

    After Arditi et al. (2024), section 2.4, equation 4, with the selected layer's direction throughout. They also
    ablate in mid-block, after attention; here the unit is the block, as for everything else that is steered.
    """
    (layer,) = _checked_layers(directions, layer)
    layers = (EMBEDDINGS, *range(len(directions.unit)))
    vectors = directions.unit[layer].expand(len(layers), -1).clone()
    return Condition(f"ablate {directions.id}", "ablate", directions.id, layers, vectors=vectors)


def _checked_layers(directions: Directions, layer: int | Sequence[int]) -> tuple[int, ...]:
    layers = tuple(layer) if isinstance(layer, Sequence) else (layer,)
    for one in layers:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < len(directions.unit):
            raise CompendiumError(f"layer is {one!r}, but must be a whole number from 0 to {len(directions.unit) - 1}.")
    if not layers or len(set(layers)) != len(layers):
        raise CompendiumError(f"the layers {layers} must be one or more different layers.")
    return layers


@dataclass(frozen=True)
class _Edits:
    """What happens to a batch: for each layer, a vector a row to add and a unit vector a row to ablate (or zeros)."""

    added: dict[int, torch.Tensor]
    ablated: dict[int, torch.Tensor]
    prompt_mask: torch.Tensor  # bool [rows, prompt tokens]: which of the prompt's tokens are steered

    @property
    def layers(self) -> list[int]:
        return sorted(self.added.keys() | self.ablated.keys())

    def of_rows(self, rows: torch.Tensor) -> "_Edits":
        """The same for some of the rows."""
        added, ablated = ({k: v[rows] for k, v in table.items()} for table in (self.added, self.ablated))
        return _Edits(added, ablated, self.prompt_mask[rows])

    def apply(self, hidden: torch.Tensor, layer: int, cached: bool) -> torch.Tensor:
        """The steered hidden state, `[rows, tokens, width]`."""
        mask = self.prompt_mask
        if cached:
            mask = mask.new_ones(len(hidden), hidden.shape[1])
        elif hidden.shape[1] > mask.shape[1]:  # without a cache, every step sees prompt and completion again
            mask = torch.cat([mask, mask.new_ones(len(hidden), hidden.shape[1] - mask.shape[1])], dim=1)
        mask = mask[:, :, None]
        if layer in self.ablated:
            unit = self.ablated[layer]
            shadow = (hidden.float() * unit).sum(-1, keepdim=True) * unit
            hidden = hidden - (shadow * mask).to(hidden.dtype)
        if layer in self.added:
            hidden = hidden + (self.added[layer] * mask).to(hidden.dtype)
        return hidden


def _edits(
    conditions: Sequence[Condition], attention_mask: torch.Tensor, width: int, last_column: bool = True
) -> _Edits:
    """What a batch needs; `last_column` says whether its last column holds the prompts' last tokens."""
    tables: dict[str, dict[int, torch.Tensor]] = {"add": {}, "ablate": {}}
    mask = attention_mask.bool().clone()
    for row, condition in enumerate(conditions):
        if condition.position == "last":
            mask[row, : -1 if last_column else None] = False
        if condition.vectors is None:
            continue
        if condition.vectors.shape != (len(condition.layers), width):
            raise CompendiumError(
                f"condition {condition.name!r} has vectors of shape {tuple(condition.vectors.shape)}, but the model "
                f"needs {(len(condition.layers), width)}: use a direction made for this model."
            )
        for layer, vector in zip(condition.layers, condition.vectors, strict=True):
            table = tables[condition.operation]
            if layer not in table:
                table[layer] = torch.zeros(len(conditions), 1, width)
            table[layer][row, 0] = vector
    added, ablated = ({k: v.to(mask.device) for k, v in tables[name].items()} for name in ("add", "ablate"))
    return _Edits(added, ablated, mask)


def _point(model: Model, layer: int) -> Any:  # noqa: ANN401 - nnsight's envoys are untyped
    return embeddings(model) if layer == EMBEDDINGS else blocks(model)[layer]


def _uniforms(rows: Sequence[Condition], texts: Sequence[str], steps: int) -> torch.Tensor:
    """The random numbers that decide each row's tokens, float64 `[rows, steps]`; NaN for rows that decode greedily.

    They depend on the row's seed and prompt alone. Transformers samples a batch from one global stream, so that a row's
    tokens would depend on its neighbours.
    """
    drawn = torch.full((len(rows), steps), torch.nan, dtype=torch.float64)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if row.seed is not None:
            generator = torch.Generator().manual_seed(int(sha256_text(f"{row.seed}|{text}")[:15], 16))
            drawn[index] = torch.rand(steps, generator=generator, dtype=torch.float64)
    return drawn


def _choose(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row, and its negative log-likelihood: the likeliest, or sampled by inverting the CDF.

    The CDF is summed over blocks of the vocabulary first, since it costs as much as a layer of the model otherwise.
    """
    largest, token = logits.max(-1)
    weights = (logits - largest[:, None]).exp_()
    blocks_ = torch.nn.functional.pad(weights, (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
    total = blocks_.sum(-1, dtype=torch.float64)
    for row in torch.nonzero(~uniform.isnan())[:, 0].tolist():
        edges = blocks_[row].cumsum(0, dtype=torch.float64)
        target = uniform[row] * edges[-1]
        block = int(torch.searchsorted(edges, target, right=True).clamp(max=len(edges) - 1))
        inside = weights[row, block * BLOCK : (block + 1) * BLOCK].cumsum(0, dtype=torch.float64)
        rest = target - (edges[block - 1] if block else 0.0)
        token[row] = block * BLOCK + int(torch.searchsorted(inside, rest, right=True).clamp(max=len(inside) - 1))
    return token, largest + total.log() - logits.gather(1, token[:, None])[:, 0]


def _forward(
    model: Model,
    inputs: dict[str, torch.Tensor],
    cache: Any,  # noqa: ANN401 - transformers' Cache
    edits: _Edits,
    *,
    cached: bool,
    use_cache: bool,
) -> tuple[torch.Tensor, Any]:
    """One steered forward pass: float32 logits `[rows, vocabulary]` at the last position, and keys and values."""
    with model.lm.trace(inputs, past_key_values=cache, use_cache=use_cache, logits_to_keep=1):
        for layer in edits.layers:
            point = _point(model, layer)
            point.output = edits.apply(point.output, layer, cached)
        logits = save(model.lm.lm_head.output[:, -1].float())
        kept = save(model.lm.output.past_key_values)
    return logits, kept


def _steered_cache(model: Model, prefix: torch.Tensor, rows: Sequence[Condition]) -> Any | None:  # noqa: ANN401
    """Keys and values of the prompts' common prefix for each row, computed once a condition."""
    if prefix.shape[1] == 0:
        return None
    different = list(dict.fromkeys(rows))
    inputs = {"input_ids": prefix.expand(len(different), -1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    edits = _edits(different, inputs["attention_mask"], model.width, last_column=False)
    _, cache = _forward(model, inputs, None, edits, cached=False, use_cache=True)
    assert cache is not None
    number = {condition: index for index, condition in enumerate(different)}
    cache.batch_select_indices(torch.tensor([number[row] for row in rows], device=prefix.device))
    return cache


def generate(
    model: Model,
    prompts: Sequence[str],
    conditions: Sequence[Condition],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    share: bool = True,
) -> list[list[Completion]]:
    """Completions of every prompt under every condition, all rows in one batch.

    Args:
        model: The model.
        prompts: Without chat template.
        conditions: One or more.
        max_new_tokens: Completions end here, or at the model's stop tokens.
        use_cache: Keep keys and values (False is a slow twin, for tests).
        share: Compute the prompts' common beginning once a condition (False is a slow twin, for tests).

    Returns:
        A list for each prompt, with a completion for each condition.
    """
    if not prompts or not conditions:
        return [[] for _ in prompts]
    texts = [text for text in prompts for _ in conditions]
    rows = [condition for _ in prompts for condition in conditions]
    with torch.no_grad():
        tokens, nll = _decode(model, texts, rows, max_new_tokens, use_cache, share and use_cache)
    flat = [_completion(model, ids, values) for ids, values in zip(tokens, nll, strict=True)]
    return [flat[start : start + len(conditions)] for start in range(0, len(flat), len(conditions))]


def _decode(
    model: Model, texts: Sequence[str], rows: Sequence[Condition], steps: int, use_cache: bool, share: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and their negative log-likelihoods, row by row, the stop token included."""
    prefix, whole = prefixes.batch(model, texts, share)
    mask = whole["attention_mask"]
    edits = _edits(rows, mask[:, prefix.shape[1] :], model.width)
    cache = _steered_cache(model, prefix, rows)
    uniforms = _uniforms(rows, texts, steps).to(mask.device)
    stop = torch.tensor(model.stop_ids, device=mask.device)
    inputs = prefixes.rest_of(whole, prefix.shape[1])
    running = torch.arange(len(rows), device=mask.device)  # which row of the whole each row of the batch is
    ended = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)
    tokens: list[list[int]] = [[] for _ in rows]
    nll: list[list[float]] = [[] for _ in rows]
    for step in range(steps):
        logits, cache = _forward(model, inputs, cache, edits, cached=use_cache and step > 0, use_cache=use_cache)
        token, cost = _choose(logits, uniforms[running, step])
        for row, done, one, value in zip(*(x.tolist() for x in (running, ended, token, cost)), strict=True):
            if not done:
                tokens[row].append(one)
                nll[row].append(value)
        ended = ended | torch.isin(token, stop)
        if bool(ended.all()):
            break
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
        seen = token[:, None] if use_cache else torch.cat([inputs["input_ids"], token[:, None]], dim=1)
        if int(ended.sum()) * LEAVE >= len(ended):
            left = torch.nonzero(~ended)[:, 0]
            running, ended, mask, seen, edits = running[left], ended[left], mask[left], seen[left], edits.of_rows(left)
            if use_cache:
                cache.batch_select_indices(left)
        inputs = {"input_ids": seen, "attention_mask": mask}
        inputs["position_ids"] = prefixes.positions(mask)[:, -seen.shape[1] :]
    return tokens, nll


def _completion(model: Model, ids: Sequence[int], nll: Sequence[float]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in model.stop_ids), None)
    kept = list(ids if end is None else ids[:end])
    text = str(model.tokenizer.decode(kept, skip_special_tokens=True))
    counted = nll[NLL_SKIP : len(kept)]
    own = sum(counted) / len(counted) if counted else float("nan")
    return Completion(tuple(kept), text, "length" if end is None else "stop", own)


def _batches(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def reference_nll(
    model: Model, prompts: Sequence[str], completions: Sequence[Sequence[int]], rows: int = 16
) -> list[float]:
    """Negative log-likelihood per token of completions under the unsteered model, given the prompt.

    The first 8 tokens are skipped: how an answer opens is what steering is meant to change (analysis plan, section 4).

    Args:
        model: The model; no condition applies.
        prompts: n prompts, without chat template.
        completions: n lists of token ids.
        rows: Rows a forward pass; no part of the result depends on it but rounding.

    Returns:
        n values in nats per token; NaN where a completion has 8 tokens or fewer.
    """
    values = [float("nan")] * len(prompts)
    wanted = [i for i, ids in enumerate(completions) if len(ids) > NLL_SKIP]
    wanted.sort(key=lambda i: len(completions[i]))
    pad = model.tokenizer.pad_token_id
    with progress(len(wanted), "reference NLL", "row") as bar, torch.no_grad():
        for part in _batches(len(wanted), rows):
            chosen = wanted[part]
            prefix, inputs = prefixes.batch(model, [prompts[i] for i in chosen])
            longest = max(len(completions[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), pad)
            valid = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(completions[i])] = torch.tensor(completions[i])
                valid[row, : len(completions[i])] = 1
            ids, valid = ids.to(model.device), valid.to(model.device)
            inputs = {name: torch.cat([inputs[name], end], dim=1)
                      for name, end in (("input_ids", ids), ("attention_mask", valid))}  # fmt: skip
            output = model.hf(
                **prefixes.rest_of(inputs, prefix.shape[1]),
                past_key_values=prefixes.unsteered_cache(model, prefix, len(chosen)),
                logits_to_keep=longest + 1,
            )
            logits = output.logits[:, :-1].float()
            # Along the vocabulary, which is contiguous: cross_entropy wants it in the middle, and is slow there.
            nll = logits.logsumexp(-1) - logits.gather(2, ids[:, :, None])[:, :, 0]
            counted = valid[:, NLL_SKIP:]
            mean = (nll[:, NLL_SKIP:] * counted).sum(1) / counted.sum(1)
            for i, value in zip(chosen, mean.tolist(), strict=True):
                values[i] = value
            bar.update(len(chosen))
    return values


def screen(
    model: Model, prompts: Sequence[str], conditions: Sequence[Condition], openings: Sequence[int], rows: int = 32
) -> torch.Tensor:
    """Log-odds of a refusal opening at the first generated token, from one forward pass a row.

    Args:
        model: The model.
        prompts: n prompts, without chat template.
        conditions: m conditions.
        openings: Token ids with which the model's own refusals open.
        rows: Rows a forward pass.

    Returns:
        float32 `[n, m]`: `log p - log(1 - p)`, p the summed probability of the openings.
    """
    if not openings:
        raise CompendiumError("the model has no refusal openings, so there is nothing to screen for.")
    # Condition by condition, so that few conditions meet in a batch and their prefixes are shared by many rows.
    texts = [text for _ in conditions for text in prompts]
    each = [condition for condition in conditions for _ in prompts]
    values = []
    with progress(len(texts), "screen", "row") as bar, torch.no_grad():
        for part in _batches(len(texts), rows):
            prefix, inputs = prefixes.batch(model, texts[part])
            length = prefix.shape[1]
            edits = _edits(each[part], inputs["attention_mask"][:, length:], model.width)
            cache = _steered_cache(model, prefix, each[part])
            logits, _ = _forward(
                model, prefixes.rest_of(inputs, length), cache, edits, cached=False, use_cache=cache is not None
            )
            opening = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            opening[list(openings)] = True
            values.append(logits[:, opening].logsumexp(-1) - logits[:, ~opening].logsumexp(-1))
            bar.update(len(logits))
    return torch.cat(values).cpu().reshape(len(conditions), len(prompts)).T.contiguous()
