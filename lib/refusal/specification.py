"""The specification curve: the effect of the sign under every reasonable choice of how to measure it.

After Simonsohn, Simmons and Nelson (2020), Nature Human Behaviour 4, 1208-1214: all specifications side by side,
sorted, and a joint test that keeps their dependence, since they share prompts and completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import statistics
from refusal.analyses import plan
from refusal.files import CompendiumError
from refusal.specification_runs import layers, name, rule

FACTORS = {
    "judge": {"ours": "our labels", "seed_rule": "the study's rule", "gcg": "Zou et al.", "arditi": "Arditi et al."},
    "unit": {"alpha": "mean differences", "alpha_relative": "residual norms", "alpha_absolute": "activation units",
             "study": "the study's dose"},
    "layer": {"screen": "by the screen", "depth": "three quarters", "separation": "by separation"},
    "position": {"all": "all tokens", "last": "from the last on"},
    "prompts": {"harmful_evaluation": "independent", "harmful_study": "the study's layout"},
}  # fmt: skip
EXCHANGES = 999  # of the two signs (analysis plan)


@dataclass(frozen=True, eq=False)
class Arm:
    """Who complied under one specification.

    Attributes:
        spec: The level of each factor, in their order.
        layer: The steered layer.
        minus: Bool `[n]`: complied when the direction was subtracted.
        plus: The same when it was added.
        base: The same without steering.
        prompts: Ids `[n]`, sorted.
        clusters: `[n]`.
        broken: The larger of the two shares of degenerate completions, by our labels.
    """

    spec: tuple[str, ...]
    layer: int
    minus: NDArray[np.bool_]
    plus: NDArray[np.bool_]
    base: NDArray[np.bool_]
    prompts: tuple[str, ...]
    clusters: NDArray
    broken: float


def complied(frame: pd.DataFrame, metrics: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each judge, whether it takes a completion for compliance: bool, prompts in rows, conditions in columns.

    Ours has a third label, degenerate, which is no compliance; the others know refusals only.

    Args:
        frame: The record's completions.
        metrics: With what the published keyword rules say of them (experiment "rules").

    Raises:
        CompendiumError: A completion or a rule's answer is missing.
    """
    said = metrics[metrics["experiment"] == "rules"].rename(columns={"direction_id": "condition"})
    found = {
        judge: frame.assign(value=frame[column] == word)
        for judge, column, word in (("ours", "label", "compliance"), ("seed_rule", "seed_rule", "jailbreak"))
    } | {judge: said[said["metric"] == judge].assign(value=lambda rows: rows["value"] < 0.5)
         for judge in FACTORS["judge"] if judge in set(said["metric"])}  # fmt: skip
    wide = {judge: rows.pivot(index="prompt_id", columns="condition", values="value") for judge, rows in found.items()}
    shape = (frame["prompt_id"].nunique(), frame["condition"].nunique())
    for judge in rule()["specifications"]["judge"]:
        if judge not in wide or wide[judge].shape != shape or wide[judge].isna().any(axis=None):
            raise CompendiumError(f"the record lacks an answer of the judge {judge!r}: measure notebook 08 again.")
    return {judge: table.astype(bool) for judge, table in wide.items()}


def arms(frame: pd.DataFrame, metrics: pd.DataFrame) -> list[Arm]:
    """Every specification of the plan that the record has; a quick record has few units.

    Args:
        frame: The record's completions.
        metrics: Its metrics.

    Raises:
        CompendiumError: As in `complied`, or no specification at all.
    """
    answers, where, planned = complied(frame, metrics), layers(metrics), rule()["specifications"]
    broken = frame.assign(value=frame["label"] == "degenerate").pivot(
        index="prompt_id", columns="condition", values="value"
    )
    about = frame.drop_duplicates("prompt_id").set_index("prompt_id").sort_index()
    of_set = {name: list(part.index) for name, part in about.groupby("prompt_set")}
    made, known = [], set(frame["condition"])
    for spec in product(*(planned[factor] for factor in FACTORS)):
        judge, unit, chosen, position, prompt_set = spec
        minus, plus = (name(where[chosen], position, unit, sign) for sign in (-1, 1))
        if not {minus, plus} <= known or prompt_set not in of_set:
            continue
        ids, table = of_set[prompt_set], answers[judge]
        subtracted, added, base = (table.loc[ids, condition].to_numpy(bool) for condition in (minus, plus, "baseline"))
        worst = float(broken.loc[ids, [minus, plus]].mean().max())
        clusters = about.loc[ids, "cluster"].to_numpy(object)
        made.append(Arm(spec, where[chosen], subtracted, added, base, tuple(ids), clusters, worst))
    if not made:
        raise CompendiumError("the record has no specification of the plan: measure notebook 08 again.")
    return made


def table(made: Sequence[Arm]) -> pd.DataFrame:
    """The curve: a row a specification, sorted by its swing.

    Args:
        made: From `arms`.

    Returns:
        The factors; `at` (layer), `n, clusters`; compliance `base, plus, minus` (rates); three paired differences, each
        with `_low, _high` and an uncorrected `_p`: `swing` (minus against plus), `rise` and `fall` (minus and plus
        against the baseline; a fall is below zero); `broken`; `study` and `ours`, which mark one row each.
    """
    confidence = plan()["confidence"]
    marked = {who: tuple(rule()[who][factor] for factor in FACTORS) for who in ("study", "ours")}
    rows = []
    for arm in made:
        pairs = {"swing": (arm.minus, arm.plus), "rise": (arm.minus, arm.base), "fall": (arm.plus, arm.base)}
        row: dict[str, Any] = dict(zip(FACTORS, arm.spec, strict=True))
        row |= {"at": arm.layer, "n": len(arm.prompts), "clusters": len(set(arm.clusters)),
                "base": arm.base.mean(), "plus": arm.plus.mean(), "minus": arm.minus.mean()}  # fmt: skip
        for what, (first, second) in pairs.items():
            found = statistics.paired(first, second, arm.clusters, confidence)
            row |= {what: found.difference, f"{what}_low": found.interval.low, f"{what}_high": found.interval.high,
                    f"{what}_p": found.p}  # fmt: skip
        rows.append(row | {"broken": arm.broken} | {who: arm.spec == spec for who, spec in marked.items()})
    return pd.DataFrame(rows).sort_values("swing", ignore_index=True, kind="stable")


@dataclass(frozen=True)
class Joint:
    """All specifications at once: median swing, share above and below zero, and the rank p of the median."""

    median: float
    above: float
    below: float
    p: float
    count: int


def joint(made: Sequence[Arm], seed: int, draws: int = EXCHANGES) -> Joint:
    """The median swing among exchanges of the two signs.

    Where the sign of alpha does not matter, the two completions of a prompt may be exchanged; they are, in all
    specifications at once and for whole clusters, so that what the specifications share stays shared.

    Args:
        made: From `arms`.
        seed: Of the exchanges.
        draws: Their number.
    """
    names = sorted({str(cluster) for arm in made for cluster in arm.clusters})
    place = {cluster: number for number, cluster in enumerate(names)}
    sums = np.zeros((len(made), len(names)))
    for row, arm in zip(sums, made, strict=True):
        np.add.at(row, [place[str(one)] for one in arm.clusters], (arm.minus.astype(int) - arm.plus) / len(arm.minus))
    swings = sums.sum(1)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(names)))
    drawn = np.median(signs @ sums.T, axis=1)
    median = float(np.median(swings))
    p = (1 + int((np.abs(drawn) >= abs(median) - 1e-12).sum())) / (1 + draws)
    return Joint(median, float((swings > 1e-12).mean()), float((swings < -1e-12).mean()), p, len(made))


def verdict(found: Joint) -> str:
    """The plan's rule: robust, reversed, depends on the choices or inconclusive."""
    most = rule()["curve"]["most"]
    if found.p >= plan()["level"]:
        return "inconclusive"
    if found.above >= most and found.median > 0:
        return "robust"
    return "reversed" if found.below >= most and found.median < 0 else "depends on the choices"


def factors(curve: pd.DataFrame, value: str = "swing") -> pd.DataFrame:
    """How much each choice matters: a row for each level of each factor.

    Args:
        curve: From `table`.
        value: The column that is looked at.

    Returns:
        `factor, level, count, median, lowest, highest`, and `share`: of the variance over specifications, that between
        the levels of the factor.
    """
    total = float(((curve[value] - curve[value].mean()) ** 2).sum())
    rows = []
    for factor in FACTORS:
        mean = curve.groupby(factor)[value].transform("mean")
        share = float(((mean - curve[value].mean()) ** 2).sum()) / total if total else float("nan")
        parts = dict(list(curve.groupby(factor)[value]))
        for level, part in ((level, parts[level]) for level in FACTORS[factor] if level in parts):
            rows.append({"factor": factor, "level": level, "count": len(part), "median": part.median(),
                         "lowest": part.min(), "highest": part.max(), "share": share})  # fmt: skip
    return pd.DataFrame(rows)
