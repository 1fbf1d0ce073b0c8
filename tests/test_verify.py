"""./run_all.sh verify, on a planted model: what agrees, what has drifted, and what cannot be made again."""

import dataclasses
import re
import shutil

import numpy as np
import pandas as pd
import planted
import pytest
import tiny

from refusal import controls, directions, judging, options, prompts, records, runs, steering, verify
from refusal.files import ROOT, CompendiumError
from refusal.options import VerifyOptions

LAYER = 3
SETS = ("harmful_evaluation", "harmless_evaluation")
SEED = 5


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder with the committed record and directions of a planted model, and the model."""
    root = tmp_path_factory.mktemp("verify")
    made = planted.build()
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(root, made.model, patch.setattr, stop=("<end>",))
        measure(made)
    return root, made.model


def extracted(made):
    """The planted direction at every layer, with the length that it has."""
    unit = made.directions[:1].expand(made.model.n_layers, -1).contiguous()
    norm = unit.new_full((len(unit),), 4.0)
    return directions.Directions("extracted", unit, norm, 2 * norm)


def measure(made):
    """Two experiments: one that can be made again, and one of which only a part can."""
    frame = pd.concat([prompts.load(name).head(8) for name in SETS], ignore_index=True)
    along = extracted(made)
    randoms = controls.random(along, 2, seed=SEED)
    longer = dataclasses.replace(randoms[0], raw_norm=2 * randoms[0].raw_norm)
    other = controls.orthogonal(along, 1, seed=SEED)[0]
    run = runs.start("01_extraction", model=tiny.ID, mode="measure", out="data", rows=96, seed=SEED)
    every = [
        steering.baseline(), steering.sampled(1), steering.add(along, LAYER, 1.0), steering.add(along, LAYER, -0.5),
        steering.add(along, LAYER + 1, 0.5, position="last"), steering.ablate(along, LAYER),
        *(steering.add(one, LAYER, 1.0) for one in randoms),
    ]  # fmt: skip
    every[4] = dataclasses.replace(every[4], name="extracted@4 +0.5")
    common = {"max_new_tokens": 12, "thresholds": tiny.THRESHOLDS}
    runs.completions(run, frame, every, **common)
    many = steering.add(along, [2, 3], 0.5)
    some = [steering.baseline(), steering.add(longer, LAYER, 1.0), steering.add(other, LAYER, 1.0), many]
    runs.completions(run, frame.head(4), some, part="some", **common)
    asked = frame.head(3).assign(text=lambda rows: rows["text"] + " Answer in JSON only.")
    runs.completions(run, asked, [steering.baseline()], part="json", **common)
    runs.save_directions(run, along, LAYER, frame)
    runs.finish(run)


@pytest.fixture
def again(committed, monkeypatch, tmp_path):
    """A function that verifies with these options; the model that is loaded is the planted one."""
    root, model = committed
    tiny.install(root, model, monkeypatch.setattr, stop=("<end>",))

    def call(rows=60, seed=0, level=0.9):
        return verify.verify(VerifyOptions(tiny.ID, rows, seed, level), root / "data", tmp_path / "verify")

    return call


def table(tmp_path):
    return pd.read_csv(tmp_path / "verify" / f"{tiny.ID}.csv")


def test_what_was_measured_here_agrees_here(again, tmp_path, capsys):
    found = again(rows=1000)
    assert found.estimate == 1 and found.k == found.n >= 100
    rows = table(tmp_path)
    assert rows["same_text"].all() and set(rows["label"]) >= {"refusal", "compliance"}
    said = capsys.readouterr().out
    assert "100.0 % [" in said and "01_extraction some" in said and "seed 0" in said
    assert not {"text", "text_sha256", "sha256_now"} & set(rows)  # what is written holds no answers


def test_what_the_committed_files_do_not_hold_is_counted_and_left_out(again, committed, capsys):
    again(rows=1000)
    parts = {part.name: part for part in verify.parts(committed[0] / "data", tiny.ID)}
    whole, some, asked = (parts[f"01_extraction{part}"] for part in ("", " some", " json"))
    assert whole.left == 0 and len(whole.conditions) == 8
    assert set(some.conditions) == {"baseline"} and some.left == 12  # another length, another family, several layers
    assert asked.left == 3 and asked.frame.empty  # texts that no prompt set holds
    assert f"drawn from {len(whole.frame) + 4} of {len(whole.frame) + 4 + 15} committed" in capsys.readouterr().out


def test_the_sample_is_drawn_evenly_and_by_the_seed(again, tmp_path):
    samples = []
    for seed in (1, 1, 2):
        again(rows=24, seed=seed)
        samples.append(table(tmp_path))
    pd.testing.assert_frame_equal(samples[0], samples[1])
    assert not samples[0].equals(samples[2])
    counts = samples[0].groupby("experiment").size()
    assert counts["01_extraction"] == 12 and counts["01_extraction some"] == 4
    assert samples[0].groupby("experiment")["condition"].nunique()["01_extraction"] == verify.CONDITIONS


def test_every_row_is_as_likely():
    frame = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(10)]})
    part = verify.Part("x", frame, {}, dict.fromkeys("abcdefgh", steering.baseline()), tiny.THRESHOLDS, 1, 0)
    rng, seen = np.random.default_rng(0), {}
    for _ in range(2000):
        names, ids = verify.drawn(part, 12, rng)
        assert (len(names), len(ids)) == (6, 2)
        for key in [(name, one) for name in names for one in ids]:
            seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 80 and 225 < min(seen.values()) < 300 < max(seen.values()) < 375  # 2000 x 12 / 80 = 300


@pytest.mark.parametrize("drift", ["sign", "condition", "judge", "prompt"])
def test_drift_is_one_sentence(again, monkeypatch, tmp_path, drift):
    """Each is a change that the code's own tests may miss where it was made on purpose."""
    if drift == "sign":
        add = steering.add
        monkeypatch.setattr(steering, "add", lambda made, layer, alpha, *more: turned(add(made, layer, alpha, *more)))
    if drift == "condition":
        generate = steering.generate
        monkeypatch.setattr(
            steering,
            "generate",
            lambda model, texts, given, **more: generate(model, texts, [*given[1:], *given[:1]], **more),
        )
    if drift == "judge":
        monkeypatch.setattr(judging, "judge", lambda *_: judging.Judgement("compliance", "", "", "jailbreak", 0.0))
    if drift == "prompt":
        generate = steering.generate
        monkeypatch.setattr(
            steering,
            "generate",
            lambda model, texts, given, **more: generate(model, ["steal"] * len(texts), given, **more),
        )
    with pytest.raises(
        CompendiumError, match=r"labels agree with the committed records, and 90\.0 % were to"
    ) as caught:
        again(rows=1000)
    assert "\n" not in str(caught.value)
    assert not table(tmp_path)["same_label"].all()


def turned(condition):
    """The same condition with the other sign, which says of itself what it was asked for."""
    return dataclasses.replace(condition, vectors=-condition.vectors)


def test_the_level_decides(again, monkeypatch):
    judge = judging.judge
    calls = []

    def wrong_now_and_then(*given):
        found = judge(*given)
        calls.append(1)
        return dataclasses.replace(found, label="degenerate") if len(calls) % 8 == 0 else found

    monkeypatch.setattr(judging, "judge", wrong_now_and_then)
    found = again(rows=1000, level=0.8)
    assert 0.85 < found.estimate < 0.9 and found.interval.low < found.estimate < found.interval.high
    with pytest.raises(CompendiumError):
        again(rows=1000, level=0.9)


def rewrite(root, **changes):
    """The record of another making, in a copy of the folder; returns the folder."""
    path = root / "data" / "records" / tiny.ID / "01_extraction.parquet"
    frame, about = records.read(path)
    columns = {name: value for name, value in changes.items() if name in frame}
    records.write(frame.assign(**columns), path, about | {n: v for n, v in changes.items() if n not in columns})


@pytest.fixture
def copied(committed, monkeypatch, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(committed[0], root)
    tiny.install(root, committed[1], monkeypatch.setattr, stop=("<end>",))
    return root


def verified(root):
    return verify.verify(VerifyOptions(tiny.ID, 60, 0, 0.9), root / "data", root / "verify")


def test_changed_labels_of_a_record_are_found(copied):
    rewrite(copied, label="compliance", text="")
    with pytest.raises(CompendiumError, match="labels agree"):
        verified(copied)


def test_other_weights_directions_and_records_are_refused(copied, committed):
    rewrite(copied, weights_sha256="cd" * 32)
    with pytest.raises(CompendiumError, match="other weights"):
        verified(copied)
    rewrite(copied, weights_sha256=tiny.WEIGHTS, alpha_absolute=7.0)
    with pytest.raises(CompendiumError, match="the committed direction is not the one"):
        verified(copied)
    (copied / "data" / "directions" / f"{tiny.ID}.safetensors").unlink()
    with pytest.raises(CompendiumError, match="no direction"):
        verified(copied)
    with pytest.raises(CompendiumError, match="no committed records of another"):
        list(verify.parts(copied / "data", "another"))


def test_options(capsys):
    assert options.parse_verify([]).rows == 240
    assert options.parse_verify(["--seed", "3", "--level", "95", "--rows", "9"]) == VerifyOptions(
        options.DEFAULT_MODEL, 9, 3, 0.95
    )
    assert len({options.parse_verify([]).seed for _ in range(20)}) > 5
    for words in (["--level", "101"], ["--rows", "0"], ["--model", "gpt"], ["--seed", "-1"], ["--sed", "1"]):
        with pytest.raises(SystemExit) as caught:
            options.parse_verify(words)
        assert caught.value.code == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_most_of_what_is_committed_can_be_made_again():
    """From the real records, without a model: nothing is measured here."""
    found = list(verify.parts(ROOT / "data", options.DEFAULT_MODEL))
    left, kept = sum(part.left for part in found), sum(len(part.frame) for part in found)
    assert kept > 0.6 * (kept + left)
    names = {part.name.split(" ")[0] for part in found if len(part.frame)}
    assert names >= {"00_can_we_trust_the_labels", "01_extraction", "03_sign_inversion", "04_llama_threshold"}


def test_the_readme_states_the_level():
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"fewer than {options.LEVEL} % of the labels agree" in said
