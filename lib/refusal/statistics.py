"""Intervals and tests of the data analysis plan (methods, section 5): rates, paired comparisons, families, power.

n is given as prompts *and* clusters. Prompts are independent where each is its own cluster; else clusters are the unit.
Measured coverage of the 95 % intervals: Wilson .950 and Tango .953 on average; for 10 | 40 clusters of 10 prompts with
an intraclass correlation of .1 to .6, at rates .3 to .7: t .93-.95 | .95, score .95-.97 | .95-.96; at .1 and .2: t
.84-.94 | .91-.95, score .90-.96 | .94-.95; at .05: t .88-.93 | .86-.92, score .98 | .90-.94; paired differences: t
.90-.95 | .93-.96. The study's way (100 prompts of 10 clusters, as if independent): .83 at .1, .66 at .3, .53 at .6.
"""

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from statsmodels.stats import multitest, proportion
from statsmodels.stats.power import NormalIndPower

from refusal.files import CompendiumError


@dataclass(frozen=True)
class Interval:
    """The two ends of a confidence interval, in the unit of what it is about."""

    low: float
    high: float


@dataclass(frozen=True)
class Rate:
    """k of n prompts, which lie in so many clusters; `method` says how the interval was made."""

    k: int
    n: int
    clusters: int
    estimate: float
    interval: Interval
    effective_n: float
    method: str


@dataclass(frozen=True)
class Paired:
    """Two conditions on the same prompts: `difference` is the first rate minus the second, p exact, p_mid its mid-p."""

    n: int
    clusters: int
    only_first: int
    only_second: int
    difference: float
    interval: Interval
    p: float
    p_mid: float
    method: str


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests at 5 %: `p` is the larger of the two, `interval` the 90 % one to lie within +-margin."""

    n: int
    clusters: int
    difference: float
    margin: float
    interval: Interval
    p: float
    method: str


def wilson(k: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's (1927) score interval of k in n; CompendiumError where n is not positive or k outside [0, n]."""
    if not (n > 0 and 0 <= k <= n):
        raise CompendiumError(f"a rate of {k} in {n} does not exist: count at least one prompt, and k between 0 and n.")
    low, high = proportion.proportion_confint(k, n, alpha=1 - level, method="wilson")
    return Interval(0.0 if k == 0 else float(low), 1.0 if k == n else float(high))


def tango(only_first: float, only_second: float, n: float, level: float = 0.95) -> Interval:
    """Score interval of a paired difference, first minus second (Tango, 1998, Statistics in Medicine 17, 891-908)."""
    z = float(stats.norm.isf((1 - level) / 2))

    def upper(b: float, c: float) -> float:  # the bracket starts beside the estimate: b = c = 0 has a second root there
        start, excess = (b - c) / n + 1e-12, lambda delta: b - c - n * delta + z * _tango_sd(b, c, n, delta)
        return float(optimize.brentq(excess, start, 1.0, xtol=1e-12)) if b - c < n else 1.0

    return Interval(-upper(only_second, only_first), upper(only_first, only_second))


def _tango_sd(b: float, c: float, n: float, delta: float) -> float:
    """Standard deviation of b - c where the true difference is delta, by constrained maximum likelihood."""
    linear = (2 * n - b + c) * delta - b - c
    share = (np.sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0.0)) - linear) / (4 * n)
    return float(np.sqrt(max(n * (2 * share + delta * (1 - delta)), 0.0)))


def pair(frame: pd.DataFrame, first_condition: str, second_condition: str, value: str) -> tuple[NDArray, ...]:
    """Two conditions of a record (one model, one experiment) joined on prompt_id, whatever the order of the rows.

    `frame` has the columns condition, prompt_id, cluster and `value`, a boolean one, such as `refused` after
    `frame.assign(refused=frame["label"] == "refusal")`. Returns first, second (bool) and clusters, each of shape
    (prompts,), sorted by prompt_id: the arguments of `paired`.

    Raises:
        CompendiumError: A missing column or condition, a missing or doubled prompt, or two clusters for one prompt.
    """
    names = (first_condition, second_condition)
    absent = [column for column in ("condition", "prompt_id", "cluster", value) if column not in frame]
    if absent or frame[value].dtype != bool:
        raise CompendiumError(f"the record needs a column {absent[0] if absent else f'{value} of true and false'}.")
    unknown = [name for name in names if not (frame["condition"] == name).any()]
    if unknown:
        raise CompendiumError(f"the record has no condition {unknown[0]!r}: it has {sorted(set(frame['condition']))}.")
    rows = frame[frame["condition"].isin(names)].sort_values("prompt_id")
    arms, prompts = [rows[rows["condition"] == name] for name in names], rows.groupby("prompt_id")
    faults = {"more than one cluster": prompts["cluster"].nunique(dropna=False) > 1}
    for name, arm in zip(names, arms, strict=True):
        count = arm["prompt_id"].value_counts().reindex(list(prompts.groups), fill_value=0)
        faults |= {f"no row under {name!r}": count == 0, f"more than one row under {name!r}": count > 1}
    for fault, wrong in faults.items():
        if wrong.any():
            ids = ", ".join(map(str, wrong.index[wrong][:5])) + (
                f" and {wrong.sum() - 5} more" if wrong.sum() > 5 else ""
            )
            raise CompendiumError(f"{names[0]!r} and {names[1]!r} cannot be paired: the record has {fault} for {ids}.")
    return arms[0][value].to_numpy(bool), arms[1][value].to_numpy(bool), arms[0]["cluster"].to_numpy(object)


def _columns(clusters: ArrayLike, *arms: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Values as 0 and 1, shape (arms, n), cluster numbers, shape (n,), and the number of clusters."""
    names, values = np.asarray(clusters, dtype=object), [np.asarray(arm, dtype=object) for arm in arms]
    if names.ndim != 1 or not len(names) or any(arm.shape != names.shape for arm in values):
        shapes = ", ".join(str(array.shape) for array in [*values, names])
        raise CompendiumError(f"values and clusters need one entry a prompt, and have the shapes {shapes}: pair them.")
    if pd.isna(names).any():
        raise CompendiumError("a prompt has no cluster: give its base prompt's id, or its own id where it has none.")
    if any(pd.isna(arm).any() or not set(arm) <= {0, 1} for arm in values):
        raise CompendiumError("rates are counted from true and false, and some value is neither: compare labels first.")
    codes, levels = pd.factorize(names)
    return np.stack(values).astype(np.int64), codes.astype(np.int64), len(levels)


def _cluster_t(x: NDArray[np.int64], codes: NDArray[np.int64], groups: int, level: float) -> tuple[float, float]:
    """Standard error of the cluster means (of unequal sizes: of the ratio; 0 where all are equal); quantile of t."""
    totals = np.bincount(codes, weights=x - x.mean())
    variance = totals @ totals * groups / (groups - 1) / len(x) ** 2
    return float(np.sqrt(variance)) if variance > 1e-16 else 0.0, float(stats.t.isf((1 - level) / 2, groups - 1))


def rate(values: ArrayLike, clusters: ArrayLike, level: float = 0.95, how: Literal["t", "score"] = "t") -> Rate:
    """A rate with its interval: Wilson for independent prompts, else from the cluster means with G - 1 df.

    `values` (true or false) and `clusters` have one entry a prompt. `how` is "t" on the cluster means, or "score":
    Wilson at Korn and Graubard's (1998) effective n. Where all cluster means are equal, their spread would give a width
    of zero; then it is Wilson at n = clusters.

    Raises:
        CompendiumError: Nothing to count, unequal lengths, a missing cluster, or a value that is not true or false.
    """
    (x,), codes, groups = _columns(clusters, values)
    n, k, estimate = len(x), int(x.sum()), float(x.mean())
    result = partial(Rate, k, n, groups, estimate)
    if groups == n:
        return result(wilson(k, n, level), float(n), "Wilson")
    if groups == 1:
        return result(Interval(0.0, 1.0), 1.0, "none: a single cluster says nothing of others")
    se, t = _cluster_t(x, codes, groups, level)
    if se == 0:
        return result(wilson(estimate * groups, groups, level), float(groups), "Wilson at n = clusters (equal means)")
    effective = min(float(n), estimate * (1 - estimate) / se**2)  # n over the design effect
    if how == "score":
        fewer = effective * (float(stats.norm.isf((1 - level) / 2)) / t) ** 2
        return result(wilson(estimate * fewer, fewer, level), effective, f"Wilson at the effective n, {groups - 1} df")
    interval = Interval(max(0.0, estimate - t * se), min(1.0, estimate + t * se))
    return result(interval, effective, f"t on cluster means, {groups - 1} df")


def sign_flips(sums: ArrayLike) -> tuple[float, float]:
    """Two-sided p and mid-p of a total of whole numbers, each of whose signs is as likely as not under the null.

    The distribution over all 2^G flips is built one number at a time, so it is exact for any G. With sums of -1, 0
    and 1 it is McNemar's exact test, with the mid-p of Fagerland, Lydersen and Laake (2013).
    """
    signed = np.asarray(sums, dtype=np.int64)
    chances = np.ones(1)  # of the totals -reach, ... reach
    for step in np.abs(signed[signed != 0]):
        chances = (np.append(chances, np.zeros(2 * step)) + np.append(np.zeros(2 * step), chances)) / 2
    distance = np.abs(np.arange(len(chances)) - len(chances) // 2) - abs(int(signed.sum()))
    beyond, ties = float(chances[distance > 0].sum()), float(chances[distance == 0].sum())
    return beyond + ties, beyond + ties / 2


def _difference(x: NDArray, codes: NDArray, groups: int, level: float) -> tuple[Interval, Callable, str]:
    """Interval of a mean difference, the chance of one as low as this where the truth is delta, and the method."""
    n, mean = len(x), float(x.mean())
    se, t = _cluster_t(x, codes, groups, level) if 1 < groups < n else (0.0, 0.0)
    if se > 0:
        interval = Interval(max(-1.0, mean - t * se), min(1.0, mean + t * se))
        return interval, lambda delta: stats.t.cdf((mean - delta) / se, groups - 1), f"t, {groups - 1} df"
    b, c = int((x > 0).sum()) * groups / n, int((x < 0).sum()) * groups / n
    score = lambda delta: (b - c - groups * delta) / _tango_sd(b, c, groups, delta)  # noqa: E731
    how = "Tango" if groups == n else "Tango at n = clusters (equal means)"
    return tango(b, c, groups, level), lambda delta: stats.norm.cdf(score(delta)), how


def paired(first: ArrayLike, second: ArrayLike, clusters: ArrayLike, level: float = 0.95) -> Paired:
    """Two conditions on the same prompts in the same order (`pair` makes sure of that); errors as in `rate`.

    Independent prompts: McNemar exact, Tango's interval. Clusters: exact sign flips of whole clusters, and t with G - 1
    on the clusters' mean differences (Tango at n = clusters where those are all equal).
    """
    (x, y), codes, groups = _columns(clusters, first, second)
    p, p_mid = sign_flips(np.bincount(codes, weights=x - y))
    interval, _, how = _difference(x - y, codes, groups, level)
    method = f"{'McNemar exact' if groups == len(x) else 'exact sign flips of whole clusters'}; interval: {how}"
    only = int((x > y).sum()), int((x < y).sum())
    return Paired(len(x), groups, *only, float((x - y).mean()), interval, p, p_mid, method)


def equivalence(first: ArrayLike, second: ArrayLike, clusters: ArrayLike, margin: float = 0.10) -> Equivalence:
    """Two one-sided tests that a paired difference lies within +-margin, by Tango's score or t on the cluster means."""
    (x, y), codes, groups = _columns(clusters, first, second)
    interval, lower, how = _difference(x - y, codes, groups, 0.90)
    p, difference = float(max(1 - lower(-margin), lower(margin))), float((x - y).mean())
    return Equivalence(len(x), groups, difference, margin, interval, p, f"two one-sided tests, {how}")


def two_proportions(k1: int, n1: int, k2: int, n2: int) -> tuple[float, float]:
    """The study's tests, as if prompts were independent and unpaired: p of the pooled z, p of Fisher's exact test."""
    z = 1.0 if k1 + k2 in (0, n1 + n2) else float(proportion.proportions_ztest([k1, k2], [n1, n2])[1])
    return z, float(stats.fisher_exact([[k1, n1 - k1], [k2, n2 - k2]])[1])


def power_two_proportions(p1: float, p2: float, n: int) -> float:
    """Power of a two-sided z test at 5 % with n independent prompts a condition (Cohen's h; Cohen, 1988)."""
    return float(NormalIndPower().power(proportion.proportion_effectsize(p1, p2), n, alpha=0.05))


def power_mcnemar(n: int, p1: float, p2: float) -> float:
    """Exact power at 5 % of McNemar's exact test for rates p1 and p2, independent within each of n pairs."""
    only_first, only_second = p1 * (1 - p2), p2 * (1 - p1)
    disagree, counts = only_first + only_second, np.arange(n + 1)
    limit = stats.binom.ppf(0.025, counts, 0.5)  # reject where the rarer kind of disagreement is at most this
    limit = np.where(stats.binom.cdf(limit, counts, 0.5) <= 0.025, limit, limit - 1)
    share = only_first / disagree if disagree else 0.5
    rejected = stats.binom.cdf(limit, counts, share) + stats.binom.cdf(limit, counts, 1 - share)
    return float(stats.binom.pmf(counts, n, disagree) @ rejected)


def smallest_detectable_difference(n: int, baseline: float, power: float = 0.8) -> float:
    """The smallest difference (> 0) that McNemar's exact test finds with this power, on the side with more room.

    Discordance: both answers to a prompt are taken as independent, which is cautious. With clusters give the effective
    n, rounded down. nan where not even the largest possible difference is found.
    """
    low = min(baseline, 1 - baseline)
    if power_mcnemar(n, 1.0, low) < power:
        return float("nan")
    return float(optimize.brentq(lambda d: power_mcnemar(n, low + d, low) - power, 0.0, 1 - low, xtol=1e-6))


def holm(pvalues: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) adjusted p values of one family, under the same names and in the same order."""
    if not all(0 <= p <= 1 for p in pvalues.values()):
        raise CompendiumError(f"a family of p values holds one outside [0, 1]: {dict(pvalues)}.")
    gc.freeze()  # multipletests collects garbage, which takes half a second where torch has been imported
    try:
        adjusted = multitest.multipletests(list(pvalues.values()), method="holm")[1].tolist() if pvalues else []
    finally:
        gc.unfreeze()
    return dict(zip(pvalues, adjusted, strict=True))


def bootstrap_interval(statistic: Callable, *samples: ArrayLike, seed: int, draws: int = 1000) -> Interval:
    """95 % bootstrap interval (bias-corrected, accelerated), resampling each sample, of shape (size,), independently.

    `statistic` takes samples of any size; one with an `axis` argument gets all resamples at once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of that degenerate case, which is dealt with below
        drawn = stats.bootstrap(samples, statistic, n_resamples=draws, method="BCa", rng=np.random.default_rng(seed))
    ends = np.array(drawn.confidence_interval)
    ends = ends if np.isfinite(ends).all() else np.quantile(drawn.bootstrap_distribution, [0.025, 0.975])
    return Interval(float(ends[0]), float(ends[1]))
