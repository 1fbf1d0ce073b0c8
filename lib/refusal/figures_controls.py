"""Figures of notebook 02: swings of the extracted direction among control directions, and what was generated."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refusal import specificity
from refusal.control_rates import GROUPS, HARMFUL, HARMLESS, STUDY_GROUPS
from refusal.figures import COLOURS, MARKERS, TITLES, WIDTH
from refusal.wording import p_equals

OWN, OTHERS = "#D55E00", "0.45"
BESIDE = ("axes fraction", "data")
ROWS = {
    "random": "random",
    "orthogonal": "orthogonal",
    "shuffled": "shuffled labels",
    "topics": "harmless topics",
    "balanced": "shuffled\nwithin classes",
}
NAMES = {
    "baseline": "no steering",
    "extracted +1": "extracted +1",
    "extracted -1": "extracted −1",
    "random": "random ±1",
    "orthogonal": "orthogonal ±1",
    "shuffled": "shuffled labels ±1",
    "topics": "harmless topics ±1",
    "ablate extracted": "extracted ablated",
    "ablate controls": "a control ablated",
}
STUDY_NAMES = dict(zip(STUDY_GROUPS, ("extracted +", "random", "orthogonal", "extracted −", "none"), strict=True))


def strips(panels: Mapping[str, pd.Series]) -> Figure:
    """Where the extracted direction's swing lies among those of every family, a row a family, with its rank p.

    Args:
        panels: From `specificity.panels`.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.0), sharex=True, sharey=True)
    for panel, (title, effects) in zip(axes, panels.items(), strict=True):
        own = float(effects["extracted", 0])
        tests = specificity.ranks(effects, own)
        panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.axvline(own, color=OWN, linestyle="--", linewidth=1.0, zorder=1)
        for place, family in enumerate(ROWS):
            if family in tests.index:
                _strip(panel, effects[family].to_numpy(dtype=float), place, own, tests.loc[family])
            else:
                panel.annotate("not measured", (0.0, place - 0.28), xycoords=BESIDE, fontsize=6.5, color="0.6")
        panel.set(title=title, xlabel="swing (log-odds)")
        panel.set_yticks(range(len(ROWS)), list(ROWS.values()))
        panel.set_ylim(len(ROWS) - 0.45, -0.75)
        panel.margins(x=0.12)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    axes[0].annotate("extracted", (float(panels[next(iter(panels))]["extracted", 0]), -0.68), (-3, 0),
                     textcoords="offset points", ha="right", va="top", color=OWN, fontsize=7)  # fmt: skip
    return figure


def _strip(axes: Axes, swings: np.ndarray, place: int, own: float, test: "pd.Series[float]") -> None:
    shift = np.random.default_rng(0).uniform(-0.16, 0.16, len(swings))
    axes.scatter(swings, place + shift, s=5, color=OTHERS, alpha=0.55, linewidths=0, zorder=2)
    axes.scatter([own], [place], s=26, marker="D", color=OWN, edgecolors="white", linewidths=0.6, zorder=3)
    missing = f", {test['missing']:.0f} out of reach" if test["missing"] else ""
    said = p_equals(test["p"])
    axes.annotate(f"{said}{missing}", (0.0, place - 0.28), xycoords=BESIDE, fontsize=6.5, color="0.3")


def generated(shares: pd.DataFrame, study: pd.DataFrame) -> Figure:
    """Rates of refusal and degeneration by group of conditions, above the study's table and ours by its rule.

    Args:
        shares: From `control_rates.rates`.
        study: From `control_rates.beside_study`.
    """
    figure = plt.figure(figsize=(WIDTH, 4.8))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    top, bottom = parts
    above = top.subplots(1, 2, sharey=True)
    for axes, prompt_set in zip(above, (HARMFUL, HARMLESS), strict=True):
        part = shares[shares["prompt_set"] == prompt_set]
        _groups(axes, part)
        axes.set(title=f"{TITLES[prompt_set]}, n = {part['clusters'].max()} prompts")
    top.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    models = list(dict.fromkeys(study["model"]))
    below = bottom.subplots(1, len(models), sharey=True)
    for axes, model in zip(below, models, strict=True):
        _study(axes, study[study["model"] == model], model, "ours" if model == models[-1] else "published")
    below[0].set_ylabel("jailbreaks, study's rule, %")
    return figure


def _groups(axes: Axes, part: pd.DataFrame) -> None:
    for shift, label in ((-0.13, "refusal"), (0.13, "degenerate")):
        table = part[part["outcome"] == label].set_index("group").loc[list(GROUPS)]
        centre, y = 100 * table["rate"].to_numpy(dtype=float), np.arange(len(table)) + shift
        ends = 100 * table[["low", "high"]].to_numpy(dtype=float).T
        axes.hlines(y, 100 * table["lowest"], 100 * table["highest"], color=COLOURS[label], alpha=0.25, linewidth=5)
        axes.errorbar(centre, y, xerr=np.abs(ends - centre), color=COLOURS[label], marker=MARKERS[label], label=label,
                      linestyle="none")  # fmt: skip
    axes.set_yticks(range(len(GROUPS)), [NAMES[group] for group in GROUPS])
    axes.set(ylim=(len(GROUPS) - 0.5, -0.5), xlim=(-3, 103), xlabel="share of completions, %")
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    for border in (2.5, 6.5):
        axes.axhline(border, color="0.8", linewidth=0.6)


def _study(axes: Axes, part: pd.DataFrame, model: str, source: str) -> None:
    table = part.set_index("condition").loc[list(STUDY_NAMES)]
    own = [name in ("extracted", "opposite") for name in STUDY_NAMES]
    rate = 100 * table["rate"].to_numpy(dtype=float)
    colours = [OWN if mine else "0.55" for mine in own]
    axes.bar(range(len(table)), rate, width=0.65, alpha=0.45, linewidth=0.6, edgecolor=colours, color=colours,
             hatch=["///" if mine else "" for mine in own])  # fmt: skip
    spread = 100 * table["sd"].to_numpy(dtype=float)
    ends = np.abs(100 * table[["low", "high"]].to_numpy(dtype=float).T - rate)
    # Published: the standard deviation over random directions, all that there is; ours: intervals over prompts.
    ends = np.where(np.isnan(ends), np.where([name == "random" for name in table.index], spread, np.nan), ends)
    axes.errorbar(range(len(table)), rate, ends, color="0.2", marker=".", linestyle="none")
    axes.set_xticks(range(len(table)), list(STUDY_NAMES.values()), rotation=60, ha="right", rotation_mode="anchor")
    axes.set(title=f"{model.removesuffix('-Instruct')}\n({source})", ylim=(0, 105))
    axes.title.set_fontsize(7.5)
