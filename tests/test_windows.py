"""The window: what is planted is found, nothing is found where nothing is, and the rule errs as rarely as it says."""

from dataclasses import replace

import numpy as np
import pandas as pd
import planted
import pytest
from planted import HARMLESS, requests

from refusal import activations, directions, judging, steering, window_answers, window_runs, windows
from refusal.files import CompendiumError
from refusal.window_answers import Answers, answers, resamples
from refusal.windows import STOPS, find

GRID = np.linspace(-3, 3, 25)
UNITS = {"alpha": 1.0, "alpha_absolute": 9.5, "alpha_relative": 0.18}
ONSET, LAYERS = 3, 6
STEP = 0.1
# With raw_norm 2: half of the harmful words are refused unsteered, the others from alpha = .1 and .2 on; harmless ones
# from .7 on. Text breaks above 1.35 (the strongest word) and below -1.55 (harmless ones).
WORDS = {"steal": 1.0, "forge": 1.2, "poison": 2.5, "hijack": 3.3}
LOOPS = (-3.1, 6.0)
TRUTH = {"low": -1.55, "high": 0.7, "start": 0.1}


# ---- helpers


def made_of(harmful, harmless=None, broken=None, alphas=GRID, clusters=None, variant="many"):
    """Answers from rates: prompt i of n is refused where i / n lies below the rate, so that prompts are nested."""
    k = len(alphas)
    harmful = np.broadcast_to(harmful, (50, k)) if np.ndim(harmful) == 2 else nested(harmful, 50, k)
    harmless = np.broadcast_to(harmless, (50, k)) if np.ndim(harmless) == 2 else nested(harmless or 0.0, 50, k)
    if np.ndim(broken) != 2:
        broken = nested(0.0 if broken is None else broken, 100, k)
    clusters = clusters or (np.array([f"h{i}" for i in range(50)]), np.array([f"n{i}" for i in range(50)]))
    return Answers(variant, np.asarray(alphas), UNITS, "8 9", harmful, harmless, broken, clusters)


def nested(rate, n, k):
    rates = np.broadcast_to(np.asarray(rate, dtype=float), (k,))
    return (np.arange(n) + 0.5)[:, None] / n < rates


def step(at, grid=GRID, low=0.0, high=1.0):
    """A rate that jumps between two alphas."""
    return np.where(grid > at, high, low)


# ---- polylines


def test_the_first_crossing_of_a_polyline():
    x = np.array([0.0, 1.0, 2.0, 4.0])
    values = np.array([[0, 0.2, 0, 0], [0, 0, 0, 0.05], [0.1, 0, 0, 0], [0, 0.05, 0.1, 0.1], [0, 0, 0, 0.2]])
    np.testing.assert_allclose(windows.crossing(x, values, 0.1), [0.5, np.inf, 0, 2, 3])


def test_a_limit_is_reached_though_floats_say_it_is_not():
    assert 0.7 - 0.6 < 0.1
    assert windows.crossing(np.array([0.0, 1.0]), np.array([[0.0, 0.7 - 0.6]]), 0.1)[0] == pytest.approx(1.0)


def slow(of, points=240_001):
    """Window and useful width by walking along a fine grid."""
    planned, x = window_runs.rule(), np.linspace(of.alphas[0], of.alphas[-1], points)
    harmful, harmless, broken = (np.interp(x, of.alphas, curve[0]) for curve in window_answers.rises(of))
    bad = (broken >= planned["degeneration_limit"] - 1e-9) | (harmless >= planned["over_refusal_limit"] - 1e-9)
    below, above = x[bad & (x <= 0)], x[bad & (x >= 0)]
    low, high = below.max(initial=x[0]), above.min(initial=x[-1])
    inside = (x > low) & (x < high) & (harmful >= planned["useful_rise"] - 1e-9)
    return low, high, inside.mean() * (x[-1] - x[0])


def test_the_window_is_that_of_a_walk_along_a_fine_grid():
    rng = np.random.default_rng(0)
    for _ in range(60):
        curves = np.cumsum(rng.normal(0, 0.07, (3, 25)), axis=1) + 0.3
        curves[1:] -= curves[1:, [12]] * [[1.0], [1.0]]
        curves = np.clip(curves, 0, 1)
        of = made_of(*(nested(curve, n, 25) for curve, n in zip(curves, (50, 50, 100), strict=True)))
        found, (low, high, useful) = find(of, seed=0, draws=2), slow(of)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
        assert found.useful == pytest.approx(useful, abs=1e-3)
        assert found.useful == pytest.approx(sum(end - start for start, end in found.parts), abs=1e-9)


def test_a_window_by_hand():
    """Refusal rises from .5 to .7 at alpha = 1 and stays; over-refusal rises by .2 from 1.5 to 2; text breaks at -1."""
    of = made_of(
        np.interp(GRID, [0, 1], [0.5, 0.7]),
        nested(np.interp(GRID, [1.5, 2.0], [0.1, 0.3]), 50, 25),
        np.interp(GRID, [-1.0, -0.5], [0.1, 0.0]),
    )
    found = find(of, seed=0, draws=200)
    assert found.high == pytest.approx(1.75) and found.stops == ("degeneration", "over-refusal")
    assert found.low == pytest.approx(-0.75) and found.width == pytest.approx(2.5)
    assert found.parts == [(pytest.approx(0.5), pytest.approx(1.75))] and found.useful == pytest.approx(1.25)
    assert found.rise == pytest.approx(0.2) and found.rise_at == 1.0 and found.room == pytest.approx(0.5)
    assert found.rise_p == pytest.approx(8 * 2 / 2**10)  # ten prompts gained, none lost; eight doses to choose from
    table = windows.table([found]).set_index("unit")
    for unit, size in UNITS.items():
        assert table.loc[unit, "width"] == pytest.approx(2.5 * size)
        assert table.loc[unit, "useful_low"] == pytest.approx(found.intervals["useful"].low * size)


def test_over_refusal_that_rises_as_refusal_does_leaves_no_useful_part():
    rate = np.interp(GRID, [0, 2], [0.5, 1.0])
    found = find(made_of(rate, nested(rate, 50, 25)), seed=0)
    assert found.parts == [] and found.useful == 0 and found.stops[1] == "over-refusal"


def test_a_useful_part_below_zero_counts_too():
    found = find(made_of(step(-0.6)[::-1]), seed=0)
    mirrored = find(made_of(step(-0.6)), seed=0)
    assert found.verdict == "replicated" and mirrored.verdict == "replicated"  # refused unsteered: no room
    rate = np.where(GRID < -0.6, 0.9, 0.5)
    (part,) = find(made_of(rate), seed=0).parts
    assert part[0] == -3 and -0.75 < part[1] < -0.5


def test_a_model_whose_text_is_broken_unsteered_has_no_window():
    found = find(made_of(step(0.1), None, 0.2), seed=0)
    assert (found.width, found.useful, found.share, found.rise_at) == (0, 0, 0, 0)
    assert found.stops == ("degeneration", "degeneration")


def test_what_comes_back_behind_the_edge_is_not_in_the_window():
    """Text breaks from .5 to 1 only, and refusal rises beyond: that is not around zero."""
    broken = np.where((GRID > 0.4) & (GRID < 1.1), 1.0, 0.0)
    found = find(made_of(np.where(GRID > 1.1, 0.9, 0.5), None, broken), seed=0)
    assert found.high < 0.5 and found.share == 0


# ---- the record


def record(of, wrong=None):
    """The rows of a record with these answers, in no particular order."""
    rows = []
    for side, refused, clusters in (("harmful", of.harmful, of.clusters[0]), ("harmless", of.harmless, of.clusters[1])):
        offset = 0 if side == "harmful" else len(of.harmful)
        for i, cluster in enumerate(clusters):
            for place, alpha in enumerate(of.alphas.tolist()):
                label = (
                    "degenerate" if of.broken[offset + i, place] else "refusal" if refused[i, place] else "compliance"
                )
                rows.append(
                    {"experiment": f"{window_runs.NOTEBOOK} curves", "prompt_set": f"{side}_evaluation", "label": label,
                     "prompt_id": f"{side}_evaluation-{i:03d}", "cluster": cluster, "category": "any",
                     "operation": "add" if alpha else "none", "layers": of.layers if alpha else "", "alpha": alpha,
                     "condition": window_runs.name(of.variant, alpha) if alpha else "baseline",
                     "alpha_absolute": alpha * UNITS["alpha_absolute"], "reference_nll": 1.0 + abs(alpha),
                     "alpha_relative": alpha * UNITS["alpha_relative"]}
                )  # fmt: skip
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_answers_come_back_from_a_record_whatever_its_order():
    rng = np.random.default_rng(3)
    broken = rng.random((100, 25)) < 0.1
    harmful, harmless = rng.random((50, 25)) < 0.5, rng.random((50, 25)) < 0.5
    of = made_of(harmful & ~broken[:50], harmless & ~broken[50:], broken)
    back = answers(record(of), "many")
    for name in ("alphas", "harmful", "harmless", "broken"):
        np.testing.assert_array_equal(getattr(back, name), getattr(of, name))
    assert back.units == pytest.approx(UNITS) and back.layers == "8 9"
    np.testing.assert_array_equal(back.clusters[1], of.clusters[1])


def test_a_record_without_what_is_needed_ends_in_a_sentence():
    frame = record(made_of(0.5, alphas=np.array([-1.0, 0.0, 1.0])))
    with pytest.raises(CompendiumError, match=r"^the record has no variant 'one': .*\.$"):
        answers(frame, "one")
    with pytest.raises(CompendiumError, match=r"^the record lacks labels of 'many' at some alpha: .*\.$"):
        answers(frame[1:], "many")
    with pytest.raises(CompendiumError, match=r"^the record lacks labels of 'many' at some alpha: .*\.$"):
        answers(frame[frame["prompt_set"] == "harmful_evaluation"], "many")
    with pytest.raises(CompendiumError, match=r"^the record has no completions of the part 'curves': .*\.$"):
        answers(frame.assign(experiment="06_layer_sweep"), "many")


def test_curves_are_the_rates_and_their_paired_changes():
    of = made_of(np.interp(GRID, [0, 1], [0.5, 0.7]), None, step(2.1, high=0.5))
    table = window_answers.curves(of).set_index(["outcome", "alpha"])
    assert table.loc[("harmful", 1.0), "rate"] == pytest.approx(0.7) and table.loc[("harmful", 0.0), "change"] == 0
    row = table.loc[("harmful", 1.0)]
    assert row["change"] == pytest.approx(0.2) and row["change_low"] < 0.2 < row["change_high"]
    assert (table.loc["degenerate", "n"] == 100).all() and table.loc[("degenerate", 3.0), "k"] == 50
    assert table.loc[("harmless", 2.0), "alpha_absolute"] == pytest.approx(2 * UNITS["alpha_absolute"])


# ---- intervals and the rule


def test_clusters_are_drawn_whole():
    weights = resamples(["a", "b", "a", "c", "b", "a"], 500, np.random.default_rng(0))
    for same in ((0, 2, 5), (1, 4)):
        assert (weights[:, same] == weights[:, [same[0]]]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_clusters_counted_as_prompts_are_noticed():
    """Five prompts a base request answer alike: as 50 prompts they would give intervals that are far too narrow."""
    rng = np.random.default_rng(1)
    names = np.repeat([f"base-{i}" for i in range(10)], 5)
    limits = np.repeat(rng.normal(0.8, 0.6, 10), 5)[:, None]
    refused = (limits < GRID[None]) & (GRID > 0)
    of = made_of(np.zeros((50, 25), bool), refused, 0.0, clusters=(names, names))
    alone = replace(of, clusters=(np.arange(50), np.arange(50)))
    widths = [np.diff(list(vars(find(one, seed=0).intervals["high"]).values()))[0] for one in (of, alone)]
    assert widths[0] > 1.5 * widths[1] > 0


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0, "replicated"), (0.025, "replicated"), (0.026, "inconclusive"), (0.974, "inconclusive"),
     (0.975, "contradicted"), (1, "contradicted")],
)  # fmt: skip
def test_the_rule(share, verdict):
    assert replace(find(made_of(0.5), seed=0, draws=2), share=share).verdict == verdict


def test_the_interval_of_an_edge_covers():
    """Text breaks at a threshold of each prompt's own; the truth is the window of the true rates on the same grid."""
    rng, hits = np.random.default_rng(5), []
    thresholds = rng.normal(1.6, 0.6, 1_000_000)
    true = np.array([(thresholds < alpha).mean() if alpha > 0 else 0.0 for alpha in GRID])
    outwards = GRID >= 0
    truth = windows.crossing(GRID[outwards], true[None, outwards], 0.05)[0]
    for seed in range(200):
        drawn = rng.normal(1.6, 0.6, (100, 1))
        of = made_of(np.zeros((50, 25), bool), None, (drawn < GRID) & (GRID > 0))
        high = find(of, seed, draws=300).intervals["high"]
        hits.append(high.low <= truth <= high.high)
    print(f"the interval of an edge at {truth:.2f} covers {np.mean(hits):.3f}")
    assert 0.88 <= np.mean(hits) <= 1


def noisy(rng, rate, flips, k=25):
    """Fifty prompts with an answer of their own, which any dose turns round with a small chance."""
    return (rng.random((50, 1)) < rate) ^ (rng.random((50, k)) < flips)


@pytest.mark.parametrize(("flips", "most"), [(0.0, 0.0), (0.01, 0.025), (0.02, 0.05)])
def test_no_useful_part_is_found_where_nothing_is_planted(flips, most):
    """Refusal of harmful requests does not depend on the dose, but for single answers that come out otherwise."""
    verdicts = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of = made_of(noisy(rng, 0.6, flips), noisy(rng, 0.1, flips), rng.random((100, 25)) < 0.002)
        verdicts.append(find(of, seed, draws=300).verdict)
    shares = {name: verdicts.count(name) / 200 for name in ("replicated", "inconclusive", "contradicted")}
    print(f"nothing planted, {flips:.0%} of the answers turned round: {shares}")
    assert shares["contradicted"] <= most


def test_a_useful_part_is_found_where_one_is():
    """With 50 prompts a rise has to be large: of 15, 20, 30 and 40 points, .17, .5, .84 and .91 are found for sure."""
    verdicts = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        more = (rng.random((50, 1)) < 0.6) & (GRID > 0.4)  # of six in ten that were not refused
        over = (rng.random((50, 1)) < 0.5) & (GRID > 1.5)
        of = made_of(noisy(rng, 0.4, 0.02) | more, noisy(rng, 0.1, 0.01) | over, rng.random((100, 25)) < 0.002)
        verdicts.append(find(of, seed, draws=300).verdict)
    assert verdicts.count("contradicted") >= 30 and "replicated" not in verdicts


# ---- planted models


def frame_of(words, count, seed, prompt_set):
    texts = requests(words, count, seed)
    ids = [f"{prompt_set}-{number:03d}" for number in range(1, count + 1)]
    return pd.DataFrame({"prompt_id": ids, "prompt_set": prompt_set, "category": "any", "cluster": ids, "text": texts})


def extract(model, words):
    sides = requests(list(words), 32, seed=31), requests(HARMLESS, 32, seed=32)
    return directions.extract(*(activations.last_token(model.model, side) for side in sides))


def measured(model, made, words, layer, variants, alphas):
    """A record of the part "curves", as the notebook makes it, at doses of our own."""
    sides = frame_of(list(words), 8, 33, "harmful_evaluation"), frame_of(HARMLESS, 8, 34, "harmless_evaluation")
    frame = pd.concat(sides, ignore_index=True)
    tried = [window_runs.at(made, layer, variant, float(a)) for variant in variants for a in alphas if abs(a) > 1e-9]
    tried.insert(0, steering.baseline())
    rows = steering.generate(model.model, frame["text"].tolist(), tried, max_new_tokens=12, score=False)
    long = pd.DataFrame(
        {**about, "condition": condition.name, "prompt": about["text"], "text": completion.text,
         "n_tokens": len(completion.token_ids), "reference_nll": completion.reference_nll,
         "operation": condition.operation, "layers": " ".join(map(str, condition.layers)),
         **{unit: getattr(condition, unit) for unit in window_answers.UNITS}}
        for about, row in zip(frame.to_dict("records"), rows, strict=True)
        for condition, completion in zip(tried, row, strict=True)
    )  # fmt: skip
    labelled = judging.label_frame(long, judging.Thresholds(repetition=0.5, nll=50.0, n=1000))
    return labelled.assign(experiment=f"{window_runs.NOTEBOOK} curves")


@pytest.fixture(scope="module")
def model():
    return planted.build([WORDS], loops=LOOPS, n_layers=LAYERS, onset=ONSET, seed=35)


@pytest.fixture(scope="module")
def extracted(model):
    return extract(model, WORDS)


@pytest.fixture(scope="module")
def steered(model, extracted):
    both = {"one": np.arange(-18, 11), "many": np.arange(-10, 6)}
    made = [measured(model, extracted, WORDS, ONSET, [variant], STEP * steps) for variant, steps in both.items()]
    return pd.concat(made).drop_duplicates(["condition", "prompt_id"])


def assert_found(frame, variant):
    """The planted window: what two layers add is twice as much, so that the window is half as wide."""
    found = find(answers(frame, variant), seed=0, draws=200)
    layers = {"one": 1, "many": 2}[variant]
    assert found.stops == ("degeneration", "over-refusal")
    assert abs(found.low - TRUTH["low"] / layers) <= STEP and abs(found.high - TRUTH["high"] / layers) <= STEP
    (part,) = found.parts
    assert abs(part[0] - TRUTH["start"] / layers) <= STEP and part[1] == pytest.approx(found.high)
    assert found.share > 0.98 and found.verdict == "contradicted" and found.rise == pytest.approx(0.5)
    return found


def test_a_planted_window_is_found(steered, extracted):
    assert float(extracted.raw_norm[ONSET]) == pytest.approx(2.0, rel=0.02)
    one, many = (assert_found(steered, variant) for variant in ("one", "many"))
    assert (one.answers.layers, many.answers.layers) == ("3", "2 3")
    assert 1.5 < one.width / many.width < 2.6


@pytest.mark.parametrize("variant", ["one", "many"])
def test_the_three_units_are_those_of_the_record(steered, extracted, variant):
    found = find(answers(steered, variant), seed=0, draws=50)
    size = {"alpha": 1.0, "alpha_absolute": float(extracted.raw_norm[ONSET]),
            "alpha_relative": float(extracted.raw_norm[ONSET] / extracted.residual_norm[ONSET])}  # fmt: skip
    table = windows.table([found]).set_index("unit")
    own = steered[steered["condition"].str.startswith(f"extracted@{variant} ")]
    for unit, one in size.items():
        np.testing.assert_allclose(own[unit], own["alpha"] * one, rtol=1e-5)
        assert table.loc[unit, "width"] == pytest.approx(found.width * one, rel=1e-5)


@pytest.mark.parametrize("variant", ["one", "many"])
def test_a_flipped_sign_is_noticed(steered, variant):
    turned = steered.assign(**{unit: -steered[unit] for unit in window_answers.UNITS})
    with pytest.raises((AssertionError, ValueError)):
        assert_found(turned, variant)


def test_a_shifted_layer_is_noticed(model, extracted):
    """The vector of the layer below, added there, is noise: nothing changes, and the window is the whole grid."""
    frame = measured(model, extracted, WORDS, ONSET - 1, ["one"], [-1.7, 0.0, 0.3, 0.8])
    with pytest.raises(AssertionError):
        assert_found(frame, "one")
    found = find(answers(frame, "one"), seed=0)
    assert found.stops == (STOPS[-1], STOPS[-1]) and found.share == 0 and found.open == (1, 1)


def test_many_layers_with_their_own_vectors_add_less(model, extracted):
    """Below the onset a layer's own vector is noise, so that only one of the two layers adds anything."""
    frame = measured(model, extracted, WORDS, ONSET, ["own"], np.arange(4, 10) * STEP)
    assert abs(find(answers(frame, "own"), seed=0, draws=2).high - TRUTH["high"]) <= STEP


def test_a_model_that_breaks_before_it_refuses_has_no_useful_part():
    """Strong words loop from alpha = .28 on, weak ones are refused from .51 on."""
    words = {"steal": 0.3, "forge": 0.3, "poison": 4.0, "hijack": 4.0}
    brittle = planted.build([words], loops=(-8.0, 4.6), n_layers=LAYERS, onset=ONSET, seed=36)
    frame = measured(brittle, extract(brittle, words), words, ONSET, ["one"], np.arange(0, 8) * STEP)
    found = find(answers(frame, "one"), seed=0)
    assert found.parts == [] and found.share <= windows.ABSENT and found.verdict == "replicated"
    assert found.stops[1] == "degeneration" and 0.2 <= found.high <= 0.3
    late = frame[(frame["prompt_set"] == "harmful_evaluation") & (frame["alpha"].round(1) == 0.6)]
    assert (late["label"] == "refusal").mean() == 0.5  # it does refuse, but too late


def test_nothing_is_found_where_nothing_is_planted():
    none = planted.build([{"please": 4.0}], n_layers=LAYERS, onset=ONSET, seed=37)
    frame = measured(none, extract(none, WORDS), WORDS, ONSET, ["one", "many"], [-3, -1, 0, 1, 3])
    for variant in ("one", "many"):
        found = find(answers(frame, variant), seed=0)
        assert found.parts == [] and found.share == 0 and found.stops == (STOPS[-1], STOPS[-1])
