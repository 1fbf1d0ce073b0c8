"""Steering: what a model says, or how it would begin, under many conditions at once.

Prompts and conditions go in; completions or first-token readings come out, a list for each prompt with an entry for
each condition. What the rows can share is the engine's business; no part of a result depends on it but rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from refusal import engine
from refusal.conditions import EMBEDDINGS, MAX_ALPHA, Condition, ablate, add, baseline, sampled
from refusal.files import CompendiumError, progress, sha256_text
from refusal.models import Model

__all__ = ["EMBEDDINGS", "MAX_ALPHA", "Completion", "Condition", "ablate", "add", "baseline", "first_token"]
__all__ += ["generate", "sampled", "screen"]

NLL_SKIP = 8
BLOCK = 512  # tokens of the vocabulary
PROMPTS = 64  # of first-token readings, at once
ROWS = 512  # the same, prompts x conditions


@dataclass(frozen=True)
class Completion:
    """The generated tokens of one prompt under one condition.

    Attributes:
        token_ids: Without prompt, stop token and padding.
        text: The same, decoded without special tokens.
        stop_reason: "stop" (the model ended it) or "length".
        reference_nll: Negative log-likelihood per token (nats) under the *unsteered* model, given the prompt, first 8
            tokens skipped: how an answer opens is what steering is meant to change (analysis plan). NaN where there are
            no more, or where it was not asked for.
    """

    token_ids: tuple[int, ...]
    text: str
    stop_reason: str
    reference_nll: float = float("nan")


@dataclass
class _Rows:
    """The rows of a branch that still run: `row` holds their numbers among all rows."""

    row: torch.Tensor
    branch: engine.Branch


def generate(
    model: Model, prompts: Sequence[str], conditions: Sequence[Condition], *, max_new_tokens: int, score: bool = True
) -> list[list[Completion]]:
    """Completions of every prompt under every condition, all rows in one batch.

    Args:
        model: The model.
        prompts: Without chat template.
        conditions: One or more.
        max_new_tokens: Completions end here, or at the model's stop tokens.
        score: Whether the reference NLL is wanted; it costs the trunk's layers above the steered one, and its logits.

    Returns:
        A list for each prompt, with a completion for each condition.
    """
    if not prompts or not conditions:
        return [[] for _ in prompts]
    with torch.no_grad():
        batch = engine.encode(model, prompts, room=max_new_tokens)
        tokens, nll = _decode(model, batch, [prompts[i] for i in batch.order], conditions, max_new_tokens, score)
    made: list[list[Completion]] = [[] for _ in prompts]
    for number, (ids, values) in enumerate(zip(tokens, nll, strict=True)):
        made[batch.order[number // len(conditions)]].append(_completion(model, ids, values))
    return made


def _decode(
    model: Model,
    batch: engine.Prompts,
    texts: Sequence[str],
    conditions: Sequence[Condition],
    steps: int,
    score: bool,
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and their reference NLL, row by row (prompts in the batch's order), the stop token included."""
    count, many = len(texts), len(conditions)
    whole = score or any(condition.first is None for condition in conditions)  # whether the trunk's logits are needed
    branches: list[_Rows] = []
    groups = _groups(model, conditions)
    trunk = engine.start_trunk(model, batch, *_taps(model, groups, whole), room=steps)
    node = torch.arange(count, device=model.device).repeat_interleave(many)  # each row's row of the trunk
    for group in groups:
        row = (torch.arange(count, device=model.device)[:, None] * many + group.own).flatten()
        which = torch.arange(len(group.own), device=model.device).repeat(count)
        branch = engine.start_branch(model, trunk, group.first, group.edits.of(which), node[row], room=steps)
        branches.append(_Rows(row, branch))
    valid, last = batch.valid, trunk.last
    plain = torch.tensor([condition.first is None for condition in conditions], device=model.device).repeat(count)
    uniform = _uniforms(texts, conditions, steps).to(model.device)
    stop = torch.tensor(model.stop_ids, device=model.device)
    running = torch.ones(count * many, dtype=torch.bool, device=model.device)
    token = torch.zeros(count * many, dtype=torch.int64, device=model.device)
    tokens: list[list[int]] = [[] for _ in range(len(running))]
    nll: list[list[float]] = [[] for _ in range(len(running))]
    scratch = _scratch(model)
    for number in range(steps):
        for rows in branches:
            token[rows.row] = _branch_tokens(model, rows.branch.last, uniform[rows.row, number], scratch)
        cost = torch.full(token.shape, torch.nan, device=model.device)
        scored = score and number >= NLL_SKIP  # what comes before is not counted
        if last is not None and (scored or bool(plain.any())):
            _trunk_tokens(
                model, last, node, running, plain, uniform[:, number], token, cost if scored else None, scratch
            )
        who = torch.nonzero(running)[:, 0]
        for row, one, value in zip(*(x.tolist() for x in (who, token[who], cost[who])), strict=True):
            tokens[row].append(one)
            nll[row].append(value)
        running &= ~torch.isin(token, stop)
        if number == steps - 1 or not bool(running.any()):
            break
        parents, said = _divide(node, token, running)
        valid = torch.cat([valid[parents], valid.new_ones(len(parents), 1)], dim=1)
        states = None
        if trunk.top != EMBEDDINGS:
            trunk.keys.select(parents)
            states, last = engine.step(model, trunk.keys, said, valid, top=trunk.top, taps=trunk.taps)
        for rows in branches:
            _advance(model, rows, running, token, node, valid, trunk, states)
        branches = [rows for rows in branches if len(rows.row)]
    return tokens, nll


@dataclass(frozen=True)
class _Group:
    """Conditions that leave the trunk at the same layer: which they are, and their tables."""

    first: int
    own: torch.Tensor
    edits: engine.Edits


def _groups(model: Model, conditions: Sequence[Condition]) -> list[_Group]:
    """The groups of the steered conditions, from the lowest layer on; unsteered ones belong to none."""
    groups = []
    for first in sorted({condition.first for condition in conditions if condition.first is not None}):
        own = [number for number, condition in enumerate(conditions) if condition.first == first]
        edits = engine.edits_of(model, [conditions[number] for number in own])
        groups.append(_Group(first, torch.tensor(own, device=model.device), edits))
    return groups


def _taps(model: Model, groups: Sequence[_Group], whole: bool) -> tuple[list[int], int]:
    """The layers at which branches leave the trunk, and the last layer that the trunk runs."""
    taps = [group.first for group in groups if group.first != EMBEDDINGS]
    return taps, model.n_layers - 1 if whole else max(taps, default=EMBEDDINGS)


def _divide(node: torch.Tensor, token: torch.Tensor, running: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the running rows (in place) to the nodes of what they have now said.

    Returns:
        For each new node, the old one that it continues, and the token that it adds.
    """
    both, inverse = ((node[running] << 32) + token[running]).unique(return_inverse=True)
    order = _in_place(both >> 32)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    node[running] = place[inverse]
    return both[order] >> 32, both[order] & (2**32 - 1)


def _in_place(parents: torch.Tensor) -> torch.Tensor:
    """An order of rows in which as many as possible take the place of their parent, so that they need not be copied."""
    old = parents.cpu().numpy()
    order = np.full(len(old), -1)
    places, heirs = np.unique(old, return_index=True)
    kept = places < len(old)
    order[places[kept]] = heirs[kept]
    order[order < 0] = np.setdiff1d(np.arange(len(old)), heirs[kept])
    return torch.from_numpy(order).to(parents.device)


def _advance(
    model: Model,
    rows: _Rows,
    running: torch.Tensor,
    token: torch.Tensor,
    node: torch.Tensor,
    valid: torch.Tensor,
    trunk: engine.Trunk,
    states: torch.Tensor | None,
) -> None:
    """Lets ended rows leave a branch, and runs the others' new tokens."""
    branch, left = rows.branch, torch.nonzero(running[rows.row])[:, 0]
    left = left[_in_place(left)]
    rows.row, branch.edits = rows.row[left], branch.edits.of(left)
    if not len(left):
        return
    branch.keys.select(left)
    nodes = node[rows.row]
    entering = (
        states[trunk.taps.index(branch.first), nodes] if branch.first != EMBEDDINGS and states is not None else None
    )
    _, ends = engine.step(
        model, branch.keys, token[rows.row], valid[nodes], top=model.n_layers - 1, edits=branch.edits,
        first=branch.first, entering=entering,
    )  # fmt: skip
    assert ends is not None
    branch.last = ends


def _uniforms(texts: Sequence[str], conditions: Sequence[Condition], steps: int) -> torch.Tensor:
    """The random numbers that decide each row's tokens, float64 `[rows, steps]`; NaN for rows that decode greedily.

    They depend on the row's seed and prompt alone. Transformers samples a batch from one global stream, so that a row's
    tokens would depend on its neighbours.
    """
    rows = [(condition.seed, text) for text in texts for condition in conditions]
    drawn = torch.full((len(rows), steps), torch.nan, dtype=torch.float64)
    for index, (seed, text) in enumerate(rows):
        if seed is not None:
            generator = torch.Generator().manual_seed(int(sha256_text(f"{seed}|{text}")[:15], 16))
            drawn[index] = torch.rand(steps, generator=generator, dtype=torch.float64)
    return drawn


def _branch_tokens(model: Model, last: torch.Tensor, uniform: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The next token of each row of a branch: the likeliest, or a sampled one."""
    token = torch.empty(len(last), dtype=torch.int64, device=last.device)
    for part, logits in engine.logits(model, last):
        token[part] = logits.max(-1).indices
        drawn = torch.nonzero(~uniform[part].isnan())[:, 0]
        if len(drawn):
            weights, _ = _weights(logits[drawn], scratch)
            token[part][drawn] = _sample(weights, range(len(drawn)), uniform[part][drawn])
    return token


def _trunk_tokens(
    model: Model,
    last: torch.Tensor,
    node: torch.Tensor,
    running: torch.Tensor,
    plain: torch.Tensor,
    uniform: torch.Tensor,
    token: torch.Tensor,
    cost: torch.Tensor | None,
    scratch: torch.Tensor,
) -> None:
    """Writes the next token of each unsteered row into `token`, and every row's cost (its token's NLL) into `cost`."""
    for part, logits in engine.logits(model, last):
        row = torch.nonzero(running & (node >= part.start) & (node < part.stop))[:, 0]
        local, own = node[row] - part.start, plain[row]
        token[row[own]] = logits.max(-1).indices[local[own]]
        drawn = own & ~uniform[row].isnan()
        if cost is None and not bool(drawn.any()):
            continue
        weights, lse = _weights(logits, scratch)
        if bool(drawn.any()):
            token[row[drawn]] = _sample(weights, local[drawn].tolist(), uniform[row[drawn]])
        if cost is not None:
            cost[row] = lse[local] - logits[local, token[row]].float()


def _scratch(model: Model) -> torch.Tensor:
    """Memory for a block of weights, which is used again: new memory costs more than what is computed in it."""
    width = model.hf.lm_head.out_features
    return torch.empty(engine.HEAD_ROWS, width + -width % BLOCK, device=model.device)


def _weights(logits: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`exp(logits - max)` in float32, by blocks of the vocabulary, `[rows, blocks, 512]`; and logsumexp `[rows]`."""
    weights = scratch[: len(logits)]
    weights[:, : logits.shape[1]] = logits
    weights[:, logits.shape[1] :] = -torch.inf
    largest = weights.amax(-1, keepdim=True)
    weights = weights.sub_(largest).exp_().unflatten(-1, (-1, BLOCK))
    return weights, largest[:, 0] + weights.sum((1, 2)).log()


def _sample(weights: torch.Tensor, rows: Sequence[int], uniform: torch.Tensor) -> torch.Tensor:
    """Tokens by inversion of the CDF, which is summed over blocks first: whole, it costs as much as a layer."""
    token = []
    for row, one in zip(rows, uniform, strict=True):
        edges = weights[row].sum(-1).cumsum(0, dtype=torch.float64)
        target = one * edges[-1]
        block = int(torch.searchsorted(edges, target, right=True).clamp(max=len(edges) - 1))
        inside = weights[row, block].cumsum(0, dtype=torch.float64)
        # The sums of blocks and inside a block round differently; beyond the last edge lies no token.
        rest = torch.minimum(target - (edges[block - 1] if block else 0.0), inside[-1] * (1 - 1e-12))
        token.append(block * BLOCK + int(torch.searchsorted(inside, rest, right=True).clamp(max=BLOCK - 1)))
    return torch.tensor(token, device=uniform.device)


def _completion(model: Model, ids: Sequence[int], costs: Sequence[float]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in model.stop_ids), None)
    kept = list(ids if end is None else ids[:end])
    text = str(model.tokenizer.decode(kept, skip_special_tokens=True))
    counted = costs[NLL_SKIP : len(kept)]
    nll = sum(counted) / len(counted) if counted else float("nan")
    return Completion(tuple(kept), text, "length" if end is None else "stop", nll)


def first_token(
    model: Model,
    prompts: Sequence[str],
    conditions: Sequence[Condition],
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    title: str = "first token",
) -> torch.Tensor:
    """A number from the distribution of the first generated token, for every prompt under every condition.

    One pass of the unsteered model over the prompts serves all conditions at all layers.

    Args:
        model: The model.
        prompts: n prompts, without chat template.
        conditions: m conditions.
        read: Makes numbers `[rows]` of float32 logits `[rows, vocabulary]` and the rows' prompts, int64 `[rows]`.
        title: Of the progress bar.

    Returns:
        float32 `[n, m]`, on the CPU.
    """
    values = torch.full((len(prompts), len(conditions)), torch.nan)
    groups = _groups(model, conditions)
    plain = [number for number, condition in enumerate(conditions) if condition.first is None]
    with progress(values.numel(), title, "row") as bar, torch.no_grad():
        for start in range(0, len(prompts), PROMPTS):
            batch = engine.encode(model, prompts[start : start + PROMPTS])
            number = torch.tensor(batch.order, device=model.device) + start
            trunk = engine.start_trunk(model, batch, *_taps(model, groups, bool(plain)))
            if trunk.last is not None and plain:
                for part, logits in engine.logits(model, trunk.last):
                    values[number[part, None].cpu(), plain] = read(logits.float(), number[part])[:, None].cpu()
                bar.update(len(number) * len(plain))
            for group in groups:
                for some in torch.arange(len(group.own), device=model.device).split(max(1, ROWS // len(number))):
                    node = torch.arange(len(number), device=model.device).repeat_interleave(len(some))
                    which = some.repeat(len(number))
                    branch = engine.start_branch(model, trunk, group.first, group.edits.of(which), node)
                    for part, logits in engine.logits(model, branch.last):
                        prompt = number[node[part]]
                        values[prompt.cpu(), group.own[which[part]].cpu()] = read(logits.float(), prompt).cpu()
                    bar.update(len(which))
    return values


def screen(
    model: Model, prompts: Sequence[str], conditions: Sequence[Condition], openings: Sequence[int]
) -> torch.Tensor:
    """Log-odds of a refusal opening at the first generated token (methods: the screen).

    Args:
        model: The model.
        prompts: n prompts, without chat template.
        conditions: m conditions.
        openings: Token ids with which the model's own refusals open.

    Returns:
        float32 `[n, m]`: `log p - log(1 - p)`, p the summed probability of the openings.

    Raises:
        CompendiumError: No openings.
    """
    if not openings:
        raise CompendiumError("the model has no refusal openings, so there is nothing to screen for.")

    def log_odds(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        opening = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        opening[list(openings)] = True
        return logits[:, opening].logsumexp(-1) - logits.masked_fill(opening, -torch.inf).logsumexp(-1)

    return first_token(model, prompts, conditions, log_odds, "screen")
