"""What notebook 07 measures: doses at one layer and at many at once, KL, and prompts with a format demand (methods, 8).

Kept apart from what the rows mean, so that a change of wording or of an estimator measures nothing anew.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from refusal import chunks, control_screens, prompts, runs, steering
from refusal.analyses import plan
from refusal.conditions import Condition
from refusal.directions import Directions
from refusal.files import CompendiumError, sha256_text
from refusal.models import Model

NOTEBOOK = "07_therapeutic_window"
VARIANTS = {
    "one": "the selected layer",
    "many": "the middle third of the layers",
    "own": "the middle third, each layer's own vector",
}
FIRST, MIDDLE, LAST = range(3)  # thirds of the layers
QUICK = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # doses of a quick look: those of the pilot
KL_PROMPTS = 20  # of each set: the plan names no number, and a mean needs fewer prompts than a rate
NONE = "none"  # no format demand


def rule() -> dict[str, Any]:
    """The plan's section of notebook 07."""
    return plan()[NOTEBOOK]


def doses(variant: str = "one", quick: bool = False) -> list[float]:
    """The plan's alphas but for 0, which is the baseline of all variants: evenly spaced, or with equal ratios.

    Args:
        variant: A key of VARIANTS; what many layers add sums up, so that their grid is finer near zero.
        quick: A few of them only.
    """
    if quick:
        return list(QUICK)
    grid = rule()["alphas"]["one" if variant == "one" else "many"]
    if "first" in grid:
        side = [float(f"{dose:.3g}") for dose in np.geomspace(grid["first"], grid["to"], grid["count"] // 2)]
        return [-dose for dose in side[::-1]] + side
    return [alpha for alpha in np.linspace(grid["from"], grid["to"], grid["count"]).round(6).tolist() if alpha != 0]


def third(n_layers: int, which: int) -> list[int]:
    """The layers of a third of the depth, e.g. 8 to 15 for the middle third of 24.

    Args:
        n_layers: Number of decoder blocks.
        which: FIRST, MIDDLE or LAST.
    """
    edges = [round(part * n_layers / 3) for part in range(4)]
    return list(range(edges[which], edges[which + 1]))


def spread(made: Directions, layer: int) -> Directions:
    """One layer's vector at every layer; alpha keeps that layer's units, whichever layers are steered."""
    return replace(
        made,
        unit=made.unit[layer].expand_as(made.unit).clone(),
        raw_norm=made.raw_norm[layer].expand_as(made.raw_norm).clone(),
        residual_norm=made.residual_norm[layer].expand_as(made.residual_norm).clone(),
    )


def steered(variant: str) -> str:
    """What the names of a variant's conditions begin with, e.g. "extracted@many": the variants share doses."""
    return f"extracted@{variant}"


def name(variant: str, alpha: float) -> str:
    """What the record calls a condition, e.g. "extracted@many +0.25"."""
    return f"{steered(variant)} {alpha:+g}"


def at(made: Directions, layer: int, variant: str, alpha: float) -> Condition:
    """One dose of one variant.

    `alpha_absolute` and `alpha_relative` are those of a single layer's addition, as everywhere: with many layers the
    model gets as many times as much. Under "own" they are those of the lowest steered layer.

    Args:
        made: The direction of every layer.
        layer: The selected layer.
        variant: A key of VARIANTS.
        alpha: In units of raw_norm.

    Raises:
        CompendiumError: An unknown variant, or a layer or alpha out of range.
    """
    if variant not in VARIANTS:
        raise CompendiumError(f"there is no variant {variant!r}: take one of {', '.join(VARIANTS)}.")
    where = [layer] if variant == "one" else third(len(made.unit), MIDDLE)
    vectors = spread(made, layer) if variant == "many" else made
    return replace(steering.add(vectors, where, alpha), name=name(variant, alpha))


def curve_conditions(made: Directions, layer: int, variants: Sequence[str], *, quick: bool = False) -> list[Condition]:
    """All doses of some variants, without the baseline; arguments as in `at` and `doses`."""
    return [at(made, layer, variant, alpha) for variant in variants for alpha in doses(variant, quick)]


def defence_conditions(made: Directions, layer: int) -> list[Condition]:
    """The baseline and the plan's doses of the defence; arguments as in `at`."""
    planned = rule()["defence"]
    return [steering.baseline(), *(at(made, layer, planned["variant"], float(alpha)) for alpha in planned["alphas"])]


def kl(run: runs.Run, frame: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """KL(unsteered || steered) of the first generated token: measured, or read.

    Args:
        run: The notebook's run.
        frame: Prompts.
        conditions: Steered ones.

    Returns:
        Metrics `kl` by condition (its name without the dose in `direction_id`, and `alpha`) and prompt, in nats.
    """

    def measure(store: chunks.Store) -> pd.DataFrame:
        return kl_rows(chunks.load_model(store), frame, conditions)

    keys = [(condition.name, condition.key()) for condition in conditions]
    layout = sha256_text(inspect.getsource(kl_rows))
    return runs.metrics(run, "kl", measure, prompts.digest(frame), keys, layout, modules=(control_screens,))


def kl_rows(model: Model, frame: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """The rows of `kl`."""
    values = control_screens.first_token_kl(model, frame["text"].tolist(), conditions).double().numpy()
    return pd.concat(
        pd.DataFrame(
            {
                "metric": "kl",
                "operation": condition.operation,
                "direction_id": condition.name.partition(" ")[0],
                "layer": min(condition.layers, default=-1),
                "alpha": condition.alpha,
                "prompt_id": frame["prompt_id"].to_numpy(),
                "value": values[:, column],
            }
        )
        for column, condition in enumerate(conditions)
    )


def demanded(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The prompts with each of the plan's format demands appended, by the demand's name."""
    demands = rule()["formats"]["demands"]
    return {demand: frame.assign(text=frame["text"] + " " + words) for demand, words in demands.items()}


def projections(run: runs.Run, frame: pd.DataFrame, made: Directions) -> pd.DataFrame:
    """Projections of the last token's activation on each layer's direction, without and with each format demand.

    Args:
        run: The notebook's run.
        frame: Prompts without a demand.
        made: The direction of every layer.

    Returns:
        Metrics `projection none`, `projection json` ... by layer and prompt, in units of that layer's raw_norm.
    """
    asked = {NONE: frame, **demanded(frame)}
    everything = pd.concat(asked.values(), ignore_index=True)

    def measure(store: chunks.Store) -> pd.DataFrame:
        return projection_rows(chunks.last_tokens(store, everything), made, list(asked), frame["prompt_id"].tolist())

    key = steering.add(made, range(len(made.unit)), 1.0).key()
    layout = sha256_text(inspect.getsource(projection_rows))
    return runs.metrics(run, "formats", measure, prompts.digest(everything), key, list(asked), layout)


def projection_rows(
    activations: torch.Tensor, made: Directions, demands: Sequence[str], prompt_ids: Sequence[str]
) -> pd.DataFrame:
    """The rows of `projections`.

    Args:
        activations: `[demands x prompts, layers, width]`, all prompts of the first demand first.
        made: The direction of every layer.
        demands: Their names.
        prompt_ids: Of the prompts, in their order.
    """
    along = torch.einsum("nlw,lw->nl", activations.double(), made.unit.double()) / made.raw_norm.double()
    values = along.reshape(len(demands), len(prompt_ids), -1).numpy()
    return pd.concat(
        pd.DataFrame(values[place], index=list(prompt_ids))
        .rename_axis(index="prompt_id", columns="layer")
        .stack()
        .rename("value")
        .reset_index()
        .assign(metric=f"projection {demand}", direction_id=made.id)
        for place, demand in enumerate(demands)
    )
