"""Is the direction special: measured on models whose truth is planted, ranked by the plan's rule, counted by prompt."""

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
from plain import PROMPTS, Plain
from planted import HARMFUL, HARMLESS, NOUNS, requests

from refusal import (
    activations,
    chunks,
    control_rates,
    control_screens,
    controls,
    directions,
    figures_controls,
    models,
    runs,
    specificity,
    statistics,
    steering,
)
from refusal.analyses import plan
from refusal.control_screens import FAMILIES
from refusal.files import ROOT, CompendiumError

LAYER = 4  # of the planted models: the one above the onset
SETS = ("harmful_evaluation", "harmless_evaluation")


# ---- KL


def test_first_token_kl_is_that_of_plain_softmax(tiny_models):
    plain, made = Plain("qwen2"), tiny.directions()
    conditions = [
        steering.add(made, 1, 1.0),
        steering.baseline(),
        steering.ablate(made, 2),
        steering.add(made, 2, -0.3),
    ]
    found = control_screens.first_token_kl(tiny_models["qwen2"], PROMPTS, conditions)
    assert found.shape == (len(PROMPTS), len(conditions)) and found.dtype == torch.float32
    for row, text in enumerate(PROMPTS):
        unsteered = plain.logits(text, steering.baseline()).softmax(-1)
        for column, condition in enumerate(conditions):
            steered = plain.logits(text, condition).softmax(-1)
            wanted = float((unsteered * (unsteered / steered).log()).sum())
            assert float(found[row, column]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert found[:, 1].max() < 1e-6 and found[:, 0].min() > 0.01


def test_controls_are_scaled_to_the_kl_of_the_extracted_direction_a_sign_at_a_time(tiny_models):
    model, made = tiny_models["qwen2"], directions.Directions(*_weak())
    family = {"random": controls.random(made, 4, seed=0)}
    matching, screened = tiny.prompts(3, "harmful_selection"), tiny.prompts(2)
    rows = control_screens.equal_kl(model, matching, screened, made, family, 1, [5, 6, 7])
    texts = matching["text"].tolist()
    own = {sign: _kl(model, texts, steering.add(made, 1, sign)) for sign in (1.0, -1.0)}
    kl, matched, means = (rows[rows["metric"] == name] for name in ("kl", "matched_kl", "mean_log_odds"))
    assert len(kl) == 2 + 8 and len(matched) == len(means) == 8
    assert abs(own[1.0] / own[-1.0] - 1) > 0.01  # so that the two signs have different targets
    for row, mean in zip(matched.itertuples(), means.itertuples(), strict=True):
        again = steering.add(family["random"][row.draw], 1, row.alpha)
        assert row.value == pytest.approx(own[math.copysign(1, row.alpha)], rel=0.051)
        assert row.value == pytest.approx(_kl(model, texts, again), rel=1e-3)
        values = steering.screen(model, screened["text"].tolist(), [again], [5, 6, 7])
        assert (mean.direction_id, mean.alpha) == (row.direction_id, row.alpha)
        assert mean.value == pytest.approx(float(values.mean()), abs=1e-4)
    assert matched["alpha"].abs().max() > 1.5 * matched["alpha"].abs().min()  # equal norm is not equal KL


def test_draws_that_cannot_reach_the_kl_are_kept_without_an_effect(tiny_models):
    identity, unit, raw, _ = _weak()
    made = directions.Directions(identity, unit, raw, 0.5 * raw)  # alpha_relative 2 is alpha = 1
    family = {"random": controls.random(made, 6, seed=1)}
    rows = control_screens.equal_kl(
        tiny_models["qwen2"], tiny.prompts(3, "harmful_selection"), tiny.prompts(2), made, family, 1, [5, 6, 7]
    )
    matched, means = (rows[rows["metric"] == name] for name in ("matched_kl", "mean_log_odds"))
    targets = rows[(rows["metric"] == "kl") & (rows["direction_id"] == "extracted")].set_index("alpha")["value"]
    short = (matched["value"].to_numpy() / targets[np.sign(matched["alpha"])].to_numpy()) < 0.95
    assert 0 < short.sum() < len(short)
    assert (means["value"].isna().to_numpy() == short).all()
    np.testing.assert_allclose(matched["alpha"].abs()[short], 1.0)
    assert len(means) == 12
    effects = specificity.swings(rows.assign(experiment="equal_kl"), experiment="equal_kl")
    assert specificity.ranks(effects, 9.0).loc["random", "missing"] == effects.isna().sum() > 0


def _weak():
    made = tiny.directions()
    return made.id, made.unit, 0.5 * made.raw_norm, 2 * made.residual_norm


def _kl(model, texts, condition):
    return float(control_screens.first_token_kl(model, texts, [condition]).double().mean())


# ---- a planted direction is found, and nothing where nothing is


def frame(words, count, seed, prompt_set):
    texts = requests(words, count, seed)
    ids = [f"{prompt_set}-{i:03d}" for i in range(1, count + 1)]
    nouns = [next(noun for noun in NOUNS if noun in text.split()) for text in texts]
    return pd.DataFrame({"prompt_id": ids, "prompt_set": prompt_set, "category": nouns, "cluster": ids, "text": texts})


def world(strength):
    """A model wide enough for random directions to be nearly orthogonal, whose prompts differ in more than harm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "NOISE", 96)
        patch.setattr(planted, "HEAD", 96)
        one = planted.build((dict.fromkeys(HARMFUL, strength),), threshold=0.7)
    with torch.no_grad():
        one.model.hf.model.layers[0].self_attn.o_proj.weight.mul_(60.0)
    return one


def measured(one, draws, small):
    """All metric rows of the notebook, and the directions."""
    sides = [frame(HARMFUL, 64, 1, "harmful_extraction"), frame(HARMLESS, 64, 2, "harmless_extraction")]
    prompts = pd.concat([frame(HARMFUL, 5, 3, SETS[0]), frame(HARMLESS, 3, 4, SETS[1])], ignore_index=True)
    matching = frame(HARMFUL, 3, 5, "harmful_selection")
    extracted = directions.extract(*(activations.last_token(one.model, side["text"].tolist()) for side in sides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "last_tokens", lambda _, side: activations.last_token(one.model, side["text"].tolist()))
        made = control_screens.families(
            None, extracted, sides, dict.fromkeys(FAMILIES, draws) | {"balanced": small}, seed=0
        )
        few = {family: made[family][:small] for family in control_screens.MATCHED}
    parts = {
        "screen": control_screens.screen(one.model, prompts, extracted, made, LAYER, one.openings),
        "equal_kl": control_screens.equal_kl(
            one.model, matching, prompts[prompts["prompt_set"] == SETS[0]], extracted, few, LAYER, one.openings
        ),
        "ablation": control_screens.ablation(one.model, prompts, extracted, few, LAYER, one.openings),
    }
    rows = pd.concat([part.assign(experiment=name) for name, part in parts.items()], ignore_index=True)
    return rows.fillna({"prompt_id": "", "operation": "none", "alpha": 0.0}), extracted


@pytest.fixture(scope="module")
def special():
    one = world(2.0)
    return one, *measured(one, 99, 19)


def test_a_planted_direction_is_special(special):
    one, metrics, extracted = special
    assert float(extracted.unit[LAYER] @ one.directions[0]) > 0.7
    test = specificity.table(metrics)
    assert list(test.index) == list(FAMILIES) and (test["n"] == 99).all()
    assert (test["extracted"] > 0).all()  # refusal rises with alpha
    assert (test["p"] == 1 / 100).all() and (test["z"] > 3).all() and (test["as_large"] == 0).all()
    assert test.loc[["random", "orthogonal"], "z"].min() > 5
    np.testing.assert_allclose(test["p_holm"], 4 / 100)
    assert specificity.verdict(test) == "special"
    assert "every one of the 396 control draws" in specificity._conclusion(test)


def test_what_stands_beside_it_agrees(special):
    _, metrics, _ = special
    more = specificity.secondary(metrics)
    matched = more.loc["equal KL"]  # this model's first token is about refusal alone: nothing else disturbs it as much
    assert matched.loc["topics", ["missing", "p"]].tolist() == [19, 1.0]
    assert (
        0 < matched.loc["random", "missing"] < 19
        and matched.loc["random", "largest"] < matched.loc["random", "extracted"]
    )
    assert matched.loc["random", "p"] == (1 + matched.loc["random", "missing"]) / 20
    assert (more.loc["harmless requests", "p"] == 1 / 100).all()
    assert more.loc[("shuffled within classes", "balanced"), "p"] == 1 / 20
    ablated = more.loc["ablation"]
    assert (ablated["extracted"] < 0).all() and (ablated["p"] == 1 / 20).all()  # harmful requests are refused less
    sizes = specificity.robustness(metrics, seed=0)
    (average, about), (worst, _) = sizes["average"], sizes["worst"]
    assert about.low < average < about.high < abs(worst) and worst < 0


def test_swings_by_hand(special):
    """Means over prompts of what the screen says under a positive alpha, minus the same under a negative one."""
    one, metrics, extracted = special
    prompts = frame(HARMFUL, 5, 3, SETS[0])
    conditions = [steering.add(extracted, LAYER, 1.0), steering.add(extracted, LAYER, -1.0)]
    values = steering.screen(one.model, prompts["text"].tolist(), conditions, one.openings)
    wanted = (values[:, 0] - values[:, 1]).numpy()
    assert specificity.swings(metrics)["extracted", 0] == pytest.approx(wanted.mean(), abs=1e-4)
    mean, interval = specificity.swing(metrics)
    assert mean == pytest.approx(wanted.mean(), abs=1e-4) and interval.low < mean < interval.high
    turned = control_screens.screen(one.model, prompts, controls.opposite(extracted), {}, LAYER, one.openings).assign(
        experiment="screen"
    )
    assert specificity.swings(turned)["opposite", 0] == pytest.approx(-wanted.mean(), abs=1e-4)


def test_nothing_is_found_where_nothing_is_planted():
    metrics, _ = measured(world(0.0), 39, 9)
    test = specificity.table(metrics)
    assert specificity.verdict(test) == "not special" and test.loc["random", "p"] > 0.05
    assert "does not move refusal further than random" in specificity._conclusion(test)


def test_false_positives_over_200_seeds(special):
    """One random direction of the planted model in place of the extracted one, against 39 others: p <= .05 in 5 %."""
    _, metrics, _ = special
    drawn = specificity.swings(metrics).loc[["random", "orthogonal"]].to_numpy()
    found = []
    for seed in range(200):
        some = np.random.default_rng(seed).permutation(drawn)[:40]
        index = pd.MultiIndex.from_product([["random"], range(39)], names=["family", "draw"])
        found.append(specificity.ranks(pd.Series(some[1:], index), some[0]).loc["random", "p"])
    share = np.mean(np.array(found) <= 0.05)
    print(f"false positives: {share:.3f}")
    assert share < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 200)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def synthetic(effects):
    """Metric rows of swings: `{family: [draws]}`."""
    names = np.repeat(list(effects), [len(values) for values in effects.values()])
    draws = np.concatenate([np.arange(len(values)) for values in effects.values()])
    ids = [name if name == "extracted" else f"{name}[{draw}]" for name, draw in zip(names, draws, strict=True)]
    halves = np.concatenate(list(effects.values())) / 2
    same = {"experiment": "screen", "metric": "mean_log_odds", "operation": "add", "prompt_id": SETS[0], "draw": draws}
    return pd.concat([pd.DataFrame(same | {"direction_id": ids, "alpha": sign, "value": sign * halves})
                      for sign in (1.0, -1.0)])  # fmt: skip


def test_an_exchangeable_direction_is_hardly_ever_called_special():
    verdicts, p = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        effects = {"extracted": rng.normal(size=1)} | {family: rng.normal(size=99) for family in FAMILIES}
        test = specificity.table(synthetic(effects))
        verdicts.append(specificity.verdict(test))
        p += test["p"].tolist()
    special, below = verdicts.count("special") / 200, np.mean(np.array(p) <= 0.05)
    print(
        f"called special: {special:.3f}; p below .05: {below:.3f}; not special: {verdicts.count('not special') / 200}"
    )
    assert special <= 0.05 and 0.02 < below < 0.09 and verdicts.count("not special") > 180


# ---- ranks and rule


def test_ranks_count_missing_draws_against_the_extracted_direction():
    index = pd.MultiIndex.from_product([["random", "topics"], range(9)], names=["family", "draw"])
    effects = pd.Series([0.1, -0.1, 0.2, -0.2, 3.0, math.nan, 0.0, 0.0, 0.0, *[math.nan] * 9], index)
    found = specificity.ranks(effects, 2.0)
    assert found.loc["random", "p"] == pytest.approx(3 / 10)  # the larger one, the missing one, and itself
    assert found.loc["random", ["n", "missing", "as_large"]].tolist() == [9, 1, 1]
    assert found.loc["random", "largest"] == 3.0
    assert found.loc["topics", "p"] == 1.0 and found.loc["topics", "missing"] == 9


@pytest.mark.parametrize(
    ("p", "n", "expected"),
    [
        ((0.005, 0.005, 0.005, 0.005), 199, "special"),
        ((0.005, 0.005, 0.03, 0.04), 199, "inconclusive"),  # Holm: twice .03 is above the level
        ((0.005, 0.005, 0.005, 0.2), 199, "inconclusive"),
        ((0.05, 0.005, 0.005, 0.005), 199, "not special"),
        ((0.4, 0.4, 0.4, 0.4), 199, "not special"),
        ((0.1, 0.1, 0.1, 0.1), 9, "inconclusive"),  # a quick look cannot find anything, nor say that nothing is there
    ],
)
def test_the_verdict_follows_the_plan(p, n, expected):
    holm = statistics.holm(dict(zip(FAMILIES, p, strict=True)))
    test = pd.DataFrame({"p": p, "p_holm": list(holm.values()), "n": n}, index=list(FAMILIES))
    assert specificity.verdict(test) == expected


def test_the_family_is_the_plans():
    assert [one["family"] for one in plan()[specificity.NOTEBOOK]["comparisons"]] == list(FAMILIES)


# ---- the size of an average perturbation


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_average_size_is_covered(noise):
    """Directions and prompts are both drawn; the truth is the mean |effect| over all of either."""
    spread, prompts, hits, shares = 0.5, 16, 0, []
    truth, signs = spread * math.sqrt(2 / math.pi), np.array([1, -1])[:, None]
    for seed in range(100):
        rng = np.random.default_rng(seed)
        effect = rng.normal(0, spread, (100, 1, 1)) + rng.normal(0, noise, (100, 1, prompts))
        changes = effect * signs * rng.normal(1, 0.2, prompts)  # some prompts move more than others
        size, interval = specificity.mean_size(changes, seed, samples=150)
        shares.append(size / truth)
        hits += interval.low <= truth <= interval.high
    print(f"coverage {hits / 100:.2f}, bias {np.mean(shares) - 1:+.3f}")
    assert hits / 100 >= 0.9 and abs(np.mean(shares) - 1) < 0.04


# ---- completions


def completions(refused):
    """Rows of 24 prompts a set; `refused(prompt, condition)` says which are refusals."""
    signed = [f"{name} {sign}" for name in ("extracted", *(f"{f}[{i}]" for f in FAMILIES for i in range(2)))
              for sign in ("+1", "-1")]  # fmt: skip
    ablated = ["ablate extracted", *(f"ablate {family}[0]" for family in FAMILIES)]
    rows = []
    for prompt_set in SETS:
        for number in range(24):
            for condition in ["baseline", *signed, *ablated]:
                name = condition.removeprefix("ablate ").split(" ")[0]
                operation = {"b": "none"}.get(condition[0], "ablate" if condition.startswith("ablate") else "add")
                no = bool(refused(number, condition))
                rows.append(
                    {"prompt_set": prompt_set, "prompt_id": f"{prompt_set}-{number}", "operation": operation,
                     "cluster": f"{prompt_set}-{number}", "condition": condition,
                     "direction_id": "" if operation == "none" else name, "label": "refusal" if no else "compliance",
                     "seed_rule": "refusal" if no else "jailbreak"}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_several_draws_answer_the_same_prompts_so_the_prompt_is_the_unit():
    shares = control_rates.rates(completions(lambda number, _: number < 6))
    shares = shares[shares["outcome"] == "refusal"].set_index(["prompt_set", "group"])
    assert set(shares.loc[SETS[0]].index) == set(control_rates.GROUPS)
    random, baseline = shares.loc[(SETS[0], "random")], shares.loc[(SETS[0], "baseline")]
    assert (random["k"], random["n"], random["clusters"], random["conditions"]) == (24, 96, 24, 4)
    assert random["rate"] == baseline["rate"] == 0.25
    naive = statistics.wilson(24, 96)
    assert random["high"] - random["low"] > 1.7 * (naive.high - naive.low)  # four equal answers are one
    assert random["high"] - random["low"] == pytest.approx(baseline["high"] - baseline["low"], rel=0.1)


def test_rates_by_group_by_hand():
    def refused(number, condition):
        if condition == "extracted -1":
            return number < 2
        if condition.startswith("random"):
            return number < (18 if condition.endswith("+1") else 6)
        return number < (6 if condition == "ablate random[0]" else 0 if condition == "ablate extracted" else 12)

    made = completions(refused)
    shares = control_rates.rates(made).set_index(["prompt_set", "group", "outcome"])["rate"][SETS[0]]
    assert shares["random", "refusal"] == 0.5 and shares["extracted +1", "refusal"] == 0.5
    assert shares["extracted -1", "jailbreak"] == pytest.approx(22 / 24)
    assert shares["ablate extracted", "refusal"] == 0
    assert shares["ablate controls", "refusal"] == pytest.approx((6 + 3 * 12) / 96)
    average, worst = control_rates.rate_changes(made)
    assert average == 0.25  # though the mean rate of the random draws is that of the baseline
    assert worst.difference == pytest.approx(-10 / 24) and worst.only_second == 10


def test_the_studys_table_is_the_published_one():
    published = control_rates.study_table().pivot(index="model", columns="condition", values="rate")
    columns = ["extracted", "random", "orthogonal", "opposite", "baseline"]
    assert {model: [round(100 * x, 1) for x in row] for model, *row in published[columns].itertuples()} == {
        "mistral-7b-v0.3": [10, 34, 24, 84, 22],
        "qwen2-7b": [0, 1, 1.4, 30, 3],
        "llama-3.1-8b": [100, 76, 91, 100, 1],
    }
    said = control_rates.study_numbers()
    assert [said[f"ControlsStudy{name}RandomSd"] for name in ("Mistral", "Qwen", "Llama")] == ["13", "0.6", "16"]
    assert said["ControlsStudyQwenOrthogonal"] == "1.4" and said["ControlsStudyLlamaExtracted"] == "100"


# ---- the figures


def test_the_figures_plot_what_was_measured(special):
    _, metrics, _ = special
    panels = specificity.panels(metrics)
    figure = figures_controls.strips(panels)
    effects = specificity.swings(metrics)
    for place, family in enumerate(("random", "orthogonal", "shuffled", "topics", "balanced")):
        drawn, own = (figure.axes[0].collections[2 * place + i].get_offsets() for i in (0, 1))
        np.testing.assert_allclose(drawn[:, 0], effects[family])
        assert np.abs(drawn[:, 1] - place).max() < 0.2
        assert own[0, 0] == effects["extracted", 0]
    shares = control_rates.rates(completions(lambda number, condition: number < (2 if "-1" in condition else 12)))
    figure = figures_controls.generated(shares, control_rates.beside_study(shares, "ours"))
    heights = [[round(bar.get_height(), 1) for bar in axes.patches] for axes in figure.axes[2:]]
    assert heights[:3] == [[10, 34, 24, 84, 22], [0, 1, 1.4, 30, 3], [100, 76, 91, 100, 1]]
    assert heights[3] == [50, 70.8, 70.8, 91.7, 50]
    plt.close("all")


# ---- a run from end to end


def notebook(mode, root):
    """What the notebook does, on the tiny model."""
    run = runs.start(specificity.NOTEBOOK, model=tiny.ID, mode=mode, out="build", rows=64, max_new_tokens=4, seed=0)
    made, layer, openings = tiny.directions(), 1, [5, 6, 7]
    sides = [tiny.prompts(10, "harmful_extraction"), tiny.prompts(10, "harmless_extraction")]
    sides[1]["category"] = [f"topic {i % 5}" for i in range(10)]
    screened = pd.concat([tiny.prompts(4, name) for name in SETS], ignore_index=True)
    matching, count = tiny.prompts(2, "harmful_selection"), dict.fromkeys(FAMILIES, 4) | {"balanced": 3}

    def families(store, counts):
        return control_screens.families(store, made, sides, counts, 0)

    def screen(store):
        model = chunks.load_model(store)
        return control_screens.screen(model, screened, made, families(store, count), layer, openings)

    def equal_kl(store):
        few = families(store, dict.fromkeys(control_screens.MATCHED, 3))
        harmful = screened[screened["prompt_set"] == SETS[0]]
        return control_screens.equal_kl(chunks.load_model(store), matching, harmful, made, few, layer, openings)

    def ablation(store):
        few = families(store, dict.fromkeys(control_screens.MATCHED, 3))
        return control_screens.ablation(chunks.load_model(store), screened, made, few, layer, openings)

    measures = {"screen": screen, "equal_kl": equal_kl, "ablation": ablation}
    metrics = pd.concat([runs.metrics(run, name, one, modules=(control_screens,)) for name, one in measures.items()])
    conditions = control_screens.generated_conditions(run.store, made, sides, layer, 2, 0)
    rows = runs.completions(run, screened, conditions, max_new_tokens=4, thresholds=tiny.THRESHOLDS)
    runs.finish(run)
    return specificity.numbers(rows, metrics, {"parameters": run.parameters}), [one.name for one in conditions]


def test_a_run_from_end_to_end(tmp_path, monkeypatch, tiny_models):
    tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)
    said, names = notebook("measure", tmp_path)
    assert len(names) == len(set(names)) == 1 + 2 * (1 + 4 * 2) + 5
    assert names[:3] == ["baseline", "extracted +1", "extracted -1"] and names[-1] == "ablate topics[0]"
    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    shutil.rmtree(tmp_path / "build")
    monkeypatch.setattr(models, "load", lambda *_: 1 / 0)
    assert notebook("replay", tmp_path) == (said, names)
    assert all(re.fullmatch("Controls[A-Za-z]+", name) and isinstance(value, str) for name, value in said.items())
    assert set(specificity.HEADLINES) <= set(said)
    assert (said["ControlsDraws"], said["ControlsKlDraws"], said["ControlsBalancedDraws"]) == ("4", "3", "3")
    assert (said["ControlsPrompts"], said["ControlsLayer"], said["ControlsVerdict"]) == ("4", "1", "inconclusive")
    words = specificity.prose(said)
    assert "inconclusive" in words and "topics" in words and "nan" not in words


def test_too_few_topics_for_the_draws_end_in_one_sentence(tmp_path, monkeypatch, tiny_models):
    tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)
    store = chunks.open_store(tiny.ID)
    sides = [tiny.prompts(4, "harmful_extraction"), tiny.prompts(4, "harmless_extraction")]
    with pytest.raises(CompendiumError, match=r"^2 topics give 1 different contrasts, and 9 were asked for: .*\.$"):
        control_screens.families(store, tiny.directions(), sides, {"topics": 9}, 0)


def test_the_studys_file_names_its_source():
    assert control_rates.study_table()["source"].str.contains("section 3.1").all()
    assert (ROOT / "data" / "study_controls.csv").read_text(encoding="utf-8").count("\n") == 16
