"""What the sweep says: how well the screen predicts, how sharp the layer is, and both in words (methods, section 9)."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from refusal import records, statistics
from refusal.analyses import plan
from refusal.files import ROOT
from refusal.statistics import Interval
from refusal.sweep_cells import gates, log_odds, means, selected_layer
from refusal.wording import detectable, percent, rated, span

HEADLINES = {
    "SweepPassed": "sweep: confirmed cells that pass all three gates",
    "SweepPassedHolm": "sweep: the same with Holm's correction",
    "SweepCorrelation": "sweep: rank correlation of screen and generated refusal",
    "SweepCorrelationInterval": "sweep: its interval",
    "SweepEffectLayer": "sweep: layer with the largest effect by the screen",
}
DRAWS = 2000
PROSE = {
    "gates": """
Of {SweepConfirmed} confirmed cells, **{SweepPassed} pass all three gates** ({SweepPassedPlus} with alpha above 0,
{SweepPassedMinus} with alpha below 0); {SweepSpecific} are specific, {SweepCoherent} coherent, {SweepEffective}
effective.

- Unsteered, {SweepBaseline} % {SweepBaselineInterval} of {SweepConfirmHarmful} harmful requests are refused, and
  {SweepHarmlessBaseline} % {SweepHarmlessBaselineInterval} of {SweepConfirmHarmless} harmless ones.
- Largest rise among the cells that pass: {SweepLargestRise}. Largest fall: {SweepLargestFall}.
- The random direction changes refusal of harmful requests by at most {SweepRandomLargest} points at any of these cells.
- **Multiplicity.** The study's gates are uncorrected, a test a cell. Where steering did nothing, no more than
  {SweepChance} of {SweepConfirmed} cells would be specific by chance (half of the level, since the sign has to fit),
  and about {SweepChanceEffective} effective. With Holm's correction of the first gate over the cells,
  {SweepPassedHolm} pass all three. The same prompts answer at all cells, so that cells of neighbouring layers or alphas
  do not confirm each other independently.
- {SweepPower}
""",
    "prediction": """
Over the {SweepConfirmed} confirmed cells, Spearman's correlation of the screen with the generated refusal rate is
**{SweepCorrelation}** {SweepCorrelationInterval}: {SweepPrediction}. Cells at both ends were picked for being extreme,
which alone makes a correlation larger; among the {SweepSpacedCells} evenly spaced ones it is {SweepSpaced}
{SweepSpacedInterval}. The interval resamples cells as if they had been drawn at random, which they were not.
""",
    "layers": """
On harmful selection prompts the effect of one mean difference (alpha = 1 against alpha = -1) is largest at layer
**{SweepEffectLayer}**, with {SweepEffect} {SweepEffectInterval} in log-odds; that layer is the best in
{SweepBestShare} % of resampled sets of prompts. Layers whose effect lies within its interval: {SweepNear}
({SweepNearCount} of {SweepLayers}). The layer that the rule of notebook 01 selected, {SweepSelected}, ranks
{SweepSelectedRank} of {SweepLayers}, with {SweepSelectedEffect}. (The rule looks at harmless selection prompts as well,
and not at the first and last layers.)
""",
    "study": """
The study states about {SweepStudyHours} hours a model for a full sweep, on a GPU with at least {SweepStudyMemory} GB.
The example in its README has {SweepStudyExample} cells and its script's default {SweepStudyDefault}, none with a
negative alpha. The largest sweep in its repository has {SweepStudyCells} cells of {SweepStudyPrompts} prompts (the
baseline anew for every layer). At {SweepStudyFlipped} of them all {SweepStudyPrompts} prompts "flipped", and at
{SweepStudyCoherent} of those at least {SweepStudyEnough} answers were coherent by its own rule; the cell that it calls
best has no coherent answer.

Here, {SweepCells} cells were screened and {SweepConfirmed} confirmed, with {SweepReadings} first-token readings and
{SweepCompletions} completions, in **{SweepWall} minutes** on {SweepThreads} processor threads, with {SweepPeak} GB of
memory. Times do not compare between models of different size. The work that is saved does: a reading takes one pass
where a completion takes one a token, and the unsteered part of a pass is computed once for all cells.
""",
}


@functools.cache
def study() -> dict[str, str]:
    """What the study states of its sweeps and what its repository holds, from the data file, by macro name."""
    table = pd.read_csv(ROOT / "data" / "study_sweep.csv", dtype=str)
    return {f"SweepStudy{name}": value for name, value in zip(table["name"], table["value"], strict=True)}


def baseline(frame: pd.DataFrame, metrics: pd.DataFrame) -> "pd.Series[Any]":
    """The unsteered model: `screen`, and refusal of harmful (`rate ...`) and of harmless requests (`harmless ...`)."""
    rows = frame[frame["condition"] == "baseline"]
    refused, harmful = rows["label"] == "refusal", rows["prompt_set"].map(records.is_harmful)
    found, other = (
        statistics.rate(refused[which], rows[which]["cluster"], plan()["confidence"]) for which in (harmful, ~harmful)
    )
    return pd.Series(
        {"screen": means(metrics).loc[(-1, 0.0), "harmful"], "rate": found.estimate, "low": found.interval.low,
         "high": found.interval.high, "n": found.n, "harmless": other.estimate, "harmless_low": other.interval.low,
         "harmless_high": other.interval.high, "harmless_n": other.n}
    )  # fmt: skip


def rank_correlation(screen: ArrayLike, rate: ArrayLike, seed: int, draws: int = DRAWS) -> tuple[float, Interval]:
    """Spearman's correlation over cells, with a 95 % bootstrap interval that resamples whole cells.

    The resampled unit is a cell's number, so that its two values stay together. NaN where one side is constant, or for
    fewer than 4 cells. Measured coverage over 16 cells at correlations of 0, .68 and .92: .97, .94, .98.

    Args:
        screen: Mean log-odds `[cells]`.
        rate: Generated refusal rates `[cells]`.
        seed: Of the bootstrap.
        draws: Resamples.
    """
    x, y = np.asarray(screen, dtype=float), np.asarray(rate, dtype=float)
    if len(x) < 4 or min(np.ptp(x), np.ptp(y)) == 0:
        return math.nan, Interval(math.nan, math.nan)

    def spearman(which: NDArray, axis: int = -1) -> NDArray:
        ranks = [stats.rankdata(side[np.asarray(which, dtype=int)], axis=axis) for side in (x, y)]
        a, b = (one - one.mean(axis, keepdims=True) for one in ranks)
        with np.errstate(invalid="ignore"):  # a resample may hold equal rates only: no correlation
            return np.nan_to_num((a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis)))

    interval = statistics.bootstrap_interval(spearman, np.arange(len(x)), seed=seed, draws=draws)
    return float(stats.spearmanr(x, y).statistic), interval


def predictions(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """How well the screen ranks cells: over all confirmed ones (the plan's), and over parts of them (exploratory).

    Choosing cells for being extreme makes a correlation larger by itself, and the two signs of alpha could make one.

    Args:
        table: From `sweep_cells.gates`.
        seed: Of the bootstrap.

    Returns:
        `over, cells, rho, low, high`.
    """
    parts = {
        "all confirmed cells": table["rank"] > 0,
        "evenly spaced cells only": table["group"] == "spaced",
        "alpha > 0 only": table["alpha"] > 0,
        "alpha < 0 only": table["alpha"] < 0,
    }
    rows = []
    for name, mask in parts.items():
        rho, interval = rank_correlation(table[mask]["screen"], table[mask]["rate"], seed)
        rows.append({"over": name, "cells": int(mask.sum()), "rho": rho} | vars(interval))
    return pd.DataFrame(rows)


def layers(metrics: pd.DataFrame, seed: int, draws: int = DRAWS) -> pd.DataFrame:
    """The effect of each layer on harmful selection prompts: mean log-odds at alpha = 1 minus those at alpha = -1.

    Args:
        metrics: From `sweep_cells.screen`.
        seed: Of the bootstrap over prompts.
        draws: Resamples.

    Returns:
        `layer`; `effect`, with `low, high` (95 %, percentiles); `rank` (1 is the largest); `near` (the effect lies
        within the interval of the largest one); `best` (share of the resamples in which it is the largest).
    """
    part = log_odds(metrics)
    part = part[(part["side"] == "harmful") & part["alpha"].abs().eq(1)]
    wide = part.pivot(index="prompt_id", columns=["alpha", "layer"], values="value")
    swing = (wide[1.0] - wide[-1.0]).sort_index(axis=1)
    n = len(swing)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
    drawn = weights @ swing.to_numpy()  # [draws, layers]: a prompt's layers stay together
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    table = pd.DataFrame({"effect": swing.mean(), "low": low, "high": high}).rename_axis("layer")
    table["rank"] = table["effect"].rank(ascending=False, method="first").astype(int)
    table["near"] = table["effect"] >= table.loc[table["effect"].idxmax(), "low"]
    table["best"] = np.bincount(drawn.argmax(1), minlength=len(table)) / draws
    return table.reset_index()


def _ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words: "3–5, 9"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if not spans or number != spans[-1][-1] + 1:
            spans.append([])
        spans[-1].append(number)
    return ", ".join("–".join(map(str, sorted({one[0], one[-1]}))) for one in spans)


def _correlation(row: "pd.Series[Any]") -> tuple[str, str]:
    """Its value and interval, as strings."""
    if math.isnan(row["rho"]):
        return "undefined", "(too few different cells)"
    return f"{row['rho']:.2f}", span(Interval(row["low"], row["high"]), 1, 2)


def _prediction(row: "pd.Series[Any]") -> str:
    if math.isnan(row["rho"]):
        return "there was nothing to predict"
    if row["low"] > 0:
        return "the screen ranks cells as generation does"
    return "the screen ranks cells the wrong way round" if row["high"] < 0 else "no correlation could be detected"


def _power(n: int, rate: float) -> str:
    return detectable(
        n,
        rate,
        "With {n} prompts a cell, a difference of {points} points or more from the random direction would be found "
        "with a chance of 80 % (before any correction, and if the answers to a prompt were independent).",
        "With {n} prompts a cell, no difference from the random direction would be found with a chance of 80 %.",
    )


def _largest(passed: pd.DataFrame, sign: int, base: "pd.Series[Any]") -> str:
    """The cell with the largest change in one direction, in words."""
    moved = passed[passed["change"] * sign > 0]
    if moved.empty:
        return "none"
    cell = moved.loc[(moved["change"] * sign).idxmax()]
    return (
        f"{_cell(cell)} (refusal of harmful requests from {percent(base['rate'])} to {percent(cell['rate'])} %, of "
        f"harmless ones from {percent(base['harmless'])} to {percent(cell['harmless'])} %)"
    )


def _cell(cell: "pd.Series[Any]") -> str:
    return f"layer {cell['layer']:.0f} at α = {cell['alpha']:+g}"


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 06, by macro name.

    Args:
        frame: The record's completions.
        metrics: Its metrics.
        about: Its metadata.
    """
    seed, level = about["parameters"]["seed"], plan()["level"]
    table = gates(frame, metrics, bool(about["parameters"]["n_prompts"]))
    effect, mean = layers(metrics, seed).set_index("layer"), means(metrics)
    best, selected = int(effect["effect"].idxmax()), selected_layer(metrics)
    over = predictions(table, seed).set_index("over")
    whole, spaced = over.loc["all confirmed cells"], over.loc["evenly spaced cells only"]
    readings = log_odds(metrics)
    screened = readings.groupby("side")["prompt_id"].nunique()
    steered = mean.drop(-1, level="layer")
    base = baseline(frame, metrics)
    passed, ends = table[table["passed"]], {"High": table.iloc[0], "Low": table.iloc[-1]}
    said = {
        "SweepLayers": str(len(effect)),
        "SweepAlphas": str(mean.index.get_level_values("alpha").nunique()),
        "SweepAlphaLargest": f"{steered.index.get_level_values('alpha').max():g}",
        "SweepCells": str(len(steered)),
        "SweepReadings": f"{len(readings):,}",
        "SweepCompletions": f"{len(frame):,}",
        "SweepScreenHarmful": str(screened["harmful"]),
        "SweepScreenHarmless": str(screened["harmless"]),
        "SweepScreenBaseline": f"{base['screen']:+.1f}",
        "SweepConfirmed": str(len(table)),
        "SweepConfirmHarmful": f"{base['n']:.0f}",
        "SweepConfirmHarmless": f"{base['harmless_n']:.0f}",
        **rated("SweepBaseline", *base[["rate", "low", "high"]]),
        **rated("SweepHarmlessBaseline", *base[["harmless", "harmless_low", "harmless_high"]]),
        "SweepPassedPlus": str(int((passed["alpha"] > 0).sum())),
        "SweepPassedMinus": str(int((passed["alpha"] < 0).sum())),
        "SweepPassedHolm": str(int((passed["p_holm"] < level).sum())),
        "SweepChance": f"{len(table) * level / 2:.1f}",
        "SweepChanceEffective": f"{len(table) * level:.1f}",
        "SweepLargestRise": _largest(passed, 1, base),
        "SweepLargestFall": _largest(passed, -1, base),
        "SweepRandomLargest": f"{100 * (table['random'] - base['rate']).abs().max():.1f}",
        "SweepPower": _power(int(base["n"]), float(base["rate"])),
        "SweepCorrelation": _correlation(whole)[0],
        "SweepCorrelationInterval": _correlation(whole)[1],
        "SweepPrediction": _prediction(whole),
        "SweepEnds": str(int((table["group"] == "highest").sum())),
        "SweepSpacedCells": f"{spaced['cells']:.0f}",
        "SweepSpaced": _correlation(spaced)[0],
        "SweepSpacedInterval": _correlation(spaced)[1],
        "SweepEffectLayer": str(best),
        "SweepEffect": f"{effect.loc[best, 'effect']:+.1f}",
        "SweepEffectInterval": span(Interval(effect.loc[best, "low"], effect.loc[best, "high"]), 1),
        "SweepBestShare": f"{100 * effect.loc[best, 'best']:.0f}",
        "SweepNear": _ranges(effect.index[effect["near"]]),
        "SweepNearCount": str(int(effect["near"].sum())),
        "SweepSelected": str(selected),
        "SweepSelectedRank": str(effect.loc[selected, "rank"]),
        "SweepSelectedEffect": f"{effect.loc[selected, 'effect']:+.1f}",
        "SweepWall": f"{about['wall_s'] / 60:.1f}",
        "SweepThreads": str(about["threads"]),
        "SweepPeak": f"{about['peak_gb']:.1f}",
    }
    for name, cell in ends.items():
        said |= {f"Sweep{name}": _cell(cell), f"Sweep{name}Screen": f"{cell['screen']:+.1f}"}
        said |= rated(f"Sweep{name}Rate", cell["rate"], cell["low"], cell["high"])
    for gate in ("specific", "coherent", "effective", "passed"):
        said[f"Sweep{gate.capitalize()}"] = str(int(table[gate].sum()))
    return said | study()


def prose(said: Mapping[str, str], part: str) -> str:
    """What the notebook says in words, from `numbers`; the parts are gates, prediction, layers and study."""
    return PROSE[part].format(**said)
