"""Controls: what each family must and must not contain, matching by KL in few calls, and rank p values."""

import math

import numpy as np
import planted
import pytest
import torch
from planted import HARMFUL, HARMLESS, requests

from refusal import activations, controls, directions, steering
from refusal.files import CompendiumError

LAYERS, WIDTH, N = 3, 400, 48
TOPICS = [f"topic {i // 8}" for i in range(N)]  # six topics of eight prompts


@pytest.fixture(scope="module")
def sides():
    """Harmful and harmless activations whose means differ by 6 along one axis, in noise of norm 20, topics apart."""
    generator = torch.Generator().manual_seed(0)
    harmful, harmless = torch.randn(2, N, LAYERS, WIDTH, generator=generator)
    harmful[..., 0] += 6
    for i in range(N):
        harmless[i, :, 1 + i // 8] += 3
    return harmful, harmless


@pytest.fixture(scope="module")
def extracted(sides):
    return directions.extract(*sides)


def families(extracted, sides, draws, seed=0):
    harmful, harmless = sides
    return {
        "random": controls.random(extracted, draws, seed=seed),
        "orthogonal": controls.orthogonal(extracted, draws, seed=seed),
        "shuffled": controls.shuffled(extracted, harmful, harmless, draws, seed=seed),
        "balanced": controls.shuffled(extracted, harmful, harmless, draws, seed=seed, balanced=True),
        "topics": controls.topics(extracted, harmless, TOPICS, draws, seed=seed),
    }


def cosines(extracted, family):
    """`[draws, layers]`."""
    return torch.stack([(one.unit.double() * extracted.unit.double()).sum(-1) for one in family]).numpy()


# ---- the families


def test_every_control_has_the_norm_of_the_extracted_direction(extracted, sides):
    for name, family in families(extracted, sides, 5).items():
        assert [one.id for one in family] == [f"{name}[{i}]" for i in range(5)]
        for one in family:
            assert one.unit.shape == extracted.unit.shape and one.unit.dtype == torch.float32
            np.testing.assert_allclose(one.unit.double().norm(dim=-1), 1, atol=1e-6)
            assert torch.equal(one.raw_norm, extracted.raw_norm)
            assert torch.equal(one.residual_norm, extracted.residual_norm)
            steered = steering.add(one, 1, -0.5)
            assert steered.alpha_absolute == steering.add(extracted, 1, -0.5).alpha_absolute
            assert steered.name == f"{one.id} -0.5"


def test_a_draw_depends_on_family_draw_and_seed_alone(extracted, sides):
    few, many = families(extracted, sides, 3), families(extracted, sides, 9)
    other = families(extracted, sides, 3, seed=1)
    for name in few:
        for i, one in enumerate(few[name]):
            assert torch.equal(one.unit, many[name][i].unit)
            assert not torch.equal(one.unit, other[name][i].unit)
    units = [one.unit for family in many.values() for one in family]
    same = [(a, b) for a in range(len(units)) for b in range(a) if torch.allclose(units[a].abs(), units[b].abs())]
    assert not same  # no draw twice, and none turned round


def test_random_directions_are_isotropic(extracted):
    cosine = cosines(extracted, controls.random(extracted, 199, seed=0))
    assert cosine.std() * math.sqrt(WIDTH) == pytest.approx(1, abs=0.1)
    assert abs(cosine.mean()) < 4 / math.sqrt(WIDTH * cosine.size)
    layers = torch.stack([one.unit for one in controls.random(extracted, 199, seed=0)])
    assert (layers[:, 0] * layers[:, 1]).sum(-1).abs().max() < 0.3  # each layer has its own


def test_orthogonal_directions_are_orthogonal(extracted):
    assert np.abs(cosines(extracted, controls.orthogonal(extracted, 50, seed=0))).max() < 1e-6


def test_opposite(extracted):
    turned = controls.opposite(extracted)
    assert torch.equal(steering.add(turned, 1, 1.0).vectors, steering.add(extracted, 1, -1.0).vectors)


def test_shuffled_labels_lose_the_direction_but_for_what_chance_leaves(extracted, sides):
    made = controls.shuffled(extracted, *sides, 199, seed=0)
    contrast, noise = 6, math.sqrt(WIDTH)
    expected = contrast / math.sqrt(contrast**2 + 4 * noise**2)  # as the docstring has it
    # The extracted direction holds noise of these prompts too, so it is the planted axis that is looked at.
    planted_part = np.array([one.unit[:, 0].numpy() for one in made])
    assert abs(planted_part.mean()) < 0.05
    assert np.sqrt((planted_part**2).mean()) == pytest.approx(expected, rel=0.15)
    assert np.abs(cosines(extracted, made).mean(0)).max() < 0.1
    assert extracted.unit[:, 0].min() > 0.7


def test_balanced_shuffles_lose_it_altogether(extracted, sides):
    made = controls.shuffled(extracted, *sides, 100, seed=0, balanced=True)
    assert np.sqrt(np.mean([one.unit[:, 0].numpy() ** 2 for one in made])) < 1.2 / math.sqrt(WIDTH)  # as at random


def test_shuffled_draws_are_contrasts_of_all_prompts_with_the_sides_sizes():
    """Each prompt has a coordinate of its own, so a direction shows who stood on which side."""
    harmful, harmless = torch.eye(10)[:, None].split([6, 4])
    made = directions.extract(harmful, harmless)
    for balanced, shares in ((False, range(2, 7)), (True, (3, 4))):
        seen = set()
        for one in controls.shuffled(made, harmful, harmless, 40, seed=0, balanced=balanced):
            positive = one.unit[0] > 0
            assert (one.unit[0] != 0).all() and int(positive.sum()) == 6
            np.testing.assert_allclose(one.unit[0, positive] * 6, -one.unit[0, ~positive][0] * 4, rtol=1e-5)
            seen.add(int(positive[:6].sum()))
        assert len(seen) >= 2 and seen <= set(shares)  # balanced: 3.6, rounded either way


def test_topic_contrasts_hold_no_harmful_prompt(extracted, sides):
    _, harmless = sides
    family = controls.topics(extracted, harmless, TOPICS, 60, seed=0)
    compared = controls.topic_sides(TOPICS, 60, seed=0)
    topic, sizes = np.array(TOPICS), set()
    for one, (first, second) in zip(family, compared, strict=True):
        assert len(first) == len(second) and not set(first) & set(second)
        rows = [torch.from_numpy(np.isin(topic, side)) for side in (first, second)]
        wanted = directions.mean_difference(harmless[rows[0]], harmless[rows[1]])
        cosine = torch.nn.functional.cosine_similarity(one.unit.double(), wanted, dim=-1)
        np.testing.assert_allclose(cosine, 1, atol=1e-6)  # these harmless prompts, and nothing else
        sizes.add(len(first))
    assert sizes == {1, 2, 3}
    assert len({frozenset(sides) for sides in compared}) == 60
    assert np.sqrt(np.mean([one.unit[:, 0].numpy() ** 2 for one in family])) < 1.5 / math.sqrt(WIDTH)


def test_topics_run_out():
    assert len(controls.topic_sides(["a", "b", "c", "d", "a"], 9, seed=0)) == 9  # 6 pairs, 3 pairs of pairs
    with pytest.raises(CompendiumError, match="4 topics give 9 different contrasts, and 10"):
        controls.topic_sides(["a", "b", "c", "d"], 10, seed=0)
    with pytest.raises(CompendiumError, match="1 topics give 0"):
        controls.topic_sides(["a"], 1, seed=0)


def test_bad_input_is_named(extracted, sides):
    harmful, harmless = sides
    with pytest.raises(CompendiumError, match="do not fit a direction"):
        controls.shuffled(extracted, harmful[..., :5], harmless[..., :5], 1, seed=0)
    with pytest.raises(CompendiumError, match="one for each prompt"):
        controls.topics(extracted, harmless, TOPICS[1:], 1, seed=0)
    with pytest.raises(CompendiumError, match="same mean"):
        controls.topics(extracted, torch.ones_like(harmless), TOPICS, 1, seed=0)


def test_on_the_planted_model_contrasts_without_harm_do_nothing():
    """Where prompts differ in harm and little else, unlike in the tests above."""
    one = planted.build()
    harmful, harmless = (
        activations.last_token(one.model, requests(words, 32, seed)) for words, seed in ((HARMFUL, 1), (HARMLESS, 2))
    )
    made = directions.extract(harmful, harmless)
    plain = controls.shuffled(made, harmful, harmless, 19, seed=0)
    assert np.abs(cosines(made, plain)[:, 4]).mean() > 0.5  # what chance leaves of harm is all there is to see
    prompts = requests(HARMLESS, 4, seed=3)
    for family in (
        controls.shuffled(made, harmful, harmless, 19, seed=0, balanced=True),
        controls.topics(made, harmless, [HARMLESS[i % 4] for i in range(32)], 9, seed=0),
    ):
        assert np.abs(cosines(made, family)[:, 4]).max() < 0.05
        conditions = [steering.baseline(), *(steering.add(control, 4, 1.0) for control in (made, *family))]
        screened = steering.screen(one.model, prompts, conditions, one.openings).mean(0).numpy()
        found = controls.specificity(screened[1] - screened[0], screened[2:] - screened[0])
        assert found.p == 1 / (1 + len(family)) and found.z > 5


# ---- scales


def test_scaled(extracted):
    twice = controls.scaled(extracted, 2.0)
    assert torch.equal(twice.raw_norm, 2 * extracted.raw_norm) and twice.id == extracted.id
    assert torch.equal(steering.add(twice, 1, 0.5).vectors, steering.add(extracted, 1, 1.0).vectors)
    each = controls.scaled(extracted, np.array([1.0, 2.0, 0.5]))
    np.testing.assert_allclose(each.raw_norm / extracted.raw_norm, [1, 2, 0.5])
    for wrong in (0.0, -1.0, math.nan, [1.0, 2.0]):
        with pytest.raises(CompendiumError, match="cannot be scaled"):
            controls.scaled(extracted, wrong)


STEEPNESS = np.geomspace(1e-3, 1e2, 60)  # KL at scale 1
CURVES = {
    "quadratic": lambda s, c: c * s**2,
    "saturating": lambda s, c: 8 * (1 - np.exp(-c * s**2 / 8)),
    "steeper later": lambda s, c: c * s**2 * (1 + s**6),
    "linear": lambda s, c: c * s,
}


@pytest.mark.parametrize("name", CURVES)
def test_match_kl(name):
    curve, asked = CURVES[name], []

    def kl_of(scales, which):
        asked.append(which)
        return curve(scales, STEEPNESS[which])

    found = controls.match_kl(kl_of, 3.0, np.ones(60), 30.0)
    assert np.array_equal(found.reached, curve(30.0, STEEPNESS) >= 3.0 * 0.95)
    assert found.reached.sum() >= 30 and np.isnan(found.scale[~found.reached]).all()
    kl = curve(found.scale, STEEPNESS)[found.reached]
    assert (np.abs(kl / 3 - 1) <= 0.05).all()
    np.testing.assert_array_equal(found.kl[found.reached], kl)
    np.testing.assert_array_equal(found.kl[~found.reached], curve(30.0, STEEPNESS[~found.reached]))
    print(f"{name}: {found.calls} calls, {found.evaluations / 60:.1f} evaluations a draw")
    assert found.calls == len(asked) <= 7 and found.evaluations == sum(map(len, asked)) <= 4 * 60
    for i in range(60):  # nothing is asked again once it is reached
        turns = [i in which for which in asked]
        assert turns == sorted(turns, reverse=True)


def test_match_kl_with_targets_starts_and_limits_of_each_draw():
    found = controls.match_kl(lambda s, _: s**2, [1.0, 4.0, 9.0, 16.0], [1.0, 50.0, 1e-4, 1.0], [9.0, 9.0, 9.0, 3.0])
    np.testing.assert_allclose(found.scale[:3], [1, 2, 3], rtol=0.03)
    assert found.reached.tolist() == [True, True, True, False] and found.kl[3] == pytest.approx(9)
    assert controls.match_kl(lambda s, _: s**2, 1.0, 1.0, 2.0).calls == 1


def test_match_kl_where_no_scale_has_the_target():
    for curve in (lambda s: np.where(s > 0.37, 10.0, 0.1), lambda s: 5 + 0 * s, lambda s: 0 * s):
        found = controls.match_kl(lambda s, _, curve=curve: curve(s), 3.0, 1.0, 30.0)
        assert not found.reached[0] and math.isnan(found.scale[0]) and found.calls <= 40
    overflow = controls.match_kl(lambda s, _: np.where(s > 2, np.inf, s**2), 3.0, 20.0, 30.0)
    assert overflow.kl[0] == pytest.approx(3, rel=0.05)
    with pytest.raises(CompendiumError, match="no number"):
        controls.match_kl(lambda s, _: s * np.nan, 3.0, 1.0, 30.0)
    with pytest.raises(CompendiumError, match="positive target"):
        controls.match_kl(lambda s, _: s, 0.0, 1.0, 30.0)


# ---- specificity


def test_specificity_by_hand():
    found = controls.specificity(0.9, [0.1, -0.1, 0.2, -0.2])
    assert (found.p, found.n, found.missing) == (1 / 5, 4, 0)
    assert found.mean == pytest.approx(0) and found.z == pytest.approx(0.9 / math.sqrt(0.1 / 3))
    # Either side counts, and ties do: the mean of all six is 0, and two of five are as far from it as .3 is.
    assert controls.specificity(0.3, [-0.3, 0.3, 0.1, -0.3, -0.1]).p == 4 / 6
    assert controls.specificity(-0.9, [0.1, -0.1, 0.2, -0.2]).p == 1 / 5
    same = controls.specificity(0.0, [0.0, 0.0, 0.0])
    assert same.p == 1 and math.isnan(same.z)


def test_draws_without_an_effect_count_against():
    found = controls.specificity(0.9, [0.1, -0.1, 0.2, math.nan, -0.2, math.nan])
    assert (found.p, found.n, found.missing) == (3 / 7, 6, 2)
    assert found.z == controls.specificity(0.9, [0.1, -0.1, 0.2, -0.2]).z
    for wrong in ((0.5, []), (0.5, [math.nan]), (math.nan, [0.1])):
        with pytest.raises(CompendiumError, match="at least one draw"):
            controls.specificity(*wrong)


@pytest.mark.parametrize("shape", ["normal", "skewed", "discrete"])
def test_specificity_finds_nothing_where_there_is_nothing(shape):
    """The extracted effect is one more draw: p <= .05 in 5 % of 2,000 seeds, whatever the distribution."""
    rng = np.random.default_rng(0)
    drawn = {
        "normal": lambda: rng.normal(-0.3, 0.1, 100),
        "skewed": lambda: rng.exponential(1.0, 100),
        "discrete": lambda: rng.binomial(50, 0.1, 100) / 50,
    }[shape]
    p = np.array([controls.specificity(x[0], x[1:]).p for x in (drawn() for _ in range(2000))])
    print(f"{shape}: {np.mean(p <= 0.05):.4f} below .05")
    assert np.mean(p <= 0.05) < 0.0625  # 2.5 standard errors above 5 %
    assert shape == "discrete" or np.mean(p <= 0.05) > 0.0375
