"""The study's own threshold: its published counts by alpha, analysed again (methods, section 6).

The study finds a "threshold collapse" between two neighbouring alphas. Only counts are published, not which prompts
they were: so they are taken as independent, though some are likely to share a base request.
"""

import functools
import math

import numpy as np
import pandas as pd

from refusal import curves, statistics
from refusal.curves import Curve
from refusal.files import ROOT
from refusal.grids import rule
from refusal.statistics import Interval
from refusal.wording import p_value, people, percent, span

SEED = 0


@functools.cache
def counts() -> pd.DataFrame:
    """The published counts by alpha, as the data file has them, with Wilson intervals: `rate, low, high`."""
    table = pd.read_csv(ROOT / "data" / "study_threshold.csv")
    ends = [statistics.wilson(row.k, row.n) for row in table.itertuples()]
    return table.assign(rate=table["k"] / table["n"], low=[one.low for one in ends], high=[one.high for one in ends])


def fits() -> dict[str, Curve]:
    """The counts, fitted as ours are.

    The answers of single prompts are made up in two ways that give these counts: "independent" from alpha to alpha, and
    "nested", where a prompt that is jailbroken at one count is so at every higher one. The truth lies between.
    """
    table, rng = counts(), np.random.default_rng(SEED)
    n, alphas = int(table["n"].iloc[0]), table["alpha"].to_numpy(dtype=float)
    ways = {
        "independent": np.stack([rng.permutation(n) < k for k in table["k"]], axis=1),
        "nested": np.arange(n)[:, None] < table["k"].to_numpy(),
    }
    unknown = np.full(len(alphas), math.nan)
    return {
        way: curves.describe("extracted", 1, "jailbreak", alphas, unknown, answers, SEED)
        for way, answers in ways.items()
    }


def numbers() -> dict[str, str]:
    """Formatted numbers of the study's own table, by macro name."""
    table, made = counts().set_index("alpha"), fits()
    pairs = {way: curves.steepest(curve, SEED) for way, curve in made.items()}
    pair, alphas, steps = pairs["independent"], table.index.tolist(), np.diff(table["k"])
    steep = [place for place, step in enumerate(np.abs(steps)) if step == np.abs(steps).max()]
    tied = [f"that from {alphas[place]} to {alphas[place + 1]}" for place in steep if alphas[place] != pair["first"]]
    found = {way: curve.found for way, curve in made.items()}
    kinds = list(dict.fromkeys(one.verdict for one in found.values()))
    values = {
        "Model": people(str(table["model"].iloc[0])),
        "Prompts": str(table["n"].iloc[0]),
        "Pairs": str(len(steps)),
        "Tied": " and ".join(tied) or "no other",
        "Z": p_value(pair["z"]),
        "Fisher": p_value(pair["fisher"]),
        "Half": f"{found['nested'].alpha50:.1f}",
        "Width": f"{found['nested'].width:.2f}",
        "Kind": " or ".join(kinds),
    }
    for macro in ("First", "Second"):
        row = table.loc[pair[macro.lower()]]
        values |= {
            macro: f"{pair[macro.lower()]:.0f}",
            f"{macro}Rate": percent(row["rate"]),
            f"{macro}Interval": span(Interval(row["low"], row["high"])),
        }
    for way, one in found.items():
        values |= {
            f"{way.capitalize()}Half": span(one.alpha50_interval, 1, 1),
            f"{way.capitalize()}Width": span(one.width_interval, 1, 2),
            f"{way.capitalize()}P": p_value(pairs[way]["p"]),
        }
    return {f"StudyThreshold{name}": value for name, value in values.items()}


def prose() -> str:
    """What the study's own counts say, in words (markdown)."""
    of = {name.removeprefix("StudyThreshold"): value for name, value in numbers().items()}
    return (
        f"From α = {of['First']} to {of['Second']} the published rate goes from {of['FirstRate']} % "
        f"{of['FirstInterval']} to {of['SecondRate']} % {of['SecondInterval']}, n = {of['Prompts']} each. The study's "
        f"pooled z gives p = {of['Z']}, Fisher's exact test {of['Fisher']}. But this pair is the steepest of "
        f"{of['Pairs']}, chosen after the fact; as steep as it is {of['Tied']}. Somewhere on a smooth curve, a pair as "
        f"steep as this occurs with p = {of['IndependentP']} (if a prompt's answers at different α are independent) or "
        f"{of['NestedP']} (if they are perfectly nested). The rate is half way at α = {of['Half']} "
        f"({of['IndependentHalf']} or {of['NestedHalf']}), and its relative width is {of['Width']} "
        f"({of['IndependentWidth']} or {of['NestedWidth']}), where a threshold would have to lie below "
        f"{rule()['width_limit']:.2f}: {of['Kind']}."
    )
