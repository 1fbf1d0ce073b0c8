"""Figures of notebook 05: geometry by layer and number of prompts, and what each direction does to each category."""

from collections.abc import Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from refusal import cone_study
from refusal.cone_effects import Contrast, rule
from refusal.figures import COLOURS, WIDTH

# Colour, line style and marker of each family of draws.
STYLES = {
    "observed": (COLOURS["refusal"], "-", "o", "categories"),
    "own": ("#56B4E9", "--", "s", "categories, pilot's baselines"),
    "permuted": ("#7F7F7F", "-.", "^", "permuted categories"),
    "planted": (COLOURS["compliance"], ":", "D", "one planted direction"),
    "topics": ("#009E73", (0, (5, 1, 1, 1, 1, 1)), "v", "everyday topics"),
}
COSINES = {
    "mean_cosine": ("#56B4E9", "--", "plain"),
    "corrected_cosine": ("#CC79A7", "-.", "corrected for attenuation"),
    "unbiased_cosine": (COLOURS["refusal"], "-", "unbiased"),
}
TOPICS = {
    "topic_cosine": ("#009E73", "--", "a category and its topic"),
    "about_cosine": ("#7F7F7F", ":", "two topics"),
    "matched_cosine": (COLOURS["refusal"], "-", "two categories, topic as baseline"),
}
ROWS = {
    "category": "categories, first token\n(decides)",
    "rest": "without their topic",
    "topic": "topics alone",
    "added": "completions, α = +1 v −1",
    "ablated": "completions, ablation",
}


def layers(found: pd.DataFrame, bands: pd.DataFrame, reliability: pd.DataFrame, selected: int) -> Figure:
    """The geometry by layer, beside its nulls.

    Args:
        found: From `cone_tables.by_layer`.
        bands: From `cone_tables.bands`.
        reliability: From `cone_tables.reliability`.
        selected: The layer that the rule chose.
    """
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(WIDTH, 5.6), sharex=True)
    for family in ("permuted", "planted", "topics"):
        part = _at_most(bands, family, "entropy_rank")
        if len(part) > 1:
            _band(a, part["layer"], part, family, f"{STYLES[family][3]}, n = {part['n'].iloc[0]:.0f}")
    _line(a, found, "entropy_rank", *STYLES["observed"][:2], STYLES["observed"][3])
    random = bands[(bands["family"] == "random") & (bands["statistic"] == "entropy_rank")]
    a.axhline(float(random["median"].iloc[0]), color="0.2", linewidth=0.8, label="random directions")
    a.set(ylabel="entropy rank", title="(a) the pilot's dimensionality")
    permuted = _at_most(bands, "permuted", "unbiased_cosine")
    if len(permuted) > 1:
        _band(b, permuted["layer"], permuted, "permuted", "permuted categories, unbiased")
    for statistic, (colour, style, label) in COSINES.items():
        _line(b, found, statistic, colour, style, label)
    b.set(ylabel="mean cosine", title="(b) cosine of two categories")
    for number, (category, values) in enumerate(reliability.items()):
        c.plot(values.index, values, color=mpl.colormaps["viridis"](number / max(1, reliability.shape[1] - 0.5)),
               marker="osD^v"[number % 5], markersize=2.5, linewidth=0.9, label=str(category))  # fmt: skip
    c.set(ylabel="reliability", xlabel="layer", title="(c) reliability of each direction")
    for statistic, (colour, style, label) in TOPICS.items():
        _line(d, found, statistic, colour, style, label)
    d.set(ylabel="mean cosine, unbiased", xlabel="layer", title="(d) refusal or topic?")
    for axes in (b, d):  # where a direction is all noise, an unbiased cosine may be anything
        axes.set_ylim(max(axes.get_ylim()[0], -0.6), min(axes.get_ylim()[1], 1.6))
    for axes in (a, b, c, d):
        axes.axvline(selected, color="0.35", linewidth=0.8, zorder=-1)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        low, high = axes.get_ylim()  # the legends lie below the curves, which fill their panels
        axes.set_ylim(low - 0.42 * (high - low), high)
        axes.legend(fontsize=6.5, loc="lower center", ncols=2 if axes is c else 1, frameon=True,
                    framealpha=0.8, edgecolor="none")  # fmt: skip
    return figure


def _at_most(bands: pd.DataFrame, family: str, statistic: str) -> pd.DataFrame:
    """A family's band at all layers, which is that of its most prompts."""
    part = bands[(bands["family"] == family) & (bands["statistic"] == statistic)]
    return part[part["n"] == part["n"].max()].sort_values("layer")


def _band(axes: Axes, x: pd.Series, part: pd.DataFrame, family: str, label: str) -> None:
    colour, style, marker, _ = STYLES[family]
    low, high = part["low"].to_numpy(dtype=float), part["high"].to_numpy(dtype=float)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, part["median"], color=colour, linestyle=style, marker=marker, markersize=2, linewidth=0.9, label=label)


def _line(axes: Axes, found: pd.DataFrame, statistic: str, colour: str, style: object, label: str) -> None:
    part = found[found["statistic"] == statistic].sort_values("layer")
    if part["low"].notna().any():
        low, high = part["low"].to_numpy(dtype=float), part["high"].to_numpy(dtype=float)
        axes.fill_between(part["layer"], low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(part["layer"], part["value"], color=colour, linestyle=style, marker="o", markersize=2, label=label)


def counts(bands: pd.DataFrame, selected: int) -> Figure:
    """What the number of prompts a category does to the pilot's dimensionality, and to the unbiased cosine.

    Args:
        bands: From `cone_tables.bands`.
        selected: The layer that the rule chose.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.1))
    here = bands[(bands["layer"] == selected) & bands["n"].notna()]
    for axes, statistic in ((left, "entropy_rank"), (right, "unbiased_cosine")):
        for family, (_, _, _, label) in STYLES.items():
            part = here[(here["family"] == family) & (here["statistic"] == statistic)].sort_values("n")
            if len(part):
                _band(axes, part["n"], part, family, label)
        numbers = sorted(here["n"].unique())
        axes.set(xscale="log", xlabel="prompts a category")
        axes.set_xticks(numbers, [f"{n:.0f}" for n in numbers])
        axes.minorticks_off()
    random = bands[(bands["family"] == "random") & (bands["statistic"] == "entropy_rank")]
    left.axhline(float(random["median"].iloc[0]), color="0.2", linewidth=0.8)
    stated = cone_study.published()
    few = [stated[name] for name in stated.index if name.startswith("prompts_")]
    at = [stated["rank_highest"]] * 2
    left.plot([min(few), max(few)], at, color=COLOURS["jailbreak"], linewidth=2.5, label="published, other model")
    left.set(ylabel="entropy rank", title="(a) the pilot's dimensionality")
    right.set(ylabel="mean cosine, unbiased", title="(b) corrected for noise")
    right.set_ylim(-0.25, 1.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def causes(
    matrices: Mapping[str, pd.DataFrame],
    contrasts: Mapping[str, Contrast],
    combinations: "pd.Series[float]",
    random: "pd.Series[float]",
) -> Figure:
    """What the direction of each category does to the prompts of each: a diagonal matrix, or a constant one?

    Args:
        matrices: From `cone_effects.matrix`, by title: the category directions by the screen, and by completions.
        contrasts: By name, those of `ROWS` that were measured.
        combinations: Mean swing of each non-negative combination.
        random: The same of each random direction.
    """
    figure = plt.figure(figsize=(WIDTH, 4.9))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    for place, (title, table) in enumerate(matrices.items()):
        _matrix(figure.add_subplot(grid[0, place]), table, title)
    _contrasts(figure.add_subplot(grid[1, 0]), contrasts)
    _swings(figure.add_subplot(grid[1, 1]), combinations, random)
    return figure


def _matrix(axes: Axes, table: pd.DataFrame, title: str) -> None:
    order = list(dict.fromkeys(table["direction"]))
    wide = table.pivot(index="direction", columns="category", values="value").loc[order, order]
    values = wide.to_numpy(dtype=float)
    reach = float(np.nanmax(np.abs(values))) or 1.0
    axes.imshow(values, cmap="RdBu_r", norm=Normalize(-reach, reach))
    ends = table.pivot(index="direction", columns="category", values=["low", "high"])
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * reach else "black"
        said = f"{value:.2f}".replace("-", "−")
        low, high = (ends[end].loc[order[row], order[column]] for end in ("low", "high"))
        span = f"[{low:.2f}, {high:.2f}]".replace("-", "−")
        axes.text(column, row - 0.12, said, ha="center", va="center", color=ink, fontsize=7.5)
        size = 5 if len(span) < 13 else 4.5  # with a minus sign it would fill the cell
        axes.text(column, row + 0.22, span, ha="center", va="center", color=ink, fontsize=size)
    axes.set_xticks(range(len(order)), order, rotation=20)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="prompts of category", ylabel="direction of category", title=title)
    axes.tick_params(length=0)


def _contrasts(axes: Axes, contrasts: Mapping[str, Contrast]) -> None:
    """Contrasts as shares of the mean effect of a category's own direction."""
    shown = [name for name in ROWS if name in contrasts and contrasts[name].own]
    for row, name in enumerate(shown):
        found = contrasts[name]
        value, low, high = (100 * one / found.own for one in (found.value, found.interval.low, found.interval.high))
        colour, marker = (COLOURS["refusal"], "o") if name == "category" else ("0.35", "s")
        ends = np.abs([[value - low], [high - value]])
        axes.errorbar([value], [row], xerr=ends, color=colour, marker=marker, linestyle="none")
    for share, style, label in (
        (rule()["shared_share"], ":", "shared below"),
        (rule()["separate_share"], "--", "separate above"),
    ):
        axes.axvline(100 * share, color=COLOURS["jailbreak"], linestyle=style, linewidth=0.9, label=label)
    axes.axvline(0, color="0.7", linewidth=0.8, zorder=-1)
    axes.set_yticks(range(len(shown)), [ROWS[name] for name in shown])
    axes.set(ylim=(len(shown) + 0.6, -0.5), xlabel="contrast, % of the own effect",  # room for the legend
             title="(c) own minus other")  # fmt: skip
    axes.set_xlim(min(axes.get_xlim()[0], -30), max(axes.get_xlim()[1], 105))
    axes.legend(fontsize=6.5, loc="lower right", frameon=True, framealpha=1, edgecolor="none")


def _swings(axes: Axes, combinations: "pd.Series[float]", random: "pd.Series[float]") -> None:
    rng, limit = np.random.default_rng(0), float(random.abs().max())
    axes.axvspan(-limit, limit, color="0.92", zorder=-2)
    for row, (values, colour, marker) in enumerate(((combinations, COLOURS["refusal"], "o"), (random, "0.45", "x"))):
        shift = rng.uniform(-0.2, 0.2, len(values))
        axes.scatter(values, row + shift, s=9, color=colour, marker=marker, linewidths=0.8, alpha=0.8)
    axes.set_yticks([0, 1], [f"combinations\n({len(combinations)})", f"random\n({len(random)})"])
    axes.set(ylim=(1.5, -0.5), xlabel="mean swing, log-odds", title="(d) non-negative combinations")
