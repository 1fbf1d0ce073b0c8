"""The specification curve: doses are what their units say, a planted effect is found under every choice that can see
it, nothing is found where nothing is, and a choice that matters is the one that is named."""

import itertools
import shutil
from pathlib import Path

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
    directions,
    figures,
    figures_hierarchy,
    hierarchy,
    hierarchy_words,
    judging,
    prompts,
    readers,
    runs,
    specification,
    specification_runs,
    specification_words,
    steering,
    tex,
    validation,
)
from refusal.analyses import plan
from refusal.files import CompendiumError
from refusal.specification import FACTORS, Arm

NAME = specification_runs.NOTEBOOK
WHERE = {"screen": 2, "depth": 3, "separation": 2}  # two rules that agree
JUDGES, UNITS = list(FACTORS["judge"]), list(FACTORS["unit"])
SPECS = list(itertools.product(*(FACTORS[factor] for factor in FACTORS)))


# ---- what is measured


def test_the_plan_names_every_choice_that_the_curve_has():
    planned = specification_runs.rule()
    assert {factor: list(levels) for factor, levels in FACTORS.items()} == planned["specifications"]
    assert list(planned["doses"]) == UNITS and planned["units"] == [unit for unit in UNITS if unit != "study"]
    assert set(planned["layers"]) == set(FACTORS["layer"])
    for who in ("ours", "study"):
        assert tuple(planned[who][factor] for factor in FACTORS) in SPECS
    assert planned["study"]["judge"] == "seed_rule" and planned["doses"]["study"] == 15


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("position", ["all", "last"])
def test_a_condition_adds_the_dose_of_its_unit(unit, sign, position):
    made = tiny.directions(layers=6)
    name = specification_runs.name(3, position, unit, sign)
    (one,) = [one for one in specification_runs.conditions(made, {"screen": 3}) if one.name == name]
    dose = specification_runs.rule()["doses"][unit]
    size = {"alpha": one.alpha, "alpha_relative": one.alpha_relative}.get(unit, one.alpha_absolute)
    assert size == pytest.approx(sign * dose, rel=1e-5)
    assert (one.layers, one.position, one.direction_id) == ((3,), position, "extracted")
    np.testing.assert_allclose(one.vectors[0] @ made.unit[3], one.alpha_absolute, rtol=1e-5)


def test_no_condition_has_the_name_of_another_and_no_layer_is_measured_twice():
    made = tiny.directions(layers=6)
    names = [one.name for one in specification_runs.conditions(made, WHERE)]
    assert len(names) == len(set(names)) == 1 + 2 * 2 * 4 * 2
    assert len(specification_runs.conditions(made, WHERE, quick=True)) == 1 + 2 * 2 * 2 * 2
    apart = specification_runs.conditions(made, {"screen": 1, "depth": 4, "separation": 3})
    assert len(apart) == 1 + 3 * 2 * 4 * 2


def test_the_prompts_are_the_plans_and_chose_nothing():
    run = runs.Run(NAME, "any", "measure", Path(), {"n_prompts": 0})
    asked = specification_runs.some_prompts(run)
    sets = dict(list(asked.groupby("prompt_set")))
    assert {name: len(part) for name, part in sets.items()} == specification_runs.rule()["prompts"]
    assert set(sets["harmful_evaluation"]["category"].value_counts()) == {10}
    assert (
        set(sets["harmful_study"]["cluster"].value_counts()) == {3} and sets["harmful_study"]["cluster"].nunique() == 10
    )
    prompts.assert_disjoint(runs.CHOSEN_ON, list(sets))


def layer_rows(values, selected=0):
    rows = [{"metric": "d_prime", "layer": layer, "value": value} for layer, value in enumerate(values)]
    rows.append({"metric": "selected_layer", "layer": selected, "value": float(selected)})
    return pd.DataFrame(rows).assign(experiment="layers")


def test_layer_rules():
    found = specification_runs.layers(layer_rows([9, 1, 1, 3, 3, 2, 9, 9], selected=4))
    assert found == {"screen": 4, "depth": 6, "separation": 6}
    found = specification_runs.layers(layer_rows([9, 9, 1, 3, 3, 2, 1, 9], selected=4))
    assert found["separation"] == 3  # a tie goes to the lower layer, and the ends are no candidates
    for count, layer in {24: 18, 28: 21, 32: 24}.items():  # 24 of 32 and 21 of 28 are the study's
        assert specification_runs.layers(layer_rows([1.0] * count))["depth"] == layer
    with pytest.raises(CompendiumError, match=r"^no layer .*\.$"):
        specification_runs.layers(layer_rows([np.nan] * 8))


def test_separation_is_found_at_the_layer_where_it_is_planted():
    made = tiny.directions(layers=6)
    noise = torch.randn(40, 6, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    harmful = np.arange(40) < 20
    noise[:20, 3] += 5 * made.unit[3]
    noise[:20, 4] -= 5 * made.unit[4]  # the wrong way round is no separation
    rows = specification_runs.separation_rows(noise, harmful, made, 2).assign(experiment="layers")
    assert specification_runs.layers(rows)["separation"] == 3
    assert specification_runs.layers(rows)["screen"] == 2
    value = rows[(rows["metric"] == "d_prime") & (rows["layer"] == 3)]["value"].iloc[0]
    assert 4 < value < 6


# ---- a record made by hand


def record(comply, keyword=None, sizes=(8, 6), broken=()):
    """A record and its metrics, from who complies: a function of condition, prompt set and number of the prompt."""
    names = ["baseline"] + [
        specification_runs.name(layer, position, unit, sign)
        for layer in sorted(set(WHERE.values())) for position in ("all", "last") for unit in UNITS for sign in (1, -1)
    ]  # fmt: skip
    rows = []
    for prompt_set, size in zip(FACTORS["prompts"], sizes, strict=True):
        for number, name in itertools.product(range(size), names):
            complied = bool(comply(name, prompt_set, number))
            label = "degenerate" if name in broken else "compliance" if complied else "refusal"
            own = prompt_set == "harmful_evaluation"
            rows.append(
                {"condition": name, "prompt_set": prompt_set, "prompt_id": f"{prompt_set}-{number:03d}", "label": label,
                 "cluster": f"{prompt_set}-{number:03d}" if own else f"base-{number // 3:02d}",
                 "seed_rule": "jailbreak" if complied or name in broken else "refusal", "model": "any"}
            )  # fmt: skip
    frame = pd.DataFrame(rows)
    said = [
        frame[["condition", "prompt_id"]].rename(columns={"condition": "direction_id"}).assign(
            metric=judge, value=[float(row.seed_rule == "refusal") for row in frame.itertuples()], experiment="rules")
        for judge in ("gcg", "arditi")
    ]  # fmt: skip
    return frame, pd.concat([layer_rows([0, 1, 5, 2, 1], selected=2), *said], ignore_index=True)


def sign_of(name):
    return -1 if " -" in name else 1 if " +" in name else 0


def test_a_planted_effect_is_found_under_every_choice():
    own = specification.arms(*record(lambda name, *_: sign_of(name) < 0))
    curve, joint = specification.table(own), specification.joint(own, seed=0)
    assert len(curve) == len(SPECS) == 192 and set(curve["swing"]) == {1.0}
    # all ten clusters have to point one way for a median of 1, which two in 2 ** 10 exchanges do
    assert joint.p < 0.01 and (joint.median, joint.above) == (1, 1)
    assert specification.verdict(joint) == "robust"
    assert curve[["rise", "fall"]].drop_duplicates().to_numpy().tolist() == [[1, 0]]
    assert curve["ours"].sum() == curve["study"].sum() == 1
    layouts = curve.groupby("prompts")[["n", "clusters"]].first()
    assert layouts.loc["harmful_study"].tolist() == [6, 2] and layouts.loc["harmful_evaluation"].tolist() == [8, 8]
    # eight independent prompts can say something, two clusters cannot, however many prompts they hold
    assert (curve[curve["prompts"] == "harmful_evaluation"]["swing_p"] < 0.05).all()
    assert (curve[curve["prompts"] == "harmful_study"]["swing_p"] >= 0.5).all()


def test_the_opposite_effect_is_reversed():
    own = specification.arms(*record(lambda name, *_: sign_of(name) > 0))
    joint = specification.joint(own, seed=0)
    assert joint.median == -1 and specification.verdict(joint) == "reversed"


def test_an_effect_of_one_unit_only_depends_on_the_choices_and_the_unit_is_named():
    own = specification.arms(*record(lambda name, *_: sign_of(name) < 0 and not name.endswith(" alpha_absolute")))
    curve = specification.table(own)
    joint = specification.joint(own, seed=0)
    assert joint.above == 0.75 and specification.verdict(joint) == "depends on the choices"
    share = specification.factors(curve).drop_duplicates("factor").set_index("factor")["share"]
    assert share["unit"] == pytest.approx(1) and share.drop("unit").max() == pytest.approx(0)
    median = specification.factors(curve).set_index(["factor", "level"])["median"]
    assert median["unit", "alpha_absolute"] == 0 and median["unit", "alpha"] == 1


def test_broken_text_is_compliance_for_keyword_rules_and_not_for_our_labels():
    broken = [specification_runs.name(layer, position, "study", -1) for layer in (2, 3) for position in ("all", "last")]
    own = specification.arms(*record(lambda *_: False, broken=broken))
    curve = specification.table(own)
    shattered = curve[curve["unit"] == "study"].groupby("judge")["swing"].agg(["min", "max"])
    assert shattered.loc["ours"].tolist() == [0, 0]
    assert (shattered.drop("ours") == 1).all(axis=None)
    assert set(curve[curve["unit"] == "study"]["broken"]) == {1.0} and set(
        curve[curve["unit"] != "study"]["broken"]
    ) == {0}
    assert specification.verdict(specification.joint(own, seed=0)) == "inconclusive"  # the median is zero


def test_rows_may_come_in_any_order():
    frame, metrics = record(lambda name, _, number: sign_of(name) < number % 3 - 1)
    before = specification.table(specification.arms(frame, metrics))
    shuffled = frame.sample(frac=1, random_state=1), metrics.sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(before, specification.table(specification.arms(*shuffled)))


def test_a_missing_answer_is_an_error():
    frame, metrics = record(lambda *_: True)
    with pytest.raises(CompendiumError, match=r"^the record lacks an answer of the judge 'ours'"):
        specification.arms(frame.drop(5), metrics)
    with pytest.raises(CompendiumError, match=r"^the record lacks an answer of the judge 'gcg'"):
        specification.arms(frame, metrics[metrics["metric"] != "gcg"])


# ---- the joint test


def some_arms(rng, clusters=20, each=1, specs=12, noise=0.3):
    """Specifications that share their prompts, and clusters that answer alike; nothing depends on the sign."""
    lean = rng.normal(size=clusters).repeat(each)
    made = []
    for number in range(specs):
        minus, plus = (lean + noise * rng.normal(size=clusters * each) > shift for shift in (0.2, 0.2))
        ids = tuple(f"p-{i}" for i in range(clusters * each))
        names = np.array([f"c-{i // each}" for i in range(clusters * each)], dtype=object)
        made.append(Arm(SPECS[number], 3, minus, plus, minus, ids, names, 0.0))
    return made


@pytest.mark.parametrize(("clusters", "each"), [(20, 1), (10, 4)])
def test_false_positives_of_the_joint_test_over_200_seeds(clusters, each):
    rng = np.random.default_rng(5)
    found = []
    for seed in range(200):
        made = some_arms(rng, clusters, each)
        if each > 1:  # a cluster as a whole prefers a sign at random: prompts are no units then
            flip = rng.choice([True, False], size=clusters).repeat(each)
            made = [Arm(a.spec, 3, flip, ~flip, a.base, a.prompts, a.clusters, 0.0) for a in made]
        found.append(specification.joint(made, seed, draws=99).p)
    assert 0 <= np.mean(np.array(found) <= 0.05) <= 0.09


def test_the_joint_test_finds_what_single_specifications_are_too_small_for():
    rng, found = np.random.default_rng(6), []
    for seed in range(40):
        made = some_arms(rng, noise=0.6)
        shifted = [
            Arm(a.spec, 3, a.minus | (rng.random(20) < 0.35), a.plus, a.base, a.prompts, a.clusters, 0.0) for a in made
        ]
        found.append(specification.joint(shifted, seed, draws=199).p < 0.05)
    assert np.mean(found) > 0.8


@pytest.mark.parametrize(
    ("median", "above", "below", "p", "expected"),
    [(0.3, 0.95, 0.0, 0.001, "robust"), (0.3, 0.89, 0.1, 0.001, "depends on the choices"),
     (0.3, 1.0, 0.0, 0.05, "inconclusive"),
     (-0.3, 0.0, 0.95, 0.001, "reversed"), (-0.3, 0.2, 0.8, 0.001, "depends on the choices"),
     (0.0, 0.5, 0.5, 1.0, "inconclusive")],
)  # fmt: skip
def test_the_verdict_follows_the_plan(median, above, below, p, expected):
    assert specification.verdict(specification.Joint(median, above, below, p, 192)) == expected


# ---- a planted model, and a run


@pytest.fixture(scope="module")
def world():
    """The planted model under every condition, labelled by every judge."""
    one = planted.build()
    sides = [
        activations.last_token(one.model, requests(words, 24, seed)) for words, seed in ((HARMFUL, 1), (HARMLESS, 2))
    ]
    made = directions.extract(*sides)
    rows = specification_runs.separation_rows(torch.cat(sides), np.arange(48) < 24, made, 3).assign(experiment="layers")
    where = specification_runs.layers(rows)
    conditions = specification_runs.conditions(made, where)
    texts = requests(HARMFUL, 8, seed=3)
    generated = steering.generate(one.model, texts, conditions, max_new_tokens=16)
    frame = pd.DataFrame(
        {"condition": condition.name, "prompt_set": "harmful_evaluation", "prompt_id": f"harmful_evaluation-{i}",
         "cluster": f"harmful_evaluation-{i}", "text": made_.text, "model": "planted",
         "label": "refusal" if judging.refusing_phrase(made_.text) else "compliance",
         "seed_rule": judging.seed_rule(made_.text)}
        for i, row in enumerate(generated) for condition, made_ in zip(conditions, row, strict=True)
    )  # fmt: skip
    said = pd.DataFrame(
        {"experiment": "rules", "metric": rule, "direction_id": row.condition, "prompt_id": row.prompt_id,
         "value": float(readers.refuses(rule, row.text))}
        for rule in ("gcg", "arditi") for row in frame.itertuples()
    )  # fmt: skip
    return where, made, frame, pd.concat([rows, said], ignore_index=True)


def test_what_is_planted_is_found_by_the_judges_that_can_see_it(world):
    where, made, frame, metrics = world
    assert where["separation"] >= 3 and where["screen"] == 3  # planted from layer 3 on
    curve = specification.table(specification.arms(frame, metrics))
    one = curve[(curve["unit"] == "alpha") & (curve["position"] == "all") & (curve["layer"] == "screen")].set_index(
        "judge"
    )
    assert one.loc["ours", ["base", "plus", "minus"]].tolist() == [0, 0, 1]
    assert one.loc["arditi", "swing"] == 1
    assert one.loc["gcg", "swing"] == 0  # it looks for "I can't", as written: none of the planted answers has it
    assert one.loc["seed_rule", "swing"] == 0  # answers below 100 characters are refusals to it, whatever they say
    # subtracting enough along the planted direction works whatever the unit; adding it leaves refusals as they are
    assert (curve[curve["judge"] == "ours"]["plus"] == 0).all()
    units = curve[(curve["judge"] == "ours") & (curve["position"] == "all") & (curve["layer"] == "screen")].set_index(
        "unit"
    )
    needed = (4.0 - 1.4) / float(made.raw_norm[3])  # alpha at which the planted strength falls to the threshold
    for unit in UNITS:
        works = specification_runs.alpha_of(made, 3, unit) > needed
        assert units.loc[unit, "minus"] == float(works), unit


@pytest.fixture
def loaded(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(hierarchy.sources, "__defaults__", (tmp_path / "no other models",))
    for module in (hierarchy_words, figures_hierarchy):
        monkeypatch.setattr(module, "people", lambda model: model.capitalize())
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


def notebook(mode="measure", n_prompts=0):
    """What the notebook measures."""
    run = runs.start(
        NAME, model=tiny.ID, mode=mode, out="build", n_prompts=n_prompts, max_new_tokens=6, rows=64, seed=0
    )
    made = tiny.directions()
    asked = pd.concat([tiny.prompts(3), tiny.prompts(4, "harmful_study")], ignore_index=True)
    chosen = pd.concat([tiny.prompts(5, "harmful_selection"), tiny.prompts(5, "harmless_selection")], ignore_index=True)
    separation = specification_runs.separation(run, chosen, made, 2)
    conditions = specification_runs.conditions(made, specification_runs.layers(separation), quick=bool(n_prompts))
    frame = runs.completions(
        run, asked, conditions, max_new_tokens=6, thresholds=tiny.THRESHOLDS, part="specifications"
    )
    said = validation.rules(run, frame)
    runs.finish(run)
    return run, frame, pd.concat([separation, said], ignore_index=True)


@pytest.mark.parametrize("n_prompts", [0, 2])
def test_a_run_to_its_numbers_and_again_from_its_record(loaded, tmp_path, n_prompts):
    run, frame, metrics = notebook(n_prompts=n_prompts)
    said = hierarchy_words.numbers(frame, metrics, {"parameters": run.parameters}, run.source / "records")
    assert all(text and "nan" not in text.split() for text in said.values()), said
    assert set(hierarchy_words.HEADLINES) <= set(said)
    for text in (
        specification_words.prose(said),
        *(hierarchy_words.prose(said, part) for part in hierarchy_words.PROSE),
    ):
        assert "{" not in text
    assert all(tex.escape(text) for text in said.values())
    layers = len(set(specification_runs.layers(metrics).values()))
    assert len(frame) == 7 * (1 + layers * 2 * (2 if n_prompts else 4) * 2)
    assert said["HierarchySpecs"] == ("96" if n_prompts else "192")
    assert len(loaded) == 1
    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    again, frame, metrics = notebook("replay", n_prompts)
    assert hierarchy_words.numbers(frame, metrics, again.about, again.source / "records") == said
    assert len(loaded) == 1


def test_measuring_again_measures_nothing(loaded):
    _, first, _ = notebook()
    loaded.clear()
    _, again, _ = notebook()
    pd.testing.assert_frame_equal(first, again)
    assert loaded == []


def test_positions_differ_in_what_the_model_says(loaded):
    _, frame, _ = notebook()
    texts = frame.pivot(index="prompt_id", columns="condition", values="text_sha256")
    pairs = [(name, name.replace(" all ", " last ")) for name in texts if " all " in name]
    assert pairs and any((texts[one] != texts[two]).any() for one, two in pairs)


# ---- the figure


def test_the_figure_shows_every_specification_with_its_choices(monkeypatch):
    figures.use_style()
    monkeypatch.setattr(figures_hierarchy, "people", lambda model: model)
    own = specification.arms(*record(lambda name, _, number: sign_of(name) < number % 3 - 1))
    curve = specification.table(own)
    figure = figures_hierarchy.specification(curve, {"other": curve.sample(frac=1, random_state=0)}, 0.25)
    top, middle, bottom = figure.axes
    swings = next(line for line in top.lines if line.get_label() == "swing, with interval")
    np.testing.assert_allclose(swings.get_ydata(), 100 * curve["swing"])
    other = next(line for line in top.lines if line.get_label() == "other")
    np.testing.assert_allclose(other.get_ydata(), 100 * curve["swing"])  # at the place of the same choices
    assert len(middle.patches) == len(curve)
    ticks = [text.get_text() for text in bottom.get_yticklabels()]
    assert len(ticks) == sum(map(len, FACTORS.values()))
    for factor in FACTORS:  # every specification has one level of each factor
        rows = [line for line, tick in zip([one for one in bottom.lines if one.get_marker() == "|"], ticks, strict=True)
                if tick.startswith(f"{factor}:")]  # fmt: skip
        assert sorted(np.concatenate([row.get_xdata() for row in rows])) == list(range(len(curve)))
    plt.close("all")


def test_the_level_is_the_plans():
    assert plan()["level"] == 0.05
