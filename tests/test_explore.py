"""Sliders: they show what the record says at their place, and stand still where they cannot be moved."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from refusal import explore

ALPHAS = [-1.0, 0.0, 0.5, 2.0]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def points():
    """Rates that differ at every dose: harmful 10 points a place, harmless 1, degenerate 2."""
    steps = {"harmful": 0.10, "harmless": 0.01, "degenerate": 0.02}
    return pd.DataFrame(
        {
            "outcome": outcome,
            "alpha": alpha,
            "rate": (place + 1) * step,
            "low": place * step,
            "high": (place + 2) * step,
        }
        for outcome, step in steps.items()
        for place, alpha in enumerate(ALPHAS)
    )


def heights(figure):
    return [round(bar.get_height(), 6) for bar in figure.axes[0].patches]


def test_bars_are_the_rates_at_the_dose_beside_the_baseline():
    figure = explore.dose(points(), 2.0)
    assert heights(figure) == [20, 40, 2, 4, 4, 8]
    assert "+2" in figure.axes[0].get_title()


def test_a_dose_that_was_not_measured_is_no_figure():
    with pytest.raises(KeyError):
        explore.dose(points(), 0.7)


def test_cosines_are_those_of_the_layer():
    made = np.stack([np.eye(2), [[1, 0.25], [0.25, 1]]])
    figure = explore.cosines(made, ["fraud", "cyber"], 1)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "0.25", "0.25", "1.00"]
    assert figure.axes[0].get_title() == "layer 1"


def test_elsewhere_the_figure_stands_still_at_the_nearest_place(monkeypatch):
    monkeypatch.delenv("REFUSAL_LAB", raising=False)
    plt.close("all")
    seen = []
    explore.slider(lambda value: seen.append(value) or plt.figure(), ALPHAS, 0.6, "alpha")
    assert seen == [0.5] and len(plt.get_fignums()) == 1


def test_without_ipywidgets_the_lab_shows_the_still_figure_too(monkeypatch):
    monkeypatch.setenv("REFUSAL_LAB", "1")
    monkeypatch.setattr(explore.importlib.util, "find_spec", lambda _: None)
    assert not explore.live()


def test_in_the_lab_a_slider_moves_it(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    monkeypatch.setenv("REFUSAL_LAB", "1")
    shown, seen = [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    explore.slider(lambda value: seen.append(value) or plt.figure(), ALPHAS, 1.7, "alpha")
    control = shown[-1].children[0]
    assert isinstance(control, ipywidgets.SelectionSlider) and control.value == 2.0
    assert [value for _, value in control.options] == ALPHAS and control.options[0][0] == "−1"
    control.value = -1.0
    assert seen == [2.0, -1.0] and isinstance(shown[-1], plt.Figure) and plt.get_fignums() == []


def test_doses_offers_every_alpha_of_the_record(monkeypatch):
    called = {}
    monkeypatch.setattr(explore, "slider", lambda draw, values, start, name: called.update(values=values, start=start))
    explore.doses(points())
    assert called == {"values": ALPHAS, "start": 1.0}
