"""Conditions: what is done to the residual stream of the rows that carry them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refusal.directions import Directions
from refusal.files import CompendiumError, sha256_text

EMBEDDINGS = -1
MAX_ALPHA = 100.0


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

    @property
    def first(self) -> int | None:
        """The lowest layer whose output is changed; None where nothing is."""
        return min(self.layers, default=None)

    def key(self) -> str:
        """A hash of everything that decides tokens."""
        vectors = "" if self.vectors is None else sha256_text(self.vectors.numpy().tobytes().hex())
        return sha256_text(f"{self.operation}|{self.layers}|{self.position}|{self.seed}|{vectors}")


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
    return tuple(sorted(layers))
