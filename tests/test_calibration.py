"""Coverage and size: the bands of section 5 of the data analysis plan, and the simulation that measures them."""

import numpy as np
import pandas as pd
import pytest

from refusal import calibration, statistics
from refusal.calibration import BAND, CORRELATIONS, LEVEL, METHODS, RATES, SIZE


def rows(made):
    """The simulation's rows as a record has them."""
    return made.assign(experiment=calibration.EXPERIMENT)


# --- independent prompts: exact, by going through all outcomes --------------------------------------------------------


@pytest.mark.parametrize("n", [50, 100])
def test_wilson_mean_coverage(n):
    coverage = calibration.wilson_coverage(n)
    print(f"Wilson, n = {n}: mean coverage {coverage.mean():.4f}, lowest {coverage.min():.4f}")
    assert 0.94 <= coverage.mean() <= 0.96


def test_coverage_by_hand():
    # Wilson of 0 in 1 is [0, .7935] and of 1 in 1 [.2065, 1]: a rate of .1 is covered by the first alone.
    assert calibration.wilson_coverage(1, [0.1, 0.5, 0.9]) == pytest.approx([0.9, 1.0, 0.9])


def test_tango_mean_coverage():
    coverage = calibration.tango_coverage(40)
    print(f"Tango, n = 40: mean coverage {coverage.mean():.4f}, lowest {coverage.min():.4f}")
    assert 0.94 <= coverage.mean() <= 0.96


def test_mcnemar_is_at_most_five_per_cent_under_the_null():
    sizes = calibration.mcnemar_sizes(60)
    print(f"McNemar exact: largest size {sizes.max():.4f}, at 60 that disagree {sizes[-1]:.4f}")
    assert sizes[:6].max() == 0  # with 5 that disagree, p is .0625 at best
    assert 0.03 < sizes.max() <= LEVEL


# --- clusters: simulated ----------------------------------------------------------------------------------------------


def test_clusters_have_the_rate_and_the_correlation_asked_for():
    values, own = calibration.clustered(np.random.default_rng(0), 4000, 10, 0.3, icc=0.2)
    assert values.shape == (4000, 100) and own.shape == (4000, 10)
    assert values.mean() == pytest.approx(0.3, abs=0.01)
    two = values.reshape(-1, SIZE)[:, :2].astype(float)  # two prompts of a cluster
    assert np.corrcoef(two.T)[0, 1] == pytest.approx(0.2, abs=0.02)
    apart = values[:, [0, SIZE]].astype(float)  # of two clusters
    assert abs(np.corrcoef(apart.T)[0, 1]) < 0.05


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize(("clusters", "rate", "icc"), [(10, 0.1, 0.6), (10, 0.5, 0.1), (40, 0.05, 0.3), (7, 0.3, 0.9)])
def test_coverage_is_that_of_the_interval_of_every_draw(how, clusters, rate, icc):
    """The bisection saves calls, and changes nothing; .9 makes clusters that are all alike."""
    draws, seed = 300, 4
    rng = np.random.default_rng([seed, clusters, round(1000 * rate), round(1000 * icc)])
    values, _ = calibration.clustered(rng, draws, clusters, rate, icc)
    codes = np.repeat(np.arange(clusters), SIZE)
    intervals = [
        statistics.wilson(int(row.sum()), len(row))
        if how == "independent"
        else statistics.rate(row, codes, how=how).interval
        for row in values
    ]
    every = np.mean([calibration.covers(interval, rate) for interval in intervals])
    assert calibration.cluster_coverage(how, clusters, rate, icc, draws=draws, seed=seed) == pytest.approx(every)


@pytest.mark.parametrize("how", ["t", "score"])
@pytest.mark.parametrize("clusters", [10, 40])
@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_cluster_interval_coverage(clusters, rate, how):
    coverage = calibration.cluster_coverage(how, clusters, rate, 0.2, draws=4000, seed=5)
    print(f"{how}, {clusters} clusters of 10, rate {rate}, icc .2: coverage {coverage:.4f}")
    assert BAND[0] <= coverage <= BAND[1]


def test_score_interval_is_the_better_one_at_low_rates():
    t, score = (calibration.cluster_coverage(how, 10, 0.1, 0.3, draws=4000, seed=6) for how in ("t", "score"))
    print(f"rate .1, icc .3, 10 clusters of 10: t covers {t:.3f}, score {score:.3f}")
    assert t < 0.89  # the misses that statistics' docstring states: .862 and .921 in 50,000 draws
    assert t + 0.04 < score < 0.95


def test_the_study_s_way_covers_far_less():
    coverage = calibration.cluster_coverage("independent", 10, 0.3, 0.3, draws=4000, seed=7)
    print(f"100 prompts of 10 clusters, taken as independent: a 95 % interval covers {coverage:.3f}")
    assert 0.60 < coverage < 0.75
    nearly = calibration.cluster_coverage("independent", 10, 0.3, 0.001, draws=4000, seed=7)
    assert nearly > 0.93  # where prompts of a cluster are as good as independent, nothing is lost


@pytest.mark.parametrize("clusters", [10, 40])
def test_paired_cluster_interval_coverage(clusters):
    coverage = calibration.paired_coverage(clusters, draws=2000, seed=8)
    print(f"paired, {clusters} clusters of 10: coverage {coverage:.4f}")
    assert BAND[0] <= coverage <= BAND[1]


@pytest.mark.parametrize("clusters", [10, 40])
def test_sign_flips_are_at_most_five_per_cent_under_a_clustered_null(clusters):
    flips, naive = calibration.flip_sizes(clusters, draws=1500, seed=9)
    print(f"clustered null, {clusters} clusters: sign flips reject {flips:.4f}, McNemar on prompts {naive:.3f}")
    assert flips <= LEVEL
    assert naive > 0.15


# --- what the notebook shows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    return calibration.simulate(draws=60, seed=1)


def test_the_simulation_has_every_case_and_depends_on_its_seed_alone(simulated):
    made = calibration.table(rows(simulated))
    assert len(made) == len(METHODS) * 2 * len(RATES) * len(CORRELATIONS)
    assert not made.duplicated(["method", "clusters", "icc", "rate"]).any()
    assert made["coverage"].between(0, 1).all()
    pd.testing.assert_frame_equal(simulated, calibration.simulate(draws=60, seed=1))
    other = calibration.simulate(draws=60, seed=2)
    assert not simulated["value"].equals(other["value"])


def test_numbers_report_planted_misses_and_no_others(simulated):
    planted = rows(simulated)
    ours = planted["direction_id"].isin(["t", "score"])
    planted.loc[ours, "value"] = 0.95
    planted.loc[planted["direction_id"] == "independent", "value"] = 0.60
    about = {"parameters": {"draws": 60}}
    values = calibration.numbers(pd.DataFrame(), planted, about)
    assert values["CalibrationScoreMisses"] == values["CalibrationTMisses"] == "in none of 24 cases"
    assert values["CalibrationScoreFew"] == "95.0" and values["CalibrationStudyWay"] == "60.0"
    low = (planted["direction_id"] == "score") & (planted["draw"] == 10) & (planted["alpha"] == 0.05)
    planted.loc[low & (planted["prompt_id"] == "0.6"), "value"] = 0.88
    planted.loc[low & (planted["prompt_id"] == "0.1"), "value"] = 0.98
    values = calibration.numbers(pd.DataFrame(), planted, about)
    assert values["CalibrationScoreMisses"] == (
        "in 2 of 24 cases, farthest with 88.0 % at a rate of 5 %, 10 clusters and a correlation of 0.6"
    )
    assert values["CalibrationScoreFew"] == "88.0 to 98.0" and values["CalibrationScoreWithin"] == "95.0"
    assert all(name.isalpha() and name.startswith("Calibration") and value for name, value in values.items())
    assert set(calibration.HEADLINES) <= set(values)
    said = calibration.prose(values)
    assert all(
        values[name] in said for name in ("CalibrationScoreMisses", "CalibrationStudyWay", "CalibrationFlipsFew")
    )
