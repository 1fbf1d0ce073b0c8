"""Figures of notebook 07: the window, the pilot's doses on our curves, the defence, and format demands."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from refusal.figures import COLOURS, WIDTH
from refusal.window_costs import GROUPS
from refusal.window_formats import Contrast
from refusal.window_pilot import READINGS
from refusal.window_runs import FIRST, LAST, NONE, VARIANTS, rule, third
from refusal.window_words import edges
from refusal.windows import Found

GREEN, PURPLE, PILOT = "#009E73", "#CC79A7", COLOURS["jailbreak"]
OUTCOMES = {
    "harmful": (COLOURS["refusal"], "o", "-", "refusal, harmful requests"),
    "harmless": (PURPLE, "D", "--", "refusal, harmless requests"),
    "degenerate": (COLOURS["degenerate"], "^", ":", "degenerate"),
}
MEASURES = {"kl": "KL, nats", "nll": "NLL, nats"}
MARKS = {"difference": ("v", PILOT, 111.0), "unit": ("v", "white", 106.0)}  # marker, face, height
DEMANDS = {"json": (COLOURS["refusal"], "o", "-"), "table": (COLOURS["compliance"], "s", "--"),
           "template": (GREEN, "^", ":")}  # fmt: skip
ALPHA = "alpha (mean differences)"


def window(
    found: Sequence[Found], points: pd.DataFrame, costs: pd.DataFrame, pilot: pd.DataFrame | None = None
) -> Figure:
    """Rates, KL at the first token and reference NLL by dose, a column for each variant.

    The window is shaded, its useful part hatched: where refusal of harmful requests lies above the thin dotted line.

    Args:
        found: From `windows.find`, one for each variant.
        points: From `window_answers.curves`, of all variants.
        costs: From `window_costs.disturbance`.
        pilot: From `window_pilot.readings`: the pilot's doses, marked on the curves for many layers.
    """
    figure, panels = plt.subplots(
        3, len(found), figsize=(WIDTH, 5.6), height_ratios=(2.6, 1, 1), sharex="col", sharey="row", squeeze=False
    )
    for column, (one, letter) in enumerate(zip(found, "abc", strict=False)):
        variant, top = one.answers.variant, panels[0, column]
        for outcome, (colour, marker, line, label) in OUTCOMES.items():
            part = points[(points["variant"] == variant) & (points["outcome"] == outcome)]
            _curve(top, part["alpha"], 100 * part[["rate", "low", "high"]].to_numpy(float), colour, marker, line, label)
        _shade(list(panels[:, column]), one)
        top.set_title(f"({letter}) {VARIANTS[variant]}\nwindow {_minus(edges(one))}\n{_useful(one)}", fontsize=7.5)
        top.set(ylim=(-3, 116 if pilot is not None else 103), yticks=range(0, 101, 25))
        for axes, (measure, name) in zip(panels[1:, column], MEASURES.items(), strict=True):
            part = costs[(costs["variant"] == variant) & (costs["measure"] == measure)]
            values = part[["value", "low", "high"]].to_numpy(float)
            _curve(axes, part["alpha"], values, "0.25", ".", "-", "")
            axes.set_ylabel(name if column == 0 else "")
        panels[2, column].set_xlabel(ALPHA)
        if variant == "many" and pilot is not None:
            _mark(top, pilot, float(one.answers.alphas.max()))
        _doses(top, panels[2, column], one)
    panels[0, 0].set_ylabel("share of completions, %")
    handles, _ = panels[0, 0].get_legend_handles_labels()
    handles += [
        Patch(color=GREEN, alpha=0.15, label="window"),
        Patch(facecolor="none", edgecolor=GREEN, hatch="////", linewidth=0, label="its useful part"),
    ]
    if pilot is not None:
        handles += [
            Line2D([], [], linestyle="none", marker=MARKS[reading][0], markerfacecolor=MARKS[reading][1],
                   markeredgecolor=PILOT, label=f"pilot's doses, {words}")
            for reading, words in {"difference": "raw difference", "unit": "unit vector"}.items()
        ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _doses(top: Axes, bottom: Axes, found: Found) -> None:
    """The two axes of doses, below in alpha and above in residual norms; logarithmic where doses have equal ratios."""
    doses, unit = found.answers.alphas[found.answers.alphas > 0], found.answers.units["alpha_relative"]
    above, scales = top.twiny(), {bottom: 1.0}
    scales[above] = unit
    if len(doses) > 2 and not np.allclose(np.diff(doses, 2), 0):
        for axes, size in scales.items():
            axes.set_xscale("symlog", linthresh=float(doses.min()) * size)
            axes.set_xlim(*(sign * 1.3 * float(doses.max()) * size for sign in (-1, 1)))
            ends = [10.0**power for power in range(-4, 3) if doses.min() <= 10.0**power / size <= doses.max()]
            axes.set_xticks([-end for end in ends[::-1]] + [0.0] + ends, minor=False)
            axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("-", "−"))
    low, high = bottom.get_xlim()
    above.set_xlim(low * unit, high * unit)
    above.set_xlabel("relative to the mean residual norm", fontsize=7)
    above.tick_params(labelsize=6.5)
    above.spines["top"].set_visible(True)


def _curve(
    axes: Axes, x: "pd.Series[float]", values: np.ndarray, colour: str, marker: str, line: str, label: str
) -> None:
    """A line with its band, from `[k, 3]` of value, low and high."""
    axes.fill_between(x, values[:, 1], values[:, 2], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, values[:, 0], color=colour, marker=marker, linestyle=line, markersize=2.8, linewidth=1.1, label=label)


def _shade(column: Sequence[Axes], found: Found) -> None:
    needed = 100 * (1 - found.room + float(rule()["useful_rise"]))
    if needed <= 100:
        column[0].axhline(needed, color=OUTCOMES["harmful"][0], linestyle=(0, (1, 3)), linewidth=0.9, zorder=-1)
    for axes in column:
        axes.axvspan(found.low, found.high, color=GREEN, alpha=0.10, linewidth=0, zorder=-3)
        axes.axvline(0, color="0.7", linewidth=0.6, zorder=-2)
    for start, end in found.parts:
        column[0].axvspan(
            start, end, facecolor="none", edgecolor=GREEN, hatch="////", linewidth=0, alpha=0.7, zorder=-1
        )


def _mark(axes: Axes, pilot: pd.DataFrame, end: float) -> None:
    for reading, (marker, face, height) in MARKS.items():
        alphas = pilot.loc[(pilot["reading"] == reading) & (pilot["alpha"].abs() <= end), "alpha"]
        axes.plot(alphas, np.full(len(alphas), height), marker, markersize=4, markerfacecolor=face,
                  markeredgecolor=PILOT, markeredgewidth=0.7)  # fmt: skip


def _useful(found: Found) -> str:
    return f"useful part in {100 * found.share:.0f} % of the resamples"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def study(points: pd.DataFrame, counts: pd.DataFrame, units: dict[str, float]) -> Figure:
    """The pilot's published rates on our curves for many layers, under either reading of its alpha.

    Args:
        points: From `window_answers.curves`; the variant "many" is shown.
        counts: From `window_pilot.counts`.
        units: Of our answers in that variant.
    """
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 2.7), sharey=True)
    size = {"difference": 1.0, "unit": units["alpha_absolute"]}
    ours, reach = points[points["variant"] == "many"], 1.1 * float(counts["alpha"].abs().max())
    for axes, (reading, words), letter in zip(panels, READINGS.items(), "ab", strict=True):
        for outcome, name in (("degenerate", "coherent, ours"), ("harmful", "refusal of harmful, ours")):
            part = ours[ours["outcome"] == outcome]
            values = 100 * part[["rate", "low", "high"]].to_numpy(float)
            if outcome == "degenerate":
                values = 100 - values[:, [0, 2, 1]]
            colour, marker, line, _ = OUTCOMES[outcome]
            _curve(axes, part["alpha"] * size[reading], values, colour, marker, line, name)
        for what, marker, face in (("coherent", "s", PILOT), ("refused", "o", "white")):
            rates = 100 * counts[[f"{what}_rate", f"{what}_low", f"{what}_high"]].to_numpy(float)
            errors = np.abs(rates[:, 1:].T - rates[:, 0])
            axes.errorbar(counts["alpha"], rates[:, 0], errors, color=PILOT, marker=marker, markerfacecolor=face,
                          linestyle="none", elinewidth=0.8, label=f"{what}, published")  # fmt: skip
        axes.set(xlim=(-reach, reach), ylim=(-3, 103), title=f"({letter}) its alpha read as\n{words}")
        axes.set_xlabel("alpha of the pilot")
        axes.axvline(0, color="0.7", linewidth=0.6, zorder=-2)
    panels[0].set_ylabel("share, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def defence(table: pd.DataFrame) -> Figure:
    """What a defence buys and costs: refusal by group of prompts, unsteered and at the plan's doses.

    Args:
        table: From `window_costs.defence`.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    groups = [group for group in GROUPS if group in set(table["group"])]
    alphas = sorted(table["alpha"].unique())
    styles = list(zip(("#56B4E9", COLOURS["refusal"]), ("s", "^"), strict=True))
    for row, group in enumerate(groups):
        own = table[table["group"] == group].set_index("alpha")
        unsteered: dict[str, Any] = {"color": "black", "marker": "o", "markerfacecolor": "white"}
        shown = [(own.iloc[0][["base", "base_low", "base_high"]], unsteered)]
        shown += [
            (own.loc[alpha, ["rate", "low", "high"]], {"color": colour, "marker": marker})
            for alpha, (colour, marker) in zip(alphas, styles, strict=False)
        ]
        for place, (one, style) in enumerate(shown):
            value, low, high = 100 * one.to_numpy(dtype=float)
            errors = np.abs([[value - low], [high - value]])
            axes.errorbar(value, row + 0.16 * place, xerr=errors, linestyle="none", **style)
    sizes = table.drop_duplicates("group").set_index("group")
    names = [
        f"{GROUPS[group]}\n(n = {sizes.loc[group, 'n']}, {sizes.loc[group, 'clusters']} clusters)" for group in groups
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set(ylim=(len(groups) - 0.4, -0.4), xlim=(-3, 103), xlabel="refusal, %")
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    handles = [Line2D([], [], linestyle="none", marker="o", color="black", markerfacecolor="white", label="unsteered")]
    handles += [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=f"alpha = {alpha:+g}")
        for alpha, (colour, marker) in zip(alphas, styles, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def formats(table: pd.DataFrame, moved: pd.DataFrame, late: Contrast) -> Figure:
    """Refusal under each format demand, and how much the demands move the projection, by layer.

    Args:
        table: From `window_formats.refusals`.
        moved: From `window_formats.by_layer`.
        late: From `window_formats.contrast`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7), width_ratios=(1, 1.5))
    x = np.arange(len(table))
    shown = {"refusal": (["rate", "low", "high"], -0.1, "o"),
             "degenerate": (["degenerate", "degenerate_low", "degenerate_high"], 0.1, "^")}  # fmt: skip
    for label, (columns, aside, marker) in shown.items():
        values = 100 * table[columns].to_numpy(float)
        left.errorbar(x + aside, values[:, 0], np.abs(values[:, 1:].T - values[:, 0]), color=COLOURS[label],
                      marker=marker, linestyle="none", label=label)  # fmt: skip
    left.axhline(100 * table.loc[NONE, "rate"], color="0.6", linestyle=":", linewidth=0.8)
    left.set_xticks(x, list(table.index))
    left.set(
        ylim=(-3, 103), xlim=(-0.5, len(table) - 0.5), ylabel="share of completions, %",
        title=f"(a) harmful requests, n = {table['n'].iloc[0]:.0f}", xlabel="demanded format",
    )  # fmt: skip
    left.legend(loc="best")
    sizes = moved[moved["statistic"] == "size"]
    for demand, (colour, marker, line) in DEMANDS.items():
        part = sizes[sizes["demand"] == demand]
        _curve(right, part["layer"], part[["value", "low", "high"]].to_numpy(float), colour, marker, line, demand)
    n_layers = int(sizes["layer"].max()) + 1
    for which in (FIRST, LAST):
        layers = third(n_layers, which)
        right.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color="0.93", zorder=-3, linewidth=0)
    interval = f"[{late.interval.low:+.2f}, {late.interval.high:+.2f}]"
    right.set(
        xlabel="layer", ylabel="size of the change of the\nprojection (mean differences)",
        title=_minus(f"(b) last third minus first: {late.difference:+.2f} {interval}"),
    )  # fmt: skip
    right.set_ylim(bottom=0)
    right.set_xlim(-0.8, n_layers - 0.2)
    right.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    right.legend(loc="best")
    return figure
