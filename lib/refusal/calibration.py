"""Do intervals cover what they should, and do tests reject as rarely as they should? By enumeration or simulation.

Clustered prompts are beta-binomial: each base prompt has a rate of its own, and `icc` is the correlation of two prompts
that share one. "As independent" is the study's way: prompts of few base requests, counted as if each were its own.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from refusal import statistics
from refusal.statistics import Interval
from refusal.wording import percent

EXPERIMENT = "calibration"
SIZE = 10  # prompts a cluster, as in the study's layout
CLUSTERS = (10, 40)
RATES = (0.05, 0.1, 0.3, 0.5)
CORRELATIONS = (0.1, 0.3, 0.6)
METHODS = {
    "t": "t on cluster means",
    "score": "Wilson at the effective n",
    "independent": "as independent (the study's way)",
}
PLAIN = 0.3  # from this rate on, few clusters suffice
BAND = (0.93, 0.97)  # of the cluster methods
LEVEL = 0.05
HEADLINES = {
    "CalibrationScoreWithin": "coverage of our clustered 95 % intervals at rates of 30 and 50 %, %",
    "CalibrationStudyWay": "the same of the study's way at all rates, %",
}


def covers(interval: Interval, truth: float) -> bool:
    """Whether the truth lies in the interval."""
    return interval.low <= truth <= interval.high


def clustered(
    rng: np.random.Generator, draws: int, clusters: int, rate: float, icc: float, size: int = SIZE
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Beta-binomial prompts: answers `[draws, clusters x size]`, and the clusters' own rates `[draws, clusters]`."""
    shape = (1 - icc) / icc
    own = rng.beta(rate * shape, (1 - rate) * shape, (draws, clusters))
    return (rng.random((draws, clusters, size)) < own[..., None]).reshape(draws, -1), own


# ---- independent prompts, by enumeration


def wilson_coverage(n: int, rates: Sequence[float] | NDArray = np.linspace(0.05, 0.95, 181)) -> NDArray[np.float64]:  # noqa: B008
    """The exact coverage of Wilson's interval of n prompts at each rate."""
    lows, highs = np.array([(i.low, i.high) for i in (statistics.wilson(k, n) for k in range(n + 1))]).T
    truth = np.asarray(rates)[:, None]
    return (stats.binom.pmf(np.arange(n + 1), n, truth) * ((lows <= truth) & (truth <= highs))).sum(1)


def tango_coverage(n: int, *, draws: int = 200, seed: int = 1) -> NDArray[np.float64]:
    """The exact coverage of Tango's interval of n pairs, at random shares of pairs that disagree either way."""
    tables = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    lows, highs = np.array([(i.low, i.high) for i in (statistics.tango(b, c, n) for b, c in tables)]).T
    b, c = np.array(tables).T
    counts, found = np.stack([b, c, n - b - c], -1), []
    for disagree, share in np.random.default_rng(seed).uniform((0.05, 0.2), (0.7, 0.8), (draws, 2)):
        p10, p01 = disagree * share, disagree * (1 - share)
        chances = stats.multinomial.pmf(counts, n, [p10, p01, 1 - p10 - p01])
        found.append(chances[(lows <= p10 - p01) & (p10 - p01 <= highs)].sum())
    return np.array(found)


def mcnemar_sizes(most: int = 60) -> NDArray[np.float64]:
    """How often McNemar's exact test rejects at 5 % under the null, for up to `most` pairs that disagree."""
    sizes = []
    for disagree in range(most + 1):
        p = np.array([statistics.sign_flips([1] * b + [-1] * (disagree - b))[0] for b in range(disagree + 1)])
        sizes.append(stats.binom.pmf(np.arange(disagree + 1), disagree, 0.5)[p <= LEVEL].sum())
    return np.array(sizes)


# ---- clusters, by simulation


def cluster_coverage(how: str, clusters: int, rate: float, icc: float, *, draws: int, seed: int) -> float:
    """Coverage of a 95 % interval of a rate over clusters of ten prompts.

    The library's interval is computed for few of the draws: it depends on the prompts only through their sum and the
    sum of the clusters' squared sums, and at one sum, a larger spread of the clusters makes it wider. So at each sum
    the spread from which on it covers is found by bisection. (All clusters alike are a case of their own.) A test
    holds this against the interval of every draw.

    Args:
        how: One of `METHODS`.
        clusters: Their number.
        rate: The true rate.
        icc: The true intraclass correlation.
        draws: Simulated studies.
        seed: Of the simulation.
    """
    rng = np.random.default_rng([seed, clusters, round(1000 * rate), round(1000 * icc)])
    values, _ = clustered(rng, draws, clusters, rate, icc)
    sums = values.reshape(draws, clusters, SIZE).sum(2)
    codes = np.repeat(np.arange(clusters), SIZE)

    def inside(row: int) -> bool:
        if how == "independent":
            return covers(statistics.wilson(int(sums[row].sum()), values.shape[1]), rate)
        return covers(statistics.rate(values[row], codes, how="t" if how == "t" else "score").interval, rate)

    keys = np.stack([sums.sum(1), (sums**2).sum(1) if how != "independent" else sums.sum(1)], 1)
    known, rows, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
    covered = 0
    for total in np.unique(known[:, 0]):
        at = np.flatnonzero(known[:, 0] == total)  # in order of the spread
        covered += int(counts[at[0]]) * inside(int(rows[at[0]]))
        wide = bisect.bisect_left(at[1:].tolist(), True, key=lambda i: inside(int(rows[i])))
        covered += int(counts[at[1 + wide :]].sum())
    return float(covered / draws)


def paired_coverage(clusters: int, *, draws: int, seed: int) -> float:
    """Coverage of the interval of a paired difference of .2, where clusters with a higher rate change more."""
    rng = np.random.default_rng(seed)
    first, own = clustered(rng, draws, clusters, 0.5, icc=0.2)
    second = rng.random(first.shape) < 0.6 * np.repeat(own, SIZE, axis=1)  # a rate of .3
    codes = np.repeat(np.arange(clusters), SIZE)
    pairs = zip(first, second, strict=True)
    return float(np.mean([covers(statistics.paired(x, y, codes).interval, 0.2) for x, y in pairs]))


def flip_sizes(clusters: int, *, draws: int, seed: int) -> tuple[float, float]:
    """How often exact flips of whole clusters, and McNemar's test on prompts, reject at 5 % under a clustered null.

    Nothing changes on average, but each base prompt moves by an amount of its own, in a direction of its own.
    """
    rng = np.random.default_rng(seed)
    own = rng.beta(2, 2, (draws, clusters, 2)).repeat(SIZE, axis=1)
    first, second = np.moveaxis(rng.random(own.shape) < own, -1, 0)
    codes = np.repeat(np.arange(clusters), SIZE)
    changes = first.astype(int) - second
    flips = [statistics.sign_flips(np.bincount(codes, weights=x).astype(int))[0] <= LEVEL for x in changes]
    counts, drawn = np.unique(np.stack([(changes > 0).sum(1), (changes < 0).sum(1)], 1), axis=0, return_counts=True)
    naive = [statistics.sign_flips([1] * b + [-1] * c)[0] <= LEVEL for b, c in counts]
    return float(np.mean(flips)), float(np.average(naive, weights=drawn))


# ---- the notebook's simulation


def simulate(*, draws: int, seed: int) -> pd.DataFrame:
    """All of it, as rows of metrics.

    Returns:
        Metrics `coverage` and `size`; `direction_id` holds the method, `draw` the number of clusters (of independent
        prompts or pairs: of these), `alpha` the true rate and `prompt_id` the intraclass correlation. What is a mean
        over rates, or has no rate, has an alpha of 0.
    """
    rows: list[tuple[str, str, int, float, str, float]] = []
    for n in (50, 100):
        rows.append(("coverage", "Wilson", n, 0.0, "", float(wilson_coverage(n).mean())))
    rows.append(("coverage", "Tango", 40, 0.0, "", float(tango_coverage(40).mean())))
    rows.append(("size", "McNemar exact", 60, 0.0, "", float(mcnemar_sizes(60).max())))
    for clusters in CLUSTERS:
        for how, icc, rate in ((h, i, r) for h in METHODS for i in CORRELATIONS for r in RATES):
            value = cluster_coverage(how, clusters, rate, icc, draws=draws, seed=seed)
            rows.append(("coverage", how, clusters, rate, f"{icc:g}", value))
        few = max(1, draws // 4)  # each draw costs a call of the library
        rows.append(("coverage", "paired t", clusters, 0.0, "", paired_coverage(clusters, draws=few, seed=seed)))
        flips, naive = flip_sizes(clusters, draws=few, seed=seed)
        rows.append(("size", "sign flips", clusters, 0.0, "", flips))
        rows.append(("size", "McNemar on prompts", clusters, 0.0, "", naive))
    return pd.DataFrame(rows, columns=["metric", "direction_id", "draw", "alpha", "prompt_id", "value"])


def table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The clustered intervals' coverage: `method, clusters, icc, rate, coverage`, and whether it is in the `band`."""
    part = metrics[(metrics["experiment"] == EXPERIMENT) & metrics["direction_id"].isin(list(METHODS))]
    made = part.rename(columns={"direction_id": "method", "draw": "clusters", "alpha": "rate", "value": "coverage"})
    made = made.assign(icc=made["prompt_id"].astype(float), band=made["coverage"].between(*BAND))
    return made[["method", "clusters", "icc", "rate", "coverage", "band"]].reset_index(drop=True)


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of the calibration, by macro name, in percent.

    Args:
        frame: A model's record of notebook 00 (not used: the simulation has no completions).
        metrics: Its metrics.
        about: Its metadata, whose parameters hold `draws`.
    """
    made, rest = table(metrics), metrics[metrics["experiment"] == EXPERIMENT]
    named = rest[~rest["direction_id"].isin(list(METHODS))].set_index(["direction_id", "draw"])["value"]
    score, t, study = (made[made["method"] == name] for name in ("score", "t", "independent"))
    few, many = CLUSTERS
    return {
        "CalibrationDraws": str(about["parameters"]["draws"]),
        "CalibrationFew": str(few),
        "CalibrationMany": str(many),
        "CalibrationSize": str(SIZE),
        "CalibrationRates": f"{100 * min(RATES):.0f} to {100 * max(RATES):.0f}",
        "CalibrationCorrelations": f"{min(CORRELATIONS):g} to {max(CORRELATIONS):g}",
        "CalibrationBand": f"{100 * BAND[0]:.0f} to {100 * BAND[1]:.0f}",
        "CalibrationWilson": percent(named["Wilson", 100]),
        "CalibrationTango": percent(named["Tango", 40]),
        "CalibrationMcnemar": percent(named["McNemar exact", 60]),
        "CalibrationScoreWithin": _range(score[score["rate"] >= PLAIN]),
        "CalibrationScoreFew": _range(score[score["clusters"] == few]),
        "CalibrationScoreMany": _range(score[score["clusters"] == many]),
        "CalibrationScoreMisses": _misses(score),
        "CalibrationTFew": _range(t[t["clusters"] == few]),
        "CalibrationTMany": _range(t[t["clusters"] == many]),
        "CalibrationTMisses": _misses(t),
        "CalibrationPairedFew": percent(named["paired t", few]),
        "CalibrationPairedMany": percent(named["paired t", many]),
        "CalibrationFlipsFew": percent(named["sign flips", few]),
        "CalibrationFlipsMany": percent(named["sign flips", many]),
        "CalibrationStudyWay": _range(study[study["clusters"] == few]),
        "CalibrationStudyRejects": percent(named["McNemar on prompts", few]),
    }


def _range(part: pd.DataFrame) -> str:
    low, high = percent(part["coverage"].min()), percent(part["coverage"].max())
    return low if low == high else f"{low} to {high}"


def _misses(part: pd.DataFrame) -> str:
    """How often a method's coverage lies outside its band, and where it lies farthest out."""
    missed = part[~part["band"]]
    if missed.empty:
        return f"in none of {len(part)} cases"
    worst = missed.loc[(missed["coverage"] - sum(BAND) / 2).abs().idxmax()]
    return (
        f"in {len(missed)} of {len(part)} cases, farthest with {percent(worst['coverage'])} % at a rate of "
        f"{100 * worst['rate']:.0f} %, {worst['clusters']} clusters and a correlation of {worst['icc']:g}"
    )


def prose(values: Mapping[str, str]) -> str:
    """What the notebook says of the calibration in words, from `numbers`."""
    v = values
    lines = [
        f"**Independent prompts.** Wilson's interval covers {v['CalibrationWilson']} % on average over rates from 5 to "
        f"95 %, Tango's of a paired difference {v['CalibrationTango']} %; McNemar's exact test rejects at most "
        f"{v['CalibrationMcnemar']} % under the null.",
        f"**Clusters of {v['CalibrationSize']} prompts.** The interval that the notebooks use (Wilson's at the "
        f"effective n) covers {v['CalibrationScoreFew']} % with {v['CalibrationFew']} clusters and "
        f"{v['CalibrationScoreMany']} % with {v['CalibrationMany']}; it lies outside the band of "
        f"{v['CalibrationBand']} % {v['CalibrationScoreMisses']}.",
        f"t on the clusters' means covers {v['CalibrationTFew']} and {v['CalibrationTMany']} %, outside the band "
        f"{v['CalibrationTMisses']}; the interval of a paired difference covers {v['CalibrationPairedFew']} and "
        f"{v['CalibrationPairedMany']} %. Flips of whole clusters reject {v['CalibrationFlipsFew']} and "
        f"{v['CalibrationFlipsMany']} % under the null.",
        f"**The study's way**, the same prompts counted as if each were independent, covers only "
        f"{v['CalibrationStudyWay']} % with {v['CalibrationFew']} clusters, and a paired test on them rejects in "
        f"{v['CalibrationStudyRejects']} % of cases where nothing changes on average.",
    ]
    return "\n".join(f"- {line}" for line in lines)
