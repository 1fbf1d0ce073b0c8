"""Figures of notebook 00: agreement with readers, and what intervals cover."""

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refusal.agreement import ALL, JUDGES, SENSES
from refusal.calibration import BAND, METHODS, SIZE
from refusal.figures import COLOURS, WIDTH

SENSE_STYLES = {"three labels": ("o", COLOURS["refusal"]), "refusal or not": ("D", COLOURS["compliance"])}
METHOD_STYLES = {
    "score": ("o", COLOURS["refusal"]),
    "t": ("s", COLOURS["compliance"]),
    "independent": ("X", COLOURS["jailbreak"]),
}


def labels(agreed: pd.DataFrame, confused: pd.DataFrame, hoped: float) -> Figure:
    """Kappa of every judge with the readers on the second half, and the confusion matrix of our labels.

    Args:
        agreed: From `agreement.agreement`.
        confused: From `agreement.confusion`.
        hoped: The plan's kappa.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.6), width_ratios=(1.5, 1))
    part = agreed[(agreed["scope"] == ALL) & (agreed["half"] == "B")]
    names = {"readers": "one reader\nwith the other", **JUDGES}
    for shift, sense in zip((-0.13, 0.13), SENSES, strict=True):
        marker, colour = SENSE_STYLES[sense]
        rows = part[part["sense"] == sense].set_index("judge").loc[list(names)]
        errors = np.abs(np.stack([rows["kappa"] - rows["boot_low"], rows["boot_high"] - rows["kappa"]]).astype(float))
        where = np.arange(len(names)) + shift
        left.errorbar(
            rows["kappa"], where, xerr=errors, color=colour, marker=marker, linestyle="none", label=sense, markersize=5
        )
    left.axvline(hoped, color="0.35", linestyle="--", linewidth=0.9)
    left.annotate(
        f"hoped for {hoped:.2f}",
        (hoped, -0.62),
        (-3, 0),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color="0.3",
    )
    left.axhline(0.5, color="0.85", linewidth=0.7)
    left.set_yticks(range(len(names)), names.values())
    left.set(ylim=(len(names) - 0.5, -0.8), xlabel="Cohen's kappa with the readers", title=_second_half(part))
    left.set_xlim(right=1.03)
    left.grid(axis="x", color="0.9", linewidth=0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _matrix(right, confused)
    return figure


def _second_half(part: pd.DataFrame) -> str:
    return f"(a) agreement, {int(part['n'].max())} completions of the second half"


def _matrix(axes: Axes, confused: pd.DataFrame) -> None:
    shares = confused.div(confused.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
    for row, column in np.ndindex(shares.shape):
        strong = shares[row, column] > 0.7
        axes.text(
            column, row, confused.iloc[row, column], ha="center", va="center", color="white" if strong else "0.15",
            fontweight="bold" if row == column else "normal", fontsize=9,
        )  # fmt: skip
    axes.set_xticks(range(len(confused.columns)), confused.columns, rotation=20)
    axes.set_yticks(range(len(confused.index)), confused.index)
    axes.set(xlabel="our label", ylabel="readers", title="(b) completions by label")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def coverage(table: pd.DataFrame) -> Figure:
    """Coverage of the intervals of a clustered rate, by clusters and intraclass correlation, a point for each rate.

    Args:
        table: From `calibration.table`.
    """
    sizes = sorted(table["clusters"].unique())
    figure, panels = plt.subplots(1, len(sizes), figsize=(WIDTH, 2.8), sharey=True, squeeze=False)
    icc = sorted(table["icc"].unique())
    for axes, clusters in zip(panels[0], sizes, strict=True):
        axes.axhspan(100 * BAND[0], 100 * BAND[1], color="0.9", zorder=-2, linewidth=0)
        axes.axhline(95, color="0.5", linewidth=0.7, zorder=-1)
        for shift, (method, (marker, colour)) in zip((-0.24, 0.0, 0.24), METHOD_STYLES.items(), strict=True):
            part = table[(table["clusters"] == clusters) & (table["method"] == method)]
            _points(axes, part, icc, shift, marker, colour, METHODS[method])
        axes.set_xticks(range(len(icc)), [f"{value:g}" for value in icc])
        axes.set(
            xlim=(-0.5, len(icc) - 0.5),
            xlabel="correlation of prompts in a cluster",
            title=f"{clusters} clusters of {SIZE} prompts",
        )
    panels[0][-1].annotate(
        f"{100 * BAND[0]:.0f} to {100 * BAND[1]:.0f} %", (len(icc) - 0.5, 100 * BAND[1]), (-2, 2),
        textcoords="offset points", ha="right", fontsize=7, color="0.35",
    )  # fmt: skip
    panels[0][0].set_ylabel("coverage of the 95 % interval, %")
    panels[0][0].set_ylim(min(50.0, 100 * float(table["coverage"].min()) - 3), 100)
    panels[0][-1].yaxis.set_major_locator(mpl.ticker.MultipleLocator(10))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _points(
    axes: Axes, part: pd.DataFrame, icc: Sequence[float], shift: float, marker: str, colour: str, name: str
) -> None:
    """The rates side by side at each correlation, the lowest rate at the left, joined by a line."""
    rates = sorted(part["rate"].unique())
    steps = np.linspace(-0.07, 0.07, len(rates)) if len(rates) > 1 else np.zeros(1)
    for place, value in enumerate(icc):
        rows = part[part["icc"] == value].set_index("rate")["coverage"].reindex(rates)
        axes.plot(
            place + shift + steps, 100 * rows, color=colour, marker=marker, markersize=4, linewidth=0.7,
            label=name if place == 0 else None,
        )  # fmt: skip
