"""A notebook's run: measuring, replaying, relabelling, what a replay refuses, and the provenance of what is written."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from refusal import activations, directions, judging, models, prompts, records, runs, steering
from refusal.files import CompendiumError, sha256_text

NOTEBOOK = "03_sign_inversion"
PARAMETERS = {"rows": 8, "max_new_tokens": 10, "n_prompts": 0, "prompts_file": ""}


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    """The tiny model stands in for a registry's; the list grows with every load."""
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


@pytest.fixture(scope="module")
def once(tmp_path_factory, tiny_models):
    """A folder in which the usual measurement has been made."""
    root = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(root, tiny_models["qwen2"], patch.setattr)
        notebook(start())
    return root


@pytest.fixture
def measured(loaded, once, tmp_path):
    """The usual measurement has been made here."""
    shutil.copytree(once / "build", tmp_path / "build")


@pytest.fixture
def published(measured, tmp_path):
    """It has been published, too; the paths of its record and its metrics."""
    publish(tmp_path)
    return records.paths(tmp_path / "data", tiny.ID, NOTEBOOK)


def start(mode="measure", out="build", notebook=NOTEBOOK, **changes):
    return runs.start(notebook, model=tiny.ID, mode=mode, out=out, **(PARAMETERS | changes))


def frames():
    return pd.concat([tiny.prompts(3), tiny.prompts(2, "harmless_evaluation")], ignore_index=True)


def notebook(run, frame=None, conditions=None, value=0.5):
    """What a notebook does: completions, a metric, and the files."""
    made = runs.completions(
        run,
        frames() if frame is None else frame,
        conditions or tiny.conditions(),
        max_new_tokens=10,
        thresholds=tiny.THRESHOLDS,
    )
    metric = runs.metrics(
        run, "screen", lambda _: pd.DataFrame({"metric": "log_odds", "layer": [1, 2], "value": [value, 1.0]}), value
    )
    runs.finish(run)
    return made.reset_index(drop=True), metric


def publish(root):
    """What --publish does to a measured record."""
    shutil.copytree(root / "build" / "records", root / "data" / "records", dirs_exist_ok=True)
    if (root / "build" / "directions").is_dir():
        shutil.copytree(root / "build" / "directions", root / "data" / "directions", dirs_exist_ok=True)


def forbid(monkeypatch):
    """From here on nothing may be measured."""

    def refuse(*_, **__):
        raise AssertionError("something was measured")

    for module, name in ((models, "load"), (steering, "generate")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(activations, "last_token", refuse)


# ---- bad input


def test_an_unknown_model_lists_the_known_ones(loaded):
    with pytest.raises(CompendiumError) as caught:
        runs.start(NOTEBOOK, model="gpt-9", mode="measure", out="build", **PARAMETERS)
    assert "'gpt-9'" in str(caught.value)
    assert all(model_id in str(caught.value) for model_id in models.registry())


@pytest.mark.parametrize("mode", ["Replay", "", "measure ", None])
def test_an_unknown_mode(loaded, mode):
    with pytest.raises(CompendiumError, match=r"mode is .*, but must be 'replay' or 'measure'\."):
        start(mode=mode)


@pytest.mark.parametrize("name", ["rows", "max_new_tokens", "samples", "draws"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, "8", None, True, 100_001, float("nan"), [8]])
def test_counts_are_whole_and_positive(loaded, name, value):
    for mode in ("measure", "replay"):
        with pytest.raises(CompendiumError) as caught:
            start(mode=mode, **{name: value})
        assert str(caught.value) == f"{name} is {value!r}, but must be a whole number from 1 to 100000."
    assert loaded == []


@pytest.mark.parametrize("value", [-1, 1.5, "5", None, True])
def test_n_prompts_is_a_whole_number(loaded, value):
    with pytest.raises(CompendiumError, match=r"n_prompts is .*, but must be a whole number, 0 for all"):
        runs.load_prompts(start(n_prompts=value), "harmful_evaluation")


# ---- prompts


@pytest.mark.parametrize("count", [0, 1, 8, 100, 1000])
def test_n_prompts_takes_a_prefix(loaded, count):
    everything = prompts.load("harmful_evaluation")
    some = runs.load_prompts(start(n_prompts=count), "harmful_evaluation")
    pd.testing.assert_frame_equal(some, everything.head(count or 100))


def test_a_users_prompts_stay_flagged_and_their_text_is_treated_as_harmful(loaded, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("text,category\nHow do I bake bread?,food\nWhat is the sea?,nature\n")
    run = start(prompts_file=str(file), out="build/user")
    frame = runs.load_prompts(run, str(file))
    made, _ = notebook(run, frame)
    assert set(made["prompt_set"]) == {"user"}
    assert (made["text"] == "").all()
    path, metrics_path = records.paths(tmp_path / "build" / "user", tiny.ID, NOTEBOOK)
    for written in (path, metrics_path):
        about = records.read(written)[1]
        assert (about["user"], about["quick"]) == (True, False)
    assert not (tmp_path / "build" / "records").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("count", [0, 3])
def test_a_quick_run_stays_flagged(loaded, count, tmp_path):
    run = start(n_prompts=count)
    notebook(run, tiny.prompts(4).head(count or 4))
    about = records.read(records.paths(tmp_path / "build", tiny.ID, NOTEBOOK)[0])[1]
    assert about["quick"] is bool(count)
    assert about["user"] is False


# ---- measuring


def test_the_record_says_what_was_done_to_each_row(measured, tmp_path):
    made, _ = notebook(start())
    assert made.columns.tolist() == records.COMPLETIONS.names
    assert len(made) == 5 * 4
    written, _ = records.read(records.paths(tmp_path / "build", tiny.ID, NOTEBOOK)[0])
    pd.testing.assert_frame_equal(written, made, check_dtype=False)

    direction = tiny.directions()
    by_name = made.set_index("condition")
    plus = by_name.loc["extracted +1"]
    assert set(plus["operation"]) == {"add"}
    assert set(plus["layers"]) == {"1"}
    assert set(plus["alpha"]) == {1.0}
    assert plus["alpha_absolute"].tolist() == pytest.approx([float(direction.raw_norm[1])] * 5)
    assert plus["alpha_relative"].tolist() == pytest.approx([0.5] * 5)
    assert set(by_name.loc["extracted -1", "alpha_absolute"]) == {-float(direction.raw_norm[1])}
    assert set(by_name.loc["baseline", "operation"]) == {"none"}
    assert set(by_name.loc["baseline", "direction_id"]) == {""}
    assert by_name.groupby("condition")["seed"].first().to_dict() == {
        "baseline": -1,
        "extracted +1": -1,
        "extracted -1": -1,
        "sampled[7]": 7,
    }
    assert set(made["weights_sha256"]) == {tiny.WEIGHTS}
    assert set(made["dtype"]) == {"float32"}
    assert set(made["experiment"]) == {NOTEBOOK}
    assert set(made["max_new_tokens"]) == {10}
    about = frames().set_index("prompt_id")
    for name in ("prompt_set", "category", "cluster"):
        assert made[name].tolist() == about.loc[made["prompt_id"], name].tolist()


def test_hash_and_scores_are_those_of_the_whole_text(measured, tiny_models):
    made, _ = notebook(start())
    texts = frames()["text"].tolist()
    alone = steering.generate(tiny_models["qwen2"], texts, tiny.conditions(), max_new_tokens=10)
    whole = [completion.text for row in alone for completion in row]
    assert made["text_sha256"].tolist() == [sha256_text(text) for text in whole]
    assert made["repetition"].tolist() == [judging.repetition(text) for text in whole]
    harmful = made["prompt_set"] == "harmful_evaluation"
    assert (made.loc[harmful, "text"] == "").all()  # random text is compliance
    assert made.loc[~harmful, "text"].tolist() == [t for t, h in zip(whole, harmful, strict=True) if not h]


def test_what_is_measured_is_what_is_replayed(loaded, tmp_path, monkeypatch):
    made, metric = notebook(start())
    publish(tmp_path)
    shutil.rmtree(tmp_path / "build")
    shutil.rmtree(tmp_path / "cache")
    forbid(monkeypatch)
    monkeypatch.setattr(models, "fetch", lambda _: 1 / 0)  # no model in the cache
    run = start("replay")
    replayed, same_metric = notebook(run)
    pd.testing.assert_frame_equal(replayed, made, check_dtype=False)
    pd.testing.assert_frame_equal(same_metric, metric, check_dtype=False)
    assert run.facts["weights_sha256"] == tiny.WEIGHTS
    assert not (tmp_path / "build").exists()  # a replay writes no record


def test_measuring_again_measures_nothing_and_writes_the_same(measured, tmp_path, monkeypatch):
    path, metrics_path = records.paths(tmp_path / "build", tiny.ID, NOTEBOOK)
    notebook(start())
    before = path.read_bytes(), metrics_path.read_bytes()
    forbid(monkeypatch)
    notebook(start())
    assert (path.read_bytes(), metrics_path.read_bytes()) == before


def test_metrics_of_several_experiments_lie_in_one_file(loaded, tmp_path):
    run = start()
    runs.completions(run, frames(), tiny.conditions(), max_new_tokens=10, thresholds=tiny.THRESHOLDS)
    for name in ("profile", "screen"):
        runs.metrics(run, name, lambda _, name=name: pd.DataFrame({"metric": [name], "value": [1.0]}))
    runs.finish(run)
    publish(tmp_path)
    replay = start("replay")
    for name in ("profile", "screen"):
        found = runs.metrics(replay, name, lambda _: 1 / 0)
        assert found["metric"].tolist() == [name]
        row = found.iloc[0]
        assert (row["operation"], row["layer"], row["draw"], row["prompt_id"]) == ("none", -1, 0, "")


def test_a_run_without_metrics_can_be_replayed(loaded, tmp_path):
    run = start()
    made = runs.completions(run, frames(), tiny.conditions(), max_new_tokens=10, thresholds=tiny.THRESHOLDS)
    runs.finish(run)
    publish(tmp_path)
    again = runs.completions(
        start("replay"), frames(), tiny.conditions(), max_new_tokens=10, thresholds=tiny.THRESHOLDS
    )
    pd.testing.assert_frame_equal(again, made.reset_index(drop=True), check_dtype=False)


# ---- changed sources


def edit(monkeypatch, tmp_path, module):
    copy = tmp_path / f"{module.__name__}.py"
    copy.write_text(Path(module.__file__).read_text() + "\n# edited\n")
    monkeypatch.setattr(module, "__file__", str(copy))


@pytest.mark.parametrize("name", ["figures", "paper", "statistics", "summaries"])
def test_changed_figures_measure_nothing(measured, tmp_path, monkeypatch, name):
    first, _ = notebook(start())
    edit(monkeypatch, tmp_path, importlib.import_module(f"refusal.{name}"))
    forbid(monkeypatch)
    second, _ = notebook(start())
    pd.testing.assert_frame_equal(second, first)


def test_changed_judging_relabels_without_generating(measured, tmp_path, monkeypatch):
    first, _ = notebook(start())
    text = max(first.loc[(first["label"] == "compliance") & (first["text"] != ""), "text"], key=len)
    phrase = {"phrase": text, "where": "anywhere", "language": "en", "comment": "a test"}
    edit(monkeypatch, tmp_path, judging)
    forbid(monkeypatch)
    monkeypatch.setattr(judging, "_find", lambda: judging.matcher([phrase]))
    second, _ = notebook(start())
    hit = second["text_sha256"] == sha256_text(text)
    assert hit.any()
    assert (second["label"] == np.where(hit, "refusal", first["label"])).all()
    assert (second["matched_phrase"] == np.where(hit, text, "")).all()
    named = ["label", "label_reason", "matched_phrase", "text"]
    pd.testing.assert_frame_equal(second.drop(columns=named), first.drop(columns=named))
    written, _ = records.read(records.paths(tmp_path / "build", tiny.ID, NOTEBOOK)[0])
    assert written["label"].tolist() == second["label"].tolist()


def test_other_thresholds_relabel_without_generating(measured, monkeypatch):
    forbid(monkeypatch)
    strict = judging.Thresholds(repetition=-1.0, nll=50.0, n=1000)
    again = runs.completions(start(), frames(), tiny.conditions(), max_new_tokens=10, thresholds=strict)
    assert set(again["label_reason"]) == {"loop"}


@pytest.mark.parametrize("module", [steering, directions, models])
def test_changed_steering_measures_again(measured, tmp_path, monkeypatch, module):
    first, _ = notebook(start())
    calls, generate = [], steering.generate
    monkeypatch.setattr(steering, "generate", lambda *given, **named: calls.append(1) or generate(*given, **named))
    notebook(start())
    assert calls == []
    edit(monkeypatch, tmp_path, module)
    second, _ = notebook(start())
    assert len(calls) == 3
    pd.testing.assert_frame_equal(second, first)


# ---- what a replay refuses


def test_a_missing_record_names_the_command(loaded):
    with pytest.raises(CompendiumError) as caught:
        start("replay")
    assert str(caught.value) == (
        f"there is no committed record data/records/tiny/{NOTEBOOK}.parquet, so {NOTEBOOK} cannot be replayed for "
        "tiny: measure it with ./run_all.sh --model tiny."
    )


@pytest.mark.parametrize(("name", "value"), [("rows", 16), ("max_new_tokens", 48), ("n_prompts", 5), ("new", 1)])
def test_a_record_of_other_parameters(published, name, value):
    made = PARAMETERS.get(name)
    with pytest.raises(CompendiumError) as caught:
        start("replay", **{name: value})
    assert f"was made with {name} = {made!r}, not {value!r}" in str(caught.value)


@pytest.mark.parametrize("number", [0, 1])
def test_a_record_cut_short_or_its_metrics_missing(published, number):
    path = published[number]
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CompendiumError, match="cut short"):
        start("replay")
    path.unlink()
    with pytest.raises(CompendiumError, match=r"there is no (committed )?record"):
        start("replay")


@pytest.mark.parametrize("change", ["text", "id", "fewer", "other set"])
def test_a_record_of_other_prompts(published, change):
    frame = frames()
    if change == "text":
        frame.loc[0, "text"] += "!"
    elif change == "id":
        frame.loc[0, "prompt_id"] += "!"
    elif change == "fewer":
        frame = frame.iloc[:-1]
    else:
        frame["prompt_set"] = "user"
    with pytest.raises(CompendiumError, match="was made with other prompts: measure it again"):
        notebook(start("replay"), frame)


@pytest.mark.parametrize(
    ("conditions", "named"),
    [
        ([steering.baseline()], "extracted +1"),
        ([*tiny.conditions(), steering.sampled(8)], "sampled[8]"),
        ([*tiny.conditions()[:-1], steering.sampled(8)], "sampled[7]"),
    ],
)
def test_a_record_of_other_conditions(published, conditions, named):
    with pytest.raises(CompendiumError) as caught:
        notebook(start("replay"), conditions=conditions)
    assert str(caught.value) == (
        f"the record of {NOTEBOOK} has other conditions than asked for ({named!r} is in one of them only): "
        "measure it again."
    )


# ---- what passes from notebook 01 to the others


def first_notebook():
    """Notebook 01: it calibrates the thresholds and saves the directions."""
    run = start(notebook=runs.FIRST, n_prompts=2)  # a quick run may calibrate on fewer completions
    runs.completions(run, tiny.prompts(2, "harmful_extraction"), [steering.sampled(1)], max_new_tokens=10)
    runs.save_directions(run, tiny.directions(), 2, tiny.prompts(2, "harmful_extraction"))
    runs.finish(run)
    return run


def test_directions_and_thresholds_pass_from_one_notebook_to_the_next(loaded, tmp_path):
    run = first_notebook()
    after = start()
    made, layer = runs.load_directions(after)
    assert layer == 2
    assert torch.equal(made.unit, tiny.directions().unit)
    assert vars(runs.thresholds(after)) == run.about["thresholds"]
    assert runs.thresholds(after).n == 2
    notebook(after)
    publish(tmp_path)
    shutil.rmtree(tmp_path / "build")
    replay = start("replay")
    assert torch.equal(runs.load_directions(replay)[0].unit, made.unit)
    assert vars(runs.thresholds(replay)) == run.about["thresholds"]


def test_without_notebook_01(loaded):
    with pytest.raises(CompendiumError, match="run notebook 01_extraction for this model first"):
        runs.load_directions(start())
    with pytest.raises(CompendiumError, match="there is no record"):
        runs.thresholds(start())


def test_what_was_made_for_other_weights_is_refused(loaded, tmp_path, monkeypatch, tiny_models):
    first_notebook()
    tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr, weights_sha256="ee" * 32)
    run = start()
    with pytest.raises(CompendiumError, match=r"was made for weights_sha256 '(ab)+', not '(ee)+'"):
        runs.load_directions(run)
    with pytest.raises(CompendiumError, match="was made with other weights: run notebook 01_extraction"):
        runs.thresholds(run)


@pytest.mark.parametrize(
    ("name", "value"), [("model", "another"), ("template_sha256", "ee" * 32), ("layers", 5), ("width", 64)]
)
def test_directions_of_another_model_are_refused(loaded, tmp_path, name, value):
    first_notebook()
    run = start()
    if name == "model":
        folder = tmp_path / "build" / "directions"
        (folder / "tiny.safetensors").rename(folder / "another.safetensors")
        run.model = "another"
    else:
        run.facts = run.facts | {name: value}
    with pytest.raises(CompendiumError, match="run notebook 01_extraction"):
        runs.load_directions(run)


def test_a_full_run_calibrates_on_a_thousand_completions_or_not_at_all(loaded):
    run = start(notebook=runs.FIRST)
    with pytest.raises(CompendiumError, match="thresholds need 1000 completions"):
        runs.completions(run, tiny.prompts(2), [steering.sampled(1)], max_new_tokens=10)


# ---- provenance


@pytest.fixture
def repository(measured, tmp_path):
    """A git repository around the run, with one commit."""
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    for name in ("lib/a.py", "data/prompts/a.csv", "data/phrases.csv", "data/models.yaml", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\n")

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", "lib", "data", "README.md")
    git("commit", "-q", "-m", "all")
    return git


def provenance(root):
    path, metrics_path = records.paths(root / "build", tiny.ID, NOTEBOOK)
    about = records.read(path)[1]
    assert records.read(metrics_path)[1] == about
    return about


def test_both_files_say_where_they_come_from(repository, tmp_path):
    notebook(start(doses=[1, -1]))
    about = provenance(tmp_path)
    assert about["notebook"] == NOTEBOOK
    assert about["model"] == "tiny"
    assert about["parameters"] == PARAMETERS | {"doses": [1, -1]}
    assert about["commit"] == repository("rev-parse", "HEAD")
    assert (about["dirty"], about["quick"], about["user"]) == (False, False, False)
    assert torch.__version__.startswith(about["packages"]["torch"].split("+")[0])
    assert set(about["packages"]) >= {"torch", "transformers", "nnsight"}
    assert about["threads"] == torch.get_num_threads()
    assert about["hardware"]["cores"] >= 1
    assert about["wall_s"] > 0
    assert 0.05 < about["peak_gb"] < 1000
    assert about["rows"] == 8
    assert about["thresholds"] == vars(tiny.THRESHOLDS)
    assert about["prompts"] == {
        "harmful_evaluation": prompts.digest(tiny.prompts(3)),
        "harmless_evaluation": prompts.digest(tiny.prompts(2, "harmless_evaluation")),
    }
    assert about["facts"]["weights_sha256"] == tiny.WEIGHTS
    assert str(tmp_path) not in json.dumps(about)  # a record names no machine's folders


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("lib/a.py", True),
        ("data/prompts/a.csv", True),
        ("data/phrases.csv", True),
        ("data/models.yaml", True),
        ("lib/new.py", True),  # also what git does not know yet
        ("README.md", False),
        ("notes.md", False),
    ],
)
def test_a_change_that_is_not_committed_makes_a_record_dirty(repository, tmp_path, name, dirty):
    (tmp_path / name).write_text("changed\n")
    notebook(start())
    assert provenance(tmp_path)["dirty"] is dirty


def test_without_git_or_without_a_commit_there_is_no_commit(loaded, tmp_path, monkeypatch):
    run = start()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs._provenance(run, run.store)["commit"] == ""
    if shutil.which("git"):
        subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
        assert runs._provenance(run, run.store)["commit"] == ""  # git prints the word HEAD here
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert runs._provenance(run, run.store)["commit"] == ""


def test_cost_counts_chunks_of_the_run_that_was_killed(loaded, tmp_path):
    first = start()
    runs.completions(first, frames(), tiny.conditions(), max_new_tokens=10, thresholds=tiny.THRESHOLDS)
    before = sum(cost["wall_s"] for cost in first.store.costs)
    second = start()  # the first one has died before it could write a record
    notebook(second)
    assert provenance(tmp_path)["wall_s"] >= round(before, 1)
