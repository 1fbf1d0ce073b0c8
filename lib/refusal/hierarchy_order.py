"""Tests between models, on the same prompts: effects at one mean difference, and whether an order is supported.

The unit is a prompt (or a cluster of prompts) that all models answered. Under the null that two models respond alike to
it, which answer came from which model does not matter, so that the sign of their difference is flipped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import hierarchy, statistics
from refusal.analyses import mean_interval, plan
from refusal.files import CompendiumError
from refusal.specification import FACTORS, Arm, arms
from refusal.specification_runs import NOTEBOOK, rule

MEASURES = ("level", "change")  # compliance when the direction is subtracted, and its rise from the baseline


@dataclass(frozen=True, eq=False)
class Measured:
    """What notebook 08 measured on a model: every specification, and how much it refuses unsteered."""

    model: str
    arms: Sequence[Arm]
    refusal: float
    n: int

    @property
    def refuses(self) -> bool:
        """Whether the model refuses enough to be ordered, by the plan."""
        return self.refusal >= rule()["least_refusal"]

    def units(self, other: "Measured | None" = None) -> list[str]:
        """The plan's units in which this model (and another) was measured: a quick look has few."""
        known = [{arm.spec[list(FACTORS).index("unit")] for arm in one.arms} for one in (self, other or self)]
        return [unit for unit in rule()["units"] if all(unit in some for some in known)]

    def arm(self, **spec: str) -> Arm:
        """One specification, by its factors; CompendiumError where the record lacks it."""
        wanted = tuple(spec[factor] for factor in FACTORS)
        for arm in self.arms:
            if arm.spec == wanted:
                return arm
        raise CompendiumError(f"the record of {self.model} lacks the specification {wanted}: measure {NOTEBOOK} again.")


def measured(model: str, frame: pd.DataFrame, metrics: pd.DataFrame) -> Measured:
    """What a record of notebook 08 holds.

    Args:
        model: Registry id.
        frame: The record's completions.
        metrics: Its metrics.
    """
    base = frame[(frame["condition"] == "baseline") & (frame["prompt_set"] == "harmful_evaluation")]
    return Measured(model, arms(frame, metrics), float((base["label"] == "refusal").mean()), len(base))


def others(folders: Mapping[str, Path], own: Measured) -> dict[str, Measured]:
    """This model's measurements and those of all others with a record of notebook 08, in the order of `folders`."""
    found = {}
    for model, folder in {own.model: Path(), **folders}.items():
        record = None if model == own.model else hierarchy.read(folder, NOTEBOOK)
        if model == own.model or record is not None:
            found[model] = own if record is None else measured(model, record[0], record[1])
    return {model: found[model] for model in [*folders, own.model] if model in found}


def difference(first: "pd.Series[int]", second: "pd.Series[int]", clusters: "pd.Series[str]") -> dict[str, float]:
    """The mean of one model's answers minus that of another's, on the prompts that both answered.

    Args:
        first: Whole numbers by prompt id.
        second: The same.
        clusters: Of the prompts.

    Returns:
        `n, clusters, value, low, high, p`: a t interval (of cluster means where clusters are larger than a prompt) and
        the exact p of flips of whole clusters. NaN where they share no prompt.
    """
    both = first.index.intersection(second.index)
    steps = (first.loc[both] - second.loc[both]).astype(int)
    if steps.empty:
        return {"n": 0, "clusters": 0, "value": math.nan, "low": math.nan, "high": math.nan, "p": 1.0}
    groups = steps.groupby(clusters.loc[both].to_numpy())
    independent = groups.ngroups == len(steps)
    _, interval = mean_interval((steps if independent else groups.mean()).to_numpy(dtype=float))
    p, _ = statistics.sign_flips(groups.sum().to_numpy())
    return {"n": len(steps), "clusters": groups.ngroups, "value": float(steps.mean()), **vars(interval), "p": p}


def _refused(frame: pd.DataFrame, wanted: Mapping[str, str]) -> tuple["pd.Series[int]", "pd.Series[str]"]:
    """Refusal of each prompt under a condition (minus that under another), and the prompts' clusters."""
    rows = frame[frame["prompt_set"] == wanted["prompt_set"]]
    labels = rows.pivot(index="prompt_id", columns="condition", values="label") == "refusal"
    names = [wanted[key] for key in ("condition", "less") if key in wanted]
    for condition in names:
        if condition not in labels:
            raise CompendiumError(f"a record of notebook 03 lacks the condition {condition!r}: measure it again.")
    values = labels[names[0]].astype(int)
    values = values - labels[names[1]].astype(int) if len(names) > 1 else values
    return values, rows.drop_duplicates("prompt_id").set_index("prompt_id")["cluster"]


def _holm(rows: list[dict[str, object]]) -> pd.DataFrame:
    table = pd.DataFrame(
        rows, columns=None if rows else ["first", "second", "n", "clusters", "value", "low", "high", "p"]
    )
    adjusted = statistics.holm({str(place): float(p) for place, p in table["p"].items()})
    return table.assign(p_holm=list(adjusted.values()))


def compared(folders: Mapping[str, Path]) -> pd.DataFrame:
    """The plan's family: every pair of models with a record of notebook 03, at one mean difference.

    Returns:
        `first, second, name, n, clusters, value, low, high, p, p_holm`; empty for a single model.
    """
    read = {model: hierarchy.read(folder, "03_sign_inversion") for model, folder in folders.items()}
    frames = {model: found[0] for model, found in read.items() if found is not None}
    rows: list[dict[str, object]] = []
    for first, second in combinations(frames, 2):
        for wanted in rule()["compared"]:
            (one, clusters), (two, _) = (_refused(frames[model], wanted) for model in (first, second))
            rows.append({"first": first, "second": second, "name": wanted["name"], **difference(one, two, clusters)})
    return _holm(rows)


def _values(arm: Arm, measure: str) -> "pd.Series[int]":
    steps: NDArray[np.int64] = arm.minus.astype(int) - (arm.base.astype(int) if measure == "change" else 0)
    return pd.Series(steps, index=list(arm.prompts))


def ordering(found: Mapping[str, Measured]) -> pd.DataFrame:
    """Every pair of models that refuse enough, in every unit and by both measures, with Holm's correction over all.

    Args:
        found: From `others`.

    Returns:
        `first, second, unit, measure, n, clusters, value, low, high, p, p_holm`; a value above zero: the first complies
        more.
    """
    fixed = {factor: rule()["ours"][factor] for factor in FACTORS}
    able = [one for one in found.values() if one.refuses]
    rows: list[dict[str, object]] = []
    for first, second in combinations(able, 2):
        for unit in first.units(second):
            pair = [model.arm(**{**fixed, "unit": unit}) for model in (first, second)]
            clusters = pd.Series(pair[0].clusters, index=list(pair[0].prompts))
            for measure in MEASURES:
                one, two = (_values(arm, measure) for arm in pair)
                rows.append({"first": first.model, "second": second.model, "unit": unit, "measure": measure,
                             **difference(one, two, clusters)})  # fmt: skip
    return _holm(rows)


def verdict(table: pd.DataFrame) -> str:
    """The plan's rule on "the models form a hierarchy of robustness".

    Args:
        table: From `ordering`; empty for fewer than two models.
    """
    if table.empty:
        return "not testable here"
    sure = table["p_holm"] < plan()["level"]
    signs = np.sign(table["value"]).where(sure, 0.0)
    pairs = signs.groupby([table["first"], table["second"]])
    if ((pairs.max() > 0) & (pairs.min() < 0)).any():
        return "contradicted"
    whole = (pairs.min() > 0) | (pairs.max() < 0)
    return "supported" if bool(whole.all()) else "inconclusive"


def levels(found: Mapping[str, Measured]) -> pd.DataFrame:
    """Compliance when the direction is subtracted, and unsteered, in each unit, for the figure.

    Returns:
        `model, unit, ordered, alpha_sign, n, rate, low, high`: sign 0 is the baseline.
    """
    fixed = {factor: rule()["ours"][factor] for factor in FACTORS}
    rows = []
    for one in found.values():
        for unit in one.units():
            arm = one.arm(**{**fixed, "unit": unit})
            for sign, values in {-1: arm.minus, 0: arm.base, 1: arm.plus}.items():
                rate = statistics.rate(values, arm.clusters, plan()["confidence"], how=plan()["intervals"]["clusters"])
                rows.append({"model": one.model, "unit": unit, "ordered": one.refuses, "sign": sign, "n": rate.n,
                             "rate": rate.estimate, **vars(rate.interval)})  # fmt: skip
    return pd.DataFrame(rows)


def order(found: Mapping[str, Measured]) -> list[str]:
    """The models that refuse enough, from the least to the most compliance under subtraction, a mean over the units."""
    table = levels({model: one for model, one in found.items() if one.refuses})
    if table.empty:
        return []
    return table[table["sign"] < 0].groupby("model")["rate"].mean().sort_values(kind="stable").index.tolist()


def across(found: Mapping[str, Measured]) -> pd.DataFrame:
    """How the order of each pair moves with the choices: exploratory, p uncorrected.

    Returns:
        `first, second`; `count` of specifications; for each measure, in how many the first complies more
        (`level_first`) or less (`level_second`), and in how many of these with p below the level (`..._sure`).
    """
    rows = []
    for first, second in combinations([one for one in found.values() if one.refuses], 2):
        mine, theirs = ({arm.spec: arm for arm in one.arms} for one in (first, second))
        shared = [spec for spec in mine if spec in theirs]
        row: dict[str, object] = {"first": first.model, "second": second.model, "count": len(shared)}
        for measure in MEASURES:
            made = []
            for spec in shared:
                clusters = pd.Series(mine[spec].clusters, index=list(mine[spec].prompts))
                made.append(difference(_values(mine[spec], measure), _values(theirs[spec], measure), clusters))
            values = np.array([one["value"] for one in made])
            sure = np.array([one["p"] for one in made]) < plan()["level"]
            for side, sign in {"first": 1, "second": -1}.items():
                own = sign * values > 1e-12
                row |= {f"{measure}_{side}": int(own.sum()), f"{measure}_{side}_sure": int((own & sure).sum())}
        rows.append(row)
    return pd.DataFrame(rows)
