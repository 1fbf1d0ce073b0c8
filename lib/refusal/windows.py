"""The window: the alphas around zero at which steering leaves the rest as it was, and its useful part (methods, 8).

Rates between two neighbouring alphas are read off the straight line between them. A window ends at the first alpha,
going outwards from zero, at which degeneration or the rise of over-refusal reaches its limit; its useful part is where
refusal of harmful requests lies high enough above the baseline. All of it is computed for many resamples at once.
Measured coverage of the 95 % intervals with 50 prompts a side: .94 for an edge, by degeneration or by over-refusal, .95
for the width of the useful part. Where nothing depends on the dose and 0, 2, 5, 20 or 50 % of the answers come out
otherwise by chance, a useful part is claimed in 0, 0, 0, 5 and 16 % of simulated studies; where refusal rises by 15,
20, 30 or 40 points, in 17, 47, 84 and 91 %.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import statistics
from refusal.statistics import Interval
from refusal.window_answers import Answers, resamples, rises
from refusal.window_runs import rule

DRAWS = 1000  # resamples (analysis plan)
THERE, ABSENT = 0.975, 0.025  # shares of them with a useful part, from and up to which there is one or none (the plan)
STOPS = ("degeneration", "over-refusal", "the end of the grid")
TINY = 1e-9  # of a rate: 0.7 - 0.6 is not 0.1 for a computer
SHORTEST = 1e-6  # of a useful part: a single point is none


def crossing(x: NDArray[np.float64], values: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Where a polyline first reaches a limit, `[draws]`; inf where it never does.

    Args:
        x: `[k]`, ascending.
        values: `[draws, k]`.
        limit: Reached from below.
    """
    reached, rows = values >= limit - TINY, np.arange(len(values))
    first = reached.argmax(1)
    before = np.maximum(first - 1, 0)
    low, high = values[rows, before], values[rows, first]
    share = np.clip((limit - low) / np.maximum(high - low, TINY), 0, 1)
    at = np.where(first > 0, x[before] + share * (x[first] - x[before]), x[0])
    return np.where(reached.any(1), at, math.inf)


def edge(
    of: Answers, harmless: NDArray[np.float64], broken: NDArray[np.float64], sign: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Where the window ends on one side, and which of STOPS ends it (a place there); both `[draws]`.

    Args:
        of: The answers, for their alphas.
        harmless: Rise of over-refusal `[draws, k]`.
        broken: Degeneration `[draws, k]`.
        sign: 1 above zero, -1 below.
    """
    outwards = np.arange(of.zero, len(of.alphas)) if sign > 0 else np.arange(of.zero, -1, -1)
    x, planned = np.abs(of.alphas[outwards]), rule()
    limits = ((broken, planned["degeneration_limit"]), (harmless, planned["over_refusal_limit"]))
    ends = np.stack([crossing(x, values[:, outwards], limit) for values, limit in limits])
    nearest = ends.min(0)
    why = np.where(np.isinf(nearest), len(STOPS) - 1, ends.argmin(0))
    return sign * np.minimum(nearest, x[-1]), why


def pieces(
    alphas: NDArray[np.float64], rise: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where, between two neighbouring alphas and inside the window, the rise is large enough to be useful.

    Args:
        alphas: `[k]`.
        rise: Of the refusal of harmful requests `[draws, k]`.
        low: Lower edge of the window `[draws]`.
        high: Upper edge.

    Returns:
        Both ends, `[draws, k - 1, 2]`; equal where there is no such place.
    """
    least, a, b = float(rule()["useful_rise"]), alphas[:-1], alphas[1:]
    left = np.clip(a, low[:, None], high[:, None])
    right = np.clip(b, low[:, None], high[:, None])
    slope = (rise[:, 1:] - rise[:, :-1]) / (b - a)
    at_left, at_right = (rise[:, :-1] + slope * (x - a) for x in (left, right))
    enough = at_left >= least - TINY, at_right >= least - TINY
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.clip(left + (least - at_left) / slope, left, right)
    start = np.where(enough[0], left, np.where(enough[1], cross, left))
    end = np.where(enough[1], right, np.where(enough[0], cross, start))
    return np.stack([start, np.maximum(start, end)], axis=-1)


@dataclass(frozen=True, eq=False)
class Found:
    """The window of a variant, in units of alpha, with 95 % bootstrap intervals over prompts.

    Attributes:
        answers: What it comes from.
        low: Lower edge.
        high: Upper edge.
        width: Of the window.
        useful: Width of its useful part, in all; 0 where there is none.
        intervals: Of `low`, `high`, `width` and `useful`.
        stops: What ends the window below and above, of STOPS.
        open: Share of the resamples whose window reaches the end of the grid, below and above.
        parts: The useful part, as pairs of alphas.
        share: Share of the resamples with a useful part: what the plan's rule looks at.
        rise: Largest rise of the refusal of harmful requests at an alpha of the grid within the window.
        rise_at: That alpha; 0 where the window holds no other.
        rise_p: McNemar's exact test of it (sign flips of whole clusters), times the number of alphas to choose from.
        room: How far that refusal could rise at most.
    """

    answers: Answers
    low: float
    high: float
    width: float
    useful: float
    intervals: dict[str, Interval]
    stops: tuple[str, str]
    open: tuple[float, float]
    parts: list[tuple[float, float]]
    share: float
    rise: float
    rise_at: float
    rise_p: float
    room: float

    @property
    def verdict(self) -> str:
        """The plan's rule on "no useful window exists", for this variant."""
        return "contradicted" if self.share >= THERE else "replicated" if self.share <= ABSENT else "inconclusive"


def find(of: Answers, seed: int, draws: int = DRAWS) -> Found:
    """The window, its useful part, and their intervals.

    Args:
        of: From `answers`.
        seed: Of the bootstrap, which draws harmful and harmless prompts apart, whole clusters at a time.
        draws: Resamples.
    """
    rng = np.random.default_rng(seed)
    weights = [resamples(clusters, draws, rng) for clusters in of.clusters]
    own, drawn = _all(of, *rises(of)), _all(of, *rises(of, *weights))
    quantiles = {key: np.quantile(drawn[key], [0.025, 0.975]) for key in ("low", "high", "width", "useful")}
    harmful, harmless, broken = (curve[0] for curve in rises(of))
    planned = rule()
    inside = (of.alphas >= own["low"][0] - TINY) & (of.alphas <= own["high"][0] + TINY) & (of.alphas != 0)
    inside &= (broken < planned["degeneration_limit"] - TINY) & (harmless < planned["over_refusal_limit"] - TINY)
    places = np.flatnonzero(inside)
    best = int(places[harmful[places].argmax()]) if len(places) else of.zero
    test = statistics.paired(of.harmful[:, best], of.harmful[:, of.zero], of.clusters[0])
    point = {key: float(own[key][0]) for key in quantiles}
    return Found(
        answers=of,
        low=point["low"],
        high=point["high"],
        width=point["width"],
        useful=point["useful"],
        intervals={key: Interval(float(ends[0]), float(ends[1])) for key, ends in quantiles.items()},
        stops=(STOPS[own["why_low"][0]], STOPS[own["why_high"][0]]),
        open=(_at_end(drawn["why_low"]), _at_end(drawn["why_high"])),
        parts=_merged(own["pieces"][0]),
        share=float((drawn["useful"] > 0).mean()),
        rise=float(harmful[best]),
        rise_at=float(of.alphas[best]),
        rise_p=min(1.0, test.p * max(len(places), 1)),
        room=float(1 - of.harmful[:, of.zero].mean()),
    )


def _at_end(why: NDArray[np.int64]) -> float:
    return float((why == len(STOPS) - 1).mean())


def _all(of: Answers, harmful: NDArray, harmless: NDArray, broken: NDArray) -> dict[str, NDArray]:
    (low, why_low), (high, why_high) = (edge(of, harmless, broken, sign) for sign in (-1, 1))
    where = pieces(of.alphas, harmful, low, high)
    useful = (where[..., 1] - where[..., 0]).sum(1)
    useful = np.where(useful > SHORTEST, useful, 0.0)
    return {"low": low, "high": high, "width": high - low, "useful": useful, "pieces": where, "why_low": why_low,
            "why_high": why_high}  # fmt: skip


def _merged(where: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Pieces that touch each other, as one; points left out."""
    made: list[tuple[float, float]] = []
    for start, end in where.tolist():
        if end - start <= SHORTEST:
            continue
        if made and start - made[-1][1] <= SHORTEST:
            made[-1] = (made[-1][0], end)
        else:
            made.append((start, end))
    return made


def table(found: list[Found]) -> pd.DataFrame:
    """Edges and widths with intervals in each unit of alpha, a row for each variant and unit."""
    rows = []
    for one in found:
        for unit, size in one.answers.units.items():
            row: dict[str, object] = {"variant": one.answers.variant, "unit": unit}
            for key, interval in one.intervals.items():
                row |= {key: size * getattr(one, key), f"{key}_low": size * interval.low,
                        f"{key}_high": size * interval.high}  # fmt: skip
            rows.append(row | {"share": one.share, "verdict": one.verdict})
    return pd.DataFrame(rows)
