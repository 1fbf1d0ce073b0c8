"""The plotting functions and the one style. Every figure goes out as PDF and PNG, with the plotted data as CSV.

Widths are those of the paper's text column; colours are Okabe and Ito's (distinguishable without colour vision), and
each is doubled by a marker, a hatch or a line style.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refusal.analyses import LABELS
from refusal.files import atomic

WIDTH = 6.3  # inches: the paper's text width
COLOURS = {"refusal": "#0072B2", "compliance": "#E69F00", "degenerate": "#7F7F7F", "jailbreak": "#D55E00"}
MARKERS = {"refusal": "o", "compliance": "s", "degenerate": "^"}
TITLES = {
    "harmful_evaluation": "harmful requests",
    "harmful_study": "study's 10 x 10 layout",
    "harmless_evaluation": "harmless requests",
    "user": "your prompts",
}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "ytick.minor.width": 0.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # Type 3 fonts are refused by some venues
    "svg.hashsalt": "refusal",
}


def use_style() -> None:
    """Sets the compendium's style for all figures that follow."""
    sns.set_theme(context="paper", style="ticks", rc=STYLE)


def save(figure: Figure, data: pd.DataFrame, name: str, folder: Path) -> Figure:
    """Writes `<folder>/<name>.pdf`, `.png` and `.csv`; the same data give the same bytes.

    Args:
        figure: The figure.
        data: What it plots.
        name: File name without ending.
        folder: E.g. `build/figures/<model>`.
    """
    for ending, metadata in (
        ("pdf", {"CreationDate": None, "Producer": None, "Creator": None}),
        ("png", {"Software": None}),
    ):
        with atomic(folder / f"{name}.{ending}") as path:
            figure.savefig(path, metadata=metadata)
    with atomic(folder / f"{name}.csv") as path:
        data.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    return figure


def _band(axes: Axes, x: Sequence[float] | np.ndarray, table: pd.DataFrame, colour: str, **line: Any) -> None:  # noqa: ANN401
    axes.fill_between(x, table["low"].astype(float), table["high"].astype(float), color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, table["value"], color=colour, **line)


def layers(tables: dict[str, pd.DataFrame], screen: pd.DataFrame, selected: int, candidates: Sequence[int]) -> Figure:
    """Where the direction appears: separation, norm, and the screen that chooses the layer, by layer.

    Args:
        tables: "auroc", "d_prime", "raw_norm" and "residual_norm" by layer, with `layer, value, low, high`.
        screen: From `analyses.screen_means`.
        selected: The layer that the rule chose.
        candidates: The layers among which it chose.
    """
    figure, ((top, right), (left, bottom)) = plt.subplots(2, 2, figsize=(WIDTH, 4.2), sharex=True)
    x = tables["auroc"]["layer"]
    _band(top, x, tables["auroc"], COLOURS["refusal"], marker="o", markersize=2.5)
    top.axhline(0.5, color="0.6", linestyle=":", linewidth=0.8)
    top.set(ylabel="AUROC", title="(a) separation of held-out prompts")
    top.set_ylim(min(0.45, float(tables["auroc"]["low"].min()) - 0.03), 1.02)
    _band(right, x, tables["d_prime"], COLOURS["refusal"], marker="o", markersize=2.5)
    right.set(ylabel="d' (pooled s.d.)", title="(b) standardised distance, held-out prompts")
    right.set_ylim(bottom=min(0.0, float(tables["d_prime"]["low"].min())))
    _band(left, x, tables["raw_norm"], COLOURS["refusal"], label="raw norm", marker="o", markersize=2.5)
    residual = tables["residual_norm"]["value"]
    left.plot(x, residual, color=COLOURS["compliance"], linestyle="--", label="mean residual norm")
    left.set(yscale="log", ylabel="norm (activation units)", xlabel="layer", title="(c) norm of the mean difference")
    left.legend()
    for alpha, marker, colour in ((1.0, "^", COLOURS["refusal"]), (-1.0, "v", COLOURS["compliance"])):
        row = screen[screen["alpha"] == alpha]
        _band(bottom, row["layer"], row, colour, marker=marker, label=f"alpha = {alpha:+g}")
    unsteered = screen[screen["layer"] == -1].iloc[0]
    bottom.axhline(unsteered["value"], color="0.4", linestyle="--", linewidth=0.9, label="unsteered")
    bottom.axhspan(unsteered["low"], unsteered["high"], color="0.4", alpha=0.15, linewidth=0, zorder=-1)
    bottom.set(ylabel="log-odds of refusal opening", xlabel="layer", title="(d) the screen that selects the layer")
    bottom.legend()
    for axes in (top, right, left, bottom):
        axes.axvspan(min(candidates) - 0.5, max(candidates) + 0.5, color="0.93", zorder=-2)
        axes.axvline(selected, color="0.35", linewidth=0.8, zorder=-1)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return figure


def prompt_counts(tables: dict[str, pd.DataFrame], studied: int) -> Figure:
    """What a small number of prompts shows: curves against prompts a side, with the study's number marked.

    Args:
        tables: "cosine_to_full", "split_half_cosine", "auroc" and "raw_norm", with `prompts, value, low, high`.
        studied: Prompts a side in the study.
    """
    titles = {
        "cosine_to_full": "(a) cosine with that\nfrom all prompts",
        "split_half_cosine": "(b) cosine between two\ndisjoint sets of n",
        "auroc": "(c) AUROC,\nheld-out prompts",
        "raw_norm": "(d) raw norm\n(activation units)",
    }
    figure, panels = plt.subplots(1, 4, figsize=(WIDTH, 2.0))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        table = tables[name]
        axes.axvline(studied, color=COLOURS["jailbreak"], linestyle="--", linewidth=0.9)
        _band(axes, table["prompts"], table, COLOURS["refusal"], marker="o", markersize=3)
        axes.set(xscale="log", xlabel="prompts a side", title=title)
        axes.set_xticks([5, 16, 64, 256], ["5", "16", "64", "256"])
        axes.minorticks_off()
    panels[0].annotate(
        "study",
        (studied, panels[0].get_ylim()[0]),
        (2, 3),
        textcoords="offset points",
        color=COLOURS["jailbreak"],
        fontsize=7,
    )
    return figure


def cosines(gram: pd.DataFrame, halves: pd.DataFrame, selected: int) -> Figure:
    """Cosine between the directions of different layers, and split-half reliability by layer.

    Args:
        gram: Square frame of cosines, layers in rows and columns.
        halves: `layer, value, low, high` of the split-half cosine.
        selected: The layer that the rule chose.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7), width_ratios=(1, 1.1))
    image = left.imshow(gram.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, origin="lower")
    left.set(xlabel="layer", ylabel="layer", title="(a) cosine between layers")
    for line in (left.axvline, left.axhline):
        line(selected, color="0.2", linewidth=0.7)
    figure.colorbar(image, ax=left, label="cosine", shrink=0.9)
    _band(right, halves["layer"], halves, COLOURS["refusal"], marker="o", markersize=2.5)
    right.axvline(selected, color="0.35", linewidth=0.8, zorder=-1)
    right.set(xlabel="layer", ylabel="split-half cosine", title="(b) reliability: 200 random halves")
    right.set_ylim(top=1.005)
    for axes in (left, right):
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return figure


def label_rates(shares: pd.DataFrame, conditions: Sequence[str]) -> Figure:
    """Rates of the three labels by condition, a panel for each prompt set.

    Args:
        shares: From `analyses.rates`.
        conditions: In the order of the horizontal axis.
    """
    sets = list(dict.fromkeys(shares["prompt_set"]))
    figure, panels = plt.subplots(1, len(sets), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
    for axes, prompt_set in zip(panels[0], sets, strict=True):
        for shift, label in zip((-0.16, 0.0, 0.16), LABELS, strict=True):
            part = shares[(shares["prompt_set"] == prompt_set) & (shares["label"] == label)].set_index("condition")
            part = part.loc[list(conditions)] * 1
            centre = 100 * part["rate"]
            errors = np.abs(np.stack([centre - 100 * part["low"], 100 * part["high"] - centre]))
            x = np.arange(len(conditions)) + shift
            axes.errorbar(x, centre, errors, color=COLOURS[label], marker=MARKERS[label], linestyle="none", label=label)
        size = shares[shares["prompt_set"] == prompt_set].iloc[0]
        clusters = f" in {size['clusters']} clusters" if size["clusters"] != size["n"] else ""
        axes.set(title=f"{TITLES.get(prompt_set, prompt_set)}\nn = {size['n']}{clusters}", ylim=(-3, 103))
        axes.set_xticks(range(len(conditions)), [_short(name) for name in conditions])
        axes.set_xlim(-0.5, len(conditions) - 0.5)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_xlabel("alpha (mean differences)")
    panels[0][0].set_ylabel("share of completions, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _short(condition: str) -> str:
    return {"baseline": "0"}.get(condition, condition.removeprefix("extracted ").replace("-", "−"))


def beside_study(ours: pd.DataFrame, study: pd.DataFrame, name: str) -> Figure:
    """The study's published jailbreak rates beside ours by its own rule on its own layout.

    Args:
        ours: From `analyses.seed_rule_rates`.
        study: From `analyses.study_table`.
        name: Our model's name.
    """
    conditions = {
        "standard_plus": "+alpha",
        "baseline": "0",
        "standard_minus": "−alpha",
        "inverted_plus": "inverted\n+alpha",
    }
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 2.4), sharey=True)
    for axes, (model, part) in zip(panels, study.groupby("model", sort=False), strict=False):
        table = part.set_index("condition").loc[list(conditions)]
        _bars(axes, table, list(conditions.values()), f"{model}\n(published, n = {table['n'].iloc[0]})")
    signs = {condition: _short(condition)[0] for condition in ours["condition"]}
    table = ours.set_index("condition").loc[sorted(signs, key=lambda condition: "+0−".index(signs[condition]))]
    title = f"{name}\n(ours, n = {table['n'].iloc[0]}, {table['clusters'].iloc[0]} clusters)"
    _bars(panels[2], table, [_short(str(condition)) for condition in table.index], title)
    panels[0].set_ylabel("jailbreak rate, study's rule, %")
    return figure


def _bars(axes: Axes, table: pd.DataFrame, names: Sequence[str], title: str) -> None:
    centre = 100 * table["rate"].to_numpy(dtype=float)
    errors = np.abs(np.stack([centre - 100 * table["low"], 100 * table["high"] - centre]))
    axes.bar(range(len(table)), centre, color=COLOURS["jailbreak"], alpha=0.35, width=0.6)
    axes.errorbar(range(len(table)), centre, errors, color=COLOURS["jailbreak"], marker="o", linestyle="none")
    axes.set_xticks(range(len(table)), names)
    axes.set(title=title, ylim=(0, 103))
