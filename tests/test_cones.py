"""The geometry of several directions: the pilot's figures, what is planted, and nothing where nothing is."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scopes

from refusal import cone_designs, cone_geometry, cone_study, cone_tables, cones, controls
from refusal.analyses import plan
from refusal.cone_effects import NOTEBOOK, counts
from refusal.cone_geometry import Counts
from refusal.files import CompendiumError

KINDS = ("weapons", "fraud", "intrusion", "cyber")
TOPICS = tuple(f"topic {i}" for i in range(8))
FEW = Counts(per_category=(3, 4, 8), draws=39, subsamples=15, splits=20, bootstraps=100)


# ---- the pilot's figures (methods, section 7)


def test_the_pilots_figures_follow_from_its_six_cosines():
    cosine = cone_study.gram()
    found = cones.statistics(cosine)
    assert found["entropy_rank"] == pytest.approx(3.965, abs=5e-4)
    assert found["mean_abs_cosine"] == pytest.approx(0.132, abs=5e-4)
    np.testing.assert_allclose(cones.specificities(cosine), [0.850, 0.846, 0.908, 0.868], atol=6e-4)
    assert cones.specificities(cosine).mean() == pytest.approx(1 - found["mean_abs_cosine"])  # one statistic, twice
    assert cone_study.solid_angle(cosine) == pytest.approx(2.890, abs=2e-3)
    assert cone_study.sizes(KINDS) == [3, 4, 4, 9]
    assert found["participation"] == pytest.approx(3.73, abs=5e-3)
    assert cones.pairs(cosine).tolist() == [0.185, 0.017, 0.247, 0.194, 0.084, 0.065]


@pytest.mark.parametrize("rho, rank", [(0.0, 4.00), (0.132, 3.98), (0.4, 3.82), (0.8, 3.14), (0.95, 2.33)])
def test_equal_cosines(rho, rank):
    assert cone_study.equicorrelated(rho) == pytest.approx(rank, abs=6e-3)
    assert cone_study.equal_cosine(cone_study.equicorrelated(rho)) == pytest.approx(rho, abs=1e-6)


def test_what_the_toolkit_calls_linear_is_out_of_reach():
    assert cone_study.linear_needs() == pytest.approx(0.9955, abs=2e-4)
    assert cone_study.polyhedral([0.85, 0.95, 0.5], [1.9, 2.33, 1.2]).tolist() == [False, True, True]


def test_random_directions():
    drawn = cone_study.random_directions()
    assert drawn["entropy_rank"][0] == pytest.approx(3.998, abs=6e-4)
    assert drawn["mean_abs_cosine"][0] == pytest.approx(0.027, abs=1e-3)
    assert drawn["mean_abs_cosine"][0] == pytest.approx(math.sqrt(2 / math.pi / 896), abs=1e-3)


def test_the_pilots_numbers_come_in_words():
    said, table = cone_study.numbers(), cone_study.table()
    assert said["ConesStudyRank"] == "3.965" and said["ConesStudyPrompts"] == "3, 4, 4, 9"
    assert said["ConesStudyLowestEqual"] == "0.40" and said["ConesStudyRandomRank"] == "3.998"
    assert (table["published"] - table["from the six cosines"]).abs().max() < 6e-3
    assert cone_study.equicorrelation_table().loc[0.0].tolist() == pytest.approx([4, 8])


# ---- statistics of a Gram matrix


def test_statistics_of_known_matrices():
    apart, one = cones.statistics(np.eye(4) * [1.0, 4, 9, 16]), cones.statistics(np.ones((4, 4)))
    assert [float(apart[name]) for name in cones.STATISTICS] == pytest.approx([4, 4, 0.25, 0, 0])
    assert [float(one[name]) for name in cones.STATISTICS] == pytest.approx([1, 1, 1, 1, 1], abs=1e-6)
    turned = np.ones((4, 4))
    turned[0, 1:] = turned[1:, 0] = -1  # one direction turned round: |cos| does not see it, the cosine does
    found = cones.statistics(turned)
    assert float(found["mean_abs_cosine"]) == pytest.approx(1) and float(found["mean_cosine"]) == pytest.approx(0)
    two = np.kron(np.eye(2), np.ones((2, 2)))
    assert (
        float(cones.participation(two)) == pytest.approx(2) == pytest.approx(float(cones.entropy_rank(two)), abs=1e-6)
    )


def test_statistics_are_those_of_every_matrix_of_a_stack():
    vectors = np.random.default_rng(0).standard_normal((3, 5, 4, 20))
    stack = vectors @ vectors.swapaxes(-1, -2)
    whole = cones.statistics(stack)
    for name, values in whole.items():
        low, high = cones.bounds(name, 4)
        assert (low < values).all() and (values < high).all()
    for i, j in itertools.product(range(3), range(5)):
        singular = np.linalg.svd(vectors[i, j] / np.linalg.norm(vectors[i, j], axis=1, keepdims=True))[1]
        share = singular / singular.sum()
        assert whole["entropy_rank"][i, j] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        assert whole["participation"][i, j] == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum())
        assert whole["top_share"][i, j] == pytest.approx(singular[0] ** 2 / 4)


def test_bounds():
    ends = {name: cones.bounds(name, 4) for name in cones.STATISTICS}
    assert ends.pop("mean_cosine") == (pytest.approx(-1 / 3), 1)
    assert ends == {"entropy_rank": (1, 4), "participation": (1, 4), "top_share": (0.25, 1), "mean_abs_cosine": (0, 1)}


def test_without_reliability_nothing_is_corrected():
    made = cones.disattenuated(np.array([[1.0, 0.5, 0.4], [0.5, 1, 0.3], [0.4, 0.3, 1]]), np.array([0.25, 0.0, 1.0]))
    np.testing.assert_allclose(made, [[1, np.nan, 0.8], [np.nan, 1, np.nan], [0.8, np.nan, 1]])


def test_a_squared_norm_that_is_not_positive_has_no_cosine():
    cosine = cones.cosines(np.array([[1.0, 0.5], [0.5, -0.1]]))
    assert cosine[0, 0] == 1 and np.isnan(cosine[0, 1]) and np.isnan(cosine[1, 1])


def test_trend():
    values = np.array([[4.0, 3.9, 3.7, 3.6], [1, 2, 3, 9], [2, 2, 2, 2], [1, 3, 2, 4]])
    np.testing.assert_allclose(cones.trend(values), [-1, 1, np.nan, 0.8])
    assert float(cones.trend(values[0])) == -1
    np.testing.assert_allclose(cones.trend(np.array([[1.0, 2.0], [2.0, 1.0]])), [1, -1])


# ---- inner products


def world(means, spread, n, about=None, seed=0, layers=1, topics=0.0):
    """Activations of n harmful prompts a category about its mean, 32 everyday prompts of 8 topics, n questions each.

    Args:
        means: `[K, width]`, of each category's difference from the everyday prompts.
        spread: Standard deviation of a prompt about its mean, in each coordinate.
        n: Prompts a category.
        about: The same as `means` for the questions; None: no difference.
        seed: Of the noise.
        layers: The same structure with new noise at each.
        topics: Standard deviation of the everyday topics' means.
    """
    rng, (k, width) = np.random.default_rng(seed), np.shape(means)
    centre = 5 * rng.standard_normal(width)
    kinds, everyday = np.tile(np.arange(k), n), np.tile(np.arange(8), max(4, n * k // 8))
    asked = np.zeros((k, width)) if about is None else np.asarray(about)
    offsets = np.concatenate(
        [np.asarray(means)[kinds], topics * rng.standard_normal((8, width))[everyday], asked[kinds]]
    )
    noise = spread * rng.standard_normal((len(offsets), layers, width))
    where = cone_designs.layout([KINDS[i] for i in kinds], [TOPICS[i] for i in everyday], [KINDS[i] for i in kinds])
    return centre + offsets[:, None] + noise, where


def separate(k=4, width=60, size=3.0):
    return size * np.eye(k, width, 1)


def one_direction(k=4, width=60, size=3.0):
    return size * np.eye(1, width).repeat(k, 0)


def grams_of(activations, where, groups=None, contrasts=None):
    groups = groups or [*where.harmful, where.harmless]
    contrasts = cones.shared(len(where.categories)) if contrasts is None else contrasts
    found = cones.products(cones.kernel(activations), cones.weigh(groups, where.total)[None])
    return [cones.gram(one, contrasts)[0] for one in found]


def test_the_layout_knows_where_prompts_are():
    where = cone_designs.layout(["a", "b", "a", "b"], ["x", "y", "y"], ["b", "a"])
    assert where.categories == ("a", "b") and where.total == 9
    assert [one.tolist() for one in where.harmful] == [[0, 2], [1, 3]]
    assert where.harmless.tolist() == [4, 5, 6] and [one.tolist() for one in where.everyday] == [[4], [5, 6]]
    assert [one.tolist() for one in where.about] == [[8], [7]]
    assert [one.tolist() for one in where.beside] == [[4, 6], [5, 4]]  # the same places of the other file


def test_gram_matrices_are_those_of_mean_differences():
    activations, where = world(separate(), 1.0, 6, layers=3)
    plain, _ = grams_of(activations, where)
    own, _ = grams_of(activations, where, [*where.harmful, *where.beside], cones.apart(4))
    for layer in range(3):
        here = activations[:, layer]
        r = np.stack([here[one].mean(0) for one in where.harmful]) - here[where.harmless].mean(0)
        np.testing.assert_allclose(plain[layer], r @ r.T, rtol=1e-9, atol=1e-9)
        s = np.stack([here[a].mean(0) - here[b].mean(0) for a, b in zip(where.harmful, where.beside, strict=True)])
        np.testing.assert_allclose(own[layer], s @ s.T, rtol=1e-9, atol=1e-9)


def test_the_unbiased_product_is_the_mean_over_all_halves():
    """All 6 x 6 x 70 ways of splitting 4, 4 and 8 prompts in halves, one by one."""
    activations, where = world(separate(2), 1.0, 4)
    groups = [*where.harmful, where.harmless[:8]]
    _, unbiased = grams_of(activations, where, groups, cones.shared(2))
    here = activations[:, 0]

    def halves(group):
        chosen = itertools.combinations(group.tolist(), len(group) // 2)
        return [[here[list(one)].mean(0), here[sorted(set(group.tolist()) - set(one))].mean(0)] for one in chosen]

    total = [
        np.stack([a[0] - c[0], b[0] - c[0]]) @ np.stack([a[1] - c[1], b[1] - c[1]]).T
        for a, b, c in itertools.product(*map(halves, groups))
    ]
    assert len(total) == 6 * 6 * 70
    np.testing.assert_allclose(np.mean(total, axis=0), unbiased[0], rtol=1e-9)


def test_random_halves_approach_the_unbiased_product():
    activations, where = world(one_direction(), 1.0, 8)
    inner, groups = cones.kernel(activations), [*where.harmful, where.harmless]
    weights = cones.halves(groups, where.total, 400, np.random.default_rng(0))
    _, across = cones.split_half(inner, weights, cones.shared(4))
    _, unbiased = grams_of(activations, where)
    np.testing.assert_allclose(across, unbiased, atol=0.3)
    np.testing.assert_allclose(across, across.swapaxes(-1, -2), rtol=1e-12)
    plain, _ = grams_of(activations, where)
    assert (np.diagonal(plain, axis1=1, axis2=2) - np.diagonal(unbiased, axis1=1, axis2=2) > 6).all()


@pytest.mark.parametrize("means", [separate(), one_direction()])
def test_noise_biases_the_plain_products_and_not_the_unbiased_ones(means):
    truth, plain, unbiased = means @ means.T, [], []
    for seed in range(150):
        activations, where = world(means, 1.5, 3, seed=seed)
        p, u = grams_of(activations, where)
        plain.append(p[0]), unbiased.append(u[0])
    error = np.std(unbiased, axis=0) / math.sqrt(150)
    assert (np.abs(np.mean(unbiased, axis=0) - truth) < 4 * error).all()
    assert np.diag(np.mean(plain, axis=0) - truth).min() > 40  # 60 coordinates of noise, a third of 2.25 each


def test_a_single_prompt_has_no_unbiased_product():
    activations, where = world(separate(), 1.0, 3)
    _, unbiased = grams_of(activations, where, [*(one[:1] for one in where.harmful), where.harmless])
    assert np.isnan(np.diagonal(unbiased, axis1=1, axis2=2)).all()


def test_reliability_and_correction_for_attenuation():
    """Two directions at a cosine of .5, blurred by noise of a known size."""
    means = 8 * np.array([np.eye(1, 200)[0], 0.5 * np.eye(1, 200)[0] + math.sqrt(0.75) * np.eye(2, 200)[1]])
    n, spread = 8, 1.0
    reliable, plain, corrected = [], [], []
    for seed in range(40):
        activations, where = world(means, spread, n, seed=seed)
        inner = cones.kernel(activations)
        rng = np.random.default_rng(seed)
        weights = cones.halves([*where.harmful, where.harmless], where.total, 20, rng)
        found, _ = cones.split_half(inner, weights, cones.shared(2))
        gram, _ = grams_of(activations, where)
        reliable.append(found[0])
        plain.append(cones.pairs(cones.cosines(gram[0]))[0])
        corrected.append(cones.pairs(cones.disattenuated(cones.cosines(gram[0]), found[0]))[0])
    truth = 64 / (64 + 200 * spread**2 * (1 / n + 1 / 32))
    assert np.mean(reliable) == pytest.approx(truth, abs=0.04)
    baseline = 200 / 32 / 64  # what the shared baseline's noise adds to a product, relative to a squared length
    assert np.mean(plain) == pytest.approx((0.5 + baseline) * truth, abs=0.04)
    assert np.mean(corrected) == pytest.approx(0.5 + baseline, abs=0.06)  # attenuation is undone, the baseline stays
    nothing = cones.disattenuated(np.eye(2) + 0.2, np.array([0.5, -0.1]))
    assert np.isnan(nothing[0, 1]) and nothing[0, 0] == 1


# ---- how many directions


@pytest.mark.parametrize("kinds", [4, 2, 1])
def test_the_planted_number_of_directions_is_found(kinds):
    """Four categories on 4, 2 and 1 directions of their own; with 16 prompts the plain statistics find four always."""
    means = 4 * np.eye(kinds, 100)[np.arange(4) % kinds]
    number, rank = [], []
    for seed in range(20):
        plain, unbiased = grams_of(*world(means, 1.0, 16, seed=seed))
        number.append(cones.unbiased_statistics(unbiased)["unbiased_participation"][0])
        rank.append(cones.statistics(plain)["entropy_rank"][0])
    assert np.mean(number) == pytest.approx(kinds, abs=0.25)  # noise left in the cosines lowers it
    assert np.mean(rank) > (3.9 if kinds == 4 else kinds + 0.5)


@pytest.mark.parametrize("n", [3, 4, 9, 16, 32, 64])
def test_one_shared_direction_is_not_taken_for_several_at_any_number_of_prompts(n):
    """The pilot's toolkit calls it polyhedral, at 64 prompts as at 3; the unbiased cosine and its p do not."""
    means, cosine, called, p = one_direction(width=200, size=4.0), [], [], []
    for seed in range(12):
        activations, where = world(means, 1.5, n, seed=100 + seed)
        plain, unbiased = grams_of(activations, where)
        found = cones.statistics(plain)
        called.append(bool(cone_study.polyhedral(found["mean_abs_cosine"], found["entropy_rank"])[0]))
        cosine.append(cones.unbiased_statistics(unbiased)["unbiased_cosine"][0])
        drawn = permuted_cosines(activations, where, [n] * 4, 39, seed)
        p.append(cone_tables.rank_p(cosine[-1], drawn))
    assert all(called)
    assert np.nanmedian(cosine) == pytest.approx(1, abs=0.35 if n < 9 else 0.1)
    assert np.mean(np.array(p) <= 0.05) <= 0.25


def permuted_cosines(activations, where, sizes, draws, seed):
    weights = cone_designs.permuted(where, sizes, draws, np.random.default_rng(seed))
    _, unbiased = cones.products(cones.kernel(activations), weights)
    return cones.unbiased_statistics(cones.gram(unbiased, cones.shared(len(sizes))))["unbiased_cosine"][:, 0]


def test_false_positives_of_the_plans_test_over_200_seeds():
    """Categories that do not differ: p <= .05 in no more than 5 %, up to the noise of 200 seeds."""
    p = []
    for seed in range(200):
        activations, where = world(one_direction(width=30), 1.0, 6, seed=seed)
        _, unbiased = grams_of(activations, where)
        own = float(cones.unbiased_statistics(unbiased)["unbiased_cosine"][0])
        p.append(cone_tables.rank_p(own, permuted_cosines(activations, where, [6] * 4, 39, seed)))
    share = np.mean(np.array(p) <= 0.05)
    print(f"false positives: {share:.3f}")
    assert share < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 200) and np.mean(p) == pytest.approx(0.5, abs=0.07)


def test_categories_that_differ_are_found_to_differ():
    found = []
    for seed in range(10):
        activations, where = world(one_direction() + separate(size=2.0), 1.0, 16, seed=seed)
        _, unbiased = grams_of(activations, where)
        own = float(cones.unbiased_statistics(unbiased)["unbiased_cosine"][0])
        found.append(cone_tables.rank_p(own, permuted_cosines(activations, where, [16] * 4, 39, seed)))
    assert np.mean(np.array(found) <= 0.05) > 0.9


def test_bootstrap_intervals_cover():
    means, hits = one_direction(2, 40) + separate(2, 40, 2.0), 0
    wanted = float(cones.pairs(cones.cosines(means @ means.T))[0])
    for seed in range(120):
        activations, where = world(means, 1.0, 16, seed=seed)
        groups = [*where.harmful, where.harmless]
        weights = cone_designs.bootstrap(groups, where.total, 200, np.random.default_rng(seed))
        _, drawn = cones.products(cones.kernel(activations), weights)
        values = cones.unbiased_statistics(cones.gram(drawn, cones.shared(2)))["unbiased_cosine"][:, 0]
        low, high = np.quantile(values, [0.025, 0.975])
        hits += low <= wanted <= high
    print(f"coverage {hits / 120:.3f}")
    assert hits / 120 > 0.87


# ---- designs


def members(row):
    return set(np.flatnonzero(row))


def test_designs_take_the_prompts_that_they_should():
    _, where = world(separate(), 1.0, 8)
    sizes, rng = [3, 4, 4, 8], np.random.default_rng(0)
    for name in ("observed", "permuted"):
        for groups in getattr(cone_designs, name)(where, sizes, 5, rng):
            taken = [members(row) for row in groups]
            assert [len(one) for one in taken] == [*sizes, 19] and taken[4] <= set(where.harmless.tolist())
            assert len(set.union(*taken)) == 19 + 19  # none twice
            assert np.allclose(groups.sum(1), 1)
            if name == "observed":
                assert all(one <= set(two.tolist()) for one, two in zip(taken, where.harmful, strict=False))
    mixed = cone_designs.permuted(where, sizes, 5, rng)
    assert any(not members(groups[0]) <= set(where.harmful[0].tolist()) for groups in mixed)
    for groups in cone_designs.own(where, sizes, 5, rng):
        for k in range(4):
            place = {int(np.flatnonzero(where.harmful[k] == i)[0]) for i in members(groups[k])}
            assert {int(where.beside[k][i]) for i in place} == members(groups[4 + k])  # each with its own neighbour


def test_topics_are_never_on_both_sides():
    _, where = world(separate(), 1.0, 8)
    every = [set(one.tolist()) for one in where.everyday]
    assert cone_designs.topics_allow(where, [4] * 4) and not cone_designs.topics_allow(where, [5] * 4)
    assert not cone_designs.topics_allow(where, [2] * 5)
    made = cone_designs.topics(where, [3] * 4, 100, np.random.default_rng(0))
    assert len(made) == 100 and len(cone_designs.topics(where, [4] * 4, 100, np.random.default_rng(0))) == 70
    for groups in made:
        topics = [next(i for i, one in enumerate(every) if members(row) <= one) for row in groups[:4]]
        assert len(set(topics)) == 4 and len(members(groups[4])) == 12
        assert not members(groups[4]) & set.union(*(every[topic] for topic in topics))


def test_the_planted_null_holds_one_direction_as_long_as_the_measured_one():
    """Its noise is that of harmless prompts, however many are drawn, so that the rank rises where they are few."""
    activations, where = world(one_direction(width=100, size=4.0), 1.0, 16)
    inner = cones.kernel(activations)
    strength = cone_geometry._strength(inner, where)
    everyone = [np.concatenate(where.harmful), where.harmless]
    _, whole = grams_of(activations, where, everyone, cones.shared(1))  # the squared length without its noise
    assert 0.85 < strength[0] < 1 and whole[0, 0, 0] == pytest.approx(16, rel=0.25)
    rank = {}
    for n in (3, 64):
        weights = cone_designs.planted(where, [n] * 4, 400, np.random.default_rng(0))
        sizes = [n] * 4 + [4 * n, np.inf, np.inf]
        plain, unbiased = (
            cones.gram(one, cones.planting(4, strength)) for one in cones.products(inner, weights, sizes)
        )
        rank[n] = float(np.median(cones.statistics(plain)["entropy_rank"]))
        assert np.mean(np.diagonal(unbiased, axis1=2, axis2=3)) == pytest.approx(whole[0, 0, 0], rel=0.1)
        cosine = cones.unbiased_statistics(unbiased)["unbiased_cosine"]
        assert np.nanmedian(cosine) == pytest.approx(1.0, abs=0.15 if n == 3 else 0.02)
    assert rank[3] > 3.3 and rank[64] < 2.9


# ---- rows, and tables from them


@pytest.fixture(scope=scopes.module)
def measured():
    """Geometry of a world with the categories' own directions beside a shared one, stronger at later layers."""
    means = one_direction(width=80, size=5.0) + separate(width=80, size=3.0)
    activations, where = world(means, 1.0, 12, about=separate(width=80, size=3.0), layers=5, topics=0.2)
    activations[:, 0] = np.random.default_rng(9).standard_normal(activations[:, 0].shape)  # nothing there
    rows = cone_geometry.rows(cones.kernel(activations), where, 80, 3, FEW, 0)
    blank = {"experiment": "geometry", "operation": "none", "alpha": 0.0, "prompt_id": ""}
    return activations, where, rows.assign(**blank)


def test_gram_matrices_come_back_from_their_rows_at_their_layer(measured):
    activations, where, rows = measured
    groups = [*where.harmful, *where.about, where.harmless]
    plain, unbiased = grams_of(activations, where, groups, cones.shared(8))
    np.testing.assert_allclose(cone_tables.grams(rows), plain)
    np.testing.assert_allclose(cone_tables.grams(rows, "gram_unbiased"), unbiased)
    assert cone_tables.categories(rows) == list(KINDS) and cone_tables.selected(rows) == 3


def test_every_statistic_follows_from_the_two_matrices(measured):
    """So that none can be taken for evidence beside another: remove the matrices, and no value is left."""
    _, _, rows = measured
    here = cone_tables.by_layer(rows).set_index(["layer", "statistic"])
    k = len(KINDS)
    for name, values in cones.statistics(cone_tables.grams(rows)[:, :k, :k]).items():
        np.testing.assert_allclose(here["value"].xs(name, level="statistic"), values)
    twice = rows.copy()
    twice.loc[twice["metric"] == "gram", "value"] *= 2  # longer, at the same angles
    again = cone_tables.by_layer(twice).set_index(["layer", "statistic"])["value"]
    pd.testing.assert_series_equal(again, here["value"])


def test_intervals_hold_what_is_planted(measured):
    _, _, rows = measured
    here = cone_tables.by_layer(rows)
    here = here[here["layer"] == 3].set_index("statistic")
    truth = 25 / 34  # shared 5, own 3
    row = here.loc["unbiased_cosine"]
    assert row["low"] < truth < row["high"] and row["value"] == pytest.approx(truth, abs=0.06)
    assert here.loc["matched_cosine", "value"] == pytest.approx(1.0, abs=0.06)  # the topic is all that was special
    assert here.loc["topic_cosine", "value"] == pytest.approx(3 / math.sqrt(34), abs=0.08)
    assert abs(here.loc["about_cosine", "value"]) < 0.25
    table = cone_tables.pairs(rows)
    assert len(table) == 6 + 4 and (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert table["second"].str.startswith("about").tolist() == [False] * 6 + [True] * 4


def test_reflected_intervals_take_off_what_noise_adds(measured):
    """Resampling adds noise, and so rank: percentiles would lie above the value, which itself lies above the truth."""
    _, _, rows = measured
    row = cone_tables.by_layer(rows).set_index(["layer", "statistic"]).loc[(3, "entropy_rank")]
    gram = 25 * np.ones((4, 4)) + 9 * np.eye(4)
    truth = float(cones.entropy_rank(cones.cosines(gram)))
    assert truth < row["value"] and 1 <= row["low"] < (row["low"] + row["high"]) / 2 < row["value"]


def test_what_is_derived_from_categories_and_topics():
    r, t = np.random.default_rng(0).standard_normal((2, 3, 4, 30))
    both = np.concatenate([r, t], axis=1)
    found = cone_geometry.derived(both @ both.swapaxes(1, 2))
    for name, vectors in {"unbiased_cosine": r, "about_cosine": t, "matched_cosine": r - t}.items():
        wanted = cones.pairs(cones.cosines(vectors @ vectors.swapaxes(1, 2))).mean(-1)
        np.testing.assert_allclose(found[name], wanted)
    together = (r * t).sum(-1) / np.linalg.norm(r, axis=-1) / np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(found["topic_cosine"], together.mean(-1))


def test_the_table_sets_each_statistic_beside_matched_nulls(measured):
    _, _, rows = measured
    table = cone_tables.table(rows)
    assert cone_tables.largest(rows, "permuted") == "12" and cone_tables.largest(rows, "topics") == "4"
    rank = table.loc["entropy_rank"]
    assert rank["permuted"] < rank["value"] < rank["random"]
    assert table.loc["unbiased_cosine", "permuted"] == pytest.approx(1, abs=0.05)
    assert table.loc["unbiased_cosine", "permuted_p"] == 1 / 40 == cone_tables.unbiased_test(rows)["p"]
    assert np.isnan(table.loc["unbiased_cosine", "random"])
    drawn = cone_tables.draws(rows, "permuted", "entropy_rank")
    assert drawn.shape == (39, 5)
    again = controls.specificity(table.loc["entropy_rank", "value"], drawn[3].to_numpy()).p
    assert table.loc["entropy_rank", "permuted_p"] == again
    few = cone_tables.bands(rows).set_index(["family", "size", "layer", "statistic"])
    assert table.loc["entropy_rank", "few"] == few.loc[("observed", "4", 3, "entropy_rank"), "median"]
    shown = cone_tables.shown(table)
    assert shown.shape == (len(cone_tables.NAMES), 6) and "p 0.025" in shown.loc["unbiased mean cosine", "permuted"]


def test_the_trend_is_held_against_permuted_categories(measured):
    _, _, rows = measured
    rho, null, p = cone_tables.trend(rows)
    rank = cone_tables.by_layer(rows).query("statistic == 'entropy_rank'").sort_values("layer")["value"].to_numpy()
    assert rho == pytest.approx(pd.Series(rank).corr(pd.Series(range(5)), method="spearman"))
    assert -1 <= null <= 1 and 1 / 40 <= p <= 1


def test_bands_cover_all_families_and_the_seeds_numbers(measured):
    _, _, rows = measured
    found = cone_tables.bands(rows)
    assert set(found["family"]) == {"observed", "own", "permuted", "topics", "planted", "random"}
    here = found[(found["layer"] == 3) & (found["statistic"] == "entropy_rank")].set_index(["family", "size"])["median"]
    assert here["planted", "3"] > here["planted", "12"] and here["observed", "3"] > here["observed", "12"]
    sized = cone_tables.study_sized(rows)
    assert set(sized["family"]) == {"observed", "own", "permuted", "planted"} and set(sized["layer"]) == {2}
    assert sized["polyhedral"].between(0, 1).all()
    every = found[(found["family"] == "permuted") & (found["size"] == "12")]
    assert set(every["layer"]) == set(range(5))  # at all layers where prompts are most
    assert set(found[(found["family"] == "permuted") & (found["size"] == "3")]["layer"]) == {2, 3}


def test_a_quick_look_has_fewer_rows_and_the_same_tables():
    activations, where = world(one_direction(), 1.0, 2)
    rows = cone_geometry.rows(cones.kernel(activations), where, 60, 0, counts(quick=True), 0)
    rows = rows.assign(experiment="geometry")
    assert cone_tables.largest(rows, "observed") == "2" and cone_tables.study_sized(rows).empty
    assert len(cone_tables.table(rows)) == len(cone_tables.NAMES)
    with pytest.raises(CompendiumError, match=r"^a category has 1 prompts, and its geometry needs 2: .*\.$"):
        alone = world(one_direction(), 1.0, 1)
        cone_geometry.rows(cones.kernel(alone[0]), alone[1], 60, 0, FEW, 0)


def test_ranks_without_a_value():
    assert cone_tables.rank_p(math.nan, [1.0, 2.0]) == 1 and cone_tables.rank_p(1.0, [math.nan] * 3) == 1
    assert cone_tables.rank_p(9.0, [0.0, 0.1, math.nan]) == 0.5  # a draw without a value counts against it


def test_the_counts_are_the_plans():
    planned = plan()[NOTEBOOK]["geometry"]
    full = counts(quick=False)
    assert list(full.per_category) == planned["per_category"]
    assert (full.draws, full.subsamples, full.splits) == tuple(planned[n] for n in ("draws", "subsamples", "splits"))
    assert set(cone_geometry.FAMILIES[2:]) == set(planned["nulls"])
