"""Figures of the sweep: the map of layers and alphas, and the screen against what is generated."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from refusal.figures import COLOURS, WIDTH
from refusal.sweep_cells import OUTCOMES

GATES = {"passed": "*", "broken": "X", "unmoved": "o", "unspecific": "D"}  # marker of each outcome
SIZES = {"passed": 90, "broken": 32, "unmoved": 26, "unspecific": 22}  # square points: a star looks small
SIGNS = {1: ("^", COLOURS["refusal"], "alpha > 0"), -1: ("v", COLOURS["compliance"], "alpha < 0")}
# From compliance's orange to refusal's blue, with ends as dark as each other: readable in grey and by anyone.
DIVERGING = LinearSegmentedColormap.from_list(
    "refusal", ["#6b3d00", COLOURS["compliance"], "#fbfbfb", "#56a5d8", "#003a5c"]
)


def sweep(means: pd.DataFrame, table: pd.DataFrame, layers: pd.DataFrame, selected: int) -> Figure:
    """The map: mean log-odds by layer and alpha on harmful and on harmless prompts, and the effect of each layer.

    Args:
        means: From `sweep_cells.means`.
        table: From `sweep_cells.gates`: confirmed cells are marked with what became of them.
        layers: From `sweeps.layers`.
        selected: The layer that the rule chose.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDTH, 4.9), width_ratios=(1.25, 1.25, 1), sharey=True)
    grids = {side: _grid(means[side]) for side in ("harmful", "harmless")}
    reach = max(float(np.nanmax(np.abs(one.to_numpy()))) for one in grids.values())
    titles = {"harmful": "(a) harmful requests", "harmless": "(b) harmless: over-refusal"}
    images = [
        _map(axes, grid, reach, titles[side]) for axes, (side, grid) in zip((left, middle), grids.items(), strict=True)
    ]
    place = {layer: row for row, layer in enumerate(grids["harmful"].index)}
    column = {alpha: number for number, alpha in enumerate(grids["harmful"].columns)}
    for axes in (left, middle):
        axes.add_patch(
            Rectangle((-0.5, place[selected] - 0.5), len(column), 1, fill=False, edgecolor="black", linewidth=1.2)
        )
    for outcome, part in table.groupby("outcome"):
        x, y = part["alpha"].map(column), part["layer"].map(place)
        shape, size = GATES[str(outcome)], SIZES[str(outcome)]
        left.scatter(x, y, s=size, c="white", marker=shape, edgecolors="black", linewidths=0.9, zorder=3)
    _effects(right, layers, place, selected)
    left.set_ylabel("layer")
    step = max(1, round(len(place) / 12))
    shown = [layer for layer in place if list(place).index(layer) % step == 0]
    left.set_yticks([place[layer] for layer in shown], [str(layer) for layer in shown])
    figure.colorbar(
        images[0], ax=[left, middle], location="bottom", aspect=40, label="mean log-odds of a refusal opening"
    )
    handles = [_handle(GATES[name], "white", text) for name, text in OUTCOMES.items()]
    handles += [
        Line2D([], [], color="black", linewidth=0.9, label="as likely as not"),
        Line2D([], [], color="black", linewidth=0, marker="s", markerfacecolor="none", label="selected layer"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _grid(mean: "pd.Series[float]") -> pd.DataFrame:
    """Layers in rows, alphas in columns; the column of alpha = 0 is the baseline's in every row."""
    grid = mean.drop(-1, level="layer").unstack("alpha")
    grid[0.0] = mean.loc[(-1, 0.0)]
    return grid.sort_index(axis=0).sort_index(axis=1)


def _map(axes: Axes, grid: pd.DataFrame, reach: float, title: str) -> mpl.image.AxesImage:
    values = grid.to_numpy(dtype=float)
    image = axes.imshow(values, cmap=DIVERGING, norm=Normalize(-reach, reach), origin="lower", aspect="auto")
    if min(values.shape) > 1 and np.nanmin(values) < 0 < np.nanmax(values):
        axes.contour(values, levels=[0.0], colors="black", linewidths=0.9)
    axes.set_xticks(range(grid.shape[1]), [_signed(alpha) for alpha in grid.columns])
    axes.tick_params(axis="x", rotation=90)
    height, width = values.shape
    axes.set(xlabel="alpha (mean differences)", title=title, xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5))
    return image


def _effects(axes: Axes, layers: pd.DataFrame, place: dict[int, int], selected: int) -> None:
    best = layers.loc[layers["effect"].idxmax()]
    axes.axvspan(best["low"], best["high"], color="0.9", zorder=-2)
    axes.axvline(0, color="0.5", linestyle=":", linewidth=0.8)
    for near, part in layers.groupby("near"):
        errors = np.abs(np.stack([part["effect"] - part["low"], part["high"] - part["effect"]]))
        axes.errorbar(
            part["effect"], part["layer"].map(place), xerr=errors, color=COLOURS["refusal"], linestyle="none",
            marker="o", markersize=3.2, markerfacecolor=COLOURS["refusal"] if near else "white", capsize=0,
        )  # fmt: skip
    here = layers[layers["layer"] == selected]
    axes.plot(here["effect"], here["layer"].map(place), "s", markersize=8, markerfacecolor="none", color="black")
    axes.set(xlabel="log-odds at +1 minus at −1", title="(c) effect on harmful")


def prediction(table: pd.DataFrame, baseline: "pd.Series[float]", correlation: "pd.Series[float]") -> Figure:
    """The screen against the generated refusal rate, and the change at each confirmed cell beside a random direction's.

    Args:
        table: From `sweep_cells.gates`.
        baseline: `screen`, and `rate, low, high` of the unsteered model.
        correlation: `rho, low, high` over all confirmed cells (`sweeps.predictions`).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.5), width_ratios=(1.15, 1))
    for sign, (shape, colour, name) in SIGNS.items():
        part = table[np.sign(table["alpha"]) == sign]
        for coherent, some in part.groupby("coherent"):
            _points(left, some["screen"], some, shape, colour, colour if coherent else "white")
        left.plot([], [], shape, color=colour, label=name)
    _points(left, pd.Series([baseline["screen"]]), baseline.to_frame().T, "D", "black", "black")
    left.plot([], [], "D", color="black", label="unsteered")
    left.plot([], [], "o", color="0.4", markerfacecolor="white", label="not coherent")
    left.set(
        xlabel="screen: mean log-odds of a refusal opening,\nharmful selection prompts",
        ylabel="generated refusal, %\nharmful evaluation prompts", ylim=(-4, 104),
    )  # fmt: skip
    left.legend(loc="best")
    said = (
        "undefined"
        if np.isnan(correlation["rho"])
        else (f"{correlation['rho']:.2f} [{correlation['low']:.2f}, {correlation['high']:.2f}]")
    )
    left.set_title("(a) what the screen predicts\n" + f"Spearman: {said}".replace("-", "−"))
    _changes(right, table)
    handles = [_handle(GATES[name], "0.75", text) for name, text in OUTCOMES.items()]
    handles.append(Line2D([], [], linestyle="none", marker="|", color="0.35", markersize=8, label="random direction"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, title="markers of (b)", title_fontsize=7.5)
    return figure


def _points(axes: Axes, x: "pd.Series[float]", rates: pd.DataFrame, shape: str, colour: str, face: str) -> None:
    centre = 100 * rates["rate"].to_numpy(dtype=float)
    ends = 100 * rates[["low", "high"]].to_numpy(dtype=float).T
    axes.errorbar(
        x, centre, np.abs(ends - centre), color=colour, marker=shape, markerfacecolor=face, linestyle="none",
        elinewidth=0.8, markersize=5,
    )  # fmt: skip


def _changes(axes: Axes, table: pd.DataFrame) -> None:
    rows = np.arange(len(table))[::-1]  # the highest by the screen on top
    axes.axvline(0, color="0.5", linestyle=":", linewidth=0.8)
    for row, (_, cell) in zip(rows, table.iterrows(), strict=True):
        colour = SIGNS[int(np.sign(cell["alpha"]))][1]
        axes.plot([100 * cell["change_low"], 100 * cell["change_high"]], [row, row], color=colour, linewidth=1.0)
        axes.scatter(
            100 * cell["change"], row, s=SIZES[cell["outcome"]], c=colour, marker=GATES[cell["outcome"]],
            edgecolors="black", linewidths=0.6, zorder=3,
        )  # fmt: skip
    drift = 100 * (table["random"] - (table["rate"] - table["change"]))
    axes.plot(drift, rows, "|", color="0.35", markersize=8, markeredgewidth=1.6)
    axes.set_yticks(rows, [f"{cell.layer}, {_signed(cell.alpha)}" for cell in table.itertuples()])
    axes.tick_params(axis="y", labelsize=6.5, length=0)
    axes.set(xlabel="change of refusal, points", ylabel="layer and alpha, by screen", title="(b) the gates")


def _signed(alpha: float) -> str:
    return f"{alpha:+g}".replace("-", "−") if alpha else "0"


def _handle(shape: str, face: str, label: str) -> Line2D:
    size = 9 if shape == "*" else 5
    return Line2D(
        [], [], linestyle="none", marker=shape, markersize=size, markerfacecolor=face, markeredgecolor="black",
        label=label,
    )  # fmt: skip
