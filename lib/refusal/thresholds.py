"""Thresholds: is a rate's change along alpha abrupt, graded or none, and what could the grid tell (methods, section 6).

The same prompts answer at every alpha: likelihoods, which count answers, serve to fit and to compare shapes; intervals
and p values take whole prompts as the unit.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy.special import expit, logit, xlogy
from sklearn.isotonic import IsotonicRegression

from refusal.files import CompendiumError
from refusal.statistics import Interval

Floats = NDArray[np.float64]
WIDTH = 2 * math.log(9)  # from 10 to 90 % of a logistic's way, in units of its scale
# Weight and centre of a penalty that holds what the data leave open (a plateau at 0, the scale of a step), and moves
# nothing else: it weighs less than a tenth of an answer. Order: both plateaus (log-odds), location and log scale (of
# the grid's span).
RIDGE, CENTRE = 0.05, np.array([0.0, 0.0, 0.5, 0.0])
STARTS = (0.25, 1.0, 3.0)  # scales, in gaps of the grid, from which a fit climbs
LARGEST_STEP = np.array([2.0, 2.0, 0.25, 1.0])


@dataclass(frozen=True, eq=False)
class Description:
    """A shape fitted to the rates `[alphas]`; its likelihood counts all answers as if they were independent."""

    parameters: int
    log_likelihood: float
    aic: float
    rates: Floats


@dataclass(frozen=True, eq=False)
class Threshold:
    """How a rate changes with alpha, on one side of zero.

    Attributes:
        n: Prompts.
        p_flat: Of the test that the rate is the same at all alphas.
        inner: The logistic's plateau towards alpha = 0; with `outer` its floor and ceiling, whichever is lower.
        outer: Its plateau towards the largest |alpha|.
        alpha50: Alpha half way between the plateaus, be it on the grid or not. NaN, as the next five, where p_flat is
            above the level.
        alpha50_interval: Bootstrap over prompts, percentiles.
        width: From 10 to 90 % of the way, relative to |alpha50|; infinite where alpha50 is not beyond zero.
        width_interval: Bootstrap over prompts, reflected on the log scale; its upper end is at least `resolution`.
        width_upper: Its one-sided upper bound at the same confidence; at least `resolution`.
        resolution: Widest relative width that this grid and these prompts may take for a step: none narrower can be
            told from one.
        descriptions: Of the names constant, logistic and isotonic.
        verdict: "threshold", "graded", "flat" or "not resolved".
    """

    n: int
    p_flat: float
    inner: float
    outer: float
    alpha50: float
    alpha50_interval: Interval
    width: float
    width_interval: Interval
    width_upper: float
    resolution: float
    descriptions: dict[str, Description]
    verdict: str


class Steepest(NamedTuple):
    """The steepest adjacent pair: the rate at alpha `second` (farther from zero) minus that at `first`.

    `p` is the chance of a pair at least as steep anywhere on the grid under the rates `smooth`; `dependence` is the
    share of a prompt's pairs of answers that follow one threshold of its own.
    """

    first: float
    second: float
    difference: float
    p: float
    smooth: Floats
    dependence: float


def describe(
    y: ArrayLike, alphas: ArrayLike, *, limit: float, seed: int, draws: int = 1000, level: float = 0.05
) -> Threshold:
    """Fits a constant, a logistic with floor and ceiling, and an isotonic curve, and says which kind of change it is.

    "flat": a constant is not rejected. "threshold": the upper bound of the relative width is below the limit, and the
    interval of alpha50 lies within the grid. "graded": the interval of the relative width lies above the limit. "not
    resolved": anything else; also too few prompts for a constant to be rejected, whatever they answer.

    Measured coverage of nominal 95 % (12 to 100 prompts, 9 and 21 alphas, answers of a prompt independent to fully
    dependent): alpha50 .90-1; width_upper .88-1, where plain percentiles would have .53-.96, because few prompts make a
    fitted curve too steep.

    Args:
        y: True or false, `[prompts, alphas]`.
        alphas: `[alphas]`, on one side of zero, by growing magnitude; the first may be zero.
        limit: Relative width below which a change is a threshold (analysis plan).
        seed: Of the bootstrap and the test.
        draws: Bootstrap samples.
        level: Of the test; intervals have a confidence of 1 - level.

    Raises:
        CompendiumError: Fewer than 3 alphas or 2 prompts, alphas in another order, values other than true and false.
    """
    answers, x = _checked(y, alphas)
    n, rng, sign = len(answers), np.random.default_rng(seed), -1.0 if np.asarray(alphas)[-1] < 0 else 1.0
    start, span = x[0], x[-1] - x[0]
    u = (x - start) / span
    fitted = _fit(answers.sum(0)[None], n, u)[0]
    shapes = _descriptions(answers.sum(0), n, _curve(fitted[None], u)[0])
    p_flat = flatness(answers, rng)
    if p_flat > level:
        able = 2.0 ** (1 - n) <= level
        rate, none = float(answers.mean()), Interval(math.nan, math.nan)
        return Threshold(n, p_flat, rate, rate, math.nan, none, math.nan, none, math.nan, math.nan, shapes,
                         "flat" if able else "not resolved")  # fmt: skip

    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    every = np.concatenate([fitted[None], _fit(weights @ answers, n, u, fitted)])
    location = start + span * every[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_width = np.where(location > 0, np.log(WIDTH * span) + every[:, 3] - np.log(location), np.inf)
    low, upper, high = _reflected(log_width[0], log_width[1:], [level / 2, 1 - level, 1 - level / 2])
    inner, outer = expit(fitted[:2]).tolist()
    hole = start + span * _hole(fitted, u)
    resolution = float(np.ptp(hole) / abs(location[0]) * _hidden(n * abs(outer - inner), level))
    upper, high = max(upper, resolution), max(high, resolution)
    ends = np.quantile(location[1:], [level / 2, 1 - level / 2])
    if low < resolution:  # it may be a step, and a step may be anywhere in its gap
        beside = [hole[hole <= location[0]].max(initial=-np.inf), hole[hole >= location[0]].min(initial=np.inf)]
        low, ends = 0.0, np.array([min(ends[0], beside[0]), max(ends[1], beside[1])])
    on_grid = x[0] <= ends[0] and ends[1] <= x[-1]
    verdict = "threshold" if upper < limit and on_grid else "graded" if low > limit else "not resolved"
    return Threshold(n, p_flat, inner, outer, float(sign * location[0]), Interval(*sorted((sign * ends).tolist())),
                     float(np.exp(log_width[0])), Interval(low, high), upper, resolution, shapes, verdict)  # fmt: skip


def steepest_pair(y: ArrayLike, alphas: ArrayLike, *, limit: float, seed: int, draws: int = 2000) -> Steepest:
    """The steepest adjacent pair, against a smooth curve rather than against no change at all.

    The smooth curve is the fitted logistic; where that is narrower than the limit (its own limit is a step, which would
    explain any cliff), it is the best one as wide as the limit. Parametric bootstrap: each new prompt has one threshold
    in its response, a uniform number that it is compared with at every alpha, so that the curve's rates hold and its
    answers turn once; at a share of its alphas it is compared with a fresh number instead. The share is chosen such
    that answers turn against the curve as often as in the data. That fixes the variance of adjacent differences: with
    thresholds alone they would vary too little, with fresh numbers alone too much. The steepest pair is chosen anew in
    each sample, so p accounts for its choice. Measured size at 5 %: .00-.07 for smooth curves, 30 and 100 prompts, 9
    and 21 alphas, answers of a prompt independent to fully dependent (.00-.03 then: the fit follows the steep pair).

    Args:
        y: True or false, `[prompts, alphas]`.
        alphas: As in `describe`.
        limit: As in `describe`.
        seed: Of the bootstrap.
        draws: Bootstrap samples.

    Raises:
        CompendiumError: As in `describe`.
    """
    answers, x = _checked(y, alphas)
    n, rng, where = len(answers), np.random.default_rng(seed), np.asarray(alphas, dtype=float)
    rates = _smooth(answers.sum(0), n, x, limit)
    before, after = (rates[:-1], rates[1:]) if rates[-1] >= rates[0] else (1 - rates[:-1], 1 - rates[1:])
    turned = np.diff(answers, axis=1) == (-1 if rates[-1] >= rates[0] else 1)
    fresh_pairs = min(1.0, turned.sum() / max(n * float(before @ (1 - after)), 1e-12))
    fresh = 1 - math.sqrt(1 - fresh_pairs)
    changes = np.diff(answers.sum(0)) / n  # counts first, so that ties are ties
    place = int(np.abs(changes).argmax())
    beyond = 0
    for _ in range(draws):
        own = np.where(rng.random(answers.shape) < fresh, rng.random(answers.shape), rng.random((n, 1)))
        beyond += np.abs(np.diff((own < rates).mean(0))).max() >= abs(changes[place]) - 1e-12
    p = (1 + int(beyond)) / (1 + draws)
    return Steepest(
        float(where[place]), float(where[place + 1]), float(changes[place]), p, rates, float(1 - fresh_pairs)
    )


def flatness(y: ArrayLike, rng: np.random.Generator, draws: int = 4000) -> float:
    """Tests that a rate is the same at all alphas, with whole prompts as the unit.

    The largest contrast of an inner with an outer part of the grid, among all splits, each in units of what independent
    answers would give it. The null flips the signs of whole prompts (all flips where they are few), so the answers of
    a prompt may depend on each other as they like, and the choice among the splits is accounted for. Dividing by the
    prompts' own spread instead would reject up to 60 % of true nulls at low rates, where that spread can be near 0.
    Measured size at 5 %: .00-.08 for 8 to 100 prompts, 3 to 21 alphas, rates .05 and .5, independent to dependent.

    Args:
        y: True or false, `[prompts, alphas]`, alphas in order.
        rng: Of the flips.
        draws: Flips, where there are more.

    Returns:
        The p value.
    """
    answers = np.asarray(y, dtype=float)
    k, places = answers.shape[1], np.arange(1, answers.shape[1])
    contrast = (answers - answers.mean(1, keepdims=True)).cumsum(1)[:, :-1] / np.sqrt(places * (k - places))
    contrast = contrast[np.ptp(answers, axis=1) > 0]  # a prompt that never changes says nothing either way
    n, observed = len(contrast), np.abs(contrast.sum(0)).max() - 1e-9
    if 2**n <= draws:
        flips = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(flips @ contrast).max(1) >= observed).mean())
    flips = rng.integers(0, 2, (draws, n)) * 2 - 1
    return (1 + int((np.abs(flips @ contrast).max(1) >= observed).sum())) / (1 + draws)


def _checked(y: ArrayLike, alphas: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    """Answers as 0 and 1, and |alpha|."""
    answers, x = np.asarray(y), np.asarray(alphas, dtype=float)
    if answers.ndim != 2 or x.shape != answers.shape[1:] or len(x) < 3 or len(answers) < 2:
        raise CompendiumError(
            f"a threshold needs answers [prompts, alphas] of 2 or more prompts at 3 or more alphas, and got "
            f"{answers.shape} at {x.size}: measure the same prompts at more alphas."
        )
    if not np.isin(answers, [0, 1]).all():
        raise CompendiumError("a threshold is fitted to answers that are true or false, and some are neither.")
    if not np.isfinite(x).all() or (x.min() < 0 < x.max()) or (np.diff(np.abs(x)) <= 0).any():
        raise CompendiumError(f"alphas must lie on one side of zero, by growing magnitude, and are {x.tolist()}.")
    return answers.astype(np.int64), np.abs(x)


def _curve(theta: Floats, u: Floats) -> Floats:
    """Rates `[rows, alphas]` of logistics `[rows, 4]`."""
    inner, outer = expit(theta[:, :1]), expit(theta[:, 1:2])
    share = expit((u - theta[:, 2:3]) * np.exp(-theta[:, 3:]))
    return np.clip(inner + (outer - inner) * share, 1e-12, 1 - 1e-12)


def _objective(theta: Floats, counts: NDArray, n: int, u: Floats) -> Floats:
    penalty = RIDGE / 2 * ((theta - CENTRE) ** 2).sum(1)
    return _log_likelihood(counts, n, _curve(theta, u)) - penalty


def _log_likelihood(counts: NDArray, n: int, rates: Floats) -> Floats:
    return (xlogy(counts, rates) + xlogy(n - counts, 1 - rates)).sum(-1)


def _fit(counts: NDArray, n: int, u: Floats, also: Floats | None = None) -> Floats:
    """Most likely logistics `[rows, 4]` of counts `[rows, alphas]`: the best of several climbs, all rows at once.

    Climbs start at each row's most likely step, which is where a likelihood with several peaks has its highest one,
    with three scales; and at `also`. A single row starts at every step.
    """
    rows, gaps = len(counts), np.diff(u)
    sums, parts = counts.cumsum(1)[:, :-1], n * np.arange(1, len(u))
    rest, others = counts.sum(1, keepdims=True) - sums, n * len(u) - parts
    halves = ((sums, parts), (rest, others))
    score = sum(xlogy(part, part / size) + xlogy(size - part, 1 - part / size) for part, size in halves)
    places = score.argmax(1)[None] if rows > 1 else np.arange(len(gaps))[:, None]
    starts = []
    for place in places:
        plateaus = [logit(np.clip(part[range(rows), place] / size[place], 0.01, 0.99)) for part, size in halves]
        middle, gap = (u[place] + u[place + 1]) / 2, gaps[place]
        starts += [np.stack([*plateaus, middle, np.log(scale * gap)], axis=1) for scale in STARTS]
    starts += [np.broadcast_to(also, (rows, 4))] if also is not None else []
    theta, value = _climb(np.concatenate(starts), np.tile(counts, (len(starts), 1)), n, u)
    best = value.reshape(-1, rows).argmax(0)
    return theta.reshape(-1, rows, 4)[best, np.arange(rows)]


def _climb(theta: Floats, counts: NDArray, n: int, u: Floats, most: int = 60) -> tuple[Floats, Floats]:
    """Fisher scoring with Levenberg's damping, each row for itself, until it gains less than a millionth."""
    theta, value = theta.copy(), _objective(theta, counts, n, u)
    damping, live, diagonal = np.full(len(theta), 1e-2), np.arange(len(theta)), np.arange(4)
    for _ in range(most):
        now, rates = theta[live], _curve(theta[live], u)
        inner, outer = expit(now[:, :1]), expit(now[:, 1:2])
        z = (u - now[:, 2:3]) * np.exp(-now[:, 3:])
        share, slope = expit(z), (outer - inner) * expit(z) * expit(-z)
        parts = [
            inner * (1 - inner) * (1 - share),
            outer * (1 - outer) * share,
            -slope * np.exp(-now[:, 3:]),
            -slope * z,
        ]
        jacobian = np.stack(parts, axis=1)
        scaled = jacobian / (rates * (1 - rates))[:, None]
        gradient = (scaled @ (counts[live] - n * rates)[..., None])[..., 0] - RIDGE * (now - CENTRE)
        information = n * scaled @ jacobian.transpose(0, 2, 1)
        information[:, diagonal, diagonal] = (information[:, diagonal, diagonal] + RIDGE) * (1 + damping[live, None])
        step = np.linalg.solve(information, gradient[..., None])[..., 0]
        new = now + np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        gain = _objective(new, counts[live], n, u) - value[live]
        up = gain >= 0
        theta[live[up]], value[live[up]] = new[up], value[live[up]] + gain[up]
        damping[live] *= np.where(up, 0.2, 5.0)
        live = live[~(up & (gain < 1e-6)) & (damping[live] < 1e8)]
        if not len(live):
            break
    return theta, value


def _smooth(counts: NDArray, n: int, x: Floats, limit: float) -> Floats:
    """Rates of the most likely logistic whose relative width is at least the limit."""
    start, span = x[0], x[-1] - x[0]
    u = (x - start) / span
    fitted = _fit(counts[None], n, u)[0]

    def tied(free: Floats) -> Floats:  # the scale follows from the location
        location = max(start + span * free[2], 1e-6 * span)
        return np.append(free, math.log(limit * location / span / WIDTH))[None]

    if fitted[3] >= tied(fitted[:3])[0, 3]:
        return _curve(fitted[None], u)[0]
    cost = lambda free: -_objective(tied(free), counts, n, u)[0]  # noqa: E731
    starts = [[*fitted[:2], place] for place in (fitted[2], *(u[:-1] + u[1:]) / 2)]
    tries = [optimize.minimize(cost, begin, method="Nelder-Mead") for begin in sorted(starts, key=cost)[:3]]
    return _curve(tied(min(tries, key=lambda one: one.fun).x), u)[0]


def _descriptions(counts: NDArray, n: int, logistic: Floats) -> dict[str, Description]:
    rates, order = counts / n, np.arange(len(counts))
    curves = [IsotonicRegression(increasing=rising).fit_transform(order, rates) for rising in (True, False)]
    isotonic = max(curves, key=lambda curve: _log_likelihood(counts, n, curve))
    shapes = {
        "constant": (1, np.full(len(counts), rates.mean())),
        "logistic": (4, logistic),
        "isotonic": (len(np.unique(isotonic.round(12))), isotonic),
    }
    made = {}
    for name, (parameters, curve) in shapes.items():
        fit = float(_log_likelihood(counts, n, curve))
        made[name] = Description(parameters, fit, 2 * parameters - 2 * fit, curve)
    return made


def _reflected(estimate: float, drawn: Floats, shares: list[float]) -> list[float]:
    """Bounds from bootstrap draws of a logarithm, reflected about the estimate: few prompts make it fall too low."""
    if not np.isfinite(estimate):
        return [0.0 if share < 0.5 else math.inf for share in shares]
    ends = [2 * estimate - np.quantile(drawn, 1 - share, method="inverted_cdf") for share in shares]
    return [float(np.exp(min(end, 700.0))) for end in ends]


def _hole(theta: Floats, u: Floats) -> Floats:
    """The alphas about alpha50 between which the grid cannot tell the width: those beside it.

    With an alpha that lies alone within the change, and so cannot show a width either, it and both of its neighbours.
    """
    share = expit((u - theta[2]) * np.exp(-theta[3]))
    last, first = int((share <= 0.05).sum()) - 1, len(u) - int((share >= 0.95).sum())
    if last < 0 or first >= len(u) or first - last > 2:
        first = int(np.clip(np.searchsorted(u, theta[2]), 1, len(u) - 1))
        last = first - 1
    return u[last : first + 1]


def _hidden(n: float, level: float) -> float:
    """Widest logistic, in units of a gap with its middle in the gap's, that leaves no answer between the plateaus.

    Of n prompts that change, none shows the other plateau's answer at either end of the gap, with a chance of `level`;
    infinite where they are too few to exclude any width.
    """
    share = level ** (1 / (2 * max(n, 1.0)))  # of the way that the curve has gone, or has yet to go, at the two ends
    return float(math.log(9) / logit(share)) if share > 0.5 else math.inf
