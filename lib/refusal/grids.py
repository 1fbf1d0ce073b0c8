"""Grids: along which directions safety is put to the test, and at which alphas, out to where the model breaks.

Notebook 04 measures in two parts (analysis plan): "ends" finds where each grid ends, "curves" fills the grids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from refusal import analyses, controls
from refusal.conditions import MAX_ALPHA, Condition, add, baseline
from refusal.directions import Directions
from refusal.files import CompendiumError

END_PROMPTS, END_DOSES = 8, (0.4, 0.8, 1.2, 1.6, 2.0)  # of the plan's rule for the end of a grid (alpha_relative)
FIRST = 16  # the lowest dose is this part of the highest, by the plan
QUICK_RANDOMS, QUICK_ALPHAS = 1, 4  # of a quick look


def rule() -> dict[str, Any]:
    """The plan's section of notebook 04."""
    return analyses.plan()["04_llama_threshold"]


def signs(name: str) -> list[int]:
    """The signs in which the plan steers along a direction: 1 where it is added, -1 where it is subtracted."""
    return [int(sign) for sign in rule()["signs"][name.split("[")[0]]]


def several(extracted: Directions, *, seed: int, quick: bool = False) -> list[Directions]:
    """The plan's directions: the extracted one, and random ones of its norm.

    Args:
        extracted: The direction of notebook 01.
        seed: Of the random ones.
        quick: One random direction instead of the plan's number.
    """
    count = QUICK_RANDOMS if quick else len(rule()["directions"]) - 1
    return [extracted, *controls.random(extracted, count, seed=seed)]


def _rounded(alpha: float) -> float:
    """Three significant digits, so that a condition's name is short and stable; at most what can be steered with."""
    return float(f"{min(alpha, MAX_ALPHA):.3g}")


def end_conditions(along: Sequence[Directions], layer: int) -> list[Condition]:
    """The few doses, in the plan's signs, from which the end of each grid follows.

    They are the plan's, in units of the mean residual norm; one beyond the largest alpha becomes that alpha.

    Args:
        along: From `several`.
        layer: The layer.
    """
    made = []
    for direction in along:
        norm = float(direction.residual_norm[layer] / direction.raw_norm[layer])
        doses = dict.fromkeys(_rounded(dose * norm) for dose in END_DOSES)
        made += [add(direction, layer, sign * dose) for sign in signs(direction.id) for dose in doses]
    return made


def ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Where each grid ends, by the plan's rule.

    Args:
        frame: A record with the part "ends".

    Returns:
        Index direction_id and sign; `alpha` and `alpha_relative` (magnitudes) of the first dose at which half of the
        completions are degenerate, else of the largest; `degenerate`, their share there; `reached`, whether it is half.

    Raises:
        CompendiumError: No such completions.
    """
    rows = part(frame, "ends")
    signs, found = np.sign(rows["alpha"]).astype(int).rename("sign"), {}
    for key, group in rows.groupby([rows["direction_id"], signs], sort=False):
        dose = group["alpha"].abs()
        share = (group["label"] == "degenerate").groupby(dose).mean()
        half = share.index[share >= 0.5]
        alpha = half[0] if len(half) else share.index[-1]
        relative = group.loc[dose == alpha, "alpha_relative"].abs().iloc[0]
        found[key] = {"alpha": float(alpha), "alpha_relative": float(relative), "degenerate": float(share[alpha]),
                      "reached": bool(len(half))}  # fmt: skip
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["direction_id", "sign"])


def curve_conditions(
    along: Sequence[Directions], layer: int, found: pd.DataFrame, *, quick: bool = False
) -> list[Condition]:
    """The baseline, and the plan's number of alphas up to the end of each grid, with equal ratios.

    A width is measured relative to where a rate changes, so that equal ratios resolve it alike wherever that is.

    Args:
        along: From `several`.
        layer: The layer.
        found: From `ends`.
        quick: Fewer alphas.
    """
    steps, made = QUICK_ALPHAS if quick else rule()["alphas"], [baseline()]
    for direction in along:
        for sign in signs(direction.id):
            end = float(found.loc[(direction.id, sign), "alpha"])
            doses = np.geomspace(end / FIRST, end, steps)
            made += [add(direction, layer, sign * _rounded(dose)) for dose in doses]
    return made


def part(frame: pd.DataFrame, word: str) -> pd.DataFrame:
    """The completions of one part, "ends" or "curves"; CompendiumError where there are none."""
    found = frame[frame["experiment"].str.endswith(f" {word}")]
    if found.empty:
        raise CompendiumError(f"the record has no completions of the part {word!r}: measure notebook 04 again.")
    return found
