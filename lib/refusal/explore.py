"""Figures that follow a slider, where looking beats reading: live in JupyterLab (`./run_all.sh lab`), else still.

Nothing here measures, and no number of the paper comes from here. A committed notebook, a code host and the site show
the figure at the slider's first place.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from refusal import cone_tables, cones
from refusal.figures import COLOURS, WIDTH

BARS = {
    "harmful": ("harmful requests\nrefused", COLOURS["refusal"], ""),
    "harmless": ("harmless requests\nrefused", "#CC79A7", "//"),
    "degenerate": ("degenerate\ncompletions", COLOURS["degenerate"], ".."),
}


def live() -> bool:
    """Whether sliders can be moved here: in the JupyterLab that ./run_all.sh lab started."""
    return bool(os.environ.get("REFUSAL_LAB")) and importlib.util.find_spec("ipywidgets") is not None


def slider(draw: Callable[[float], Figure], values: Sequence[float], start: float, name: str) -> None:
    """Shows `draw(value)` under a slider over `values`; where none can be moved, `draw(start)` alone.

    Args:
        draw: Makes a figure with pyplot.
        values: Where the slider can stand.
        start: Where it stands first; the nearest of `values` is taken.
        name: What the slider moves.
    """
    first = min(values, key=lambda value: abs(value - start))
    if not live():
        draw(first)  # the notebook shows it at the end of the cell
        return
    import ipywidgets
    from IPython.display import display

    def show(value: float) -> None:
        display(figure := draw(value))  # at once: ipywidgets does not know the inline backend by its present name
        plt.close(figure)

    places = [(f"{value:g}".replace("-", "−"), value) for value in values]
    control = ipywidgets.SelectionSlider(options=places, value=first, description=name, continuous_update=False)
    display(ipywidgets.VBox([control, ipywidgets.interactive_output(show, {"value": control})]))


def dose(points: pd.DataFrame, alpha: float) -> Figure:
    """The three rates at one alpha, with intervals, beside those of the baseline.

    Args:
        points: From `window_answers.curves`, of one variant.
        alpha: One of its alphas.
    """
    figure, axes = plt.subplots(figsize=(WIDTH * 0.7, 2.4))
    for place, (outcome, (_, colour, hatch)) in enumerate(BARS.items()):
        rows = points[points["outcome"] == outcome].set_index("alpha")
        for value, offset, strength in ((0.0, -0.2, 0.35), (alpha, 0.2, 0.85)):
            rate, low, high = 100 * rows.loc[value, ["rate", "low", "high"]].to_numpy(dtype=float)
            axes.bar(place + offset, rate, 0.36, color=colour, alpha=strength, hatch=hatch, edgecolor="white")
            axes.errorbar(place + offset, rate, [[max(rate - low, 0)], [max(high - rate, 0)]], color="0.2")
    axes.set_xticks(range(len(BARS)), [words for words, *_ in BARS.values()])
    words = f"alpha = 0 (pale) and {alpha:+g}".replace("-", "−")
    axes.set(ylim=(0, 103), ylabel="share, %", title=words)
    return figure


def doses(points: pd.DataFrame, start: float = 1.0) -> None:
    """A slider over the alphas of one variant (notebook 07)."""
    alphas = sorted(points["alpha"].unique().tolist())
    slider(lambda alpha: dose(points, alpha), alphas, start, "alpha")


def cosines(made: np.ndarray, names: Sequence[str], layer: int) -> Figure:
    """Cosines between the directions of the categories at one layer.

    Args:
        made: Cosines `[layers, K, K]`.
        names: The categories.
        layer: Which layer.
    """
    figure, axes = plt.subplots(figsize=(WIDTH * 0.5, 2.8))
    image = axes.imshow(made[layer], vmin=-1, vmax=1, cmap="PuOr")
    for (row, column), value in np.ndenumerate(made[layer]):
        dark = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=dark)
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"layer {layer}")
    figure.colorbar(image, label="cosine")
    return figure


def layers(metrics: pd.DataFrame, start: int) -> None:
    """A slider over the layers: how alike the categories' directions are (notebook 05).

    Args:
        metrics: The geometry of notebook 05's record.
        start: The selected layer.
    """
    names = cone_tables.categories(metrics)
    made = cones.cosines(cone_tables.grams(metrics)[:, : len(names), : len(names)])
    slider(lambda layer: cosines(made, names, int(layer)), list(range(len(made))), start, "layer")
