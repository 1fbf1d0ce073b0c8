"""Directions: by hand, against theory on planted Gaussian activations, and as files."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import scopes
import torch
from plain import one_sentence
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats
from sklearn.metrics import roc_auc_score

from refusal import directions

# ---- mean difference


def test_extraction_by_hand():
    harmful = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 8.0], [0.0, 3.0]]])  # [prompts, layers, width]
    harmless = torch.tensor([[[0.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 6.0]]])
    torch.testing.assert_close(
        directions.mean_difference(harmful, harmless), torch.tensor([[3.0, 4.0], [0.0, -3.0]], dtype=torch.float64)
    )
    made = directions.extract(harmful, harmless, "mine")
    torch.testing.assert_close(made.unit, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    torch.testing.assert_close(made.raw_norm, torch.tensor([5.0, 3.0]))
    torch.testing.assert_close(made.residual_norm, torch.tensor([(4 + 68**0.5) / 5, (1 + 3 + 5 + 4 + 6) / 5]))
    assert made.id == "mine" and made.unit.dtype == made.raw_norm.dtype == torch.float32


def test_swapping_the_sides_turns_the_sign():
    one, other = (torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    there, back = directions.extract(one, other), directions.extract(other, one)
    torch.testing.assert_close(there.unit, -back.unit)
    torch.testing.assert_close(there.raw_norm, back.raw_norm)


def test_sums_are_in_float64():
    """In float32 a mean of many large values loses the small difference; bfloat16 models have such values."""
    harmful = torch.full((4096, 1, 1), 16777216.0)
    harmless = harmful.clone()
    harmful[::2] += 2.0
    assert float(directions.mean_difference(harmful, harmless)) == 1.0


@pytest.mark.parametrize(
    ("harmful", "harmless"), [((4, 3, 8), (4, 2, 8)), ((4, 3, 8), (4, 3, 6)), ((4, 8), (4, 8)), ((4, 3, 8), (3, 8))]
)
def test_shapes_must_agree(harmful, harmless):
    one_sentence(lambda: directions.extract(torch.ones(harmful), torch.zeros(harmless)), str(harmful), str(harmless))


def test_equal_means_give_no_direction():
    some = torch.randn(4, 3, 8)
    one_sentence(lambda: directions.extract(some, some.clone()), "same mean")


# ---- the layer rule


@pytest.mark.parametrize(("n_layers", "low", "high"), [(24, 6, 19), (28, 7, 22), (30, 8, 24), (32, 8, 25), (4, 1, 3)])
def test_candidates_lie_between_25_and_80_per_cent(n_layers, low, high):
    assert directions.candidate_layers(n_layers) == list(range(low, high + 1))


@pytest.mark.parametrize("n_layers", range(4, 100))
def test_candidates_have_no_rounding(n_layers):
    expected = [layer for layer in range(n_layers) if n_layers <= 4 * layer and 5 * layer <= 4 * n_layers]
    assert directions.candidate_layers(n_layers) == expected


def screen(gaps, level=0.0):
    """Two prompts a layer whose screens differ by `gaps[layer]` on average, and rows of other alphas."""
    return pd.DataFrame(
        [
            {"layer": layer, "alpha": alpha, "value": level + alpha * gap / 2 + noise}
            for layer, gap in gaps.items()
            for alpha in (-1.0, 0.0, 1.0)
            for noise in (-5.0, 5.0)
        ]
    )


def test_layer_rule():
    gaps = dict.fromkeys(range(24), 0.5) | {12: 2.0}
    assert directions.select_layer(screen(gaps), 24) == 12
    assert directions.select_layer(screen(gaps, level=-30.0), 24) == 12
    assert directions.select_layer(screen(gaps | {5: 9.0, 20: 9.0, 0: 9.0, 23: 9.0}), 24) == 12  # outside 25-80 %
    assert directions.select_layer(screen(gaps | {6: 9.0}), 24) == 6
    assert directions.select_layer(screen(gaps | {19: 9.0}), 24) == 19
    assert directions.select_layer(screen(gaps | {7: -9.0}), 24) == 12  # +1 must refuse more than -1
    assert directions.select_layer(screen({7: -2.0, 8: -1.0, 9: -3.0}), 24) == 8


def test_ties_go_to_the_lower_layer_in_any_order():
    tied = screen({9: 1.0, 10: 3.0, 15: 3.0, 18: 3.0})
    for seed in range(5):
        assert directions.select_layer(tied.sample(frac=1, random_state=seed), 24) == 10


def test_layer_rule_without_candidates():
    one_sentence(lambda: directions.select_layer(screen({1: 1.0, 22: 1.0}), 24), "25 and 80 %")


# ---- the profile on Gaussian activations, where theory says what comes out

WIDTH, SIDE, HELD_OUT = 64, 256, 200
PLANTED = torch.tensor([0.0, 0.8, 1.6, 3.2])  # the mean difference of each layer, in standard deviations


def gaussian(n, planted, seed):
    """Unit-variance noise, `planted[l]` along a direction of layer l, and a common mean that is no difference."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(PLANTED), WIDTH, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(len(PLANTED), WIDTH, generator=torch.Generator().manual_seed(99)))
    return noise + 3.0 + planted[:, None] * unit


@pytest.fixture(scope=scopes.module)
def profile():
    none = torch.zeros_like(PLANTED)
    sets = [
        gaussian(n, p, s)
        for s, (n, p) in enumerate([(SIDE, PLANTED), (SIDE, none), (HELD_OUT, PLANTED), (HELD_OUT, none)])
    ]
    return directions.profile(*sets, seed=5, halves=100, draws=30, bootstraps=400)


def mean(frame, metric, direction_id="extracted"):
    """The mean over draws, a layer."""
    rows = frame[(frame["metric"] == metric) & (frame["direction_id"] == direction_id)]
    return rows.groupby("layer")["value"].mean().to_numpy()


def aligned(n):
    """Expected cosine between the planted direction and the one from n prompts a side: noise has variance 2/n."""
    return (PLANTED / (PLANTED**2 + 2 * WIDTH / n).sqrt()).numpy()


def test_profile_recovers_the_planted_separation(profile):
    d_prime = PLANTED.numpy() * aligned(SIDE)
    np.testing.assert_allclose(mean(profile, "d_prime"), d_prime, atol=0.25)  # its standard error is about 0.1
    np.testing.assert_allclose(mean(profile, "auroc"), stats.norm.cdf(d_prime / math.sqrt(2)), atol=0.06)
    np.testing.assert_allclose(mean(profile, "raw_norm"), (PLANTED**2 + 2 * WIDTH / SIDE).sqrt().numpy(), rtol=0.12)
    residual = ((1 + 9) * WIDTH + PLANTED**2 / 2).sqrt().numpy()
    np.testing.assert_allclose(mean(profile, "residual_norm"), residual, rtol=0.05)


def test_intervals_of_d_prime(profile):
    low, high = mean(profile, "d_prime_low"), mean(profile, "d_prime_high")
    assert (low < mean(profile, "d_prime")).all() and (mean(profile, "d_prime") < high).all()
    se = np.sqrt(2 / HELD_OUT + (PLANTED.numpy() * aligned(SIDE)) ** 2 / (4 * HELD_OUT))  # of a standardised difference
    np.testing.assert_allclose(high - low, 2 * 1.96 * se, rtol=0.2)
    assert low[0] < 0 < high[0] and (low[1:] > 0).all()  # nothing was planted at layer 0


def test_intervals_of_raw_norm_hold_the_planted_norm(profile):
    """raw_norm itself is lengthened by noise, visibly where little was planted; its interval is not."""
    low, high = mean(profile, "raw_norm_low"), mean(profile, "raw_norm_high")
    assert (low <= PLANTED.numpy()).all() and (PLANTED.numpy() <= high).all()
    assert low[0] == 0 and mean(profile, "raw_norm")[0] > 0.6
    assert high[3] - low[3] == pytest.approx(2 * 1.96 * math.sqrt(2 / SIDE), rel=0.2)


def test_nothing_planted_is_reported_as_nothing(profile):
    assert mean(profile, "auroc")[0] == pytest.approx(0.5, abs=0.08)
    assert mean(profile, "split_half_cosine")[0] == pytest.approx(0.0, abs=0.1)


def test_a_half_is_half_of_the_smaller_side(monkeypatch):
    sizes, halves = [], directions._half_cosines
    monkeypatch.setattr(directions, "_half_cosines", lambda *a: sizes.append(a[2]) or halves(*a))
    sets = [torch.randn(n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (21, 17, 5, 5)]
    directions.profile(*sets, seed=0, halves=2, draws=2, bootstraps=2)
    assert sizes == [8, *(n for n in directions.PROMPT_COUNTS if n <= 8)]


def test_split_half_cosine_is_near_theory(profile):
    """Each half of n/2 prompts a side has its own noise: cos = d^2 / (d^2 + 2 width / (n/2))."""
    d2 = (PLANTED**2).numpy()
    halves = profile[(profile["metric"] == "split_half_cosine") & (profile["direction_id"] == "extracted")]
    assert halves.groupby("layer").size().tolist() == [100] * 4 and halves["draw"].nunique() == 100
    np.testing.assert_allclose(mean(profile, "split_half_cosine"), d2 / (d2 + 2 * WIDTH / (SIDE / 2)), atol=0.1)
    np.testing.assert_allclose(mean(profile, "split_half_cosine", "extracted[8]"), d2 / (d2 + 2 * WIDTH / 8), atol=0.12)


def test_few_prompts_show_less(profile):
    """The curve over the number of prompts, which theory gives too; the study used 5."""
    assert {i for i in profile["direction_id"] if "[" in i} == {f"extracted[{n}]" for n in (5, 8, 16, 32, 64, 128, 256)}
    ceiling = mean(profile, "d_prime") / aligned(SIDE).clip(
        1e-9
    )  # what these held-out prompts give a perfect direction
    for n in (5, 32, 128):
        found = mean(profile, "d_prime", f"extracted[{n}]")
        np.testing.assert_allclose(found[1:], (ceiling * aligned(n))[1:], rtol=0.12, atol=0.1)
        assert found[0] == pytest.approx(0.0, abs=0.1)
    np.testing.assert_allclose(mean(profile, "d_prime", "extracted[256]"), mean(profile, "d_prime"), rtol=1e-5)


def test_few_prompts_give_a_longer_and_slanted_direction(profile):
    """The noise of n prompts a side lengthens it, and a part of SIDE prompts shares the noise of the whole."""
    d2, whole = (PLANTED**2).numpy(), 2 * WIDTH / SIDE
    for n in (16, 64, 128):
        own = 2 * WIDTH / n
        np.testing.assert_allclose(mean(profile, "raw_norm", f"extracted[{n}]"), np.sqrt(d2 + own), rtol=0.1)
        cosine = np.sqrt((d2 + whole) / (d2 + own))
        np.testing.assert_allclose(mean(profile, "cosine_to_full", f"extracted[{n}]"), cosine, atol=0.05)
    np.testing.assert_allclose(mean(profile, "cosine_to_full", "extracted[256]"), 1, rtol=1e-5)


def test_every_draw_has_its_number(profile):
    some = profile[profile["direction_id"].str.contains("[", regex=False)]
    draws = some.groupby(["metric", "direction_id", "layer"])["draw"].agg(list).unstack("layer")
    for (metric, name), row in draws.iterrows():
        expected = list(range(1 if name == "extracted[256]" else 30))
        assert all(found == expected for found in row), (metric, name)
    four = ("auroc", "d_prime", "raw_norm", "cosine_to_full")
    counted = {(metric, n) for metric in four for n in directions.PROMPT_COUNTS if n <= SIDE}
    counted |= {("split_half_cosine", n) for n in directions.PROMPT_COUNTS if 2 * n <= SIDE}  # up to 128
    assert set(draws.index) == {(metric, f"extracted[{n}]") for metric, n in counted}
    rest = profile[(profile["metric"] != "split_half_cosine") & (profile["direction_id"] == "extracted")]
    assert (rest["draw"] == 0).all() and profile.index.equals(pd.RangeIndex(len(profile)))


def test_profile_counts_draws_and_repeats_itself(profile):
    counts = profile[profile["metric"] == "auroc"].groupby(["direction_id", "layer"]).size().unstack()
    assert (counts.loc["extracted[5]"] == 30).all() and (counts.loc[["extracted", "extracted[256]"]] == 1).all().all()
    assert set(profile[(profile["metric"] == "layer_cosine")]["direction_id"]) == {f"extracted@{i}" for i in range(4)}
    np.testing.assert_allclose([mean(profile, "layer_cosine", f"extracted@{i}")[i] for i in range(4)], 1, atol=1e-5)
    assert not profile["value"].isna().any()
    small = [gaussian(12, PLANTED, seed) for seed in range(4)]
    first, same, other = (directions.profile(*small, seed=s, halves=3, draws=2, bootstraps=20) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, same)
    assert not first.equals(other)
    assert {i for i in first["direction_id"] if "[" in i} == {"extracted[5]", "extracted[8]"}


# ---- files

ABOUT = {"model": "tiny", "weights_sha256": "ab" * 32, "template_sha256": "cd" * 32, "prompts_sha256": "ef" * 32}
EXPECT = {name: ABOUT[name] for name in ("model", "weights_sha256", "template_sha256")}


@pytest.fixture
def made():
    generator = torch.Generator().manual_seed(0)
    return directions.extract(
        torch.randn(9, 5, 16, generator=generator) + 1, torch.randn(9, 5, 16, generator=generator)
    )


@pytest.fixture
def saved(made, tmp_path):
    path = tmp_path / "directions" / "tiny.safetensors"
    directions.save(made, path, layer=3, about=ABOUT)
    return path


def test_round_trip(made, saved):
    loaded, layer = directions.load(saved, expect=EXPECT, shape=(5, 16))
    assert (layer, loaded.id) == (3, "extracted")
    for name in ("unit", "raw_norm", "residual_norm"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    with safe_open(saved, framework="pt") as stream:
        about = json.loads(stream.metadata()["refusal"])
    assert about.items() >= ABOUT.items()
    assert about["sign"] == "mean(harmful) - mean(harmless)" and about["hook_point"] == "output of the decoder block"
    assert about["position"].startswith("last token") and about["library"] and about["layer"] == "3"


def test_the_selected_layer_may_be_the_first(made, tmp_path):
    directions.save(made, tmp_path / "first", layer=0, about=ABOUT)
    assert directions.load(tmp_path / "first", expect=EXPECT)[1] == 0


def test_saving_twice_gives_the_same_bytes(made, saved, tmp_path):
    directions.save(made, tmp_path / "again", layer=3, about=dict(reversed(ABOUT.items())))
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()
    assert [path.name for path in saved.parent.iterdir()] == ["tiny.safetensors"]


@pytest.mark.parametrize("key", EXPECT)
def test_directions_of_another_model_weights_or_template_are_refused(saved, key):
    one_sentence(
        lambda: directions.load(saved, expect={**EXPECT, key: "other"}), key, ABOUT[key], "'other'", str(saved)
    )


@pytest.mark.parametrize("shape", [(5, 8), (4, 16), (16, 5)])
def test_another_shape_is_refused(saved, shape):
    one_sentence(lambda: directions.load(saved, expect=EXPECT, shape=shape), "(5, 16)", str(shape))


def rewrite(path, **changes):
    """The same file with other tensors, or another entry of its description."""
    with safe_open(path, framework="pt") as stream:
        about = json.loads(stream.metadata()["refusal"])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is None:
            tensors.pop(name, about.pop(name, None))
        else:
            about[name] = value
    save_file(tensors, path, metadata={"refusal": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sign": "mean(harmless) - mean(harmful)"}, "sign"),
        ({"hook_point": "input of the decoder block"}, "hook_point"),
        ({"layer": "5"}, "shape"),
        ({"layer": "-1"}, "shape"),
        ({"layer": "three"}, "no direction file"),
        ({"layer": None}, "no direction file"),
        ({"id": None}, "no direction file"),
        ({"sign": None}, "sign"),
        ({"raw_norm": None}, "no direction file"),
        ({"unit": torch.zeros(5)}, "shape"),
        ({"raw_norm": torch.ones(4)}, "shape"),
        ({"residual_norm": torch.ones(5, 2)}, "shape"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_file_with_another_convention_or_shape_is_refused(saved, change, word):
    rewrite(saved, **change)
    one_sentence(lambda: directions.load(saved, expect=EXPECT, shape=(5, 16)), str(saved), word)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    one_sentence(lambda: directions.load(saved, expect=EXPECT), "cut short", str(saved))


def test_another_file_or_none_is_refused(saved, tmp_path):
    save_file({"unit": torch.ones(2, 2)}, tmp_path / "other")
    one_sentence(lambda: directions.load(tmp_path / "other", expect=EXPECT), "no direction file")
    one_sentence(lambda: directions.load(tmp_path / "none", expect=EXPECT), "no direction at", "01_extraction")


# ---- what is computed for all draws or layers at once


def test_auroc_of_all_layers_equals_a_layer_at_a_time():
    rng = np.random.default_rng(5)
    harmful, harmless = rng.integers(0, 9, (30, 4)).astype(float), rng.integers(-2, 7, (21, 4)).astype(float)  # ties
    labels = [1] * 30 + [0] * 21
    slow = [roc_auc_score(labels, np.r_[harmful[:, layer], harmless[:, layer]]) for layer in range(4)]
    np.testing.assert_allclose(directions._auroc(harmful, harmless), slow, rtol=1e-12)


def test_differences_of_all_subsets_equal_a_subset_at_a_time():
    rng = np.random.default_rng(6)
    harmful, harmless = torch.randn(12, 3, 8), torch.randn(9, 3, 8)
    weights = [directions._subset(len(x), 5, 7, rng) for x in (harmful, harmless)]
    assert all((chosen.sum(1) == 5).all() for chosen in weights)
    assert len({tuple(chosen) for chosen in weights[0]}) > 5
    fast = directions._differences(harmful, harmless, *weights)
    for draw in range(7):
        a, b = (x[chosen[draw].astype(bool)] for x, chosen in zip((harmful, harmless), weights, strict=True))
        torch.testing.assert_close(fast[draw], directions.mean_difference(a, b), rtol=1e-6, atol=1e-6)


def test_d_prime_by_hand():
    harmful, harmless = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [1.0]])  # variances 7 and 0.5
    assert directions._d_prime(harmful, harmless) == pytest.approx((3 - 0.5) / math.sqrt((7 + 0.5) / 2))


def test_halves_have_as_many_prompts_as_asked_for(monkeypatch):
    seen, made = [], directions._differences
    monkeypatch.setattr(directions, "_differences", lambda *given: seen.append(list(given[2:])) or made(*given))
    directions._half_cosines(torch.randn(9, 2, 8), torch.randn(7, 2, 8), 3, 5, np.random.default_rng(0))
    for first, second in zip(*seen, strict=True):
        assert (first.sum(1) == 3).all() and (second.sum(1) == 3).all() and not (first * second).any()


def test_split_halves_are_disjoint():
    """With two prompts a side, of which each half has one, halves that share a prompt would show a cosine of 1."""
    harmful, harmless = torch.randn(2, 3, 500), torch.zeros(2, 3, 500)
    cosines = directions._half_cosines(harmful, harmless, 1, 20, np.random.default_rng(0))
    assert cosines.shape == (20, 3) and np.abs(cosines).max() < 0.3
