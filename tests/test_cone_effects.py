"""Do the categories' directions work apart: planted worlds, the plan's rule, false positives, a run from end to end."""

import math
import re
import shutil

import numpy as np
import pandas as pd
import planted
import pytest
import tiny
import torch
from matplotlib import pyplot as plt
from planted import HARMFUL, HARMLESS, requests

from refusal import (
    activations,
    chunks,
    cone_designs,
    cone_effects,
    cone_geometry,
    cone_prose,
    cone_screens,
    cone_tables,
    cone_words,
    cones,
    directions,
    figures_cones,
    models,
    runs,
    statistics,
    steering,
)
from refusal.analyses import mean_interval, plan
from refusal.cone_effects import Contrast
from refusal.files import CompendiumError
from refusal.statistics import Interval

KINDS = ("weapons", "fraud", "intrusion", "cyber")
LAYER = 4  # of the planted models: the one above the onset
COUNTS = {"random": 19, "combination": 8}


# ---- worlds


def asked(words, n, seed, prompt_set):
    """n requests of each category, which is told by its word; in turns, as the prompt sets are."""
    texts = [requests([word], n, seed + 10 * k) for k, word in enumerate(words)]
    rows = [(KINDS[k], texts[k][i]) for i in range(n) for k in range(len(words))]
    ids = [f"{prompt_set}-{i:03d}" for i in range(1, len(rows) + 1)]
    return pd.DataFrame({"prompt_id": ids, "prompt_set": prompt_set, "category": [kind for kind, _ in rows],
                         "cluster": ids, "text": [text for _, text in rows]})  # fmt: skip


def everyday(n, seed):
    """n harmless requests; their topics are their words."""
    texts = requests(HARMLESS, n, seed)
    ids = [f"harmless_extraction-{i:03d}" for i in range(1, n + 1)]
    topics = [text.split()[0] for text in texts]
    return pd.DataFrame({"prompt_id": ids, "prompt_set": "harmless_extraction", "category": topics, "cluster": ids,
                         "text": texts})  # fmt: skip


def build(apart):
    """A model in which every category has its own direction, or all share one; prompts differ in more than harm."""
    strengths = [{word: 2.0} for word in HARMFUL] if apart else [dict.fromkeys(HARMFUL, 2.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "NOISE", 96)
        patch.setattr(planted, "HEAD", 96)
        one = planted.build(strengths, threshold=0.7, seed=21)
    with torch.no_grad():
        one.model.hf.model.layers[0].self_attn.o_proj.weight.mul_(30.0)
    return one


@pytest.fixture(scope="module")
def worlds():
    return {"separate": build(True), "shared": build(False)}


def made_from(one, n, counts=None):
    """The directions from n prompts a category."""
    sides, about = [asked(HARMFUL, n, 1, "harmful_extraction"), everyday(4 * n, 2)], asked(HARMLESS, n, 3, "about")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "last_tokens", lambda _, side: activations.last_token(one.model, side["text"].tolist()))
        return cone_screens.families(None, sides, about, counts or COUNTS, seed=0)


def screened(one, made, n=6):
    prompts = asked(HARMFUL, n, 500, "harmful_evaluation")
    rows = cone_screens.screen(one.model, prompts, made, LAYER, one.openings).assign(experiment="screen", draw=0)
    return rows, prompts.set_index("prompt_id")["category"]


def verdict_of(rows, kinds, p_holm=None):
    found = cone_effects.contrast(cone_effects.swings(rows, "category"), kinds, seed=0)
    limit = cone_effects.combinations(rows, kinds)[1] if COUNTS["combination"] else math.nan
    p = found.p if p_holm is None else p_holm
    return cone_effects.verdict(found, 2 * p, cone_effects.causes(rows, kinds), limit), found


# ---- what is planted


def test_separate_directions_give_a_diagonal_matrix_and_are_called_separate(worlds):
    rows, kinds = screened(worlds["separate"], made_from(worlds["separate"], 16))
    verdict, found = verdict_of(rows, kinds)
    matrix = cone_effects.causes(rows, kinds).pivot(index="direction", columns="category", values="value")
    own = np.diag(matrix.loc[list(KINDS), list(KINDS)])
    others = matrix.loc[list(KINDS), list(KINDS)].to_numpy()[~np.eye(4, dtype=bool)]
    assert own.min() > 5 and np.abs(others).max() < 0.15 * own.min()
    assert verdict == "separate" and found.p == 1 / 1000
    assert found.own == pytest.approx(own.mean()) and found.other == pytest.approx(others.mean())
    assert found.interval.low <= found.value <= found.interval.high and found.n == 24


def test_one_shared_direction_gives_a_constant_matrix_and_is_called_shared(worlds):
    rows, kinds = screened(worlds["shared"], made_from(worlds["shared"], 16))
    verdict, found = verdict_of(rows, kinds)
    matrix = cone_effects.causes(rows, kinds)
    assert matrix["beyond"].all() and np.ptp(matrix["value"]) < 0.1 * matrix["value"].mean()
    assert abs(found.value) < 0.02 * found.own and verdict == "shared"
    assert cone_effects.is_cone(rows, kinds)
    mixed, limit = cone_effects.combinations(rows, kinds)
    assert len(mixed) == 8 and mixed.min() > limit


@pytest.mark.parametrize("n", [3, 4, 9, 16, 32, 64])
def test_one_shared_direction_is_not_called_separate_at_any_number_of_prompts(worlds, n):
    """Where the pilot's toolkit sees a polyhedron, since its vectors are noisy: what is shared still works alike."""
    made = made_from(worlds["shared"], n)
    rows, kinds = screened(worlds["shared"], made, n=4)
    verdict, found = verdict_of(rows, kinds)
    assert verdict in ("shared", "inconclusive") and abs(found.value) < 0.05 * max(found.own, 1.0)
    unit = torch.stack([one.unit[LAYER] for one in made["category"]]).double().numpy()
    rank = float(cones.entropy_rank(unit @ unit.T))
    print(f"n = {n}: {verdict}, entropy rank {rank:.2f}")
    assert rank > 1.5  # never what the toolkit calls linear


def test_the_number_of_planted_directions_is_found(worlds):
    """The unbiased participation ratio; words differ beside the harm, so that one shared direction leaves some more."""
    number = {}
    for name, one in worlds.items():
        sides, about = [asked(HARMFUL, 24, 1, "harmful_extraction"), everyday(96, 2)], asked(HARMLESS, 24, 3, "about")
        values = np.concatenate(
            [activations.last_token(one.model, side["text"].tolist()).numpy() for side in (*sides, about)]
        )
        where = cone_designs.layout(*(side["category"].tolist() for side in (*sides, about)))
        groups = [*where.harmful, where.harmless]
        _, unbiased = cones.products(cones.kernel(values), cones.weigh(groups, where.total)[None])
        number[name] = cones.unbiased_statistics(cones.gram(unbiased, cones.shared(4)))["unbiased_participation"][
            0, LAYER
        ]
    print(number)
    assert number["separate"] > 3 > 2 > number["shared"]


def test_a_reversed_sign_is_noticed(worlds):
    made = made_from(worlds["shared"], 8)
    turned = made | {"category": [directions.Directions(one.id, -one.unit, one.raw_norm, one.residual_norm)
                                  for one in made["category"]]}  # fmt: skip
    rows, kinds = screened(worlds["shared"], turned, n=3)
    verdict, found = verdict_of(rows, kinds, p_holm=0.001)
    assert found.own < 0 and verdict == "inconclusive"
    assert "not move refusal further" in cone_prose.conclusion(
        verdict, found, cone_effects.combinations(rows, kinds)[1]
    )


def test_a_layer_without_the_directions_shows_nothing(worlds):
    one = worlds["shared"]
    made, prompts = made_from(one, 8), asked(HARMFUL, 3, 500, "harmful_evaluation")
    rows = cone_screens.screen(one.model, prompts, made, 1, one.openings).assign(experiment="screen", draw=0)
    verdict, found = verdict_of(rows, prompts.set_index("prompt_id")["category"])
    assert verdict == "inconclusive" and abs(found.own) < 2


def test_swings_are_the_difference_of_two_screens_of_each_prompt(worlds):
    one = worlds["separate"]
    made, prompts = made_from(one, 4), asked(HARMFUL, 2, 500, "harmful_evaluation")
    rows = cone_screens.screen(one.model, prompts, made, LAYER, one.openings).assign(experiment="screen", draw=0)
    swings = cone_effects.swings(rows, "category")
    assert swings.index.tolist() == list(KINDS)
    tried = [steering.add(made["category"][1], LAYER, sign) for sign in (1.0, -1.0)]
    values = steering.screen(one.model, prompts["text"].tolist(), tried, one.openings).numpy()
    np.testing.assert_allclose(swings.loc["fraud", prompts["prompt_id"]], values[:, 0] - values[:, 1], atol=2e-3)
    means = rows[(rows["metric"] == "mean_log_odds") & (rows["direction_id"] == "category[fraud]")]
    own = means[(means["prompt_id"] == "cyber") & (means["alpha"] == 1)]["value"]
    assert float(own.iloc[0]) == pytest.approx(values[prompts["category"] == "cyber", 0].mean(), abs=2e-3)
    norms = rows[rows["metric"] == "raw_norm"].set_index("direction_id")["value"]
    mean = norms[[f"category[{kind}]" for kind in KINDS]].mean()
    np.testing.assert_allclose(norms[norms.index.str.startswith(("random", "combination"))], mean, rtol=1e-5)


# ---- the directions


def test_what_is_left_of_a_direction_has_no_part_along_its_topic(worlds):
    made = made_from(worlds["separate"], 8)
    for own, topic, rest in zip(made["category"], made["topic"], made["rest"], strict=True):
        cosine = (own.unit.double() * topic.unit.double()).sum(-1)
        assert float((rest.unit.double() * topic.unit.double()).sum(-1).abs().max()) < 1e-5
        np.testing.assert_allclose(rest.raw_norm, own.raw_norm * (1 - cosine**2).sqrt(), rtol=1e-4)
        vector = own.raw_norm[:, None] * (own.unit - cosine[:, None].float() * topic.unit)
        np.testing.assert_allclose(rest.raw_norm[:, None] * rest.unit, vector, atol=1e-4)
    with pytest.raises(
        CompendiumError, match=r"^category\[weapons\] lies along category\[weapons\] at some layer, .*\.$"
    ):
        cone_screens.without(made["category"][0], made["category"][0], "rest")


def test_combinations_are_not_negative_and_as_long_as_the_directions_on_average(worlds):
    weights = cone_screens.weights(64, 4, seed=0)
    assert (weights > 0).all() and np.allclose(weights.sum(1), 1)
    assert (cone_screens.weights(3, 4, seed=0) == weights[:3]).all() and (
        cone_screens.weights(3, 4, 1) != weights[:3]
    ).any()
    made = made_from(worlds["separate"], 8)
    own = torch.stack([one.raw_norm[:, None] * one.unit for one in made["category"]])
    for one, weight in zip(made["combination"], weights, strict=False):
        mixed = torch.einsum("k,klw->lw", torch.from_numpy(weight).float(), own)
        assert float((torch.nn.functional.cosine_similarity(mixed, one.unit, dim=-1) - 1).abs().max()) < 1e-4
        torch.testing.assert_close(one.raw_norm, torch.stack([two.raw_norm for two in made["category"]]).mean(0))


def test_a_replay_names_the_same_conditions(worlds):
    made = made_from(worlds["shared"], 4)
    sides, about = [asked(HARMFUL, 1, 1, "harmful_extraction"), everyday(4, 2)], asked(HARMLESS, 1, 3, "about")
    names = cone_screens.tried(None, made["category"][0], sides, about, COUNTS, 0)
    for own, other in (
        (cone_screens.conditions(made, LAYER), cone_screens.conditions(names, LAYER)),
        (cone_screens.combined(made, LAYER, 8), cone_screens.combined(names, LAYER, 8)),
    ):
        assert [one.name for one in own] == [one.name for one in other]
    tried = cone_screens.conditions(made, LAYER)
    assert len(tried) == len({one.name for one in tried}) == 1 + 3 * (4 + 2)
    assert tried[1].name == "category[weapons] +1" and tried[-1].name == "ablate random[1]"


# ---- the contrast


def effects_of(interaction, seed, n=6, noise=1.0, base=3.0):
    """Swings of four directions on n prompts a category: directions and prompts differ, and categories interact."""
    rng = np.random.default_rng(seed)
    codes = np.tile(np.arange(4), n)
    strength, answers = rng.normal(base, 0.5, 4), rng.normal(1, 0.3, len(codes))
    values = np.outer(strength, answers) + noise * rng.normal(size=(4, len(codes)))
    values[codes, np.arange(len(codes))] += interaction
    ids = [f"p-{i:03d}" for i in range(len(codes))]
    return pd.DataFrame(values, KINDS, ids), pd.Series([KINDS[code] for code in codes], ids)


def test_the_contrast_by_hand():
    values = pd.DataFrame([[3.0, 1, 5], [2, 6, 0]], ["a", "b"], ["p", "q", "r"])
    kinds = pd.Series({"p": "a", "q": "b", "r": "a"})
    found = cone_effects.contrast(values, kinds, seed=0)
    assert found.own == pytest.approx((4 + 6) / 2) and found.other == pytest.approx((1 + 1) / 2)
    assert found.value == pytest.approx(4) and math.isnan(found.interval.low)  # one prompt of b has no interval
    assert cone_effects.contrast(values[["r", "q", "p"]], kinds, seed=0).value == pytest.approx(4)
    with pytest.raises(CompendiumError, match=r"^directions of \['a', 'b'\] do not fit prompts of \['a', 'c'\]: .*\.$"):
        cone_effects.contrast(values, pd.Series({"p": "a", "q": "c", "r": "a"}), seed=0)


def test_a_direction_that_is_stronger_everywhere_is_no_contrast():
    values, kinds = effects_of(0.0, seed=0, noise=0.0)
    values.loc["fraud"] += 50
    found = cone_effects.contrast(values, kinds, seed=0)
    assert abs(found.value) < 1.0 and found.p > 0.05


def test_false_positives_over_200_seeds():
    """Directions and prompts of different strength, no category special: p, and the verdicts that would be wrong."""
    p, verdicts = [], []
    for seed in range(200):
        values, kinds = effects_of(0.0, seed)
        found = cone_effects.contrast(values, kinds, seed)
        p.append(found.p)
        matrix = cone_effects.matrix(values, kinds).assign(beyond=True)
        verdicts.append(cone_effects.verdict(found, min(1.0, 2 * found.p), matrix, limit=0.5))
    share = np.mean(np.array(p) <= 0.05)
    print(f"p <= .05: {share:.3f}; {pd.Series(verdicts).value_counts().to_dict()}")
    assert share < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 200) and np.mean(p) == pytest.approx(0.5, abs=0.07)
    assert verdicts.count("separate") == 0 and verdicts.count("partly shared") <= 12
    assert verdicts.count("shared") > 150


def test_the_interval_covers_a_planted_interaction():
    hits = 0
    for seed in range(200):
        values, kinds = effects_of(1.0, seed, n=25)
        interval = cone_effects.contrast(values, kinds, seed).interval
        hits += interval.low <= 1.0 <= interval.high
    print(f"coverage {hits / 200:.3f}")
    assert 0.9 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("value", "low", "high", "own", "p_holm", "beyond", "expected"),
    [
        (9, 8, 10, 12, 0.002, True, "separate"),
        (9, 5.9, 10, 12, 0.002, True, "partly shared"),  # the lower end is not above half
        (9, 8, 10, 12, 0.06, True, "inconclusive"),
        (1, 0.2, 2.9, 12, 0.002, True, "shared"),  # small, though detectable
        (0, -1, 1, 12, 0.9, True, "shared"),
        (0, -1, 1, 12, 0.9, False, "inconclusive"),  # some cell is no larger than a random direction's
        (2, 0.5, 3.1, 12, 0.002, True, "partly shared"),
        (2, 0.5, 3.1, 12, 0.3, True, "inconclusive"),
        (9, 8, 10, 0.9, 0.002, True, "inconclusive"),  # no effect beyond random ones
        (-1, -2, -0.5, -12, 0.002, True, "inconclusive"),
        (1, math.nan, math.nan, 12, 0.002, True, "partly shared"),
    ],
)
def test_the_verdict_follows_the_plan(value, low, high, own, p_holm, beyond, expected):
    found = Contrast(value, Interval(low, high), p_holm / 2, own, own - value, 100)
    matrix = pd.DataFrame({"beyond": [True] * 15 + [beyond]})
    assert cone_effects.verdict(found, p_holm, matrix, limit=1.0) == expected
    sentence = cone_prose.conclusion(expected, found, 1.0)
    assert sentence.endswith(".") and "nan" not in sentence


def test_a_cell_lies_beyond_random_directions_on_the_same_prompts_and_upwards():
    ids = [f"p-{i}" for i in range(4)]
    kinds = pd.Series(["a", "a", "b", "b"], ids)
    swing = {"category[a]": [3.0, 3, 3, 3], "category[b]": [-5.0, -5, 1, 1], "random[0]": [-4.0, -4, 0.5, 0.5]}
    rows = pd.DataFrame(
        {"experiment": "screen", "metric": "swing", "direction_id": one, "prompt_id": prompt, "value": value}
        for one, values in swing.items() for prompt, value in zip(ids, values, strict=True)
    )  # fmt: skip
    found = cone_effects.causes(rows, kinds).set_index(["direction", "category"])
    assert found["random"].xs("a", level="category").tolist() == [4.0, 4.0]
    assert found["beyond"].to_dict() == {("a", "a"): False, ("a", "b"): True, ("b", "a"): False, ("b", "b"): True}


def test_the_family_and_the_counts_are_the_plans():
    planned = plan()[cone_effects.NOTEBOOK]
    assert [one["name"] for one in planned["comparisons"]] == ["causes", "geometry"]
    assert f"({cone_effects.PERMUTATIONS})" in str(planned["comparisons"][0])
    drawn = cone_effects.directions_drawn(quick=False)
    assert drawn == {"random": 19, "combination": 64, "generated": 8}
    assert cone_screens.COMBINED_PROMPTS == 12 and cone_screens.GENERATED_RANDOM == 2


# ---- completions


def completions(refused):
    """A record of two prompts a category: `refused(kind, condition)`."""
    made = {f"category[{kind}]": kind for kind in KINDS} | {f"random[{i}]": "" for i in range(2)}
    conditions = [("baseline", "none", "")]
    conditions += [(f"{one} {sign}", "add", one) for one in made for sign in ("+1", "-1")]
    conditions += [(f"ablate {one}", "ablate", one) for one in made]
    mixed = [(f"combination[{i}] {sign}", "add", f"combination[{i}]") for i in range(2) for sign in ("+1", "-1")]
    return pd.DataFrame(
        {"experiment": f"{cone_effects.NOTEBOOK} {part}", "condition": name, "operation": operation,
         "direction_id": one, "prompt_id": f"{kind}-{i}", "category": kind,
         "label": "refusal" if refused(kind, name) else "compliance"}
        for part, some in (("causes", conditions), ("combinations", mixed))
        for name, operation, one in some for kind in KINDS for i in range(2)
    )  # fmt: skip


def test_completions_under_separate_directions():
    def refused(kind, condition):
        own = f"[{kind}]" in condition
        return not own if condition.startswith("ablate") or condition.endswith("-1") else own or condition == "baseline"

    frame = completions(refused)
    kinds = cone_effects.kinds_of(frame)
    added = cone_effects.matrix(cone_effects.generated(frame, "add"), kinds, cone_effects.answers_interval)
    assert added["low"].min() > -1.0 - 1e-9 and added["high"].max() < 1.0 + 1e-9
    wide = added.pivot(index="direction", columns="category", values="value").loc[list(KINDS), list(KINDS)]
    np.testing.assert_array_equal(wide, 2 * np.eye(4) - 1)  # own: +1 refuses and -1 does not; others the reverse
    ablated = cone_effects.generated(frame, "ablate")
    assert cone_effects.contrast(ablated, kinds, 0).value == 1 and cone_effects.contrast(ablated, kinds, 0).own == 1
    assert cone_effects.generated(frame, "add", "random").shape == (2, 8)
    assert cone_effects.generated(frame, "add", "combination").index.tolist() == ["0", "1"]
    missing = frame.drop(frame.index[3])
    with pytest.raises(CompendiumError, match=r"^the record lacks a completion .*\.$"):
        cone_effects.generated(missing, "add")


def test_answers_have_the_interval_of_paired_differences():
    """A t interval of 23 rises and 2 prompts as they were would end above 1, which no difference can reach."""
    value, interval = cone_effects.answers_interval(np.array([1.0] * 23 + [0.0] * 2))
    assert value == 0.92 and vars(interval) == vars(statistics.tango(23, 0, 25)) and interval.high < 1
    assert mean_interval(np.array([1.0] * 23 + [0.0] * 2))[1].high > 1
    mixed, interval = cone_effects.answers_interval(np.array([1.0] * 6 + [-1.0] * 2 + [0.0] * 12))
    assert mixed == 0.2 and vars(interval) == vars(statistics.tango(6, 2, 20))


# ---- a run from end to end, and its figures


def notebook(mode, n_prompts):
    """What the notebook does, on the tiny model: two categories, four topics."""
    run = runs.start(cone_effects.NOTEBOOK, model=tiny.ID, mode=mode, out="build", n_prompts=n_prompts, rows=64,
                     max_new_tokens=4, seed=0)  # fmt: skip
    quick, layer, openings = bool(n_prompts), 1, [5, 6, 7]
    sides = [tiny.prompts(20, "harmful_extraction"), tiny.prompts(20, "harmless_extraction")]
    sides[1]["category"] = [f"topic {i % 4}" for i in range(20)]
    about, evaluation = tiny.prompts(8, "harmless_topics"), tiny.prompts(8)
    counts, drawn = cone_effects.counts(quick), cone_effects.directions_drawn(quick)

    def geometry(store):
        return cone_geometry.measure(store, sides, about, layer, counts, 0)

    def screen(store):
        made = cone_screens.families(store, sides, about, drawn, 0)
        return cone_screens.screen(chunks.load_model(store), evaluation, made, layer, openings)

    metrics = pd.concat(
        [runs.metrics(run, "geometry", geometry, modules=(cones, cone_geometry)),
         runs.metrics(run, "screen", screen, modules=(cone_screens,))], ignore_index=True
    )  # fmt: skip
    made = cone_screens.tried(run.store, tiny.directions(), sides, about, drawn, 0)
    arguments = {"max_new_tokens": 4, "thresholds": tiny.THRESHOLDS}
    rows = runs.completions(run, evaluation, cone_screens.conditions(made, layer), part="causes", **arguments)
    few = evaluation.groupby("category").head(3)
    mixed = cone_screens.combined(made, layer, drawn["generated"])
    rows = pd.concat([rows, runs.completions(run, few, mixed, part="combinations", **arguments)], ignore_index=True)
    runs.finish(run)
    return rows, metrics, cone_words.numbers(rows, metrics, {"parameters": run.parameters})


@pytest.mark.parametrize("n_prompts", [0, 1])
def test_a_run_from_end_to_end(tmp_path, monkeypatch, tiny_models, n_prompts):
    tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)
    rows, metrics, said = notebook("measure", n_prompts)
    assert rows["condition"].nunique() == 1 + 3 * 4 + 2 * (2 if n_prompts else 8)
    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    shutil.rmtree(tmp_path / "build")
    monkeypatch.setattr(models, "load", lambda *_: 1 / 0)
    again_rows, again, same = notebook("replay", n_prompts)
    assert same == said
    pd.testing.assert_frame_equal(again.reset_index(drop=True), metrics.reset_index(drop=True), check_dtype=False)
    assert all(re.fullmatch("Cones[A-Za-z]+", name) for name in said)
    assert all(isinstance(value, str) and value and "nan" not in value.lower() for value in said.values()), said
    assert set(cone_words.HEADLINES) <= set(said)
    for part in cone_prose.PROSE:
        assert "{" not in cone_prose.prose(said, part)
    assert (said["ConesLayer"], said["ConesPrompts"], said["ConesKinds"]) == ("1", "8", "2")
    assert said["ConesPerCategory"] == "10" and said["ConesTopicsPrompts"] == "4"
    figures_of(again_rows, again)


def figures_of(rows, metrics):
    """All three figures, drawn from a record alone; what they show is what the tables say."""
    kinds, layer = cone_effects.kinds_of(rows), cone_tables.selected(metrics)
    bands, found = cone_tables.bands(metrics), cone_tables.by_layer(metrics)
    figure = figures_cones.counts(bands, layer)
    here = bands[(bands["layer"] == layer) & (bands["family"] == "planted") & bands["n"].notna()]
    here = here[here["statistic"] == "entropy_rank"].sort_values("n")
    shown = [line.get_ydata() for line in figure.axes[0].lines if line.get_label() == "one planted direction"]
    np.testing.assert_allclose(shown[0], here["median"])
    figure = figures_cones.layers(found, bands, cone_tables.reliability(metrics), layer)
    rank = found[found["statistic"] == "entropy_rank"].sort_values("layer")["value"]
    assert any(
        len(line.get_ydata()) == len(rank) and np.allclose(line.get_ydata(), rank) for line in figure.axes[0].lines
    )
    matrix = cone_effects.causes(metrics, kinds)
    contrasts = {"category": cone_effects.contrast(cone_effects.swings(metrics, "category"), kinds, 0)}
    contrasts |= cone_effects.secondary(rows, metrics, 0)
    swings = [cone_effects.mean_swings(metrics, kinds, family) for family in ("combination", "random")]
    generated = cone_effects.matrix(cone_effects.generated(rows, "add"), kinds, cone_effects.answers_interval)
    figure = figures_cones.causes({"(a)": matrix, "(b)": generated}, contrasts, *swings)
    image = figure.axes[0].images[0].get_array()
    wide = matrix.pivot(index="direction", columns="category", values="value")
    order = list(dict.fromkeys(matrix["direction"]))
    np.testing.assert_allclose(image, wide.loc[order, order])
    assert [len(dots.get_offsets()) for dots in figure.axes[3].collections] == [len(one) for one in swings]
    figure.canvas.draw()
    plt.close("all")
