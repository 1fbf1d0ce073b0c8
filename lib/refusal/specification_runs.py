"""What notebook 08 measures: the same dose in several units, at the layers of several rules, at both positions.

Kept apart from what the rows mean, so that a change of wording or of an estimator measures nothing anew.
"""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from refusal import chunks, directions, prompts, records, runs, steering
from refusal.analyses import plan
from refusal.conditions import Condition
from refusal.directions import Directions
from refusal.files import CompendiumError, sha256_text

NOTEBOOK = "08_robustness_hierarchy"
POSITIONS = ("all", "last")
QUICK_UNITS = ("alpha", "study")  # of a quick look
SIGNS = {1: "+", -1: "-"}


def rule() -> dict[str, Any]:
    """The plan's section of notebook 08."""
    return plan()[NOTEBOOK]


def units(quick: bool = False) -> list[str]:
    """The units in which a dose is fixed; a few of them for a quick look."""
    return [unit for unit in rule()["doses"] if unit in QUICK_UNITS or not quick]


def some_prompts(run: runs.Run) -> pd.DataFrame:
    """The plan's prompts: the first of the evaluation set, and a few prefixes of each of the study's base requests."""
    planned = rule()["prompts"]
    evaluation = runs.load_prompts(run, "harmful_evaluation").head(planned["harmful_evaluation"])
    layout = runs.load_prompts(run, "harmful_study")
    each = max(1, planned["harmful_study"] // prompts.load("harmful_study")["cluster"].nunique())
    return pd.concat([evaluation, layout.groupby("cluster", sort=False).head(each)], ignore_index=True)


def separation(run: runs.Run, frame: pd.DataFrame, made: Directions, selected: int) -> pd.DataFrame:
    """How far apart each layer's direction holds harmful and harmless selection prompts: measured, or read.

    Args:
        run: The notebook's run.
        frame: Selection prompts, harmful and harmless.
        made: The direction of every layer.
        selected: The layer that the rule of notebook 01 chose, which is noted beside.

    Returns:
        Metrics `d_prime` by layer, and `selected_layer`, one row.
    """
    harmful = frame["prompt_set"].map(records.is_harmful).to_numpy(bool)

    def measure(store: chunks.Store) -> pd.DataFrame:
        return separation_rows(chunks.last_tokens(store, frame), harmful, made, selected)

    key = steering.add(made, range(len(made.unit)), 1.0).key()
    layout = sha256_text(inspect.getsource(separation_rows))
    return runs.metrics(run, "layers", measure, prompts.digest(frame), key, selected, layout)


def separation_rows(activations: torch.Tensor, harmful: np.ndarray, made: Directions, selected: int) -> pd.DataFrame:
    """The rows of `separation`.

    Args:
        activations: `[prompts, layers, width]`.
        harmful: Bool `[prompts]`.
        made: The direction of every layer.
        selected: As in `separation`.
    """
    along = torch.einsum("nlw,lw->nl", activations.double(), made.unit.double()).numpy()
    sides = along[harmful], along[~harmful]
    spread = np.sqrt((sides[0].var(0, ddof=1) + sides[1].var(0, ddof=1)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (sides[0].mean(0) - sides[1].mean(0)) / spread
    rows = pd.DataFrame({"metric": "d_prime", "direction_id": made.id, "layer": range(len(values)), "value": values})
    noted = pd.DataFrame(
        [{"metric": "selected_layer", "direction_id": "", "layer": selected, "value": float(selected)}]
    )
    return pd.concat([rows, noted], ignore_index=True)


def layers(metrics: pd.DataFrame) -> dict[str, int]:
    """The layer of each of the plan's rules; two rules may come to the same one.

    Args:
        metrics: From `separation`.

    Raises:
        CompendiumError: No layer separates the prompts.
    """
    part = metrics[metrics["experiment"] == "layers"]
    by_layer = part[part["metric"] == "d_prime"].set_index("layer")["value"].sort_index()
    eligible = by_layer.reindex(directions.candidate_layers(len(by_layer))).replace([np.inf, -np.inf], np.nan).dropna()
    if eligible.empty:
        raise CompendiumError("no layer between 25 and 80 % of the depth has a finite d': measure notebook 08 again.")
    return {
        "screen": int(part.loc[part["metric"] == "selected_layer", "layer"].iloc[0]),
        "depth": int(rule()["layers"]["depth"] * len(by_layer)),
        "separation": int(eligible.idxmax()),
    }


def name(layer: int, position: str, unit: str, sign: int) -> str:
    """What the record calls a condition, e.g. "extracted@18 last -15 study"."""
    return f"extracted@{layer} {position} {SIGNS[sign]}{rule()['doses'][unit]:g} {unit}"


def alpha_of(made: Directions, layer: int, unit: str) -> float:
    """The plan's dose of a unit in mean differences of a layer.

    Args:
        made: The direction of every layer.
        layer: The layer.
        unit: A key of the plan's doses.
    """
    dose, raw = float(rule()["doses"][unit]), float(made.raw_norm[layer])
    return dose * {"alpha": 1.0, "alpha_relative": float(made.residual_norm[layer]) / raw}.get(unit, 1.0 / raw)


def conditions(made: Directions, where: dict[str, int], *, quick: bool = False) -> list[Condition]:
    """The baseline, and every layer, position, unit and sign; a layer that two rules choose stands there once.

    Args:
        made: The direction of every layer.
        where: From `layers`.
        quick: A few units only.
    """
    found = [steering.baseline()]
    for layer in sorted(set(where.values())):
        for position in POSITIONS:
            for unit in units(quick):
                for sign in SIGNS:
                    one = steering.add(made, layer, sign * alpha_of(made, layer, unit), position)
                    found.append(replace(one, name=name(layer, position, unit, sign)))
    return found
