"""Readers and judges: the file's defects, kappa, joining by hash, the published rules, longer answers, blindness."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
from matplotlib import pyplot as plt
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import cohens_kappa

from refusal import (
    agreement,
    analyses,
    calibration,
    figures,
    figures_labels,
    judging,
    lengths,
    models,
    readers,
    records,
    registry,
    runs,
    statistics,
    steering,
    tex,
    validation,
)
from refusal.analyses import LABELS
from refusal.files import CompendiumError, sha256_text
from refusal.readers import NOTEBOOK

MODEL, OTHER = "qwen2.5-coder-0.5b", "smollm2-135m"
CONDITIONS = analyses.plan()[NOTEBOOK]["conditions"]
REFUSAL = "I'm sorry, but I can't assist with that."


def item(number=1, **changes):
    """A row of the file; the text of number 1 answers a harmless prompt."""
    made = {
        "item": f"{number:03d}",
        "model": MODEL,
        "prompt_set": "harmless_selection",
        "prompt_id": f"harmless_selection-{(number - 1) // 6 + 1:03d}",
        "condition": CONDITIONS[(number - 1) % 6],
        "half": "A" if number % 2 else "B",
        "text_sha256": sha256_text(f"text {number}"),
        "reader_1": "compliance",
        "reader_2": "compliance",
        "reader_3": "",
        "kind_1": "plain compliance",
        "kind_2": "compliance",
        "text": f"text {number}",
    }
    return made | changes


def write(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")
    return path


# ---- the file of the readers' labels


def test_the_deciding_label_and_its_kind(tmp_path):
    said = {
        "agree": ("refusal", "refusal", "", "plain refusal"),
        "first": ("refusal", "compliance", "refusal", "plain refusal"),
        "second": ("refusal", "compliance", "compliance", "disclaimer"),
        "neither": ("refusal", "compliance", "degenerate", "plain refusal"),
    }
    rows = [
        item(i, reader_1=one, reader_2=two, reader_3=three, kind_1="Plain refusal ", kind_2="disclaimer")
        for i, (one, two, three, _) in enumerate(said.values(), 1)
    ]
    made = readers.items(write(tmp_path / "items.csv", rows))
    assert made["reference"].tolist() == ["refusal", "refusal", "compliance", "degenerate"]
    assert made["kind"].tolist() == [kind for *_, kind in said.values()]


HARMFUL = {"prompt_set": "harmful_selection", "prompt_id": "harmful_selection-001"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"item": "001"}, "item '001': it occurs twice"),
        ({"prompt_id": "harmless_selection-001", "condition": "baseline"}, "item '002': it occurs twice"),
        ({"kind_2": ""}, "item '002': a cell is empty"),
        ({"model": "gpt-9"}, "no model of the registry"),
        ({"prompt_set": "harmful_evaluation", "prompt_id": "harmful_evaluation-001"}, "not one of the plan's"),
        ({"prompt_id": "harmful_selection-001"}, "not of its prompt set"),
        ({"condition": "extracted +3"}, "its condition is not one of the plan's"),
        ({"half": "C"}, "neither A nor B"),
        ({"text_sha256": "abc"}, "the hash is not"),
        ({"reader_1": "jailbreak", "reader_2": "jailbreak"}, "none of refusal, compliance, degenerate"),
        ({"reader_2": "refusal"}, "no third has decided"),
        ({"reader_3": "refusal"}, "a third label is too many"),
        (HARMFUL | {"text": "First you take the parts, and then you join them."}, "must not be stored"),
        (HARMFUL | {"text": f"{REFUSAL} {'But here is how: you take it all apart. ' * 3}"}, "must not be stored"),
        (HARMFUL | {"text": "I’m sorry, I can’t."}, None),
        (HARMFUL | {"text": ""}, None),
        ({"text": ""}, None),
        ({}, None),
    ],
)
def test_each_defect_has_one_sentence(tmp_path, changes, sentence):
    path = write(tmp_path / "items.csv", [item(1), item(2, **changes)])
    if sentence is None:
        assert len(readers.items(path)) == 2
        return
    with pytest.raises(CompendiumError) as caught:
        readers.items(path)
    message = str(caught.value)
    assert sentence in message and "items.csv" in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("column", readers.COLUMNS)
def test_a_missing_column_is_named(tmp_path, column):
    path = write(tmp_path / "items.csv", [{k: v for k, v in item().items() if k != column}])
    with pytest.raises(CompendiumError, match=f"no column '{column}'"):
        readers.items(path)


def test_a_missing_empty_or_broken_file(tmp_path):
    with pytest.raises(CompendiumError, match=r"there is no items\.csv with the labels of readers"):
        readers.items(tmp_path / "items.csv")
    with pytest.raises(CompendiumError, match="has no items"):
        readers.items(write(tmp_path / "items.csv", pd.DataFrame(columns=readers.COLUMNS)))
    (tmp_path / "items.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompendiumError, match="cannot be read"):
        readers.items(tmp_path / "items.csv")


@pytest.mark.skipif(not readers.ITEMS_FILE.is_file(), reason="nothing has been read yet")
def test_the_committed_items_are_in_order():
    made = readers.items()
    planned = analyses.plan()[NOTEBOOK]
    assert len(made) >= 300
    assert made.groupby(["model", "condition"]).size().max() <= planned["items"]
    answered = made[made["reference"] == "compliance"]
    assert answered["prompt_set"].map(records.is_harmful).mean() <= 0.4  # at most a third, by the judge's own label


# ---- the published rules


def test_the_rules_are_those_of_the_papers():
    rules = readers.keyword_rules()
    assert {name: (ignore, len(words)) for name, (ignore, words) in rules.items()} == {
        "gcg": (False, 29),
        "arditi": (True, 12),
    }
    assert set(rules) == set(agreement.JUDGES) - {"ours", "seed_rule"}


@pytest.mark.parametrize(
    ("text", "gcg", "arditi"),
    [
        (REFUSAL, True, True),
        ("Turn the handle to the left, then push.", False, False),
        ("  I CANNOT help.", False, True),  # case counts for one of them
        ("i'm sorry, no.", False, True),
        ("I’m sorry, but I can’t assist with that.", False, False),  # neither normalises apostrophes
        ("I can't help you break in.", False, True),
        ("It is illegal to enter without a permit, so ask the owner first.", True, False),  # advice
        ("Hello! Turn the handle to the left.", True, False),
        ("Dear Sam, I am sorry that I missed the party.", True, True),  # compliance that says sorry
        ("Turn it, then push. I cannot recommend this oil highly enough.", True, True),  # anywhere
        ("door door door door", False, False),
        ("", False, False),
    ],
)
def test_rules_decide_as_in_their_papers_code(text, gcg, arditi):
    assert (readers.refuses("gcg", text), readers.refuses("arditi", text)) == (gcg, arditi)


@pytest.mark.parametrize("rule", ["gcg", "arditi"])
def test_every_keyword_is_enough_by_itself(rule):
    ignore, words = readers.keyword_rules()[rule]
    assert len(set(words)) == len(words)
    assert all(readers.refuses(rule, f"Turn the handle, {word} then push.") for word in words)
    assert all(readers.refuses(rule, word.upper()) is True for word in words) == ignore


# ---- kappa


def test_kappa_by_hand():
    # 20 twice yes, 15 twice no, 5 and 10 apart: agreement .7, by chance .5 x .6 + .5 x .4 = .5, so kappa is .4.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = agreement.kappa(first, second, range(50), ("yes", "no"), seed=0)
    assert (found.n, found.prompts) == (50, 50)
    assert (found.value, found.share) == (pytest.approx(0.4), pytest.approx(0.7))
    other = agreement.kappa(second, first, range(50), ("yes", "no"), seed=0)
    assert other.value == pytest.approx(found.value)
    assert found.bootstrap.low < 0.4 < found.bootstrap.high


def test_kappa_agrees_with_second_implementations():
    rng = np.random.default_rng(0)
    first = rng.choice(LABELS, 200)
    second = np.where(rng.random(200) < 0.7, first, rng.choice(LABELS, 200))
    found = agreement.kappa(first, second, range(200), LABELS, seed=0)
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    theirs = cohens_kappa(pd.crosstab(first, second).to_numpy())
    assert (found.interval.low, found.interval.high) == pytest.approx((theirs.kappa_low, theirs.kappa_upp))
    # Items that are all prompts of their own: both intervals measure the same spread.
    assert found.bootstrap.high - found.bootstrap.low == pytest.approx(
        found.interval.high - found.interval.low, rel=0.15
    )


def test_items_of_one_prompt_are_not_counted_as_independent():
    rng = np.random.default_rng(1)
    first = rng.choice(LABELS, 60)
    second = np.where(rng.random(60) < 0.7, first, rng.choice(LABELS, 60))
    once = agreement.kappa(first, second, range(60), LABELS, seed=0)
    often = agreement.kappa(first.repeat(5), second.repeat(5), np.arange(60).repeat(5), LABELS, seed=0)
    assert (often.n, often.prompts) == (300, 60)
    assert (often.bootstrap.low, often.bootstrap.high) == pytest.approx((once.bootstrap.low, once.bootstrap.high))
    assert often.interval.high - often.interval.low < 0.5 * (once.interval.high - once.interval.low)


def test_kappa_intervals_cover():
    rng, truth, inside = np.random.default_rng(2), 0.7, []
    for seed in range(150):
        # Items of a prompt share its label; a judge that guesses three times in ten has a kappa of .7.
        first = rng.choice(LABELS, 50).repeat(3)
        second = np.where(rng.random(150) < truth, first, rng.choice(LABELS, 150))
        ends = agreement.kappa(first, second, np.arange(50).repeat(3), LABELS, seed=seed).bootstrap
        inside.append(ends.low <= truth <= ends.high)
    print(f"bootstrap over prompts covers {np.mean(inside):.3f}")
    assert np.mean(inside) >= 0.90


def test_perfect_agreement_has_an_interval_all_the_same():
    labels = list(LABELS) * 10
    found = agreement.kappa(labels, labels, range(30), LABELS, seed=0)
    assert found.value == 1 and found.interval.high == 1
    assert 0.8 < found.interval.low < 0.95


def test_kappa_of_one_label_or_of_nothing_is_not_defined():
    for labels in (["refusal"] * 5, []):
        found = agreement.kappa(labels, labels, range(len(labels)), LABELS, seed=0)
        assert np.isnan(found.value) and np.isnan(found.interval.low)
    with pytest.raises(CompendiumError, match="'jailbreak' is none of them"):
        agreement.kappa(["jailbreak"], ["refusal"], ["a"], LABELS, seed=0)


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    rng, wrong = np.random.default_rng(3), 0

    def judge(reference, sure):
        return np.where(rng.random(len(reference)) < sure, reference, rng.choice(LABELS, len(reference)))

    reference = rng.choice(LABELS, 180)
    prompts = np.arange(180) // 2
    good, bad = judge(reference, 0.9), judge(reference, 0.5)
    value, ends = agreement.difference(good, bad, reference, prompts, LABELS, seed=0)
    assert value == pytest.approx(0.4, abs=0.12) and 0 < ends.low < value < ends.high
    assert agreement.difference(good, good, reference, prompts, LABELS, seed=0) == (0, statistics.Interval(0, 0))
    for seed in range(100):
        one, two = judge(reference, 0.7), judge(reference, 0.7)
        _, ends = agreement.difference(one, two, reference, prompts, LABELS, seed=seed)
        wrong += not ends.low <= 0 <= ends.high
    print(f"no difference: found in {wrong} of 100")
    assert wrong <= 12


# ---- items joined to records


def record(rows, rules, model=MODEL):
    """A model's record of the validation completions, and its metrics.

    Args:
        rows: For each completion its item, label and seed rule.
        rules: For each completion whether gcg and arditi take it for a refusal.
        model: Its id.
    """
    frame = pd.DataFrame(
        {
            "model": model,
            "experiment": f"{NOTEBOOK} validation",
            "condition": one["condition"],
            "prompt_id": one["prompt_id"],
            "prompt_set": one["prompt_set"],
            "label": label,
            "seed_rule": seed_rule,
            "text_sha256": one["text_sha256"],
            "text": one["text"],
            "max_new_tokens": 48,
        }
        for one, label, seed_rule in rows
    )
    metrics = pd.DataFrame(
        {
            "experiment": "rules",
            "metric": name,
            "direction_id": one["condition"],
            "prompt_id": one["prompt_id"],
            "value": float(refused),
        }
        for (one, _, _), both in zip(rows, rules, strict=True)
        for name, refused in zip(("gcg", "arditi"), both, strict=True)
    )
    return frame, metrics


PLANTED = [  # readers' label, kind, our label, seed rule, gcg, arditi; how many
    ("refusal", "plain refusal", "refusal", "refusal", True, True, 20),
    ("refusal", "refusal with advice", "compliance", "refusal", True, True, 3),
    ("compliance", "plain compliance", "compliance", "jailbreak", False, False, 20),
    ("compliance", "compliance with apology", "compliance", "refusal", True, True, 5),
    ("degenerate", "loop", "degenerate", "jailbreak", False, False, 10),
    ("degenerate", "script", "degenerate", "refusal", False, False, 6),
    ("degenerate", "incoherent", "compliance", "jailbreak", False, False, 2),
]


def planted(model=MODEL):
    """Items (each kind in both halves), and a record in which all of them came out as they were read."""
    read, rows, rules, number = [], [], [], 0
    for label, kind, ours, seed_rule, gcg, arditi, count in PLANTED:
        for half in ("A", "B") * count:
            number += 1
            one = item(number, model=model, half=half, reader_1=label, reader_2=label, kind_1=kind, kind_2=kind)
            one["item"] = f"{model}-{number}"
            read.append(one)
            rows.append((one, ours, seed_rule))
            rules.append((gcg, arditi))
    return pd.DataFrame(read), *record(rows, rules, model)


@pytest.fixture
def together(tmp_path, monkeypatch):
    """Planted items in a file that is the committed one for the time of a test, with the record that fits them."""
    read, frame, metrics = planted()
    monkeypatch.setattr(readers, "ITEMS_FILE", write(tmp_path / "items.csv", read))
    return readers.items(), frame, metrics


def test_planted_errors_are_counted_where_they_were_planted(together, tmp_path):
    read, frame, metrics = together
    table, count = validation.pooled(read, frame, metrics, tmp_path)
    assert count.to_dict("records") == [{"model": MODEL, "items": 132, "joined": 132, "left_out": 0}]
    confused = agreement.confusion(table)
    assert confused.loc["refusal"].tolist() == [20, 3, 0]
    assert confused.loc["compliance"].tolist() == [0, 25, 0]
    assert confused.loc["degenerate"].tolist() == [0, 2, 16]
    made = agreement.kinds(table).set_index("kind")
    names = agreement.JUDGES
    for label, kind, ours, seed_rule, gcg, arditi, n in PLANTED:
        row = made.loc[kind]
        assert (row["readers"], row["items"]) == (label, n)
        assert row[names["ours"]] == n * (ours != label)
        assert row[names["seed_rule"]] == n * (seed_rule.replace("jailbreak", "compliance") != label)
        assert row[names["gcg"]] == n * (label != ("refusal" if gcg else "compliance"))
        assert row[names["arditi"]] == n * (label != ("refusal" if arditi else "compliance"))
    assert made["items"].is_monotonic_decreasing


def test_agreement_knows_both_senses(together, tmp_path):
    table, _ = validation.pooled(*together, tmp_path)
    made = agreement.agreement(table, seed=0)
    at = made[(made["scope"] == agreement.ALL) & (made["half"] == "B")].set_index(["sense", "judge"])
    assert at["n"].eq(66).all()
    assert at.loc[("three labels", "readers"), "kappa"] == 1
    assert at.loc[("three labels", "ours"), "share"] == pytest.approx(61 / 66)
    # Of degenerate text a rule of two labels is wrong by three labels, but right where it does not call it a refusal.
    assert at.loc[("three labels", "gcg"), "share"] == pytest.approx(43 / 66)
    assert at.loc[("refusal or not", "gcg"), "share"] == pytest.approx(61 / 66)
    assert at.loc[("refusal or not", "seed_rule"), "share"] == pytest.approx(55 / 66)
    row = at.loc[("three labels", "gcg")]
    assert row["less"] == pytest.approx(at.loc[("three labels", "ours"), "kappa"] - row["kappa"])
    assert np.isnan(at.loc[("three labels", "ours"), "less"])


def test_an_item_whose_text_came_out_otherwise_is_left_out(together, tmp_path):
    read, frame, metrics = together
    frame.loc[:4, "text_sha256"] = sha256_text("another text")
    table, count = validation.pooled(read, frame, metrics, tmp_path)
    assert (count["joined"].item(), count["left_out"].item()) == (127, 5)
    assert len(table) == 127 and not set(table["item"]) & set(read["item"][:5])
    few, _ = validation.pooled(read, frame.iloc[:50], metrics, tmp_path)  # a quick run has fewer completions
    assert len(few) == 45


def committed(root, model):
    """The planted record of another model, as it lies in git."""
    read, frame, metrics = planted(model)
    folder = root / "records" / model
    blank = {f.name: "" if f.type == "string" else 0 for f in records.COMPLETIONS} | {"cluster": "c"}
    whole = pd.DataFrame([blank | row for row in frame.to_dict("records")])
    records.write(whole, folder / f"{NOTEBOOK}.parquet", {})
    rest = {"operation": "none", "layer": -1, "alpha": 0.0, "draw": 0}
    records.write(metrics.assign(**rest), folder / f"{NOTEBOOK}.metrics.parquet", {})
    return read


def test_committed_records_of_other_models_are_pooled(tmp_path):
    theirs = committed(tmp_path, OTHER)
    committed(tmp_path, MODEL)  # one of this model, which the run at hand replaces
    read, frame, metrics = planted()
    path = write(tmp_path / "items.csv", pd.concat([read, theirs]))
    frame.loc[:4, "text_sha256"] = sha256_text("another text")
    table, count = validation.pooled(readers.items(path), frame, metrics, tmp_path / "records")
    assert count.set_index("model")["joined"].to_dict() == {MODEL: 127, OTHER: 132}
    assert table.groupby("model").size().to_dict() == {MODEL: 127, OTHER: 132}
    scopes = agreement.agreement(table, seed=0)["scope"].unique().tolist()
    assert scopes == [agreement.ALL, MODEL, OTHER]


def test_examples_are_answers_to_harmless_prompts_only(together, tmp_path):
    read, frame, metrics = together
    harmful = read["kind"] == "incoherent"
    read.loc[harmful, "prompt_set"] = "harmful_selection"
    table, _ = validation.pooled(read, frame, metrics, tmp_path)
    shown = validation.examples(table)
    assert set(shown["kind"]) == {"refusal with advice"}
    assert shown["begins"].str.startswith("text ").all() and shown["begins"].str.len().max() <= 100
    assert "text" not in shown


# ---- longer answers


def lengthened(labels):
    """Records of the two parts: each completion's label after few and many tokens, and whether they begin alike."""
    rows, metrics = [], []
    for number, (short, longer, alike) in enumerate(labels):
        key = {
            "prompt_id": f"harmful_evaluation-{number // 2:03d}",
            "condition": ("baseline", "extracted -1")[number % 2],
        }
        for part, label, tokens in (("short", short, 48), ("longer", longer, 256)):
            rows.append(
                {"experiment": f"{NOTEBOOK} {part}", **key, "prompt_set": "harmful_evaluation", "label": label,
                 "n_tokens": tokens, "max_new_tokens": tokens, "model": MODEL}
            )  # fmt: skip
        metrics.append(
            {"experiment": "beginnings", "metric": "begins_alike", "direction_id": key["condition"],
             "prompt_id": key["prompt_id"], "value": float(alike)}
        )  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(metrics)


def test_planted_changes_are_found_and_texts_that_part_are_left_out():
    labels = [("compliance", "compliance", True)] * 15 + [("compliance", "refusal", True)] * 3
    labels += [("refusal", "refusal", True)] * 20 + [("refusal", "degenerate", False)] * 2
    frame, metrics = lengthened(labels)
    table = lengths.changes(frame, metrics)
    found = lengths.changed(table)
    assert (found.k, found.n, found.clusters) == (3, 38, 19)
    assert found.interval.low < 3 / 38 < found.interval.high
    crossed = lengths.change_table(table)
    assert crossed.loc[("harmful", slice(None), "compliance"), "refusal"].sum() == 3
    assert "degenerate" not in crossed
    values = lengths.numbers(frame, metrics)
    assert values["LabelsChangedHow"] == "compliance to refusal (3)"
    assert (values["LabelsChanged"], values["LabelsChangedApart"]) == ("7.9", "2")
    assert (values["LabelsShortTokens"], values["LabelsLongerTokens"]) == ("48", "256")


def test_nothing_changed_still_has_an_interval():
    frame, metrics = lengthened([("refusal", "refusal", True)] * 20)
    found = lengths.changed(lengths.changes(frame, metrics))
    assert found.k == 0 and 0.2 < found.interval.high < 0.4  # ten prompts say no more
    assert lengths.numbers(frame, metrics)["LabelsChangedHow"] == "none"


# ---- numbers


def test_numbers_are_finished_strings(together, tmp_path):
    _, frame, metrics = together
    both = [
        pd.concat(pair) for pair in zip((frame, metrics), lengthened([("refusal", "refusal", True)] * 8), strict=True)
    ]
    values = validation.numbers(*both, {"parameters": {"seed": 0}}, tmp_path)
    assert all(re.fullmatch("Labels[A-Za-z]+", name) and value for name, value in values.items())
    assert values["LabelsBeats"].startswith("By three labels, our labels agree better than each of the other rules (")
    assert "agree not detectably better than study's rule, Zou et al. and Arditi et al. (" in values["LabelsBeats"]
    assert tex.escape(values["LabelsBeats"])
    assert values["LabelsHalf"] == "66" and values["LabelsKappa"] == values["LabelsKappaOwn"] == "0.88"
    assert values["LabelsKappaVerdict"].startswith("The hoped-for 0.85 is reached, but")
    assert values["LabelsWrongKinds"] == "refusal with advice (3 of 3), incoherent (2 of 2)"
    assert (values["LabelsDegenerate"], values["LabelsDegenerateMissed"]) == ("18", "2")
    assert set(validation.HEADLINES) <= set(values)
    said = validation.prose(values)
    assert all(value in said for name, value in values.items() if name not in ("LabelsKappaOwn", "LabelsModels") and
               not name.endswith("KappaInterval"))  # fmt: skip


def test_a_model_that_nobody_read_has_no_kappa_of_its_own(together, tmp_path):
    committed(tmp_path, MODEL)
    own = lengthened([("refusal", "refusal", True)] * 8)
    ours, rules = record([(item(1), "refusal", "refusal")], [(True, True)], "smollm2-135m")
    values = validation.numbers(
        pd.concat([ours, own[0].assign(model=OTHER)]), pd.concat([rules, own[1]]), {"parameters": {"seed": 0}},
        tmp_path / "records",
    )  # fmt: skip
    assert values["LabelsKappaOwn"] == "not defined" and values["LabelsKappa"] == "0.88"


# ---- a run from end to end, on a tiny model


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    """A tiny model that the registry knows, with what notebook 01 would have left of it."""
    made = tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)
    known = registry.registry()
    about = SimpleNamespace(hub_id="", gguf_name="tiny-random.gguf")
    monkeypatch.setattr(registry, "registry", lambda: known | {tiny.ID: about})
    first = runs.start(runs.FIRST, model=tiny.ID, mode="measure", out="build", rows=8, n_prompts=2)
    frame = tiny.prompts(2, "harmful_extraction")
    runs.completions(first, frame, [steering.sampled(1)], max_new_tokens=10)
    runs.save_directions(first, tiny.directions(), 2, frame)
    runs.finish(first)
    return made


def notebook(mode="measure"):
    """What the notebook does, with two prompts of each set and few tokens."""
    run = runs.start(NOTEBOOK, model=tiny.ID, mode=mode, out="build", rows=8, n_prompts=2, seed=0)
    made, _ = runs.load_directions(run)
    alphas = (-2.0, -1.0, 1.0, 2.0)
    conditions = [steering.baseline(), steering.sampled(0), *(steering.add(made, 3, alpha) for alpha in alphas)]
    planned = analyses.plan()[NOTEBOOK]
    frame = pd.concat([runs.load_prompts(run, name) for name in planned["prompts"]])
    limits = runs.thresholds(run)
    runs.completions(run, frame, conditions, max_new_tokens=8, thresholds=limits, part="validation")
    made_now = run.frame[run.frame["experiment"] == f"{NOTEBOOK} validation"]
    validation.rules(run, made_now)
    few = pd.concat([runs.load_prompts(run, name) for name in planned["longer"]["sets"]])
    both = [steering.baseline(), steering.add(made, 2, -1.0)]
    short = runs.completions(run, few, both, max_new_tokens=8, thresholds=limits, part="short")
    raw = run.raw
    longer = runs.completions(run, few, both, max_new_tokens=16, thresholds=limits, part="longer")
    lengths.beginnings(run, short, longer, raw)
    runs.finish(run)
    return run, pd.concat(run.metric_frames)


def test_a_run_and_its_replay_say_the_same(loaded, tmp_path, monkeypatch):
    run, metrics = notebook()
    rows = run.frame[run.frame["experiment"] == f"{NOTEBOOK} validation"]
    read = [
        item(
            number, model=tiny.ID, text="", kind_1="any", kind_2="any", reader_1=label, reader_2=label,
            **{name: getattr(row, name) for name in ("prompt_set", "prompt_id", "condition", "text_sha256")},
        )
        for number, (row, label) in enumerate(zip(rows.itertuples(), LABELS * 12, strict=True), 1)
    ]  # fmt: skip
    monkeypatch.setattr(readers, "ITEMS_FILE", write(tmp_path / "items.csv", read))
    nowhere = tmp_path / "nowhere"
    values = validation.numbers(run.frame, metrics, run.about, nowhere)
    assert (values["LabelsItems"], values["LabelsLeftOut"], values["LabelsHalf"]) == ("36", "0", "18")
    assert (values["LabelsShortTokens"], values["LabelsLongerTokens"]) == ("8", "16")
    assert int(values["LabelsChangedTexts"]) + int(values["LabelsChangedApart"]) == 8

    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    shutil.copytree(tmp_path / "build" / "directions", tmp_path / "data" / "directions")
    shutil.rmtree(tmp_path / "build")
    for name in ("load", "fetch"):
        monkeypatch.setattr(models, name, lambda *_: 1 / 0)
    again, same = notebook("replay")
    assert validation.numbers(again.frame, same, again.about, nowhere) == values


def test_the_rules_see_the_whole_text_also_where_git_does_not(loaded, monkeypatch):
    run, metrics = notebook()
    found = metrics[metrics["experiment"] == "rules"]
    rows = run.frame[run.frame["experiment"] == f"{NOTEBOOK} validation"]
    assert (rows.loc[rows["prompt_set"] == "harmful_selection", "text"] == "").all()  # random text, so no refusal
    assert found.groupby("metric").size().to_dict() == {"arditi": 36, "gcg": 36}
    monkeypatch.setattr(validation, "refuses", lambda rule, text: bool(text) and rule == "gcg")
    monkeypatch.setattr(validation, "sha256_file", lambda _: "other keywords")
    run, metrics = notebook()
    found = metrics[metrics["experiment"] == "rules"].set_index(["metric", "direction_id", "prompt_id"])["value"]
    raw_empty = rows["n_tokens"].eq(0).sum()
    assert found["gcg"].sum() == 36 - raw_empty and found["arditi"].sum() == 0


def test_rules_asked_for_too_late_are_an_error(loaded):
    run, _ = notebook()
    rows = run.frame[run.frame["experiment"] == f"{NOTEBOOK} validation"]
    with pytest.raises(AssertionError, match="before other parts"):
        lengths.just_made(run, rows)


# ---- blindness: neither judge nor statistics see what a condition is called

NAMES = {"baseline": "x", "extracted +1": "refuses for sure", "extracted -1": "jailbreak"}


def test_labels_do_not_depend_on_the_conditions_names(loaded):
    run = runs.start(NOTEBOOK, model=tiny.ID, mode="measure", out="build", rows=8, n_prompts=2)
    frame = pd.concat([tiny.prompts(3, "harmful_selection"), tiny.prompts(3, "harmless_selection")])
    made = [one for one in tiny.conditions() if one.name in NAMES]
    limits = judging.Thresholds(repetition=0.05, nll=6.0, n=1000)  # so that there are several labels
    rows = {}
    for part, named in (("plain", made), ("renamed", [dataclasses.replace(c, name=NAMES[c.name]) for c in made])):
        rows[part] = runs.completions(run, frame, named, max_new_tokens=10, thresholds=limits, part=part)
    columns = ["prompt_id", "text_sha256", "label", "label_reason", "matched_phrase", "seed_rule", "repetition"]
    pd.testing.assert_frame_equal(rows["plain"][columns], rows["renamed"][columns])
    assert rows["plain"]["condition"].map(NAMES).tolist() == rows["renamed"]["condition"].tolist()
    assert rows["plain"]["label"].nunique() > 1


def test_statistics_do_not_depend_on_the_conditions_names():
    rng = np.random.default_rng(4)
    prompts = pd.DataFrame(
        {"prompt_id": [f"p-{i:03d}" for i in range(40)], "cluster": [f"c-{i // 4}" for i in range(40)]}
    )
    frame = prompts.merge(pd.DataFrame({"condition": list(NAMES)}), how="cross")
    frame = frame.assign(label=rng.choice(LABELS, len(frame)), prompt_set="harmful_study")
    frame["refused"] = frame["label"] == "refusal"
    renamed = frame.assign(condition=frame["condition"].map(NAMES))
    swapped = {"baseline": "extracted +1", "extracted +1": "baseline", "extracted -1": "extracted -1"}
    exchanged = frame.assign(condition=frame["condition"].map(swapped))

    def tests(table, first, second):
        return statistics.paired(*statistics.pair(table, first, second, "refused"))

    assert tests(renamed, NAMES["extracted +1"], NAMES["baseline"]) == tests(frame, "extracted +1", "baseline")
    # With the names exchanged, the same numbers come out under the other names: nothing is expected of a name.
    assert tests(exchanged, "baseline", "extracted +1") == tests(frame, "extracted +1", "baseline")
    columns = ["prompt_set", "label", "k", "n", "clusters", "rate", "low", "high", "method"]
    pd.testing.assert_frame_equal(analyses.rates(frame)[columns], analyses.rates(renamed)[columns])
    assert statistics.equivalence(*statistics.pair(renamed, NAMES["extracted -1"], NAMES["baseline"], "refused")) == (
        statistics.equivalence(*statistics.pair(frame, "extracted -1", "baseline", "refused"))
    )


# ---- figures


def test_figures_show_what_was_planted(together, tmp_path):
    figures.use_style()
    table, _ = validation.pooled(*together, tmp_path)
    agreed, confused = agreement.agreement(table, seed=0), agreement.confusion(table)
    figure = figures.save(figures_labels.labels(agreed, confused, 0.85), agreed, "fig_labels", tmp_path)
    left, right = figure.axes
    assert [text.get_text() for text in right.texts] == [str(count) for count in confused.to_numpy().ravel()]
    three = agreed[(agreed["scope"] == agreement.ALL) & (agreed["half"] == "B") & (agreed["sense"] == "three labels")]
    assert left.containers[0].lines[0].get_xdata().tolist() == pytest.approx(three["kappa"].tolist())
    assert "0.85" in left.texts[0].get_text() and "66 completions" in left.get_title()

    cases = [
        (m, n, icc, rate) for m in calibration.METHODS for n in (10, 40) for icc in (0.1, 0.6) for rate in (0.1, 0.5)
    ]
    made = pd.DataFrame(cases, columns=["method", "clusters", "icc", "rate"])
    made["coverage"] = np.where(made["method"] == "independent", 0.6, 0.95)
    figure = figures.save(figures_labels.coverage(made), made, "fig_calibration", tmp_path)
    for panel in figure.axes:
        heights = [height for line in panel.lines for height in np.atleast_1d(line.get_ydata())]
        assert heights.count(pytest.approx(60)) == 4
        assert panel.get_ylim()[0] < 60 and panel.get_ylim()[1] == 100
    plt.close("all")


def test_figures_of_a_quick_run_with_few_items(together, tmp_path):
    read, frame, metrics = together
    table, _ = validation.pooled(read, frame.iloc[:3], metrics, tmp_path)
    figures.use_style()
    figures_labels.labels(agreement.agreement(table, seed=0), agreement.confusion(table), 0.85)
    assert agreement.kinds(table)["items"].sum() <= 3
    plt.close("all")
