"""Thresholds: a simulated truth is recovered, a step is called one, and neither slopes nor noise are."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import optimize
from scipy.special import expit, xlogy

from refusal import thresholds
from refusal.files import CompendiumError
from refusal.statistics import Interval

LIMIT = 0.25
GRID = np.linspace(0, 4, 21)
STUDY_ALPHAS, STUDY_COUNTS = [0, 8, 9, 10, 11, 12, 13, 14], np.array([0, 16, 16, 33, 29, 46, 48, 50])  # of 50


def logistic(x, alpha50, width, inner=0.05, outer=0.95):
    """Rates of a change whose 10-90 % width is `width` times alpha50; a width of 0 is a step."""
    return inner + (outer - inner) * expit((x - alpha50) / max(width * alpha50 / thresholds.WIDTH, 1e-6))


def answers(rng, n, rates, dependence=1.0):
    """True and false, `[n, alphas]`: at a share of alphas a prompt follows a threshold of its own, else nothing."""
    shape = (n, len(rates))
    own = np.where(rng.random(shape) < dependence, rng.random((n, 1)), rng.random(shape))
    return own < rates


def covers(interval, truth):
    return interval.low <= truth <= interval.high


# ---- recovery


@pytest.mark.parametrize(("width", "dependence"), [(0.6, 0.0), (0.6, 1.0), (0.15, 0.6)])
def test_alpha50_and_width_are_recovered(width, dependence):
    rng, found, truths = np.random.default_rng(0), [], []
    for seed in range(25):
        truths.append(alpha50 := rng.uniform(1.6, 2.4))
        y = answers(rng, 60, logistic(GRID, alpha50, width), dependence)
        found.append(thresholds.describe(y, GRID, limit=LIMIT, seed=seed, draws=100))
    error = [one.alpha50 - truth for one, truth in zip(found, truths, strict=True)]
    ratio = np.log([one.width / width for one in found])
    coverage = [
        np.mean([covers(one.alpha50_interval, truth) for one, truth in zip(found, truths, strict=True)]),
        np.mean([covers(one.width_interval, width) for one in found]),
        np.mean([one.width_upper >= width for one in found]),
    ]
    print(f"width {width}, dependence {dependence}: log ratio {ratio.mean():+.2f}, coverage {coverage}")
    assert abs(np.mean(error)) < 0.05 and abs(ratio.mean()) < 0.12
    assert min(coverage) >= 0.8  # .95 less more than three standard errors of 25 draws; measured: see the docstring


def test_the_upper_bound_holds_for_few_prompts():
    """Their fitted curves are too steep (the median is 20 % too narrow here), and plain percentiles cover but .6."""
    rng = np.random.default_rng(14)
    found = [
        thresholds.describe(answers(rng, 12, logistic(GRID, 2.0, 0.8)), GRID, limit=LIMIT, seed=seed, draws=100)
        for seed in range(30)
    ]
    seen = [one for one in found if one.verdict != "flat"]
    coverage = np.mean([one.width_upper >= 0.8 for one in seen])
    print(f"12 prompts: width_upper covers {coverage:.2f}, median width {np.median([one.width for one in seen]):.2f}")
    assert coverage >= 0.8


def test_a_fall_on_the_negative_side_is_the_mirror_image_of_a_rise():
    y = answers(np.random.default_rng(1), 60, logistic(GRID, 2.0, 0.5))
    rise, fall = (thresholds.describe(z, x, limit=LIMIT, seed=0, draws=200) for z, x in ((y, GRID), (~y, -GRID)))
    assert rise.alpha50 == pytest.approx(-fall.alpha50, abs=1e-3)
    assert rise.width == pytest.approx(fall.width, rel=1e-2)
    assert (rise.inner, rise.outer) == pytest.approx((1 - fall.inner, 1 - fall.outer), abs=1e-3)
    assert rise.alpha50_interval.low == pytest.approx(-fall.alpha50_interval.high, abs=1e-2)
    assert fall.alpha50_interval.low < fall.alpha50 < fall.alpha50_interval.high < 0
    assert rise.verdict == fall.verdict == "graded"


def test_the_fit_is_the_most_likely_one():
    """Against a search by scipy without penalty, on grids with even and uneven gaps."""
    for seed, x in enumerate((GRID, np.array([0.0, 0.5, 1.0, 1.2, 1.4, 1.6, 2.5, 4.0]))):
        y = answers(np.random.default_rng(seed), 80, logistic(x, 1.5, 0.8, 0.2, 0.9), 0.3)

        def cost(theta, x=x, y=y):
            counts, rates = y.sum(0), theta[0] + (theta[1] - theta[0]) * expit((x - theta[2]) / theta[3])
            return -(xlogy(counts, rates) + xlogy(80 - counts, 1 - rates)).sum()

        bounds = [(1e-6, 1 - 1e-6)] * 2 + [(0, 4), (1e-3, 4)]
        best = optimize.differential_evolution(cost, bounds, seed=0, maxiter=150)
        found = thresholds.describe(y, x, limit=LIMIT, seed=0, draws=10)
        assert -found.descriptions["logistic"].log_likelihood == pytest.approx(best.fun, abs=0.02)
        assert (found.inner, found.outer) == pytest.approx(best.x[:2], abs=0.02)
        assert found.alpha50 == pytest.approx(best.x[2], abs=0.02)
        assert found.width == pytest.approx(thresholds.WIDTH * best.x[3] / best.x[2], rel=0.05)


def test_constant_and_isotonic_by_hand():
    counts = [1, 3, 2, 8, 9]  # the second and the third are pooled to 2.5
    y = np.arange(10)[:, None] < np.array(counts)
    found = thresholds.describe(y, [1, 2, 3, 4, 5], limit=LIMIT, seed=0, draws=10).descriptions
    flat = 23 * math.log(0.46) + 27 * math.log(0.54)
    assert found["constant"].log_likelihood == pytest.approx(flat)
    assert found["constant"].aic == pytest.approx(2 - 2 * flat)
    assert found["isotonic"].rates.tolist() == pytest.approx([0.1, 0.25, 0.25, 0.8, 0.9])
    assert [found[name].parameters for name in ("constant", "logistic", "isotonic")] == [1, 4, 4]
    rates = np.array([0.1, 0.25, 0.25, 0.8, 0.9])
    likely = (xlogy(counts, rates) + xlogy(10 - np.array(counts), 1 - rates)).sum()
    assert found["isotonic"].aic == pytest.approx(8 - 2 * likely)
    assert found["constant"].log_likelihood < found["logistic"].log_likelihood < likely
    falling = thresholds.describe(~y, [1, 2, 3, 4, 5], limit=LIMIT, seed=0, draws=10).descriptions
    assert falling["isotonic"].rates.tolist() == pytest.approx((1 - rates).tolist())


# ---- verdicts


def verdicts(rng, n, rates, x=GRID, dependence=1.0, seeds=10):
    return Counter(
        thresholds.describe(answers(rng, n, rates, dependence), x, limit=LIMIT, seed=seed, draws=60).verdict
        for seed in range(seeds)
    )


@pytest.mark.parametrize(("inner", "outer"), [(0.05, 0.95), (0.9, 0.2)])
@pytest.mark.parametrize("dependence", [0.3, 1.0])
def test_a_step_is_a_threshold_wherever_in_its_gap_it_lies(inner, outer, dependence):
    rng, places = np.random.default_rng(2), (1.81, 1.9, 1.99)
    for alpha50 in places:
        y = answers(rng, 60, logistic(GRID, alpha50, 0, inner, outer), dependence)
        found = thresholds.describe(y, GRID, limit=LIMIT, seed=0, draws=200)
        assert found.verdict == "threshold"
        assert covers(found.alpha50_interval, alpha50) and found.alpha50_interval.low < found.alpha50_interval.high
        assert covers(found.width_interval, 1e-4)
        assert 0.02 < found.resolution <= found.width_upper < LIMIT


def test_a_smooth_change_is_no_threshold():
    rng = np.random.default_rng(3)
    for dependence in (0.0, 1.0):
        many, few = (verdicts(rng, n, logistic(GRID, 2.0, 0.7), dependence=dependence) for n in (100, 20))
        print(f"dependence {dependence}: 100 prompts {dict(many)}, 20 prompts {dict(few)}")
        assert many["graded"] == 10 and few["threshold"] == 0
    at_the_limit = verdicts(rng, 60, logistic(GRID, 2.0, LIMIT), seeds=25)
    print(f"as wide as the limit: {dict(at_the_limit)}")
    assert at_the_limit["threshold"] <= 4  # 1.25 expected, more than 4 in 1 % of runs


def test_a_grid_that_is_too_coarse_finds_no_threshold():
    """A step between 1 and 3 could be any change that fits in there."""
    coarse = np.array([0.0, 1.0, 3.0, 4.0])

    def found(n, x, alpha50):
        y = answers(np.random.default_rng(4), n, logistic(x, alpha50, 0))
        return thresholds.describe(y, x, limit=LIMIT, seed=0, draws=100)

    one = found(100, coarse, 2.0)
    assert one.resolution > LIMIT and one.width_upper >= one.resolution
    assert one.verdict == "not resolved"
    assert found(8, GRID, 1.9).resolution > found(100, GRID, 1.9).resolution  # few prompts can hide a wider change


def test_resolution_is_the_width_that_leaves_no_answer_between_the_plateaus():
    """By hand: of n prompts none shows the other side's answer at the two ends of the gap, in 5 % of experiments."""
    n, gap = 40, 0.2
    width = thresholds._hidden(n, 0.05) * gap
    inside = 1 - expit(-gap / 2 / (width / thresholds.WIDTH))
    assert inside ** (2 * n) == pytest.approx(0.05)
    assert thresholds._hidden(2, 0.05) == math.inf  # two prompts exclude nothing


def test_a_change_that_leaves_the_grid_is_no_threshold():
    found = verdicts(np.random.default_rng(5), 60, 0.02 + 0.05 * GRID**1.5, seeds=8)  # .02 to .42, still rising
    assert found["threshold"] == 0


@pytest.mark.parametrize("dependence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n", "rate"), [(60, 0.4), (20, 0.05)])
def test_nothing_is_found_where_nothing_is(n, rate, dependence):
    rng = np.random.default_rng(6)
    rejected = sum(
        thresholds.flatness(answers(rng, n, np.full(21, rate), dependence), rng, 400) <= 0.05 for _ in range(200)
    )
    print(f"{n} prompts at {rate}, dependence {dependence}: {rejected / 200} rejected")
    assert rejected <= 0.05 * 200 + 2.5 * math.sqrt(200 * 0.05 * 0.95)
    found = verdicts(rng, n, np.full(21, rate), dependence=dependence)
    assert found["flat"] >= 8 and found["graded"] == 0


def test_flatness_where_neighbours_resemble_each_other():
    """Exchanging labels over alphas would not do: a prompt that changes its mind keeps it for a while."""
    rng, n, rejected = np.random.default_rng(7), 40, 0
    for _ in range(200):
        turns = rng.normal(size=(n, 21))
        for j in range(1, 21):
            turns[:, j] = 0.9 * turns[:, j - 1] + math.sqrt(1 - 0.81) * turns[:, j]
        rejected += thresholds.flatness(turns > 0.3, rng, 400) <= 0.05
    assert rejected <= 0.05 * 200 + 2.5 * math.sqrt(200 * 0.05 * 0.95)


def test_flatness_by_hand():
    """Eight prompts, all of which change alike: 2 of the 256 flips are as extreme; with two that never change, too."""
    rng = np.random.default_rng(0)
    y = np.tile([0, 0, 1, 1], (8, 1))
    assert thresholds.flatness(y, rng) == 2 / 256
    assert thresholds.flatness(np.vstack([y, np.ones((2, 4))]), rng) == 2 / 256
    assert thresholds.flatness(np.vstack([y, 1 - y]), rng) == 1
    assert thresholds.flatness(np.ones((9, 4)), rng) == 1


# ---- the steepest pair


@pytest.mark.parametrize("dependence", [0.0, 0.6, 1.0])
def test_the_steepest_pair_of_a_smooth_curve_is_no_cliff(dependence):
    rng = np.random.default_rng(8)
    for rates in (logistic(GRID, 2.0, 0.7), logistic(GRID, 2.0, 0.7, 0.6, 0.2)):
        found = [
            thresholds.steepest_pair(answers(rng, 60, rates, dependence), GRID, limit=LIMIT, seed=s, draws=99)
            for s in range(40)
        ]
        p = np.array([one.p for one in found])
        print(f"dependence {dependence}: p <= .05 in {np.mean(p <= 0.05):.3f}, mean {p.mean():.2f}")
        assert np.mean(p <= 0.05) <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 40)
        assert 0.4 < p.mean() < 0.8
        assert np.mean([one.dependence for one in found]) == pytest.approx(dependence**2, abs=0.06)


def test_the_naive_p_of_the_steepest_pair_is_far_too_small():
    """What the study did: a test of the pair that was chosen for its steepness, as if it were the only one."""
    rng, naive, ours = np.random.default_rng(9), [], []
    for seed in range(40):
        y = answers(rng, 50, logistic(GRID[::2], 2.0, 0.6), 0.0)
        found = thresholds.steepest_pair(y, GRID[::2], limit=LIMIT, seed=seed, draws=99)
        pooled = y.mean(0)[np.isin(GRID[::2], [found.first, found.second])].mean()
        naive.append(math.erfc(abs(found.difference) / math.sqrt(pooled * (1 - pooled) * 2 / 50) / math.sqrt(2)))
        ours.append(found.p)
    assert np.mean(np.array(naive) <= 0.05) > 0.8 and np.mean(np.array(ours) <= 0.05) < 0.12


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dependence", [0.6, 1.0])
def test_a_cliff_is_found(dependence, sign):
    rng = np.random.default_rng(10)
    step = logistic(GRID, 1.9, 0, 0.2, 0.8)
    on_a_slope = logistic(GRID, 2.0, 0.9, 0.05, 0.6) + 0.35 * (GRID > 1.9)
    for rates in (step, on_a_slope):
        y = answers(rng, 60, rates[::-1] if sign < 0 else rates, dependence)
        found = thresholds.steepest_pair(y, sign * GRID, limit=LIMIT, seed=0, draws=399)
        assert found.p <= 0.01
        assert (found.first, found.second) == pytest.approx((2.0 * sign, 2.2 * sign) if sign < 0 else (1.8, 2.0))
        assert np.sign(found.difference) == sign and abs(found.difference) > 0.2
        assert np.abs(np.diff(found.smooth)).max() < 0.5 * abs(found.difference) + 0.1


def test_the_study_s_cliff():
    """Its counts at all its alphas; which prompts they were is not known, so both extremes of dependence are taken."""
    rng = np.random.default_rng(11)
    together = np.arange(50)[:, None] < STUDY_COUNTS
    apart = np.array([rng.permutation(50) < k for k in STUDY_COUNTS]).T
    for y in (together, apart):
        found = thresholds.describe(y, STUDY_ALPHAS, limit=LIMIT, seed=0)
        pair = thresholds.steepest_pair(y, STUDY_ALPHAS, limit=LIMIT, seed=0)
        print(f"alpha50 {found.alpha50:.2f}, width {found.width:.2f} {found.width_interval}, steepest p = {pair.p:.3f}")
        assert (pair.first, pair.second, pair.difference) == (9, 10, 0.34)  # 11 to 12 is as steep
        assert pair.p > 0.05  # the study has .0007
        assert found.verdict == "graded" and found.width_interval.low > 0.4
        assert covers(found.alpha50_interval, 9.5)


# ---- edges


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (40, 21)])
def test_answers_that_never_change(value, shape):
    x = np.arange(shape[1])
    found = thresholds.describe(np.full(shape, value), x, limit=LIMIT, seed=0)
    assert found.verdict == ("flat" if shape[0] > 5 else "not resolved")  # five prompts cannot reject a constant
    assert found.p_flat == 1 and found.inner == found.outer == float(value)
    assert math.isnan(found.alpha50) and math.isnan(found.width_upper)
    assert {name: one.rates.round(1).tolist() for name, one in found.descriptions.items()} == dict.fromkeys(
        ("constant", "logistic", "isotonic"), [float(value)] * shape[1]
    )
    pair = thresholds.steepest_pair(np.full(shape, value), x, limit=LIMIT, seed=0, draws=50)
    assert pair.difference == 0 and pair.p == 1


def test_few_prompts_and_few_alphas():
    rng = np.random.default_rng(12)
    five = thresholds.describe(answers(rng, 5, logistic(GRID, 2.0, 0)), GRID, limit=LIMIT, seed=0)
    assert five.verdict == "not resolved" and five.p_flat >= 2 / 32
    three = thresholds.describe(answers(rng, 30, np.array([0.1, 0.5, 0.9])), [0.5, 1, 1.5], limit=LIMIT, seed=0)
    assert three.verdict == "not resolved" and three.p_flat < 0.01 and covers(three.alpha50_interval, 1.0)
    for seed in range(8):  # whatever they are, there is an answer
        y = np.random.default_rng(seed).random((6, 3)) < [0.1, 0.1, 1.0]
        found = thresholds.describe(y, [1, 2, 3], limit=LIMIT, seed=0, draws=50)
        pair = thresholds.steepest_pair(y, [1, 2, 3], limit=LIMIT, seed=0, draws=50)
        assert found.verdict in ("flat", "graded", "threshold", "not resolved") and 0 < pair.p <= 1


def test_the_seed_decides():
    y = answers(np.random.default_rng(13), 30, logistic(GRID, 2.0, 0.5))
    for function in (thresholds.describe, thresholds.steepest_pair):
        one, same, other = (function(y, GRID, limit=LIMIT, seed=seed, draws=99) for seed in (0, 0, 1))
        bounds = [x.alpha50_interval if isinstance(x, thresholds.Threshold) else x.p for x in (one, same, other)]
        assert bounds[0] == bounds[1]
        assert not isinstance(bounds[0], Interval) or bounds[0] != bounds[2]


@pytest.mark.parametrize(
    ("y", "alphas", "message"),
    [
        (np.ones((9, 2)), [1, 2], "3 or more alphas"),
        (np.ones((1, 3)), [1, 2, 3], "2 or more prompts"),
        (np.ones((9, 4)), [1, 2, 3], r"\(9, 4\) at 3"),
        (np.ones(3), [1, 2, 3], "prompts, alphas"),
        (np.full((9, 3), 0.5), [1, 2, 3], "neither"),
        (np.full((9, 3), np.nan), [1, 2, 3], "neither"),
        (np.ones((9, 3)), [-1, 0, 1], "one side of zero"),
        (np.ones((9, 3)), [-3, -2, -1], "growing magnitude"),
        (np.ones((9, 3)), [1, 1, 2], "growing magnitude"),
    ],
)
def test_bad_input_is_named(y, alphas, message):
    for function in (thresholds.describe, thresholds.steepest_pair):
        with pytest.raises(CompendiumError, match=message):
            function(y, alphas, limit=LIMIT, seed=0)
