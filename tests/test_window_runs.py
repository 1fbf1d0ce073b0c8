"""Notebook 07 around the window: what is measured, the cost of a defence, format demands, the pilot, the words."""

import itertools
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from matplotlib import pyplot as plt

from refusal import (
    chunks,
    control_screens,
    figures,
    figures_windows,
    prompts,
    runs,
    steering,
    window_answers,
    window_costs,
    window_formats,
    window_pilot,
    window_runs,
    window_words,
    windows,
)
from refusal.files import ROOT, CompendiumError

NAME = window_runs.NOTEBOOK
DEMANDS = ("json", "table", "template")


# ---- conditions


def test_the_doses_are_the_plans():
    doses = window_runs.doses()
    assert len(doses) == 24 and doses == sorted(doses) and (doses[0], doses[-1]) == (-3, 3)
    assert set(np.diff([*doses[:12], 0.0, *doses[12:]]).round(9)) == {0.25}
    planned = window_runs.rule()["defence"]["alphas"]
    pilot = {alpha for alpha in window_pilot.counts()["alpha"] if alpha}
    for some in (doses, window_runs.doses(quick=True)):
        assert set(planned) | pilot <= set(some)
    many = window_runs.doses("many")
    assert many == window_runs.doses("own") == [-dose for dose in many[::-1]]
    assert len(many) == 24 and (many[12], many[-1]) == (0.04, 3)
    ratios = np.divide(many[13:], many[12:-1])
    assert ratios.max() < 1.03 * ratios.min()


@pytest.mark.parametrize(
    ("n_layers", "middle"), [(24, (8, 15)), (28, (9, 18)), (30, (10, 19)), (32, (11, 20)), (42, (14, 27)), (4, (1, 2))]
)
def test_thirds(n_layers, middle):
    parts = [window_runs.third(n_layers, which) for which in range(3)]
    assert (parts[1][0], parts[1][-1]) == middle
    assert [*itertools.chain(*parts)] == list(range(n_layers))


@pytest.mark.parametrize("alpha", [-1.5, 0.25])
def test_conditions_add_what_their_names_say(alpha):
    made, layer = tiny.directions(layers=6), 4
    one, many, own = (window_runs.at(made, layer, variant, alpha) for variant in ("one", "many", "own"))
    assert one.key() == steering.add(made, layer, alpha).key()
    assert (one.layers, many.layers, own.layers) == ((4,), (2, 3), (2, 3))
    vector = alpha * made.raw_norm[layer] * made.unit[layer]
    np.testing.assert_allclose(many.vectors, vector.expand(2, -1), rtol=1e-5)
    np.testing.assert_allclose(own.vectors, alpha * made.raw_norm[2:4, None] * made.unit[2:4], rtol=1e-5)
    assert [one.name, many.name, own.name] == [f"extracted@{kind} {alpha:+g}" for kind in ("one", "many", "own")]
    assert (many.alpha_absolute, many.alpha_relative) == (one.alpha_absolute, one.alpha_relative)
    assert one.alpha_relative == pytest.approx(alpha * float(made.raw_norm[layer] / made.residual_norm[layer]))
    with pytest.raises(CompendiumError, match=r"^there is no variant 'few': .*\.$"):
        window_runs.at(made, layer, "few", alpha)


def test_no_condition_has_the_name_of_another():
    made = tiny.directions(layers=6)
    names = [one.name for one in window_runs.curve_conditions(made, 4, ["one", "many", "own"])]
    assert len(names) == len(set(names)) == 72
    base, *doses = window_runs.defence_conditions(made, 4)
    assert base.name == "baseline" and {one.name for one in doses} <= set(names)
    assert all(one.layers == (4,) for one in doses)


def test_what_reports_a_rate_chose_nothing():
    planned = window_runs.rule()
    prompts.assert_disjoint(runs.CHOSEN_ON, [*planned["prompts"], planned["defence"]["prompts"]])


# ---- KL


def test_kl_rows_are_the_kl_of_each_condition(tiny_models):
    made, frame = tiny.directions(), tiny.prompts(3)
    conditions = window_runs.curve_conditions(made, 3, ["one", "many"], quick=True)
    rows = window_runs.kl_rows(tiny_models["qwen2"], frame, conditions).set_index(["direction_id", "alpha"])
    for condition in conditions:
        alone = control_screens.first_token_kl(tiny_models["qwen2"], frame["text"].tolist(), [condition])
        own = rows.loc[(condition.name.split()[0], condition.alpha)]
        np.testing.assert_allclose(own["value"], alone[:, 0], rtol=1e-3, atol=1e-5)
        assert own["prompt_id"].tolist() == frame["prompt_id"].tolist()
        assert set(own["layer"]) == {min(condition.layers)}
    assert rows["value"].max() > 0.01


# ---- a record made by hand


def completions(part, condition, prompt_set, labels, alpha=0.0, clusters=None, category="everyday", nll=1.0):
    ids = [f"{prompt_set}-{i:03d}" for i in range(len(labels))]
    words = {"r": "refusal", "c": "compliance", "d": "degenerate"}
    return pd.DataFrame(
        {"experiment": f"{NAME} {part}", "condition": condition, "operation": "add" if alpha else "none",
         "alpha": alpha, "prompt_set": prompt_set, "prompt_id": ids, "cluster": clusters or ids, "category": category,
         "label": [words[letter] for letter in labels], "seed_rule": "refusal", "reference_nll": nll}
    )  # fmt: skip


def defended(at_half, at_one, base="rrcccccc"):
    """A record whose harmful prompts answer thus at the three doses, and whose harmless ones are refused at 1 only."""
    look = ["lookalike"] * 4 + ["everyday"] * 4
    bases = [f"base-{i // 4}" for i in range(8)]
    rows = []
    for condition, alpha, labels, cost in (
        ("baseline", 0.0, base, "cccccccc"),
        ("extracted@one +0.5", 0.5, at_half, "cccccccc"),
        ("extracted@one +1", 1.0, at_one, "rrrrrccd"),
    ):
        rows += [
            completions("curves", condition, "harmful_evaluation", labels, alpha),
            completions("curves", condition, "harmless_evaluation", cost, alpha, category=look),
            completions("defence", condition, "harmful_study", labels, alpha, clusters=bases),
        ]
    return pd.concat(rows)


def test_what_a_defence_buys_and_costs():
    frame = defended("rrrrcccc", "rrrrrrcd")
    table = window_costs.defence(frame).set_index(["group", "alpha"])
    assert len(table) == 2 * len(window_costs.GROUPS)
    row = table.loc[("harmful", 1.0)]
    assert (row["base"], row["rate"], row["change"]) == (0.25, 0.75, 0.5) and row["degenerate"] == 1 / 8
    assert row["p"] == pytest.approx(2 / 2**4) and (row["n"], row["clusters"]) == (8, 8)
    study = table.loc[("study", 1.0)]
    assert study["change"] == 0.5 and study["clusters"] == 2 and study["p"] == pytest.approx(0.5)  # 2 clusters, flipped
    assert table.loc[("lookalike", 1.0), "change"] == 1.0 and table.loc[("everyday", 1.0), "change"] == 0.25
    assert table.loc[("harmless", 1.0), "change"] == 5 / 8 and table.loc[("harmless", 0.5), "change"] == 0
    assert (table["p_holm"] >= table["p"]).all()
    said = window_costs.numbers(frame)
    assert "each point gained on harmful requests costs 0.0 points" in said["WindowDefencePrice"]
    assert "each point gained on harmful requests costs 1.2 points" in said["WindowDefencePrice"]
    assert "harmful requests +50.0" in said["WindowDefenceHigh"]
    assert (said["WindowDefencePrompts"], said["WindowDefenceClusters"]) == ("8", "2")


def test_a_defence_that_buys_nothing_has_no_price():
    said = window_costs.numbers(defended("rrcccccc", "rccccccc"))
    assert said["WindowDefencePrice"].count("nothing is gained on harmful requests") == 2


def test_disturbance_leaves_out_texts_that_are_too_short():
    base = completions("curves", "baseline", "harmful_evaluation", "rrcc", nll=[1.0, np.nan, 2.0, 3.0])
    steered = completions("curves", "extracted@one +1", "harmful_evaluation", "rrcc", 1.0, nll=np.nan)
    kl = pd.DataFrame({"metric": "kl", "direction_id": "extracted@one", "alpha": 1.0, "prompt_id": base["prompt_id"],
                       "value": [1.0, 2.0, 3.0, 6.0]})  # fmt: skip
    table = window_costs.disturbance(pd.concat([base, steered]), kl, ["one"], seed=0).set_index(["measure", "alpha"])
    assert table.loc[("nll", 0.0), "value"] == 2 and table.loc[("nll", 0.0), "n"] == 3
    assert np.isnan(table.loc[("nll", 1.0), "value"]) and table.loc[("nll", 1.0), "n"] == 0
    alike = window_costs._means(np.array([[2.0], [np.nan], [2.0], [np.nan]]), np.arange(4), seed=0)
    assert alike.loc[0, ["n", "value", "low", "high"]].tolist() == [2, 2, 2, 2]
    assert table.loc[("kl", 0.0), ["value", "low", "high"]].tolist() == [0, 0, 0]
    row = table.loc[("kl", 1.0)]
    assert row["value"] == 3 and 1 <= row["low"] < 3 < row["high"] <= 6


# ---- format demands


def test_a_demand_is_appended_and_nothing_else_changes():
    frame = tiny.prompts(2)
    for demand, asked in window_runs.demanded(frame).items():
        words = window_runs.rule()["formats"]["demands"][demand]
        assert asked["text"].tolist() == [f"{text} {words}" for text in frame["text"]]
        pd.testing.assert_frame_equal(asked.drop(columns="text"), frame.drop(columns="text"))
    assert tuple(window_runs.demanded(frame)) == DEMANDS == tuple(window_runs.rule()["formats"]["comparisons"])


def asked(**labels):
    base = completions("curves", "baseline", "harmful_evaluation", "r" * 12 + "c" * 8)
    harmless = completions("curves", "baseline", "harmless_evaluation", "c" * 20)
    parts = [completions(demand, "baseline", "harmful_evaluation", labels[demand]) for demand in DEMANDS]
    return pd.concat([base, harmless, *parts]).sample(frac=1, random_state=1)


def test_demands_are_compared_with_the_same_prompts():
    frame = asked(json="r" * 2 + "c" * 18, table="r" * 12 + "c" * 8, template="r" * 13 + "d" * 7)
    table = window_formats.refusals(frame)
    assert table.index.tolist() == ["none", *DEMANDS] and (table["n"] == 20).all()
    assert table.loc["json", "change"] == pytest.approx(-0.5) and table.loc["json", "p"] == pytest.approx(2 / 2**10)
    assert table.loc["json", "p_holm"] == pytest.approx(6 / 2**10)
    assert (table.loc["template", "gained"], table.loc["template", "degenerate"]) == (1, 0.35)
    assert table.loc["table", ["change", "p"]].tolist() == [0, 1] and np.isnan(table.loc["none", "p_holm"])
    assert "changes refusal: json lowers it" in window_formats._conclusion(table)


def test_no_demand_changes_anything_where_none_does():
    same = dict.fromkeys(DEMANDS, "r" * 12 + "c" * 8)
    assert "no demand changes refusal" in window_formats._conclusion(window_formats.refusals(asked(**same)))


def test_projections_are_in_units_of_each_layers_raw_norm():
    made = tiny.directions(layers=3, width=8)
    activations = torch.randn(2 * 4, 3, 8, generator=torch.Generator().manual_seed(0))
    rows = window_runs.projection_rows(activations, made, ["none", "json"], list("abcd"))
    assert len(rows) == 2 * 4 * 3
    for demand, prompt, layer in (("none", "a", 0), ("json", "c", 2)):
        index = 4 * ["none", "json"].index(demand) + "abcd".index(prompt)
        wanted = float(activations[index, layer] @ made.unit[layer] / made.raw_norm[layer])
        one = rows[
            (rows["metric"] == f"projection {demand}") & (rows["prompt_id"] == prompt) & (rows["layer"] == layer)
        ]
        assert one["value"].tolist() == [pytest.approx(wanted, rel=1e-5)]


def moved(by, n=20, n_layers=12, noise=0.05, seed=0, clusters=None, signs=(-1, 1)):
    """A record, and metrics in which each demand moves the projection by so much at every layer, up or down."""
    rng, rows = np.random.default_rng(seed), []
    base = rng.normal(size=(n, n_layers))
    sign = rng.choice(signs, size=(n, 1))
    for demand in ("none", *DEMANDS):
        values = base + (0 if demand == "none" else sign * by + rng.normal(0, noise, (n, n_layers)))
        rows += [
            {"metric": f"projection {demand}", "layer": layer, "prompt_id": f"p-{i:02d}", "value": values[i, layer]}
            for i in range(n)
            for layer in range(n_layers)
        ]
    ids = [f"p-{i:02d}" for i in range(n)]
    return pd.DataFrame({"prompt_id": ids, "cluster": clusters or ids}), pd.DataFrame(rows).sample(frac=1)


def test_a_change_in_late_layers_is_found_and_its_size_too():
    by = np.r_[np.full(4, 0.1), np.full(4, 9.0), np.full(4, 0.6)]
    found = window_formats.contrast(*moved(by), seed=0)
    assert found.first == pytest.approx(0.1, abs=0.02) and found.last == pytest.approx(0.6, abs=0.02)
    assert found.difference == pytest.approx(found.last - found.first) and found.p == pytest.approx(1e-4)
    assert found.interval.low < 0.5 < found.interval.high and (found.n, found.clusters) == (20, 20)
    assert abs(found.signed) < 0.3 < 0.6 < found.last + 0.05  # up for some prompts, down for others
    assert found.signed_interval.low < found.signed < found.signed_interval.high
    assert "more in late layers than in early ones, as the pilot supposes" in window_formats._late(found)
    early = window_formats.contrast(*moved(by[::-1]), seed=0)
    assert early.difference == pytest.approx(-0.5, abs=0.03) and "unlike what" in window_formats._late(early)
    assert window_formats.contrast(*moved(by, signs=(-1,)), seed=0).signed == pytest.approx(-0.6, abs=0.02)
    table = window_formats.by_layer(*moved(by), seed=0)
    assert set(table["statistic"]) == {"size", "change"} and len(table) == 2 * 3 * 12
    size = table[(table["statistic"] == "size") & (table["layer"] == 5)]
    np.testing.assert_allclose(size["value"], 9.0, atol=0.1)
    assert (size["low"] <= size["value"]).all() and (size["value"] <= size["high"]).all()


def test_layers_off_by_one_are_noticed():
    by = np.r_[np.full(4, 0.0), np.full(4, 5.0), np.full(4, 0.0)]
    frame, metrics = moved(by, noise=0.0)
    assert window_formats.contrast(frame, metrics, seed=0).difference == pytest.approx(0)
    shifted = metrics.assign(layer=(metrics["layer"] + 1) % 12)
    assert window_formats.contrast(frame, shifted, seed=0).difference == pytest.approx(5 / 4)


def test_flips_are_those_of_whole_clusters():
    """All flips of a few clusters give the same p, up to the draws'; ten prompts alike count as one."""
    by = np.r_[np.zeros(8), np.full(4, 0.05)]
    bases = [f"b{i // 4}" for i in range(20)]
    frame, metrics = moved(by, noise=0.2, seed=3, clusters=bases)
    sizes = sum(one.abs() for one in window_formats.changes(metrics).values()) / 3
    difference = (sizes[range(8, 12)].mean(axis=1) - sizes[range(4)].mean(axis=1)).to_numpy()
    sums = difference.reshape(5, 4).sum(1)
    signs = np.array(list(itertools.product([1, -1], repeat=5)))
    exact = (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12).mean()
    found = window_formats.contrast(frame, metrics, seed=0)
    assert found.p == pytest.approx(exact, abs=0.02) and found.clusters == 5 and found.p >= 2 / 2**5 - 0.02


def test_flips_reject_at_their_level_where_early_and_late_are_alike(monkeypatch):
    monkeypatch.setattr(window_formats, "FLIPS", 499)
    monkeypatch.setattr(window_formats, "DRAWS", 10)
    ps = [window_formats.contrast(*moved(np.zeros(12), n=12, seed=seed), seed=seed).p for seed in range(200)]
    rejected = np.mean(np.array(ps) < 0.05)
    print(f"late against early, nothing planted: rejected in {rejected:.3f}")
    assert rejected <= 0.09


# ---- the pilot


def test_the_pilots_table_and_its_intervals():
    header = (ROOT / "data" / "study_window.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "model,alpha,refused,n,coherent,n_coherent,layers,source"
    table = window_pilot.counts().set_index("alpha")
    assert (100 * table["coherent_rate"]).tolist() == [2.5, 0, 82.5, 100, 100, 0, 0]
    assert (100 * table["refused_rate"]).tolist() == [0, 0, 0, 5, 0, 0, 0]
    np.testing.assert_allclose(
        100 * table.loc[0, ["refused_low", "refused_high"]].astype(float), [0.9, 23.6], atol=0.05
    )
    np.testing.assert_allclose(100 * table.loc[1, ["refused_low", "refused_high"]].astype(float), [0, 16.1], atol=0.05)
    assert set(table["layers"]) == {" ".join(map(str, window_runs.third(24, window_runs.MIDDLE)))}


def pilot_answers(unit):
    grid = np.linspace(-3, 3, 25)
    broken = (np.arange(100) + 0.5)[:, None] / 100 < np.interp(np.abs(grid), [0, 2], [0.0, 1.0])
    refused = np.zeros((50, 25), bool)
    units = {"alpha": 1.0, "alpha_absolute": unit, "alpha_relative": 0.1}
    names = tuple(np.array([f"{side}{i}" for i in range(50)]) for side in "hn")
    return window_answers.Answers("many", grid, units, "8 9", refused, refused, broken, names)


def test_the_pilots_doses_lie_where_either_reading_puts_them():
    table = window_pilot.readings(pilot_answers(8.0)).set_index(["reading", "pilot_alpha"])
    assert table.loc[("difference", -1.0), "alpha"] == -1 and table.loc[("unit", -1.0), "alpha"] == -1 / 8
    assert table.loc[("difference", -1.0), "coherent"] == pytest.approx(0.5)
    assert table.loc[("unit", -1.0), "coherent"] == pytest.approx(1 - 1 / 16, abs=0.01)
    far = window_pilot.readings(pilot_answers(0.5)).set_index(["reading", "pilot_alpha"])
    assert np.isnan(far.loc[("unit", 2.0), "coherent"]) and far.loc[("unit", 1.0), "alpha"] == 2
    said = window_pilot.numbers(pilot_answers(0.5))
    assert said["WindowPilotUnitCoherent"].startswith("beyond our doses, 0, 50, 100")
    assert said["WindowPilotDoses"] == "-2, -1, -0.5, 0, 0.5, 1, 2" and said["WindowPilotLayers"] == "8–15"


# ---- words


def answers_with(harmful, harmless=0.0, broken=0.0):
    grid = np.linspace(-3, 3, 25)
    curve = lambda rate, n: (np.arange(n) + 0.5)[:, None] / n < np.broadcast_to(rate, 25)  # noqa: E731
    units = {"alpha": 1.0, "alpha_absolute": 9.5, "alpha_relative": 0.18}
    names = tuple(np.array([f"{side}{i}" for i in range(50)]) for side in "hn")
    return window_answers.Answers("many", grid, units, "8 9", curve(harmful, 50), curve(harmless, 50),
                                  curve(broken, 100), names)  # fmt: skip


def test_sentences_follow_from_the_verdict():
    grid = np.linspace(-3, 3, 25)
    useful = windows.find(answers_with(np.where(grid > 0.3, 0.9, 0.5), np.where(grid > 1.6, 0.5, 0.0)), 0)
    assert useful.verdict == "contradicted" and window_words._meaning(useful).startswith("There are doses that raise")
    assert window_words.edges(useful).startswith("beyond -3 to +1.55 [")
    assert "over-refusal" in window_words._why(useful) and "wide 1.24 [" in window_words._useful(useful)
    assert window_words._ceiling(useful) == "Refusal of harmful requests could rise by 50.0 points at most."
    near = windows.find(answers_with(np.where(grid > 0, 0.9, 0.5), np.where(grid > 0, 0.9, 0.0)), 0)
    assert 0 < near.high < 0.25 and "nearest dose (+0.25)" in window_words._meaning(near)
    assert "nearest dose" not in window_words._meaning(useful)
    none = windows.find(answers_with(0.5, 0.0, np.where(grid > 1.1, 1.0, 0.0)), 0)
    assert none.verdict == "replicated" and window_words._useful(none).startswith(
        "none (its width is 0.00 [0.00, 0.00]"
    )
    assert "before the end of the grid or degeneration ended the window" in window_words._meaning(none)
    full = windows.find(answers_with(0.96), 0)
    assert full.verdict == "replicated" and "the verdict says nothing here" in window_words._ceiling(full)
    broken = windows.find(answers_with(0.5, 0.0, 0.07), 0)
    assert (broken.low, broken.high, broken.verdict) == (0.0, 0.0, "replicated")
    assert "unsteered text breaks the limit" in window_words._ceiling(broken)


# ---- a run, from doses to numbers


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


def notebook(mode="measure", n_prompts=0, own=False):
    """What the notebook does."""
    run = runs.start(NAME, model=tiny.ID, mode=mode, out="build", n_prompts=n_prompts, own_vectors=own,
                     max_new_tokens=4, rows=64, seed=0)  # fmt: skip
    size, made, layer = n_prompts or 4, tiny.directions(), 3
    asked = tiny.prompts(size, "harmful_evaluation")
    harmless = tiny.prompts(size, "harmless_evaluation")
    harmless["category"] = np.where(np.arange(size) % 2 == 0, "lookalike", "everyday")
    evaluation, layout = pd.concat([asked, harmless]), tiny.prompts(size, "harmful_study")
    given = {"max_new_tokens": 4, "thresholds": tiny.THRESHOLDS}
    conditions = window_runs.curve_conditions(made, layer, ["one", "many"], quick=bool(n_prompts))
    runs.completions(run, evaluation, [steering.baseline(), *conditions], part="curves", **given)
    if own:
        added = window_runs.curve_conditions(made, layer, ["own"], quick=bool(n_prompts))
        runs.completions(run, evaluation, added, part="own", **given)
        conditions = [*conditions, *added]
    kl = window_runs.kl(run, evaluation.head(3), conditions)
    runs.completions(run, layout, window_runs.defence_conditions(made, layer), part="defence", **given)
    for demand, frame in window_runs.demanded(asked).items():
        runs.completions(run, frame, [steering.baseline()], part=demand, **given)
    metrics = pd.concat([kl, window_runs.projections(run, asked, made)])
    runs.finish(run)
    return run, metrics


@pytest.mark.parametrize("n_prompts", [0, 2])
def test_a_run_to_its_numbers_and_again_from_its_record(loaded, tmp_path, n_prompts):
    run, metrics = notebook(n_prompts=n_prompts)
    said = window_words.numbers(run.frame, metrics, run.about | {"parameters": run.parameters})
    assert all(re.fullmatch(r"Window[A-Za-z]+", name) for name in said)
    assert all(text and not re.search(r"\bnan\b|\binf\b", text.lower()) for text in said.values()), said
    assert set(window_words.HEADLINES) <= set(said)
    for part in window_words.PROSE:
        assert "{" not in window_words.prose(said, part)
    assert said["WindowLayers"] == "1–2" and said["WindowLayer"] == "3" and said["WindowThirdLast"] == "3"
    assert said["WindowAlphas"] == ("7" if n_prompts else "25")
    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    again, same = notebook("replay", n_prompts)
    assert window_words.numbers(again.frame, same, again.about) == said


def test_every_number_is_told_in_the_prose_or_is_a_headline(loaded):
    """A macro that the notebook never says would be a number of the paper without a notebook."""
    run, metrics = notebook(n_prompts=1)
    said = window_words.numbers(run.frame, metrics, {"parameters": run.parameters})
    told = set(re.findall(r"\{(\w+)\}", "".join(window_words.PROSE.values())))
    assert told <= set(said)
    setup = {"Alphas", "AlphaEnd", "Completions", "KlPrompts", "LayerCount", "UnitAbsolute", "UnitRelative",
             "LimitBroken", "LimitRefusal", "UsefulRise", "DefencePrompts", "DefenceClusters"}  # fmt: skip
    assert set(said) - told - set(window_words.HEADLINES) == {f"Window{name}" for name in setup}


def test_measuring_again_measures_nothing_and_own_vectors_only_what_is_new(loaded, monkeypatch):
    notebook(n_prompts=2)
    made = []
    generate = chunks._generate
    monkeypatch.setattr(chunks, "_generate", lambda *given: made.append(given[2]) or generate(*given))
    notebook(n_prompts=2)
    assert made == []
    run, _ = notebook(n_prompts=2, own=True)
    assert {one.name.split()[0] for group in made for one in group} == {"extracted@own"}
    own = window_answers.answers(run.frame, "own")
    assert own.layers == "1 2" and len(own.alphas) == 7
    assert windows.find(own, 0, draws=10).verdict in ("replicated", "inconclusive", "contradicted")


# ---- figures


@pytest.fixture
def _style():
    figures.use_style()
    yield
    plt.close("all")


def lines(axes):
    return [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in axes.lines]


def test_the_window_figure_shows_rates_window_and_the_pilots_doses(_style):
    grid = np.linspace(-3, 3, 25)
    of = answers_with(np.where(grid > 0.3, 0.9, 0.5), np.where(grid > 1.6, 0.5, 0.0), np.where(grid < -2, 0.5, 0.0))
    found, points = windows.find(of, 0, draws=50), window_answers.curves(of)
    costs = pd.DataFrame({"variant": "many", "measure": np.repeat(["kl", "nll"], 25), "alpha": np.tile(grid, 2),
                          "n": 9, "value": 1.0, "low": 0.5, "high": 2.0})  # fmt: skip
    marks = window_pilot.readings(of)
    figure = figures_windows.window([found], points, costs, marks)
    top = figure.axes[0]
    shown = [y for _, y in lines(top)]
    for outcome in ("harmful", "harmless", "degenerate"):
        rates = 100 * points[points["outcome"] == outcome]["rate"].to_numpy()
        assert any(len(y) == 25 and np.allclose(y, rates) for y in shown)
    for reading in window_pilot.READINGS:
        wanted = marks.loc[marks["reading"] == reading, "alpha"].to_numpy()
        assert any(len(x) == 7 and np.allclose(x, wanted) and y.min() > 100 for x, y in lines(top))
    spans = {(round(p.get_x(), 4), round(p.get_x() + p.get_width(), 4)) for p in top.patches}
    assert (round(found.low, 4), round(found.high, 4)) in spans
    assert {(round(a, 4), round(b, 4)) for a, b in found.parts} <= spans
    assert f"{100 * found.share:.0f} %" in top.get_title()


def test_the_pilots_figure_has_both_readings(_style):
    of = pilot_answers(8.0)
    figure = figures_windows.study(window_answers.curves(of), window_pilot.counts(), of.units)
    for axes, size in zip(figure.axes, (1.0, 8.0), strict=True):
        ours = next(y for x, y in lines(axes) if len(x) == 25 and np.allclose(x, of.alphas * size))
        np.testing.assert_allclose(ours, 100 * (1 - of.broken.mean(0)))
        theirs = [container.lines[0].get_ydata() for container in axes.containers]
        np.testing.assert_allclose(theirs[0], [2.5, 0, 82.5, 100, 100, 0, 0])


def test_the_other_figures_show_their_tables(_style):
    table = window_costs.defence(defended("rrrrcccc", "rrrrrrcd"))
    axes = figures_windows.defence(table).axes[0]
    shown = sorted(float(x) for container in axes.containers for x in container.lines[0].get_xdata())
    unsteered = table.drop_duplicates("group")["base"]
    np.testing.assert_allclose(shown, sorted(100 * pd.concat([table["rate"], unsteered])))
    frame = asked(json="r" * 2 + "c" * 18, table="r" * 12 + "c" * 8, template="r" * 13 + "d" * 7)
    late = window_formats.contrast(*moved(np.r_[np.full(8, 0.1), np.full(4, 0.6)]), seed=0)
    by_layer = window_formats.by_layer(*moved(np.full(12, 0.5)), seed=0)
    refused = window_formats.refusals(frame)
    left, right = figures_windows.formats(refused, by_layer, late).axes
    np.testing.assert_allclose(left.containers[0].lines[0].get_ydata(), 100 * refused["rate"])
    np.testing.assert_allclose(left.containers[1].lines[0].get_ydata(), 100 * refused["degenerate"])
    assert "+0.50" in right.get_title() and sum(len(x) == 12 for x, _ in lines(right)) == 3
