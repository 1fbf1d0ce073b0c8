"""Format demands: do they change refusal, and where do they move the projection on the direction (methods, section 8)?

The pilot (see `window_pilot`) supposes that a demanded format acts late, where refusal has become one direction.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import statistics
from refusal.analyses import plan
from refusal.statistics import Interval
from refusal.window_answers import part, resamples, signed
from refusal.window_runs import FIRST, LAST, NONE, rule, third
from refusal.wording import detectable, p_equals, p_value, percent, points, span

FLIPS, DRAWS = 9999, 2000


def refusals(frame: pd.DataFrame) -> pd.DataFrame:
    """Refusal under each demand, unsteered, against the same prompts without a demand: the plan's comparisons.

    Args:
        frame: The record; a demand's completions are a part of its name, those without one are the baseline's.

    Returns:
        A row a demand, first `none`: `n, clusters, rate, low, high` of refusal; `degenerate, degenerate_low,
        degenerate_high`; `seed_rule` (refusals by the study's rule, a share); `change, change_low, change_high, gained,
        lost, p, p_holm` (McNemar exact, Holm over the demands).
    """
    confidence, how = plan()["confidence"], plan()["intervals"]["clusters"]
    asked = {demand: part(frame, demand) for demand in rule()["formats"]["comparisons"]}
    prompts = set().union(*(rows["prompt_id"] for rows in asked.values()))
    base = part(frame, "curves")
    base = base[(base["operation"] == "none") & base["prompt_id"].isin(prompts)]
    parts = {NONE: base, **asked}
    both = pd.concat(rows.assign(condition=demand) for demand, rows in parts.items())
    both = both.assign(refused=both["label"] == "refusal")
    table = {}
    for demand, rows in parts.items():
        first, second, clusters = statistics.pair(both, demand, NONE, "refused")
        found = statistics.rate(first, clusters, confidence, how=how)
        broken = statistics.rate(rows["label"] == "degenerate", rows["cluster"], confidence, how=how)
        change = statistics.paired(first, second, clusters, confidence)
        table[demand] = {
            "n": found.n, "clusters": found.clusters, "rate": found.estimate, "low": found.interval.low,
            "high": found.interval.high, "degenerate": broken.estimate, "degenerate_low": broken.interval.low,
            "degenerate_high": broken.interval.high,
            "seed_rule": (rows["seed_rule"] == "refusal").mean(), "change": change.difference,
            "change_low": change.interval.low, "change_high": change.interval.high, "gained": change.only_first,
            "lost": change.only_second, "p": change.p,
        }  # fmt: skip
    made = pd.DataFrame.from_dict(table, orient="index")
    made["p_holm"] = pd.Series(statistics.holm(made["p"].drop(NONE).to_dict()))
    return made


def changes(metrics: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """How each demand changes the projection, in units of raw_norm: prompts in rows, layers in columns, by demand.

    Args:
        metrics: From `window_runs.projections`, among others.
    """
    wide = {
        str(metric).removeprefix("projection "): rows.pivot(index="prompt_id", columns="layer", values="value")
        for metric, rows in metrics[metrics["metric"].str.startswith("projection ")].groupby("metric")
    }
    return {demand: wide[demand] - wide[NONE] for demand in rule()["formats"]["comparisons"]}


def by_layer(frame: pd.DataFrame, metrics: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The mean change of the projection and its mean size, by demand and layer, with 95 % bootstrap intervals.

    Returns:
        `demand, layer, statistic ("change" or "size"), value, low, high`.
    """
    rows = []
    for demand, moved in changes(metrics).items():
        weights = _weights(frame, moved, seed)
        for statistic, values in (("change", moved.to_numpy(float)), ("size", moved.abs().to_numpy(float))):
            low, high = np.quantile(weights @ values / weights.sum(1, keepdims=True), [0.025, 0.975], axis=0)
            rows.append(pd.DataFrame({"demand": demand, "layer": moved.columns.astype(int), "statistic": statistic,
                                      "value": values.mean(0), "low": low, "high": high}))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True)
class Contrast:
    """Mean size of the change in the first and the last third of the layers, and their paired difference.

    `signed` is the mean change itself over the last third: above zero is towards harmful.
    """

    first: float
    last: float
    difference: float
    interval: Interval
    p: float
    signed: float
    signed_interval: Interval
    n: int
    clusters: int


def contrast(frame: pd.DataFrame, metrics: pd.DataFrame, seed: int, demand: str = "") -> Contrast:
    """The plan's comparison of late with early layers: two-sided flips of whole clusters, bootstrap interval over them.

    Args:
        frame: The record, for the clusters of the prompts.
        metrics: From `window_runs.projections`, among others.
        seed: Of flips and bootstrap.
        demand: One of them (exploratory); "" for the mean over all (the plan's).
    """
    moved = changes(metrics)
    chosen = [moved[demand]] if demand else list(moved.values())
    size = sum(one.abs() for one in chosen) / len(chosen)
    n_layers = size.shape[1]
    first, last = (size[third(n_layers, which)].mean(axis=1) for which in (FIRST, LAST))
    difference = (last - first).to_numpy(float)
    own = (sum(chosen) / len(chosen))[third(n_layers, LAST)].mean(axis=1).to_numpy(float)
    weights = _weights(frame, size, seed)
    ends = [np.quantile(weights @ one / weights.sum(1), [0.025, 0.975]) for one in (difference, own)]
    intervals = [Interval(float(low), float(high)) for low, high in ends]
    codes, levels = pd.factorize(_clusters(frame, size))
    sums = np.bincount(codes, weights=difference)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(sums)))
    # Rounding must not tell apart a draw that flips nothing from the truth.
    as_far = int((np.abs(signs @ sums) >= np.abs(sums.sum()) * (1 - 1e-12)).sum())
    return Contrast(
        float(first.mean()),
        float(last.mean()),
        float(difference.mean()),
        intervals[0],
        (1 + as_far) / (1 + FLIPS),
        float(own.mean()),
        intervals[1],
        len(difference),
        len(levels),
    )


def _clusters(frame: pd.DataFrame, table: pd.DataFrame) -> NDArray:
    known = frame.drop_duplicates("prompt_id").set_index("prompt_id")["cluster"]
    return known.loc[table.index].to_numpy(object)


def _weights(frame: pd.DataFrame, table: pd.DataFrame, seed: int) -> NDArray[np.float64]:
    return resamples(_clusters(frame, table), DRAWS, np.random.default_rng(seed))


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, seed: int) -> dict[str, str]:
    """Formatted numbers of the format demands, by macro name; arguments as in `contrast`."""
    table, late = refusals(frame), contrast(frame, metrics, seed)
    base, worst = table.loc[NONE], table["degenerate"].idxmax()
    return {
        "WindowFormatsPrompts": str(int(base["n"])),
        "WindowFormatsBase": f"{percent(base['rate'])} {span(Interval(base['low'], base['high']))}",
        **{f"WindowFormats{one.capitalize()}": _said(table.loc[one]) for one in table.index.drop(NONE)},
        "WindowFormatsConclusion": _conclusion(table),
        "WindowFormatsBroken": f"at most {percent(table.loc[worst, 'degenerate'])} % ({worst})",
        "WindowFormatsPower": detectable(
            int(base["n"]),
            float(base["rate"]),
            "With {n} prompts, a change of {points} points or more would be found with a probability of 80 % (before "
            "correction, and if the two answers to a prompt were independent).",
            "With {n} prompts, no change of this rate would be found with a probability of 80 %.",
        ),
        "WindowProjectionFirst": f"{late.first:.2f}",
        "WindowProjectionLast": f"{late.last:.2f}",
        "WindowProjectionDifference": signed(late.difference),
        "WindowProjectionInterval": span(late.interval, 1, 2),
        "WindowProjectionP": p_value(late.p),
        "WindowProjectionSigned": signed(late.signed),
        "WindowProjectionSignedInterval": span(late.signed_interval, 1, 2),
        "WindowProjectionConclusion": _late(late),
    }


def _said(row: "pd.Series[Any]") -> str:
    change = f"{points(row['change'])} {span(Interval(row['change_low'], row['change_high']))} points"
    return f"{percent(row['rate'])} % ({change}; {p_equals(row['p'])}, Holm {p_value(row['p_holm'])})"


def _conclusion(table: pd.DataFrame) -> str:
    demands = table.drop(NONE)
    found = demands[demands["p_holm"] < plan()["level"]]
    if found.empty:
        return "By the plan's tests, no demand changes refusal detectably."
    how = ", ".join(f"{demand} {'raises' if row['change'] > 0 else 'lowers'} it" for demand, row in found.iterrows())
    return f"By the plan's tests, a demanded format changes refusal: {how}."


def _late(found: Contrast) -> str:
    if found.p >= plan()["level"]:
        return "So a difference between late and early layers could not be detected."
    if found.difference > 0:
        return "So the demands move the projection more in late layers than in early ones, as the pilot supposes."
    return "So the demands move the projection more in early layers than in late ones, unlike what the pilot supposes."
