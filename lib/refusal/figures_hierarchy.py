"""Figures of notebook 08: the models side by side, and the specification curve."""

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from refusal.analyses import plan
from refusal.figures import COLOURS, WIDTH
from refusal.specification import FACTORS
from refusal.wording import people

NOT_MEASURED = "not measured"
SIGNS = {
    "refusal_minus": ("v", COLOURS["compliance"], "α = −1"),
    "baseline": ("o", "0.35", "unsteered"),
    "refusal_plus": ("^", COLOURS["refusal"], "α = +1"),
    "harmless": ("o", "0.35", ""),
    "harmless_plus": ("^", COLOURS["refusal"], ""),
}
UNITS = {"alpha": ("o", "mean differences"), "alpha_relative": ("D", "residual norms"),
         "alpha_absolute": ("s", "activation units")}  # fmt: skip
STUDY, OURS = COLOURS["jailbreak"], COLOURS["refusal"]
OTHERS = ("x", "+", "1")  # markers of other models' swings


def models(table: pd.DataFrame, levels: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The models side by side, one a row, in six panels; what has no record says so.

    Args:
        table: From `hierarchy.side_by_side`.
        levels: From `hierarchy_order.levels`: compliance under subtraction in each unit.
        names: Model ids, from the top down.
    """
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, 1.9 + 0.75 * len(names)), sharey=True)
    place = {model: len(names) - 1 - number for number, model in enumerate(names)}
    shares = {"refusal": ("baseline", "refusal_plus", "refusal_minus"), "over": ("harmless", "harmless_plus")}
    for axes, quantities in zip(panels[0], shares.values(), strict=False):
        for quantity in quantities:
            shape, colour, _ = SIGNS[quantity]
            _row(axes, _part(table, quantity, "share"), place, shape, colour, 100)
        axes.set_xlim(-3, 103)
    panels[0, 0].set(title="(a) refusal, harmful", xlabel="%")
    panels[0, 1].set(title="(b) refusal, harmless", xlabel="%")
    for number, (unit, (shape, _)) in enumerate(UNITS.items()):
        rows = levels[(levels["unit"] == unit) & (levels["sign"] < 0)].rename(columns={"rate": "value"})
        _row(panels[0, 2], rows.assign(said=""), place, shape, COLOURS["compliance"], 100, 0.2 * (1 - number))
    panels[0, 2].set(title="(c) compliance, subtracted", xlabel="%", xlim=(-3, 103))
    _row(panels[1, 0], _part(table, "alpha50", "alpha_relative"), place, "o", COLOURS["compliance"])
    panels[1, 0].set(title="(d) half-way dose", xlabel="residual norms")
    for quantity, shape, shift in (("window_low", "v", 0.1), ("window_high", "^", -0.1)):
        _row(panels[1, 1], _part(table, quantity, "alpha_relative"), place, shape, COLOURS["refusal"], 1, shift)
    panels[1, 1].axvline(0, color="0.6", linestyle=":", linewidth=0.8)
    panels[1, 1].set(title="(e) window, one layer", xlabel="residual norms")
    _row(panels[1, 2], _part(table, "cones", "share"), place, "o", COLOURS["refusal"], 100)
    for share in ("shared_share", "separate_share"):
        panels[1, 2].axvline(100 * plan()["05_polyhedral_cones"][share], color="0.6", linestyle="--", linewidth=0.8)
    panels[1, 2].set_xlim(left=min(0.0, panels[1, 2].get_xlim()[0]))
    panels[1, 2].set(title="(f) own minus others", xlabel="contrast, % of own effect")
    for axes in panels.flat:
        axes.grid(axis="x", color="0.92", linewidth=0.6)
        axes.set_ylim(-0.6, len(names) - 0.4)
    for axes in panels[1]:
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    for axes in panels[:, 0]:
        axes.set_yticks([place[model] for model in names], [_short(model) for model in names])
    handles = [Line2D([], [], color=colour, marker=shape, linestyle="none", label=label)
               for shape, colour, label in SIGNS.values() if label]  # fmt: skip
    handles += [Line2D([], [], color=COLOURS["compliance"], marker=shape, linestyle="none",
                       label=f"(c) {label}") for shape, label in UNITS.values()]  # fmt: skip
    hollow = "falls, or beyond the grid"
    handles.append(Line2D([], [], color="0.4", marker="o", linestyle="none", markerfacecolor="white", label=hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _part(table: pd.DataFrame, quantity: str, unit: str) -> pd.DataFrame:
    return table[(table["quantity"] == quantity) & (table["unit"] == unit)]


def _short(model: str) -> str:
    """A name of two lines at most."""
    words = people(model).split("-")
    half = (len(words) + 1) // 2
    return "-".join(words[:half]) + ("-\n" + "-".join(words[half:]) if words[half:] else "")


def _row(
    axes: Axes, rows: pd.DataFrame, place: Mapping[str, int], shape: str, colour: str, scale: float = 1,
    shift: float = 0.0,
) -> None:  # fmt: skip
    """A point with its interval for each model; a word for one without a number."""
    for model, at in place.items():
        own = rows[rows["model"] == model]
        if own.empty or math.isnan(float(own["value"].iloc[0])):
            said = NOT_MEASURED if own.empty else str(own["said"].iloc[0]) or "no number"
            texts = {(text.get_text(), round(text.get_position()[1], 2)) for text in axes.texts}
            if (said, round(at, 2)) not in texts:
                axes.text(0.5, at, said, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=6.5,
                          color="0.4")  # fmt: skip
            continue
        one = own.iloc[0]
        if not math.isnan(float(one["low"])):
            axes.plot([scale * one["low"], scale * one["high"]], [at + shift, at + shift], color=colour, linewidth=1.0)
        face = "white" if str(one["said"]) else colour  # an open end, or a rate that does not rise
        axes.plot(scale * one["value"], at + shift, shape, color=colour, markerfacecolor=face, markersize=4.5)


def specification(curve: pd.DataFrame, others: Mapping[str, pd.DataFrame], median: float) -> Figure:
    """The specification curve: swings with intervals, sorted, over the choices that make each of them.

    Args:
        curve: From `specification.table`, sorted.
        others: The same of other models: their swings stand at the place of the same choices.
        median: Of all swings.
    """
    levels = [(factor, level) for factor, known in FACTORS.items() for level in known if level in set(curve[factor])]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(WIDTH, 6.2), height_ratios=(2.2, 0.6, 0.165 * len(levels)), sharex=True
    )
    x = np.arange(len(curve))
    top.fill_between(x, 100 * curve["swing_low"], 100 * curve["swing_high"], color="0.88", linewidth=0, step="mid")
    top.plot(x, 100 * curve["swing"], ".", color="0.25", markersize=3, label="swing, with interval")
    for shape, (model, table) in zip(OTHERS, others.items(), strict=False):
        both = curve[list(FACTORS)].merge(table, on=list(FACTORS), how="left")
        top.plot(x, 100 * both["swing"], shape, color=COLOURS["compliance"], markersize=2.5, markeredgewidth=0.6,
                 label=people(model))  # fmt: skip
    top.axhline(0, color="0.5", linestyle=":", linewidth=0.8)
    top.axhline(100 * median, color="0.25", linestyle="--", linewidth=0.8, label="median")
    for who, colour, shape in (("ours", OURS, "D"), ("study", STUDY, "*")):
        for row in np.flatnonzero(curve[who]):
            for axes in (top, middle, bottom):
                axes.axvline(row, color=colour, linewidth=0.9, zorder=0)
            top.plot(row, 100 * curve["swing"].iloc[row], shape, color=colour, markersize=9 if shape == "*" else 6,
                     markeredgecolor="black", markeredgewidth=0.5, label={"ours": "our choice"}.get(who, "the study's"),
                     zorder=4)  # fmt: skip
    top.set(ylabel="compliance at −α\nminus at +α, points", title="(a) the effect of the sign, by specification")
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    top.set_yticks([tick for tick in top.get_yticks() if low <= tick <= 100])
    top.legend(ncols=3, loc="upper left", frameon=True, framealpha=1, edgecolor="none")  # above the lines
    middle.bar(x, 100 * curve["broken"], width=1.0, color=COLOURS["degenerate"])
    middle.set(ylabel="%", ylim=(0, 105), title="(b) degenerate completions, the worse sign")
    _choices(bottom, curve, levels)
    bottom.set(xlabel="specifications, sorted by swing", title="(c) the choices")
    bottom.set_xlim(-1, len(curve))
    return figure


def _choices(axes: Axes, curve: pd.DataFrame, levels: Sequence[tuple[str, str]]) -> None:
    """A row of ticks for each level of each factor."""
    gaps = [0, *np.cumsum([0.6 * (one[0] != two[0]) for one, two in itertools.pairwise(levels)])]
    rows = [-(number + float(gap)) for number, gap in enumerate(gaps)]
    for row, (factor, level) in zip(rows, levels, strict=True):
        where = np.flatnonzero(curve[factor] == level)
        axes.plot(where, np.full(len(where), row), "|", color="0.25", markersize=5, markeredgewidth=0.7)
    axes.set_yticks(rows, [f"{factor}: {FACTORS[factor][level]}" for factor, level in levels])
    axes.tick_params(axis="y", labelsize=6.5, length=0)
    axes.set_ylim(rows[-1] - 0.7, 0.7)
