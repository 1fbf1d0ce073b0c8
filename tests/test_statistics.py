"""Intervals and tests: published figures, hand computations, second implementations (coverage: test_calibration)."""

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.stats import contingency_tables

from refusal import statistics
from refusal.files import CompendiumError

# Section 5 of the data analysis plan: counts, and the interval in the study in per cent.
PUBLISHED = [
    (15, 100, 9.3, 23.3),
    (6, 100, 2.8, 12.5),
    (96, 100, 90.2, 98.4),
    (99, 100, 94.6, 99.8),
    (0, 100, 0.0, 3.7),
    (9, 100, 4.8, 16.2),
    (7, 100, 3.4, 13.7),
    (16, 50, 20.8, 45.8),
    (33, 50, 52.2, 77.6),
    (29, 50, 44.2, 70.6),
    (46, 50, 81.2, 96.8),
    (48, 50, 86.5, 98.9),
    (50, 50, 92.9, 100.0),
]


def per_cent(interval):
    return round(100 * interval.low, 1), round(100 * interval.high, 1)


def arms(only_first, only_second, both=0, neither=0):
    """Two paired boolean arms with these counts."""
    counts = {(1, 0): only_first, (0, 1): only_second, (1, 1): both, (0, 0): neither}
    pairs = np.array([pair for pair, count in counts.items() for _ in range(count)], dtype=bool)
    return pairs[:, 0], pairs[:, 1]


# --- the study's figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "low", "high"), PUBLISHED)
def test_wilson_reproduces_the_study(k, n, low, high):
    assert per_cent(statistics.wilson(k, n)) == (low, high)
    independent = statistics.rate(np.arange(n) < k, range(n))
    assert per_cent(independent.interval) == (low, high)
    assert (independent.k, independent.n, independent.clusters, independent.method) == (k, n, n, "Wilson")
    assert independent.effective_n == n


def test_published_wilson_figures_would_show_an_interval_of_n_minus_one():
    wrong = [per_cent(statistics.wilson(min(k, n - 1), n - 1)) == (low, high) for k, n, low, high in PUBLISHED]
    assert sum(wrong) <= 1  # 0 in 100 and 0 in 99 agree to the digit


@pytest.mark.parametrize(
    ("k1", "k2", "n", "z", "fisher", "digits"),
    [
        (15, 6, 100, 0.038, 0.063, (3, 3)),
        (0, 9, 100, 0.002, 0.0032, (3, 4)),
        (0, 7, 100, 0.007, 0.014, (3, 3)),
        (16, 33, 50, 0.0007, 0.0013, (4, 4)),
    ],
)
def test_two_proportions_reproduce_the_study(k1, k2, n, z, fisher, digits):
    p_z, p_fisher = statistics.two_proportions(k1, n, k2, n)
    assert (round(p_z, digits[0]), round(p_fisher, digits[1])) == (z, fisher)
    assert statistics.two_proportions(k2, n, k1, n) == pytest.approx((p_z, p_fisher))


def test_two_proportions_of_as_many_in_more():
    z, _ = statistics.two_proportions(8, 10, 8, 20)
    assert z == pytest.approx(2 * stats.norm.sf(0.4 / math.sqrt(16 / 30 * 14 / 30 * (1 / 10 + 1 / 20))))


def test_two_proportions_without_variance():
    assert statistics.two_proportions(0, 100, 0, 100) == (1.0, 1.0)
    assert statistics.two_proportions(50, 50, 50, 50) == (1.0, 1.0)


def test_power_reproduces_the_study():
    assert round(statistics.power_two_proportions(0.15, 0.06, 100), 2) == 0.57


# --- rates -----------------------------------------------------------------------------------------------------------


def test_wilson_refuses_impossible_counts():
    for k, n in [(1, 0), (0, 0), (5, 4), (-1, 4), (math.nan, 4)]:
        with pytest.raises(CompendiumError, match="does not exist"):
            statistics.wilson(k, n)


def test_wilson_at_its_edges():
    assert statistics.wilson(0, 30).low == 0 < statistics.wilson(1, 30).low  # exactly 0, which rounding would miss
    assert statistics.wilson(30, 30).high == 1 > statistics.wilson(29, 30).high
    assert statistics.wilson(1, 1).high == 1


@pytest.mark.parametrize(
    ("values", "clusters", "how"),
    [
        (np.arange(20) < 7, np.arange(20), "t"),
        (np.tile(np.arange(10) < 3, 10), np.repeat(np.arange(10), 10), "t"),
        (np.arange(40) < 13, np.repeat(np.arange(8), 5), "t"),
        (np.arange(40) < 13, np.repeat(np.arange(8), 5), "score"),
    ],
)
def test_every_interval_is_of_the_level_that_is_asked_for(values, clusters, how):
    inner, outer = (statistics.rate(values, clusters, level, how).interval for level in (0.8, 0.99))
    assert outer.low < inner.low < inner.high < outer.high


def test_an_interval_of_t_ends_at_one():
    values = np.concatenate([np.ones(35), np.arange(5) < 1])  # seven clusters of ones, and one of a single one
    assert statistics.rate(values, np.repeat(np.arange(8), 5)).interval.high == 1


def test_cluster_interval_by_hand():
    # Cluster means .8 .7 .6 .5 .4: mean .6, sd .158114, se .0707107, t(4) 2.776445, half width .196324.
    values = np.concatenate([np.arange(10) < k for k in (8, 7, 6, 5, 4)])
    result = statistics.rate(values, np.repeat(list("abcde"), 10))
    assert (result.k, result.n, result.clusters) == (30, 50, 5)
    assert result.estimate == pytest.approx(0.6)
    assert (result.interval.low, result.interval.high) == pytest.approx((0.403676, 0.796324), abs=1e-6)
    assert result.effective_n == pytest.approx(48)
    assert result.method == "t on cluster means, 4 df"
    # Wilson at 48 x (1.959964 / 2.776445)^2 = 23.9197, with q = 1.959964^2 / 2 / 23.9197 = .080299: centre
    # (.6 + q) / (1 + 2q) = .586163, half width 1.959964 x sqrt(.24 / 23.9197 + q / 2 / 23.9197) / (1 + 2q) = .182760.
    score = statistics.rate(values, np.repeat(list("abcde"), 10), how="score")
    assert (score.interval.low, score.interval.high) == pytest.approx((0.403403, 0.768923), abs=2e-6)
    assert score.effective_n == pytest.approx(48) and score.method == "Wilson at the effective n, 4 df"


def test_clusters_are_not_counted_as_prompts():
    values, clusters = np.repeat([1, 0, 1, 0, 1, 1, 0, 1, 0, 1], 10), np.repeat(np.arange(10), 10)
    whole = statistics.rate(values, clusters)
    assert (whole.n, whole.clusters) == (100, 10)
    assert whole.effective_n == pytest.approx(9)  # ten answers, each given ten times
    naive = statistics.rate(values, range(100))
    assert whole.interval.high - whole.interval.low > 3 * (naive.interval.high - naive.interval.low)


def test_unequal_clusters_agree_with_cluster_robust_least_squares():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), rng.integers(1, 15, 12))
    values = rng.random(len(clusters)) < rng.beta(2, 3, 12)[clusters]
    fit = sm.OLS(values.astype(float), np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    result = statistics.rate(values, clusters)
    assert (result.interval.low, result.interval.high) == pytest.approx(tuple(fit.conf_int()[0]))
    assert result.estimate == pytest.approx(values.mean())
    order = rng.permutation(len(values))
    assert statistics.rate(values[order], clusters[order]) == result


@pytest.mark.parametrize("k", [0, 3, 10])
def test_equal_cluster_means_do_not_give_an_interval_of_no_width(k):
    result = statistics.rate(np.tile(np.arange(10) < k, 10), np.repeat(np.arange(10), 10))
    assert result.interval == statistics.wilson(k, 10)
    assert result.effective_n == 10
    assert result.method == "Wilson at n = clusters (equal means)"


def test_a_single_cluster_says_nothing():
    result = statistics.rate([1, 0, 1], ["a"] * 3)
    assert (result.interval.low, result.interval.high, result.effective_n) == (0, 1, 1)
    assert result.method == "none: a single cluster says nothing of others"


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "one entry a prompt"),
        ([True, False], ["a"], "one entry a prompt"),
        ([True, "refusal"], ["a", "b"], "neither"),
        ([True, None], ["a", "b"], "neither"),
        ([True, 0.5], ["a", "b"], "neither"),
        ([True, False], ["a", None], "no cluster"),
    ],
)
def test_rates_refuse_what_cannot_be_counted(values, clusters, message):
    with pytest.raises(CompendiumError, match=message):
        statistics.rate(values, clusters)


# --- paired comparisons ----------------------------------------------------------------------------------------------


def test_paired_reproduces_a_published_example():
    # Complete response before and after consolidation therapy (Cavo et al., 2012), in Fagerland, Lydersen and Laake
    # (2017), Statistical Analysis of Contingency Tables, chapter 8: exact .0525, mid-p .0347, Tango [-.1240, -.0054].
    first, second = arms(6, 16, both=59, neither=80)
    result = statistics.paired(first, second, range(161))
    assert (result.n, result.clusters, result.only_first, result.only_second) == (161, 161, 6, 16)
    assert round(result.difference, 4) == -0.0621
    assert (round(result.p, 6), round(result.p_mid, 6)) == (0.052479, 0.034690)
    assert (round(result.interval.low, 4), round(result.interval.high, 4)) == (-0.1240, -0.0054)
    assert result.method.startswith("McNemar exact; interval: Tango")


@pytest.mark.parametrize(("b", "c", "n"), [(6, 16, 161), (9, 0, 100), (1, 7, 21), (3, 3, 20)])
def test_tango_limits_have_the_score_that_the_level_asks_for(b, c, n):
    # A second derivation: maximise the trinomial likelihood under p10 - p01 = delta numerically, then take the score.
    def score(delta):
        def loss(p01):
            p10 = p01 + delta
            return -(stats.multinomial.logpmf([b, c, n - b - c], n, [p10, p01, 1 - p10 - p01]))

        p01 = optimize.minimize_scalar(
            loss, bounds=(max(0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12), method="bounded", options={"xatol": 1e-10}
        ).x
        return (b - c - n * delta) / math.sqrt(n * (2 * p01 + delta - delta**2))

    interval = statistics.tango(b, c, n)
    assert (score(interval.low), score(interval.high)) == pytest.approx((1.959964, -1.959964), abs=1e-3)


def test_tango_at_its_edges():
    z = stats.norm.isf(0.025)
    nothing = statistics.tango(0, 0, 100)
    assert (nothing.low, nothing.high) == pytest.approx((-(z**2) / (100 + z**2), z**2 / (100 + z**2)))
    assert statistics.tango(5, 0, 5).high == 1
    assert statistics.tango(0, 5, 5).low == -1
    assert statistics.tango(6, 4, 10).high < 1  # all disagree, but not all the same way
    there, back = statistics.tango(9, 2, 40), statistics.tango(2, 9, 40)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.high - there.low < statistics.tango(9, 2, 40, level=0.99).high - statistics.tango(9, 2, 40, 0.99).low


def test_mcnemar_by_hand_and_by_statsmodels():
    result = statistics.paired(*arms(1, 7, 1, 12), range(21))
    assert result.p == pytest.approx(2 * (1 + 8) / 2**8)  # .0703
    assert result.p_mid == pytest.approx(2 * (1 + 8) / 2**8 - 8 / 2**8)  # .0391
    for b, c in itertools.product(range(13), repeat=2):
        p, p_mid = statistics.sign_flips([1] * b + [-1] * c)
        assert p == pytest.approx(contingency_tables.mcnemar([[0, b], [c, 0]], exact=True).pvalue)
        half = 0.5 if b == c else 1.0  # of the tied outcomes, which lie in one cell if b = c, and else in two
        assert p_mid == pytest.approx(p - half * stats.binom.pmf(b, b + c, 0.5))


def test_sign_flips_by_hand_enumeration_and_permutation():
    assert statistics.sign_flips([2, 1]) == (0.5, 0.25)  # totals 3 1 -1 -3: two of four as far out, both ties
    sums = [5, -2, 3, 0, 4, -1, 6, 2]
    totals = [sum(s * x for s, x in zip(signs, sums, strict=True)) for signs in itertools.product((-1, 1), repeat=8)]
    assert statistics.sign_flips(sums)[0] == pytest.approx(np.mean(np.abs(totals) >= sum(sums)))
    scipys = stats.permutation_test((np.array(sums),), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flips(sums)[0] == pytest.approx(scipys.pvalue)
    assert statistics.sign_flips([0, 0]) == (1.0, 0.5)


def test_paired_flips_whole_clusters():
    # Four clusters of five, each wholly changed the same way: 2 of 16 flips are as extreme; McNemar would say 2^-19.
    result = statistics.paired([1] * 20, [0] * 20, np.repeat(list("abcd"), 5))
    assert result.p == pytest.approx(2 / 16)
    assert result.interval == statistics.tango(4, 0, 4)
    assert result.method == "exact sign flips of whole clusters; interval: Tango at n = clusters (equal means)"
    assert (result.n, result.clusters, result.difference) == (20, 4, 1.0)


def test_paired_cluster_interval_by_hand():
    # Cluster differences .4 .2 .0 .2: mean .2, sd .163299, se .0816497, t(3) 3.182446: half width .259846.
    first = np.concatenate([np.arange(10) < k for k in (6, 5, 5, 7)])
    second = np.concatenate([np.arange(10) < k for k in (2, 3, 5, 5)])
    result = statistics.paired(first, second, np.repeat(list("abcd"), 10))
    assert (result.interval.low, result.interval.high) == pytest.approx((-0.059846, 0.459846), abs=1e-6)
    assert result.p == pytest.approx(4 / 16)  # sums 4 2 0 2: +-8 is reached by 4 of the 16 flips
    assert result.method == "exact sign flips of whole clusters; interval: t, 3 df"
    other = statistics.paired(second, first, np.repeat(list("abcd"), 10))
    assert (other.difference, other.only_first) == (pytest.approx(-0.2), result.only_second)
    assert (other.interval.low, other.p) == (pytest.approx(-result.interval.high), result.p)


def test_paired_intervals_of_one_and_of_two_clusters():
    alone = statistics.paired([1, 0], [0, 0], ["a", "a"])
    assert alone.interval == statistics.tango(0.5, 0, 1) and "equal means" in alone.method
    two = statistics.paired([1, 0, 0, 0], [0, 0, 0, 0], list("aabb"))  # mean .25, t(1) 12.706 x .25
    assert two.interval == statistics.Interval(-1.0, 1.0) and two.method.endswith("t, 1 df")


def test_paired_intervals_are_of_the_level_that_is_asked_for():
    inner, outer = (statistics.paired(*arms(9, 2, 40, 49), range(100), level).interval for level in (0.8, 0.99))
    assert outer.low < inner.low < inner.high < outer.high


def test_paired_refuses_arms_of_different_length():
    with pytest.raises(CompendiumError, match=r"one entry a prompt, and have the shapes \(2,\), \(1,\), \(2,\): pair"):
        statistics.paired([True, False], [True], ["a", "b"])


# --- equivalence, power, families ------------------------------------------------------------------------------------


def test_equivalence_by_hand():
    # No disagreement in 100: the score at +-.1 is 10 / sqrt(100 x .1 x .9) = 3.3333.
    same = statistics.equivalence(*arms(0, 0, 50, 50), range(100))
    assert same.p == pytest.approx(stats.norm.sf(10 / 3))
    assert (same.n, same.clusters, same.margin, same.method) == (100, 100, 0.10, "two one-sided tests, Tango")
    assert statistics.equivalence(*arms(9, 2, 40, 49), range(100)).difference == pytest.approx(0.07)
    # Cluster differences .1 0 -.1 0 0: se .0316228, t(4) = .1 / se = 3.162278, 90 % quantile 2.131847.
    first, second = np.zeros(50, bool), np.zeros(50, bool)
    first[0], second[20] = True, True
    result = statistics.equivalence(first, second, np.repeat(np.arange(5), 10))
    assert result.p == pytest.approx(stats.t.sf(3.162278, 4), abs=1e-6)
    assert (result.interval.low, result.interval.high) == pytest.approx((-0.067415, 0.067415), abs=1e-6)


@pytest.mark.parametrize(("b", "c"), [(3, 2), (9, 2), (10, 1), (15, 3), (2, 10)])
def test_equivalence_means_that_the_90_per_cent_interval_lies_within_the_margin(b, c):
    result = statistics.equivalence(*arms(b, c, 40, 60 - b - c), range(100))
    assert (result.p <= 0.05) == (max(-result.interval.low, result.interval.high) < 0.1)


def test_equivalence_is_near_five_per_cent_at_its_margin():
    n, p10, p01 = 100, 0.12, 0.02
    size = 0.0
    for b, c in itertools.product(range(31), range(11)):  # all but 1 in 100,000 of the chances
        if statistics.equivalence(*arms(b, c, 0, n - b - c), range(n)).p <= 0.05:
            size += stats.multinomial.pmf([b, c, n - b - c], n, [p10, p01, 1 - p10 - p01])
    print(f"TOST at the margin, n = 100: {size:.4f}")
    assert 0.03 < size < 0.055


def test_power_of_mcnemar_by_brute_force():
    n, p1, p2 = 18, 0.8, 0.3
    p10, p01 = p1 * (1 - p2), p2 * (1 - p1)
    power = sum(
        stats.multinomial.pmf([b, c, n - b - c], n, [p10, p01, 1 - p10 - p01])
        for b in range(n + 1)
        for c in range(n + 1 - b)
        if statistics.sign_flips([1] * b + [-1] * c)[0] <= 0.05
    )
    assert statistics.power_mcnemar(n, p1, p2) == pytest.approx(power)
    assert all(statistics.power_mcnemar(n, p, p) <= 0.05 for n in (10, 32, 100) for p in np.linspace(0, 1, 21))


def test_smallest_detectable_difference():
    found = statistics.smallest_detectable_difference(100, 0.15)
    assert statistics.power_mcnemar(100, 0.15 + found, 0.15) == pytest.approx(0.8, abs=1e-4)
    assert statistics.smallest_detectable_difference(100, 0.85) == pytest.approx(found)
    assert statistics.smallest_detectable_difference(400, 0.15) < found
    assert statistics.smallest_detectable_difference(100, 0.15, power=0.9) > found
    assert math.isnan(statistics.smallest_detectable_difference(5, 0.5))  # six must disagree before p can reach .05


def test_holm_by_hand():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert statistics.holm({"a": 0.04}) == {"a": 0.04}
    assert statistics.holm({}) == {}
    with pytest.raises(CompendiumError, match="outside"):
        statistics.holm({"a": 0.04, "b": math.nan})
    with pytest.raises(CompendiumError, match="outside"):
        statistics.holm({"a": 1.5})
    assert statistics.holm({"a": 0.0, "b": 1.0}) == {"a": 0, "b": 1}


# --- bootstrap -------------------------------------------------------------------------------------------------------


def effect_size(a, b, axis=-1):
    pooled = np.sqrt((np.var(a, axis=axis, ddof=1) + np.var(b, axis=axis, ddof=1)) / 2)
    return (np.mean(a, axis=axis) - np.mean(b, axis=axis)) / pooled


def test_bootstrap_interval():
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, 64), rng.normal(0, 1, 64)
    once = statistics.bootstrap_interval(effect_size, a, b, seed=1)
    assert once == statistics.bootstrap_interval(effect_size, a, b, seed=1)
    assert once != statistics.bootstrap_interval(effect_size, a, b, seed=2)
    assert once.low < effect_size(a, b) < once.high
    assert once.high - once.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 64 + 1 / 4 / 64), rel=0.25)
    assert statistics.bootstrap_interval(np.mean, np.ones(20), seed=1) == statistics.Interval(1.0, 1.0)


def test_bootstrap_interval_is_corrected_for_skewness():
    values = np.random.default_rng(4).exponential(size=30)
    drawn = [
        stats.bootstrap((values,), np.mean, n_resamples=400, method=method, rng=np.random.default_rng(5))
        for method in ("BCa", "percentile")
    ]
    corrected, plain = (statistics.Interval(*map(float, one.confidence_interval)) for one in drawn)
    assert statistics.bootstrap_interval(np.mean, values, seed=5, draws=400) == corrected != plain


# --- pairing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def record():
    rng = np.random.default_rng(3)
    prompts = pd.DataFrame(
        {"prompt_id": [f"p-{i:03d}" for i in range(30)], "cluster": [f"c-{i // 3}" for i in range(30)]}
    )
    rows = prompts.merge(pd.DataFrame({"condition": ["baseline", "extracted +1", "extracted -1"]}), how="cross")
    return rows.assign(refused=rng.random(len(rows)) < 0.5, label="refusal")


def test_pair_joins_on_the_prompt_whatever_the_order(record):
    wide = record.pivot(index="prompt_id", columns="condition", values="refused")
    shuffled = record.sample(frac=1, random_state=4).reset_index(drop=True)
    for frame in (record, shuffled):
        first, second, clusters = statistics.pair(frame, "extracted +1", "baseline", "refused")
        assert first.tolist() == wide["extracted +1"].tolist()
        assert second.tolist() == wide["baseline"].tolist()
        assert clusters.tolist() == [f"c-{i // 3}" for i in range(30)]
        assert first.dtype == second.dtype == bool
    result = statistics.paired(*statistics.pair(shuffled, "extracted +1", "baseline", "refused"))
    assert (result.n, result.clusters) == (30, 10)
    assert result.difference == pytest.approx(wide["extracted +1"].mean() - wide["baseline"].mean())


def test_pair_names_what_is_missing_or_doubled(record):
    def refused(frame, message, second="baseline", value="refused"):
        with pytest.raises(CompendiumError, match=message):
            statistics.pair(frame, "extracted +1", second, value)

    baseline = record["condition"] == "baseline"
    refused(record[~(baseline & record["prompt_id"].isin(["p-004"]))], "no row under 'baseline' for p-004:?")
    five = "p-000, p-001, p-002, p-003, p-004"
    for last, more in (("p-006", " and 2 more"), ("p-005", " and 1 more"), ("p-004", "")):
        some = record[baseline | (record["prompt_id"] > last)]
        refused(some, rf"^'extracted \+1' and 'baseline' cannot .* under 'extracted .1' for {five}{more}\.$")
    refused(pd.concat([record, record[baseline].head(1)]), "more than one row under 'baseline' for p-000")
    swapped = record.assign(cluster=record["cluster"].where(~baseline | (record["prompt_id"] != "p-009"), "c-0"))
    refused(swapped, "more than one cluster for p-009")
    lost = record.assign(cluster=record["cluster"].where(~baseline | (record["prompt_id"] != "p-009")))
    refused(lost, "more than one cluster for p-009")
    other = record.assign(prompt_id=record["prompt_id"].where(~baseline, "q" + record["prompt_id"]))
    refused(other, "no row under")
    refused(record, "no condition 'random.3.': it has .*'baseline', 'extracted .1'", second="random[3]")
    refused(record.drop(columns="cluster"), "needs a column cluster")
    refused(record, "label of true and false", value="label")


def test_the_module_does_not_shadow_the_standard_library():
    standard = importlib.import_module("statistics")
    assert Path(standard.__file__).parent != Path(statistics.__file__).parent
    assert standard.mean([1, 2]) == 1.5
