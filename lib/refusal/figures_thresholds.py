"""Figures of notebook 04: what is said at which dose, along the extracted direction and along random ones."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from refusal import curves, thresholds
from refusal.analyses import LABELS
from refusal.curves import Curve
from refusal.figures import COLOURS, MARKERS, WIDTH
from refusal.wording import people

LINES = {"compliance": "-", "degenerate": "--"}
NOUNS = {"compliance": "compliance", "degenerate": "degeneration"}
RELATIVE = "alpha relative to the mean residual norm"
NAMES = {"refusal": "refusal", "compliance": "compliance (safety)", "degenerate": "degenerate (model)"}
SHIFT = 0.06  # of a gap of the grid, between the labels' points


def extracted(points: pd.DataFrame, made: Sequence[Curve]) -> Figure:
    """The three labels along the extracted direction, both signs on one axis, with the fits of the plan's outcomes.

    Args:
        points: From `curves.rates`.
        made: From `curves.fit`.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    _panel(axes, points, made, "extracted")
    unit = next(curve.relative[-1] / curve.alphas[-1] for curve in made if curve.direction_id == "extracted")
    top = axes.secondary_xaxis("top", functions=(lambda x: x / unit, lambda x: x * unit))
    top.set_xlabel("alpha (mean differences)")
    axes.set(xlabel=RELATIVE, ylabel="share of completions, %")
    axes.set_title(_answer(made, -1), loc="left", fontsize=8)
    axes.set_title(_answer(made, 1), loc="right", fontsize=8)
    _legend(figure)
    return figure


def randoms(points: pd.DataFrame, made: Sequence[Curve]) -> Figure:
    """The same along each random direction, a panel each: is it so regardless of direction?

    Args:
        points: From `curves.rates`.
        made: From `curves.fit`.
    """
    others = [curve for curve in made if curve.direction_id != "extracted"]
    names = list(dict.fromkeys(curve.direction_id for curve in others))
    rows = (len(names) + 1) // 2
    figure, panels = plt.subplots(rows, 2, figsize=(WIDTH, 1.1 + 1.4 * rows), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        _panel(axes, points, made, name)
        axes.set_title(name)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(RELATIVE)
    for axes in panels[:, 0]:
        axes.set_ylabel("share, %")
    said = []
    for label, noun in NOUNS.items():
        own = [curve for curve in others if curve.label == label]
        rising = [curve for curve in own if curves.change(curve.described) == "rises"]
        abrupt = sum(curve.described.verdict == "threshold" for curve in rising)
        where = f"{len(rising)} of {len(own)} random directions"
        said.append(f"{noun} rises along {where}, at a threshold along {abrupt}")
    figure.suptitle("\n".join(said), fontsize=8)
    _legend(figure)
    return figure


def study(counts: pd.DataFrame, made: dict[str, Curve], pair: tuple[float, float]) -> Figure:
    """The study's published rates with our fit of them, and the pair of alphas that it tested.

    Args:
        counts: From `collapse_study.counts`.
        made: From `collapse_study.fits`.
        pair: The two alphas.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    centre = 100 * counts["rate"]
    errors = np.abs(np.stack([centre - 100 * counts["low"], 100 * counts["high"] - centre]))
    colour, first = COLOURS["jailbreak"], next(iter(made.values()))
    axes.axvspan(*pair, color="0.9", zorder=-2, linewidth=0, label="the pair that it tested")
    axes.errorbar(counts["alpha"], centre, errors, color=colour, marker="o", linestyle="none", label="published rate")
    x = np.linspace(first.alphas[0], first.alphas[-1], 400)
    rate = 100 * curves.fitted(first.found, first.alphas, x)
    axes.plot(x, rate, color="0.25", linewidth=1.2, label="fitted logistic")
    for (way, curve), height, marker in zip(made.items(), (-9, -17), "Dd", strict=True):
        found = curve.found.alpha50_interval
        axes.plot([found.low, found.high], [height, height], color="0.25", linewidth=1.2)
        axes.plot(
            curve.found.alpha50, height, marker, color="0.25", markersize=4, label=f"half way, if answers are {way}"
        )
    axes.axhline(0, color="0.8", linewidth=0.6, zorder=-1)
    axes.set(xlabel="alpha (the study's unit)", ylabel="jailbreak rate, study's rule, %", ylim=(-23, 104))
    axes.set_yticks([0, 25, 50, 75, 100])
    width = first.found.width_interval
    axes.set_title(
        f"{people(str(counts['model'].iloc[0]))}, published counts (n = {counts['n'].iloc[0]} each)\n"
        f"{first.answer}, relative width {first.found.width:.2f} [{width.low:.2f}, {width.high:.2f}]"
    )
    axes.legend(loc="center left")
    return figure


def plotted(points: pd.DataFrame, made: Sequence[Curve], names: Sequence[str]) -> pd.DataFrame:
    """The data of a figure: the rates with intervals, and the fitted rate where there is a fit that is drawn.

    Args:
        points: From `curves.rates`.
        made: From `curves.fit`.
        names: The directions that are drawn.
    """
    columns = ["direction_id", "label", "alpha", "alpha_relative", "k", "n", "rate", "low", "high"]
    table = points[points["direction_id"].isin(names)][columns].copy()
    table["fitted"] = np.nan
    for curve in made:
        if curve.label in LINES:
            found, alphas = _drawn(curve)
            own = (table["direction_id"] == curve.direction_id) & (table["label"] == curve.label)
            own &= table["alpha"].isin(alphas[1:])
            table.loc[own, "fitted"] = curves.fitted(found, alphas, table.loc[own, "alpha"].to_numpy(dtype=float))
    return table


def _drawn(curve: Curve) -> tuple[thresholds.Threshold, NDArray[np.float64]]:
    """The fit that is drawn, and its alphas: what rises and falls again is drawn as far as it rises."""
    found = curve.described
    return found, curve.alphas[: len(found.descriptions["constant"].rates)]


def _panel(axes: Axes, points: pd.DataFrame, made: Sequence[Curve], name: str) -> None:
    own = [curve for curve in made if curve.direction_id == name]
    table, gap = points[points["direction_id"] == name], min(abs(curve.relative[1]) for curve in own)
    for place, label in enumerate(LABELS):
        part = table[table["label"] == label].sort_values("alpha_relative")
        centre = 100 * part["rate"]
        errors = np.abs(np.stack([centre - 100 * part["low"], 100 * part["high"] - centre]))
        x = part["alpha_relative"] + (place - 1) * SHIFT * gap
        axes.errorbar(
            x, centre, errors, color=COLOURS[label], marker=MARKERS[label], linestyle="none", label=NAMES[label],
            markersize=3.5, elinewidth=0.6, capsize=0,
        )  # fmt: skip
    marked = False
    for curve in own:
        if curve.label not in LINES:
            continue
        (found, alphas), unit = _drawn(curve), curve.relative[-1] / curve.alphas[-1]
        x = np.linspace(0, alphas[-1], 300)
        rate = 100 * curves.fitted(found, alphas, x)
        axes.plot(x * unit, rate, color=COLOURS[curve.label], linestyle=LINES[curve.label], linewidth=1.3)
        if not math.isnan(found.alpha50):
            _half_way(axes, found, curve, None if marked else "half way, with interval")
            marked = True
    axes.axvline(0, color="0.8", linewidth=0.6, zorder=-1)
    axes.set_ylim(-3, 103)


def _half_way(axes: Axes, found: thresholds.Threshold, curve: Curve, label: str | None) -> None:
    unit, height = curve.relative[-1] / curve.alphas[-1], 50 * (found.inner + found.outer)
    ends = np.array([found.alpha50_interval.low, found.alpha50_interval.high]) * unit * curve.sign
    low, high = sorted(np.clip(ends, 0, abs(curve.relative[-1])) * curve.sign)
    axes.plot([low, high], [height, height], color="black", linewidth=1.6, zorder=4)
    if 0 <= found.alpha50 * curve.sign <= abs(curve.alphas[-1]):
        axes.plot(
            found.alpha50 * unit, height, "D", color=COLOURS[curve.label], markeredgecolor="black", markersize=5,
            zorder=5, label=label,
        )  # fmt: skip


def _answer(made: Sequence[Curve], sign: int) -> str:
    """What happens on one side of the extracted direction, in three lines."""
    own = [one for one in made if (one.direction_id, one.sign) == ("extracted", sign)]
    said = [f"{noun}: {one.answer}" for label, noun in NOUNS.items() for one in own if one.label == label]
    return "\n".join([f"extracted direction {'added' if sign > 0 else 'subtracted'}", *said])


def _legend(figure: Figure) -> None:
    """One legend for all panels, the labels first."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    order = sorted(entries, key=lambda label: label not in NAMES.values())
    figure.legend([entries[label] for label in order], order, loc="outside lower center", ncols=4)
