"""Has each kind of harm a direction of its own? Effects of the category directions, by the plan (methods, section 7).

Separate directions predict a diagonal matrix of effects, one shared direction predicts a constant one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import cone_tables, controls, statistics
from refusal.analyses import mean_interval, plan
from refusal.cone_geometry import Counts
from refusal.cone_screens import member_of
from refusal.control_screens import family_of
from refusal.files import CompendiumError
from refusal.statistics import Interval

NOTEBOOK = "05_polyhedral_cones"
PERMUTATIONS = 999  # of the categories over the evaluation prompts (analysis plan)


def rule() -> dict[str, Any]:
    """The plan's section of this notebook."""
    return plan()[NOTEBOOK]


def counts(quick: bool) -> Counts:
    """What the geometry draws: the plan's numbers, or few for a quick look."""
    planned = rule()["geometry"]
    few = {"draws": 19, "subsamples": 10, "splits": 10}
    drawn = {name: min(planned[name], one) if quick else planned[name] for name, one in few.items()}
    return Counts(tuple(planned["per_category"]), **drawn, bootstraps=100 if quick else 1000)


def directions_drawn(quick: bool) -> dict[str, int]:
    """How many directions are random, or combinations, and how many combinations have completions."""
    wanted = {"random": rule()["random_directions"], "combination": rule()["combinations"]}
    wanted["generated"] = rule()["generated_combinations"]
    return {name: min(number, 2) if quick else number for name, number in wanted.items()}


@dataclass(frozen=True)
class Contrast:
    """Diagonal against off-diagonal: how much more a category's own direction does to its prompts than the others do.

    Attributes:
        value: mean E[k, k] - mean E[j, k].
        interval: 95 % bootstrap interval, over prompts within categories.
        p: Two-sided rank p among permutations of the categories over the prompts.
        own: mean E[k, k].
        other: mean E[j, k], j != k.
        n: Prompts, each its own cluster.
    """

    value: float
    interval: Interval
    p: float
    own: float
    other: float
    n: int


def contrast(effects: pd.DataFrame, kinds: "pd.Series[str]", seed: int) -> Contrast:
    """The contrast of K directions.

    Args:
        effects: What each direction (rows, named as the categories) does to each prompt (columns).
        kinds: The category of each prompt, by prompt id.
        seed: Of the permutations and the bootstrap.

    Raises:
        CompendiumError: A category without a direction, or a direction without prompts.
    """
    of = kinds.loc[effects.columns].to_numpy()
    if set(of) != set(effects.index) or len(effects) < 2:
        raise CompendiumError(
            f"directions of {sorted(effects.index)} do not fit prompts of {sorted(set(of))}: each category needs both."
        )
    codes, values = effects.index.get_indexer(of), effects.to_numpy(dtype=float)
    rng, share = np.random.default_rng(seed), 1 / (np.bincount(codes) * len(effects))
    value = float(_contrasts(values, codes[None], share)[0])
    permuted = _contrasts(values, np.stack([rng.permutation(codes) for _ in range(PERMUTATIONS)]), share)
    own = float((values[codes, np.arange(len(codes))] * share[codes]).sum())
    return Contrast(value, _interval(values, codes, seed), controls.specificity(value, permuted).p, own, own - value,
                    len(codes))  # fmt: skip


def _scores(values: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each prompt, what its own category's direction does beyond the mean of the others: `[..., prompts]`."""
    own = values[codes, np.arange(values.shape[1])]
    return own - (values.sum(0) - own) / (len(values) - 1)


def _contrasts(
    values: NDArray[np.float64], codes: NDArray[np.int64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    return (_scores(values, codes) * share[codes]).sum(-1)


def _interval(values: NDArray[np.float64], codes: NDArray[np.int64], seed: int) -> Interval:
    """BCa over prompts, the categories apart; NaN for fewer than two prompts of one."""
    score = _scores(values, codes)
    groups = [score[codes == k] for k in range(len(values))]
    if min(map(len, groups)) < 2:
        return Interval(math.nan, math.nan)
    if np.ptp(score) == 0:
        return Interval(float(score[0]), float(score[0]))
    return statistics.bootstrap_interval(_mean_of_means, *groups, seed=seed)


def _mean_of_means(*groups: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.mean([group.mean(axis) for group in groups], axis=0)


# ---- effects at the first token


def swings(metrics: pd.DataFrame, family: str) -> pd.DataFrame:
    """Swing of each direction of a family (rows, by member) on each prompt (columns)."""
    rows = metrics[(metrics["experiment"] == "screen") & (metrics["metric"] == "swing")]
    rows = rows[rows["direction_id"].map(family_of) == family]
    order = rows["direction_id"].map(member_of).drop_duplicates()
    wide = rows.assign(member=rows["direction_id"].map(member_of)).pivot(
        index="member", columns="prompt_id", values="value"
    )
    return wide.loc[order]


def kinds_of(frame: pd.DataFrame) -> "pd.Series[str]":
    """The category of each prompt of a record."""
    return frame.drop_duplicates("prompt_id").set_index("prompt_id")["category"]


def answers_interval(values: NDArray[np.float64]) -> tuple[float, Interval]:
    """The mean of differences -1, 0 and 1 of paired answers, with the plan's interval for them."""
    more, less = int((values > 0).sum()), int((values < 0).sum())
    return float(np.mean(values)), statistics.tango(more, less, len(values), plan()["confidence"])


def matrix(
    effects: pd.DataFrame,
    kinds: "pd.Series[str]",
    interval: Callable[[NDArray[np.float64]], tuple[float, Interval]] = mean_interval,
) -> pd.DataFrame:
    """E[j, k], the mean effect of direction j on the prompts of category k.

    Args:
        effects: From `swings` or `generated`.
        kinds: The category of each prompt.
        interval: t over prompts, or `answers_interval` for completions.

    Returns:
        A row for each direction and category: `direction, category, n, value, low, high`.
    """
    rows = []
    for direction, values in effects.iterrows():
        for kind, part in values.groupby(kinds.loc[effects.columns].to_numpy(), sort=False):
            value, ends = interval(part.to_numpy(dtype=float))
            rows.append({"direction": direction, "category": kind, "n": len(part), "value": value, **vars(ends)})
    return pd.DataFrame(rows)


def causes(metrics: pd.DataFrame, kinds: "pd.Series[str]") -> pd.DataFrame:
    """`matrix` of the category directions by the screen, with `random` (the largest size of a random one) and `beyond`.

    A cell lies beyond the random directions where it raises refusal further than any of them, of the same norm, raises
    or lowers it on these prompts.
    """
    made = matrix(swings(metrics, "category"), kinds)
    drawn = matrix(swings(metrics, "random"), kinds)
    largest = drawn["value"].abs().groupby(drawn["category"]).max()
    made["random"] = made["category"].map(largest)
    return made.assign(beyond=made["value"] > made["random"])


def mean_swings(metrics: pd.DataFrame, kinds: "pd.Series[str]", family: str) -> "pd.Series[float]":
    """The mean over categories of the effect of each direction of a family, by member."""
    values = swings(metrics, family).T
    return values.groupby(kinds.loc[values.index].to_numpy()).mean().mean()


def combinations(metrics: pd.DataFrame, kinds: "pd.Series[str]") -> tuple["pd.Series[float]", float]:
    """The mean swing of every non-negative combination, and the largest size of a random direction's."""
    return mean_swings(metrics, kinds, "combination"), float(mean_swings(metrics, kinds, "random").abs().max())


def is_cone(metrics: pd.DataFrame, kinds: "pd.Series[str]") -> bool:
    """The stronger sense: every combination lies beyond all random directions."""
    found, limit = combinations(metrics, kinds)
    return bool((found > limit).all())


def tests(metrics: pd.DataFrame, kinds: "pd.Series[str]", seed: int) -> pd.DataFrame:
    """The plan's two comparisons with Holm's correction: index causes and geometry; `value, low, high, p, p_holm`."""
    found = contrast(swings(metrics, "category"), kinds, seed)
    causes = {"value": found.value, **vars(found.interval), "p": found.p}
    made = pd.DataFrame({"causes": causes, "geometry": cone_tables.unbiased_test(metrics)}).T
    return made.assign(p_holm=pd.Series(statistics.holm(made["p"].to_dict())))


def verdict(found: Contrast, p_holm: float, matrix: pd.DataFrame, limit: float) -> str:
    """The plan's rule: separate, shared, partly shared or inconclusive.

    Args:
        found: The contrast of the category directions' swings.
        p_holm: Its p after Holm's correction.
        matrix: From `causes`.
        limit: The largest size of a random direction's mean swing.
    """
    if not found.own > limit:
        return "inconclusive"
    clear = p_holm < plan()["level"]
    if clear and found.interval.low > rule()["separate_share"] * found.own:
        return "separate"
    if found.interval.high < rule()["shared_share"] * found.own and bool(matrix["beyond"].all()):
        return "shared"
    return "partly shared" if clear else "inconclusive"


def judged(metrics: pd.DataFrame, kinds: "pd.Series[str]", seed: int) -> str:
    """The verdict from a record's metrics."""
    found = contrast(swings(metrics, "category"), kinds, seed)
    p_holm = float(tests(metrics, kinds, seed).loc["causes", "p_holm"])
    return verdict(found, p_holm, causes(metrics, kinds), combinations(metrics, kinds)[1])


# ---- completions


def refused(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """Whether each prompt (columns) is refused under each condition (rows), as 0 and 1, of one part of the record."""
    rows = frame[frame["experiment"] == f"{NOTEBOOK} {part}"]
    wide = rows.assign(refused=(rows["label"] == "refusal").astype(float)).pivot(
        index="condition", columns="prompt_id", values="refused"
    )
    if wide.isna().any(axis=None):
        raise CompendiumError("the record lacks a completion of some prompt under some condition: measure it again.")
    return wide


def generated(frame: pd.DataFrame, operation: str, family: str = "category") -> pd.DataFrame:
    """What each direction of a family does to the refusal of each prompt: rows by member, columns by prompt.

    Args:
        frame: The record.
        operation: "add": refusal at alpha = +1 minus refusal at -1. "ablate": refusal without steering minus refusal
            under ablation, so that both are positive where the direction carries refusal.
        family: "category", "random" or "combination".
    """
    answers = refused(frame, "combinations" if family == "combination" else "causes")
    ids = frame[frame["direction_id"].map(family_of) == family]["direction_id"].drop_duplicates()
    if operation == "add":
        made = {member_of(one): answers.loc[f"{one} +1"] - answers.loc[f"{one} -1"] for one in ids}
    else:
        made = {member_of(one): answers.loc["baseline"] - answers.loc[f"ablate {one}"] for one in ids}
    return pd.DataFrame(made).T


def secondary(frame: pd.DataFrame, metrics: pd.DataFrame, seed: int) -> dict[str, Contrast]:
    """Contrasts of what decides nothing: other directions by the screen, and the categories' by completions."""
    kinds = kinds_of(frame)
    found: Mapping[str, pd.DataFrame] = {
        "rest": swings(metrics, "rest"),
        "topic": swings(metrics, "topic"),
        "added": generated(frame, "add"),
        "ablated": generated(frame, "ablate"),
    }
    return {name: contrast(effects, kinds, seed) for name, effects in found.items()}
