"""Figures: the same data give the same bytes, and the plotted data lie beside them."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from test_analyses import CONDITIONS, record, same

from refusal import analyses, figures, summaries
from refusal.files import ROOT


@pytest.fixture(autouse=True)
def _style() -> None:
    figures.use_style()
    yield
    plt.close("all")


def test_saved_twice_equal_bytes(tmp_path: Path) -> None:
    shares = analyses.rates(record(same((0.6, 0.9, 0.3))))
    for folder in ("a", "b"):
        figures.save(figures.label_rates(shares, list(CONDITIONS)), shares, "fig", tmp_path / folder)
    for ending in ("pdf", "png", "csv"):
        assert (tmp_path / "a" / f"fig.{ending}").read_bytes() == (tmp_path / "b" / f"fig.{ending}").read_bytes()


def test_plotted_points_are_the_rates() -> None:
    shares = analyses.rates(record(same((0.6, 0.9, 0.3))))
    panel = figures.label_rates(shares, list(CONDITIONS)).axes[0]
    refusal = panel.containers[0].lines[0]
    assert refusal.get_ydata().tolist() == pytest.approx([60, 90, 30])
    assert panel.get_xlabel() and panel.figure.axes[0].get_ylabel()


def test_study_panel_shows_published_counts() -> None:
    frame = record(same((0.6, 0.9, 0.3)))
    figure = figures.beside_study(analyses.seed_rule_rates(frame), analyses.study_table(), "ours")
    heights = [[round(bar.get_height()) for bar in axes.patches] for axes in figure.axes]
    assert heights == [[6, 15, 96, 99], [0, 0, 9, 7], [10, 40, 70]]


def test_fonts_are_embedded_as_truetype(tmp_path: Path) -> None:
    shares = analyses.rates(record(same((0.6, 0.9, 0.3))))
    figures.save(figures.label_rates(shares, list(CONDITIONS)), shares, "fig", tmp_path)
    assert b"/Type3" not in (tmp_path / "fig.pdf").read_bytes()


def test_every_committed_figure_has_its_data() -> None:
    folder = ROOT / "figures" / summaries.DEFAULT_MODEL
    for name in summaries.FIGURES:
        for ending in ("pdf", "png"):
            assert (folder / f"{name}.{ending}").is_file(), f"{name}.{ending} is not committed: ./run_all.sh --publish"
        assert len(pd.read_csv(folder / f"{name}.csv"))
