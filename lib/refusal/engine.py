"""The steering engine: passes through parts of a model, for many rows at once, that share what they can.

Steering the output of layer f leaves every layer up to f a function of the tokens alone. So the model is run in two
parts. The *trunk* is unsteered: one row for each different beginning that any condition has produced of a prompt (a
node), through the layers up to f, or through all layers where its logits are wanted (unsteered rows take their tokens
from it, and every row's reference NLL is read off it). A *branch* is steered: one row for each prompt and condition,
through the layers above f only. Conditions that say the same keep sharing a node, which is most of a refusal; where
they part, the node divides.

What else is shared or saved, and what the profile said (two cores, bfloat16, 0.5B):

- The prompts' common beginning is computed once in the trunk and once a condition in a branch (a prompt is 45 tokens
  there, of which 22 are its own).
- Prompts are sorted by length and run in passes of a few hundred tokens, whose intermediate results stay in the
  processor's cache; decoding runs all rows in one pass a part, since the weights are read once a pass.
- Keys and values lie in buffers that are as wide as the completions can get: a step writes one column, and rows that
  end, part or move copy only themselves (all are copied where the trunk outgrows its buffers).
- The vocabulary is multiplied in blocks of 96 rows: logits of 960 rows would be 583 MB in float32. `max` finds the
  token in a quarter of the time of `argmax`.
- In the last layer, the MLP of a prompt runs for the last token only, since no other is read. The slice is copied: for
  a strided one torch multiplies in a batch, and copies the whole weight once a row.
- A pass through nnsight costs a few milliseconds more than one without; a decoding step takes a second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import save
from transformers.cache_utils import Cache, CacheLayerMixin

from refusal import prefixes
from refusal.conditions import EMBEDDINGS, Condition
from refusal.files import CompendiumError
from refusal.models import Model, blocks, embeddings

PASS_TOKENS = 512
HEAD_ROWS = 96


@dataclass
class _Extent:
    """Which part of the buffers a pass computes: these rows, and the columns after `length`."""

    rows: slice
    capacity: int
    width: int
    length: int = 0


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, `[capacity, heads, width, head width]`; unwritten columns are zero, and masked."""

    def __init__(self, extent: _Extent) -> None:
        super().__init__()
        self.extent = extent

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.buffers(key_states, value_states)

    def buffers(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, made at the first need for states like these."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                x.new_zeros(self.extent.capacity, x.shape[1], self.extent.width, x.shape[3])
                for x in (key_states, value_states)
            )
            self.is_initialized = True
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.buffers(key_states, value_states)
        rows, start = self.extent.rows, self.extent.length
        end = start + key_states.shape[2]
        keys[rows, :, start:end], values[rows, :, start:end] = key_states, value_states
        return keys[rows, :, :end], values[rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.extent.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.extent.length

    def get_max_length(self) -> int:
        return self.extent.width


class Keys(Cache):
    """A key-value cache that is written in place; layers that a pass leaves out take no memory."""

    def __init__(self, layers: int, rows: int, width: int) -> None:
        self.extent = _Extent(slice(0, rows), rows, width)
        self.own = [_Layer(self.extent) for _ in range(layers)]
        super().__init__(layers=list(self.own))

    def fill(self, beginning: "Keys", index: torch.Tensor) -> None:
        """Row i begins as row `index[i]` of another cache."""
        for own, layer in zip(self.own, beginning.own, strict=True):
            if layer.keys is None or layer.values is None:
                continue
            end = beginning.extent.length
            for buffer, source in zip(own.buffers(layer.keys, layer.values), (layer.keys, layer.values), strict=True):
                buffer[: len(index), :, :end] = source[index, :, :end]
        self.extent.length = beginning.extent.length

    def select(self, index: torch.Tensor) -> None:
        """Row i becomes what row `index[i]` was; rows that stay in their place are not touched."""
        extent, count = self.extent, len(index)
        moved = torch.nonzero(index != torch.arange(count, device=index.device))[:, 0]
        grown = extent.capacity if count <= extent.capacity else max(count, extent.capacity * 3 // 2)

        def moving(buffer: torch.Tensor) -> torch.Tensor:
            if grown > len(buffer):
                buffer = torch.cat([buffer, buffer.new_zeros(grown - len(buffer), *buffer.shape[1:])])
            buffer[moved, :, : extent.length] = buffer[index[moved], :, : extent.length]
            return buffer

        for layer in self.own:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = moving(layer.keys), moving(layer.values)
        extent.capacity, extent.rows = grown, slice(0, count)


@dataclass(frozen=True)
class Edits:
    """What happens to a batch: a table of vectors for each layer, and which of its rows each row of the batch takes."""

    added: dict[int, torch.Tensor]  # float32 [conditions, 1, width]
    ablated: dict[int, torch.Tensor]  # unit vectors, or zeros
    last_only: torch.Tensor  # bool [conditions]: of the prompt, steers the last token only
    row: torch.Tensor  # int64 [rows]

    @property
    def layers(self) -> set[int]:
        """The layers whose output changes."""
        return self.added.keys() | self.ablated.keys()

    def of(self, rows: torch.Tensor | slice) -> "Edits":
        """The same for some of the rows."""
        return Edits(self.added, self.ablated, self.last_only, self.row[rows])

    def prompt_mask(self, valid: torch.Tensor, last_column: bool) -> torch.Tensor:
        """Which tokens of the prompts are steered, bool `[rows, tokens]`: never padding."""
        mask = valid.clone()
        mask[self.last_only[self.row], : -1 if last_column else None] = False
        return mask

    def apply(self, hidden: torch.Tensor, layer: int, mask: torch.Tensor | None) -> torch.Tensor:
        """The steered hidden state, `[rows, tokens, width]`; without a mask, every token is steered."""
        steered = 1 if mask is None else mask[:, :, None]
        if layer in self.ablated:
            unit = self.ablated[layer][self.row]
            projection = (hidden.float() * unit).sum(-1, keepdim=True) * unit
            hidden = hidden - (projection * steered).to(hidden.dtype)
        if layer in self.added:
            hidden = hidden + (self.added[layer][self.row] * steered).to(hidden.dtype)
        return hidden


def edits_of(model: Model, conditions: Sequence[Condition]) -> Edits:
    """The tables of several conditions, a row for each.

    Raises:
        CompendiumError: Vectors of another width than the model's, or layers that it does not have.
    """
    tables: dict[str, dict[int, torch.Tensor]] = {"add": {}, "ablate": {}}
    for row, condition in enumerate(conditions):
        if condition.vectors is None:
            continue
        if condition.vectors.shape != (len(condition.layers), model.width):
            raise CompendiumError(
                f"condition {condition.name!r} has vectors of shape {tuple(condition.vectors.shape)}, but the model "
                f"needs {(len(condition.layers), model.width)}: use a direction made for this model."
            )
        last = max(condition.layers)
        everywhere = condition.operation == "ablate" and EMBEDDINGS in condition.layers
        if last >= model.n_layers or (everywhere and last != model.n_layers - 1):
            raise CompendiumError(
                f"condition {condition.name!r} reaches layer {last}, but the model's last layer is "
                f"{model.n_layers - 1}: use a direction made for this model."
            )
        for layer, vector in zip(condition.layers, condition.vectors, strict=True):
            table = tables[condition.operation]
            if layer not in table:
                table[layer] = torch.zeros(len(conditions), 1, model.width, device=model.device)
            table[layer][row, 0] = vector
    last_only = torch.tensor([condition.position == "last" for condition in conditions], device=model.device)
    return Edits(tables["add"], tables["ablate"], last_only, torch.arange(len(conditions), device=model.device))


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts. Columns: the common beginning, padding, the rest of each. Rows: the shortest rest first."""

    prefix: torch.Tensor  # int64 [1, p]
    ids: torch.Tensor  # int64 [n, p + longest rest]
    valid: torch.Tensor  # bool, the same shape: no padding
    order: list[int]  # which of the texts each row is

    @property
    def width(self) -> int:
        """Columns of the batch."""
        return self.ids.shape[1]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens a prompt."""
        return self.valid.sum(1)


def encode(model: Model, texts: Sequence[str], room: int = 0, share: bool = True) -> Prompts:
    """Encodes prompts for the engine.

    Args:
        model: The model.
        texts: Prompts, without chat template.
        room: How many tokens will follow.
        share: Whether the common beginning is moved to the front (False is a twin, for tests).
    """
    prefix, whole = prefixes.batch(model, texts, share)
    window = getattr(model.hf.config, "sliding_window", None)
    if share and window and whole["input_ids"].shape[1] + room >= window:
        # Windows are counted in columns: the padding in mid-row would push a short prompt's beginning out.
        prefix, whole = prefixes.batch(model, texts, share=False)
    order = whole["attention_mask"].sum(1).argsort(stable=True)
    ids, valid = whole["input_ids"][order], whole["attention_mask"][order].bool()
    return Prompts(prefix, ids, valid, order.tolist())


def parts(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Consecutive rows (of rising length) whose tokens fit one pass, and the length of the longest."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while end < len(lengths) and lengths[end] * (end + 1 - start) <= PASS_TOKENS:
            end += 1
        yield slice(start, end), lengths[end - 1]
        start = end


def _inputs(ids: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """A pass's inputs: the last columns, of rows whose columns so far are `valid`."""
    positions = prefixes.positions(valid)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": valid, "position_ids": positions}


def run(
    model: Model,
    keys: Keys,
    inputs: dict[str, torch.Tensor],
    *,
    top: int,
    taps: Sequence[int] = (),
    edits: Edits | None = None,
    mask: torch.Tensor | None = None,
    first: int = EMBEDDINGS,
    entering: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One pass through the layers above `first` up to `top`.

    Args:
        model: The model.
        keys: Its cache, whose extent says which rows and columns are computed; it moves on by the pass's tokens.
        inputs: `input_ids`, `attention_mask`, `position_ids`.
        top: The last layer that is run; the last one of the model also runs the final norm.
        taps: Layers whose output is returned.
        edits: What is added and ablated at the layers that are run.
        mask: Which tokens are steered; None for all.
        first: The layer whose output `entering` is; -1 to enter with the tokens.
        entering: `[rows, tokens, width]`, before its own layer's edit.

    Returns:
        The taps `[taps, rows, tokens, width]` (at the model's last layer, only the last token's is right) and, from
        that layer, the normed state of the last token `[rows, width]`; None for what was not asked for.
    """
    every, end = blocks(model), model.n_layers - 1
    changed = edits.layers if edits is not None else set()
    tapped = last = None
    several = inputs["input_ids"].shape[1] > 1

    def edit(hidden: torch.Tensor, layer: int) -> torch.Tensor:
        return edits.apply(hidden, layer, mask) if edits is not None and layer in changed else hidden

    if entering is not None:
        entering = edit(entering, first)
    with model.lm.trace(inputs, past_key_values=keys, use_cache=True, logits_to_keep=1):
        if entering is None and EMBEDDINGS in changed:
            embeddings(model).output = edit(embeddings(model).output, EMBEDDINGS)
        out: Any = entering
        kept = []
        for layer in range(len(every)):
            if entering is not None and layer <= first:
                every[layer].skip(entering)
            elif layer > top:
                every[layer].skip(out)
            else:
                if layer == end and several:  # only the last token of the last layer is read
                    states = every[end].mlp.input
                    every[end].mlp.input = states[:, -1].clone()[:, None]  # not strided: see above
                    states = torch.zeros_like(states)
                    states[:, -1:] = every[end].mlp.output
                    every[end].mlp.output = states
                if layer in changed:
                    every[layer].output = edit(every[layer].output, layer)
                if layer == top or layer in taps:
                    out = every[layer].output
                if layer in taps:
                    kept.append(out)
        if kept:
            tapped = save(torch.stack(kept))
        if top == end:
            last = save(model.lm.model.norm.output[:, -1].clone())
        else:
            model.lm.model.norm.skip(out)
        model.lm.lm_head.skip(out[:, -1:])  # the vocabulary is multiplied in `logits`, where it is needed
    keys.extent.length += inputs["input_ids"].shape[1]
    return tapped, last


@dataclass
class Trunk:
    """The unsteered part of a batch, after the prompts.

    Attributes:
        prompts: What it was made from; row i of everything here is row i of these.
        keys: Keys and values of the layers up to `top`.
        top: The last layer that it runs.
        taps: Layers at which branches leave it.
        beginning: Their states in the common beginning, `[taps, 1, p, width]`; see `run` for the model's last layer.
        rest: The same in the rest of the prompts, `[taps, n, rest, width]`, or in each prompt's last token only.
        last: The normed state of each prompt's last token, `[n, width]`, where the trunk runs all layers.
    """

    prompts: Prompts
    keys: Keys
    top: int
    taps: list[int]
    beginning: torch.Tensor
    rest: torch.Tensor
    last: torch.Tensor | None


@dataclass
class Branch:
    """The steered rows that leave the trunk at one layer, after the prompts.

    Attributes:
        first: That layer.
        edits: What happens to the rows.
        keys: Keys and values of the layers above.
        last: The normed state of each row's last token, `[rows, width]`.
    """

    first: int
    edits: Edits
    keys: Keys
    last: torch.Tensor


def start_trunk(
    model: Model, prompts: Prompts, taps: Sequence[int], top: int, room: int = 0, last_only: bool = False
) -> Trunk:
    """Runs the prompts through the layers up to `top`.

    Args:
        model: The model.
        prompts: The prompts.
        taps: Layers whose states are kept.
        top: The last layer that is run, -1 for none.
        room: How many more tokens there must be room for.
        last_only: Keep the states of each prompt's last token only; no branch can leave such a trunk.
    """
    count, begun, dtype = len(prompts.ids), prompts.prefix.shape[1], model.hf.dtype
    keys = Keys(model.n_layers, count, prompts.width + room)
    columns = 1 if last_only else prompts.width - begun
    rest = torch.zeros(len(taps), count, columns, model.width, dtype=dtype, device=model.device)
    beginning = rest[:, :1, :0]
    last = torch.zeros(count, model.width, dtype=dtype, device=model.device) if top == model.n_layers - 1 else None
    if top == EMBEDDINGS:  # nothing is unsteered
        return Trunk(prompts, keys, top, list(taps), beginning, rest, last)
    if begun:
        once = Keys(model.n_layers, 1, begun)
        tapped, _ = run(model, once, _inputs(prompts.prefix, prompts.valid[:1, :begun]), top=top, taps=taps)
        keys.fill(once, torch.zeros(count, dtype=torch.int64, device=model.device))
        beginning = beginning if tapped is None else tapped
    for part, longest in parts((prompts.lengths - begun).tolist()):
        keys.extent.rows, keys.extent.length = part, prompts.width - longest
        inputs = _inputs(prompts.ids[part, -longest:], prompts.valid[part])
        tapped, ends = run(model, keys, inputs, top=top, taps=taps)
        if tapped is not None:
            rest[:, part, -longest:] = tapped[:, :, -columns:]
        if last is not None and ends is not None:
            last[part] = ends
    keys.extent.rows = slice(0, count)
    return Trunk(prompts, keys, top, list(taps), beginning, rest, last)


def start_branch(model: Model, trunk: Trunk, first: int, edits: Edits, node: torch.Tensor, room: int = 0) -> Branch:
    """Runs the prompts of a branch's rows through the layers above `first`.

    Args:
        model: The model.
        trunk: The trunk that it leaves.
        first: The layer at which it does, -1 for the embeddings.
        edits: A row of the tables for each row of the branch.
        node: int64 `[rows]`, rising: each row's prompt, as a row of the trunk.
        room: How many more tokens there must be room for.
    """
    prompts, top = trunk.prompts, model.n_layers - 1
    begun, own = prompts.prefix.shape[1], first != EMBEDDINGS
    tap = trunk.taps.index(first) if own else 0
    keys = Keys(model.n_layers, len(node), prompts.width + room)
    last = torch.zeros(len(node), model.width, dtype=model.hf.dtype, device=model.device)
    if begun:
        different, which = edits.row.unique(return_inverse=True)
        once = Keys(model.n_layers, len(different), begun)
        for part, _ in parts([begun] * len(different)):
            once.extent.rows, once.extent.length = part, 0
            few = Edits(edits.added, edits.ablated, edits.last_only, different[part])
            valid = prompts.valid[:1, :begun].expand(len(few.row), -1)
            entering = trunk.beginning[tap].expand(len(few.row), -1, -1) if own else None
            mask = few.prompt_mask(valid, last_column=False)
            inputs = _inputs(prompts.prefix.expand(len(few.row), -1), valid)
            run(model, once, inputs, top=top, edits=few, mask=mask, first=first, entering=entering)
        keys.fill(once, which)
    for part, longest in parts((prompts.lengths - begun)[node].tolist()):
        keys.extent.rows, keys.extent.length = part, prompts.width - longest
        rows, few = node[part], edits.of(part)
        valid = prompts.valid[rows]
        mask = few.prompt_mask(valid[:, -longest:], last_column=True)
        inputs = _inputs(prompts.ids[rows, -longest:], valid)
        entering = trunk.rest[tap, rows, -longest:] if own else None
        _, ends = run(model, keys, inputs, top=top, edits=few, mask=mask, first=first, entering=entering)
        assert ends is not None
        last[part] = ends
    keys.extent.rows = slice(0, len(node))
    return Branch(first, edits, keys, last)


def logits(model: Model, last: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The logits of normed states `[rows, width]`, block by block: which rows, and `[block, vocabulary]`."""
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    for start in range(0, len(last), HEAD_ROWS):
        part = slice(start, min(start + HEAD_ROWS, len(last)))
        block = model.hf.lm_head(last[part])
        yield part, block if cap is None else torch.tanh(block / cap) * cap


def step(
    model: Model,
    keys: Keys,
    token: torch.Tensor,
    valid: torch.Tensor,
    **where: Any,  # noqa: ANN401 - those of `run`
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One more token a row: `run` with a token each; `valid` covers the columns up to it."""
    return run(model, keys, _inputs(token[:, None], valid), **where)
