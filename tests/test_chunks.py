"""Chunks: what names them, how they are cut, and that a killed run ends with the rows of an uninterrupted one."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from refusal import activations, chunks, conditions, conversion, directions, engine, models, packing, prefixes, steering
from refusal.steering import add, baseline

FACTS = {"weights_sha256": "ab" * 32, "template_sha256": "cd" * 32, "dtype": "float32", "stop_tokens": ["a", "b"]}


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    """The tiny model stands in for a registry's; the list grows with every load."""
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


def measure(store, frame=None, conditions=None, max_new_tokens=10, rows=8):
    """A small measurement: 5 prompts, 4 conditions, chunks of 2 prompts."""
    frame = tiny.prompts(5) if frame is None else frame
    made = chunks.completions(
        store, frame, conditions or tiny.conditions(), max_new_tokens=max_new_tokens, rows=rows, title="test"
    )
    return comparable(made)


def comparable(frame):
    """A frame read from a file has arrays for lists; the values are what counts."""
    return frame.assign(token_ids=[tuple(map(int, ids)) for ids in frame["token_ids"]])


def files(store, pattern="*.parquet"):
    return {path.name: path.stat().st_mtime_ns for path in sorted(store.folder.glob(pattern))}


# ---- what names a chunk


@pytest.fixture
def names(monkeypatch):
    """A function from changes of a measurement to the names of its chunks; nothing is measured."""

    def collect(*, model="tiny", frame=None, conditions=None, max_new_tokens=10, rows=8, title="test", **facts):
        seen = []
        found = pd.DataFrame({"n_tokens": [1]})
        with monkeypatch.context() as patch:
            patch.setattr(chunks, "read", lambda _, path: seen.append(path.name) or found)
            chunks.completions(
                chunks.Store(model, FACTS | facts),
                tiny.prompts(4) if frame is None else frame,
                conditions or tiny.conditions(),
                max_new_tokens=max_new_tokens,
                rows=rows,
                title=title,
            )
        assert len(set(seen)) == len(seen) > 0
        return seen

    return collect


MADE = tiny.directions()
NUDGE = torch.zeros(1, tiny.WIDTH).index_fill(1, torch.tensor(5), 1e-4)


def changed(**changes):
    """The condition "extracted +1" with other fields."""
    return dataclasses.replace(add(MADE, 1, 1), **changes)


CHANGES = {
    "model": {"model": "another"},
    "weights": {"weights_sha256": "ee" * 32},
    "template": {"template_sha256": "ee" * 32},
    "dtype": {"dtype": "bfloat16"},
    "stop tokens": {"stop_tokens": ["a"]},
    "max_new_tokens": {"max_new_tokens": 11},
    "rows": {"rows": 9},
    "vector": {"conditions": [baseline(), add(tiny.directions(1), 1, 1)]},
    "one number of the vector": {"conditions": [baseline(), changed(vectors=add(MADE, 1, 1).vectors + NUDGE)]},
    "alpha": {"conditions": [baseline(), add(MADE, 1, 1.001)]},
    "sign": {"conditions": [baseline(), add(MADE, 1, -1)]},
    "layer": {"conditions": [baseline(), add(MADE, 2, 1)]},
    "layers": {"conditions": [baseline(), add(MADE, (1, 2), 1)]},
    "position": {"conditions": [baseline(), add(MADE, 1, 1, position="last")]},
    "operation": {"conditions": [baseline(), steering.ablate(MADE, 1)]},
    "sampled": {"conditions": [baseline(), steering.sampled(1)]},
    "another seed": {"conditions": [baseline(), dataclasses.replace(steering.sampled(1), seed=2)]},
    "name": {"conditions": [baseline(), changed(name="another")]},
    "order of conditions": {"conditions": [add(MADE, 1, 1), baseline()]},
}
USUAL = {"conditions": [baseline(), add(MADE, 1, 1)]}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_tokens_names_other_chunks(names, change):
    usual = names(**USUAL)
    assert names(**USUAL) == usual  # the same input has the same names
    others = names(**(USUAL | change))
    assert not set(others) & set(usual)
    # and no two of the changes are taken for each other
    assert all(not set(others) & set(names(**(USUAL | c))) for c in CHANGES.values() if c is not change)


@pytest.mark.parametrize("column", ["text", "prompt_id"])
def test_a_prompts_text_and_id_name_other_chunks_but_its_neighbours_chunks_stay(names, column):
    frame = tiny.prompts(4)
    frame.loc[3, column] += "!"
    before, after = names(), names(frame=frame)
    assert len(before) == len(after) == 2
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_words_that_decide_no_token_name_no_chunk(names):
    frame = tiny.prompts(4).assign(category="another", cluster="another")
    assert names(frame=frame, title="another") == names()


def test_whole_chunks_of_a_longer_set_are_used_again(names):
    assert names(frame=tiny.prompts(8))[:2] == names(frame=tiny.prompts(4))


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function that edits a module's source, as far as the keys can see."""

    def edit(module):
        copy = tmp_path / f"{module.__name__}.py"
        copy.write_text(Path(module.__file__).read_text() + "\n# edited\n")
        monkeypatch.setattr(module, "__file__", str(copy))

    return edit


@pytest.mark.parametrize("module", [conversion, packing, models, prefixes, directions, conditions, engine, steering])
def test_the_source_of_a_module_that_decides_tokens_names_other_chunks(names, edited, module):
    before = names()
    edited(module)
    assert not set(names()) & set(before)


@pytest.mark.parametrize(
    "name", ["prompts", "activations", "judging", "records", "chunks", "runs", "statistics", "figures", "paper"]
)
def test_the_source_of_other_modules_names_no_chunk(names, edited, name):
    before = names()
    edited(importlib.import_module(f"refusal.{name}"))
    assert names() == before


@pytest.mark.parametrize(
    ("module", "tokens", "metrics"),
    [
        (conversion, True, True),
        (models, True, True),
        (prefixes, True, True),
        (engine, True, True),
        (activations, True, True),
        (directions, False, True),
        (conditions, False, True),
        (steering, False, True),
        (importlib.import_module("refusal.judging"), False, False),
    ],
)
def test_what_measures_activations_and_metrics_again(loaded, edited, monkeypatch, module, tokens, metrics):
    store, calls = chunks.Store("tiny", FACTS), []
    monkeypatch.setattr(activations, "last_token", lambda *_: calls.append("tokens") or torch.ones(2, 4, 32))

    def both():
        calls.clear()
        chunks.last_tokens(store, tiny.prompts(2))
        chunks.metrics(store, "screen", lambda: calls.append("metrics") or pd.DataFrame({"value": [1.0]}), ["a", 1])
        return calls

    assert both() == ["tokens", "metrics"]
    assert both() == []
    edited(module)
    assert both() == ["tokens"] * tokens + ["metrics"] * metrics


def test_inputs_and_name_decide_metrics(loaded):
    store, calls = chunks.Store("tiny", FACTS), []

    def made(name, inputs):
        frame = chunks.metrics(store, name, lambda: calls.append(1) or pd.DataFrame({"value": [len(calls)]}), inputs)
        return frame["value"].item()

    assert [made("a", [1]), made("a", [2]), made("b", [1]), made("a", [1, 2]), made("a", [[1, 2]])] == [1, 2, 3, 4, 5]
    assert [made("a", [1]), made("b", [1])] == [1, 3]


# ---- how chunks are cut


@pytest.fixture
def batches(loaded, monkeypatch):
    """What the model was asked for: a pair of prompts and condition names a batch."""
    seen, generate = [], steering.generate

    def watch(model, texts, conditions, **others):
        seen.append((len(texts), [condition.name for condition in conditions]))
        return generate(model, texts, conditions, **others)

    monkeypatch.setattr(steering, "generate", watch)
    return seen


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (8, [(2, 4), (2, 4), (1, 4)]),
        (11, [(2, 4), (2, 4), (1, 4)]),  # a chunk is never larger than the rows
        (4, [(1, 4)] * 5),
        (100, [(5, 4)]),
        (3, [(1, 3)] * 5 + [(3, 1), (2, 1)]),  # more conditions than rows: one group of conditions after the other
        (2, [(1, 2)] * 10),
        (1, [(1, 1)] * 20),
    ],
)
def test_chunks_are_groups_of_prompts_under_all_conditions(batches, rows, wanted):
    made = measure(chunks.open_store("tiny"), rows=rows)
    assert [(prompts, len(names)) for prompts, names in batches] == wanted
    assert all(prompts * len(names) <= rows for prompts, names in batches)
    pairs = set(zip(made["prompt_id"], made["condition"], strict=True))
    assert len(pairs) == len(made) == 20
    assert made["condition"].nunique() == 4


def test_rows_hold_what_was_generated(loaded, tiny_models):
    made = measure(chunks.open_store("tiny"))
    texts = tiny.prompts(5)["text"].tolist()
    alone = steering.generate(tiny_models["qwen2"], texts, tiny.conditions(), max_new_tokens=10)
    wanted = [completion for row in alone for completion in row]
    assert made["token_ids"].tolist() == [completion.token_ids for completion in wanted]
    assert made["text"].tolist() == [completion.text for completion in wanted]
    assert made["stop_reason"].tolist() == [completion.stop_reason for completion in wanted]
    assert made["n_tokens"].tolist() == [len(completion.token_ids) for completion in wanted]
    assert made["condition"].tolist() == [condition.name for condition in tiny.conditions()] * 5
    nll = [completion.reference_nll for completion in wanted]
    assert made["reference_nll"].tolist() == pytest.approx(nll, rel=1e-4, nan_ok=True)
    assert made["reference_nll"].notna().any()


FIXED = chunks.FIXED_BYTES


@pytest.mark.parametrize(
    ("memory", "weights", "wanted"),
    [
        (64e9, 1e9, 64),
        (FIXED + 1.280e9, 0, 64),
        (FIXED + 1.279e9, 0, 32),
        (FIXED + 2.5e9, 1e9, 32),
        (FIXED + 1.6e9, 1e9, 4),
        (FIXED + 1.5e9, 1e9, 1),  # never none
        (1e6, 1e9, 1),
    ],
)
def test_rows_halve_until_they_fit_half_of_what_the_weights_leave(memory, weights, wanted):
    assert chunks.rows_that_fit(64, 10e6, weights, memory) == wanted
    if wanted > 1:
        assert wanted * 10e6 <= 0.5 * (memory - 1.5 * weights - FIXED)


def test_other_row_counts_are_halved_too():
    assert [chunks.rows_that_fit(48, 10e6, 0, FIXED + m) for m in (0.96e9, 0.95e9, 0.4e9, 0.2e9)] == [48, 24, 12, 6]


def test_a_row_takes_no_more_than_is_reckoned_with(loaded, tiny_models, tmp_path, monkeypatch):
    """What the buffers really hold, a row, against the estimate for prompts of that length."""
    kept, made = [], engine.Keys.__init__
    monkeypatch.setattr(engine.Keys, "__init__", lambda self, *size: (made(self, *size), kept.append(self))[0])
    model, texts = tiny_models["qwen2"], tiny.prompts(5)["text"].tolist()
    steering.generate(model, texts, tiny.conditions(), max_new_tokens=10)
    buffers = [x for keys in kept if keys.extent.capacity > 5 for layer in keys.own for x in (layer.keys, layer.values)]
    held = sum(x.numel() * x.element_size() for x in buffers if x is not None)
    (tmp_path / "config.json").write_text(model.hf.config.to_json_string())
    reckoned = chunks.row_bytes(tmp_path, "float32", 10, letters=128) * 5 * 4
    assert 0.05 * reckoned < held < reckoned


def test_a_row_takes_its_keys_and_values(tmp_path):
    """By hand: 2 parts x (keys, values) x 3 layers x 2 heads x 16 x bytes x (128 + 48) tokens."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert chunks.row_bytes(tmp_path, "float32", 48) == 2 * 2 * 3 * 2 * 16 * 4 * (128 + 48)
    assert chunks.row_bytes(tmp_path, "bfloat16", 0) == 2 * 2 * 3 * 2 * 16 * 2 * 128
    assert chunks.row_bytes(tmp_path, "bfloat16", 0, letters=999) == 2 * 2 * 3 * 2 * 16 * 2 * 999
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    assert chunks.row_bytes(tmp_path, "float32", 48) == 2 * 2 * 3 * 4 * 32 * 4 * (128 + 48)


def test_the_row_count_depends_on_the_machines_size_not_on_what_is_free(monkeypatch):
    def machine(total, free, limit=None, group="max"):
        sizes = SimpleNamespace(total=total, available=free, free=free)
        monkeypatch.setattr(chunks.psutil, "virtual_memory", lambda: sizes)
        monkeypatch.setattr(
            chunks.resource,
            "getrlimit",
            lambda _: (limit or chunks.resource.RLIM_INFINITY, chunks.resource.RLIM_INFINITY),
        )
        file = SimpleNamespace(is_file=lambda: True, read_text=lambda: f"{group}\n")
        monkeypatch.setattr(chunks, "Path", lambda _: file)
        return chunks.rows_that_fit(64, 10e6, 0)

    assert {machine(FIXED + 2e9, free) for free in (1e6, 1e9, 2e9)} == {64}
    assert machine(FIXED + 1e9, 1e9) == 32
    assert machine(FIXED + 2e9, 2e9, limit=chunks.ADDRESSES + FIXED + 500e6) == 16
    assert machine(FIXED + 2e9, 2e9, group=f"{FIXED + 250e6:.0f}") == 8


# ---- chunks that are there already


def test_finished_chunks_need_no_model_and_give_the_same_rows(loaded, monkeypatch):
    store = chunks.open_store("tiny")
    first, before = measure(store), files(store)
    tokens = chunks.last_tokens(store, tiny.prompts(3))
    assert len(before) == 3
    assert loaded == ["tiny"]  # one load serves a whole run

    def refuse(*_, **__):
        raise AssertionError("nothing is to be measured")

    for module, name in ((models, "load"), (steering, "generate")):
        monkeypatch.setattr(module, name, refuse)
    again = chunks.open_store("tiny")
    pd.testing.assert_frame_equal(measure(again), first)
    assert torch.equal(chunks.last_tokens(again, tiny.prompts(3)), tokens)
    assert again.facts == store.facts
    assert again.loaded is None
    assert files(again) == before
    assert again.costs == store.costs  # what the record says it cost does not shrink when a run goes on


def test_facts_identify_the_model(loaded, tiny_models):
    facts = chunks.open_store("tiny").facts
    assert facts == {
        "weights_sha256": tiny.WEIGHTS,
        "template_sha256": tiny_models["qwen2"].template_sha256,
        "dtype": "float32",
        "layers": 4,
        "width": 32,
        "stop_tokens": ["<|im_end|>", "<|endoftext|>"],
    }


def test_other_weights_and_another_dtype_are_looked_at_anew(loaded, tmp_path, monkeypatch, tiny_models, edited):
    chunks.open_store("tiny")
    again = tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr, weights_sha256="ee" * 32)
    assert chunks.open_store("tiny").facts["weights_sha256"] == "ee" * 32
    monkeypatch.setattr(models, "choose_dtype", lambda: "bfloat16")
    chunks.open_store("tiny")
    edited(models)
    chunks.open_store("tiny")
    chunks.open_store("tiny")
    assert len(again) == 3


def test_another_stop_token_in_the_registry_is_noticed(loaded, tmp_path, monkeypatch, tiny_models):
    chunks.open_store("tiny")
    again = tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr, stop=("<|im_start|>",))
    chunks.open_store("tiny")
    assert len(again) == 1


@pytest.mark.parametrize("data", [b"", b"{", b'{"weights_sha256": "ab'])
def test_damaged_facts_are_looked_up_again(loaded, data):
    store = chunks.open_store("tiny")
    (path,) = store.folder.glob("model-*.json")
    path.write_bytes(data)
    assert chunks.open_store("tiny").facts == store.facts
    assert json.loads(path.read_text().splitlines()[0]) == store.facts


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    position = data.index(b"harmful_evaluation-00")  # a value, which the format itself would read as another
    return data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": cut,
    "no end": lambda data: data[:-1],
    "flipped": flip,
    "other": lambda data: b"text",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_chunk_is_measured_again_and_no_other(batches, damage):
    store = chunks.open_store("tiny")
    first, before = measure(store), files(store)
    path = store.folder / sorted(before)[1]
    path.write_bytes(damage(path.read_bytes()))
    batches.clear()
    pd.testing.assert_frame_equal(measure(chunks.open_store("tiny")), first)
    assert len(batches) == 1
    after = files(store)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [path.name]


def test_a_chunk_without_its_cost_is_measured_again(batches):
    store = chunks.open_store("tiny")
    first = measure(store)
    path = store.folder / sorted(files(store))[0]
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    batches.clear()
    pd.testing.assert_frame_equal(measure(store), first)
    assert len(batches) == 1


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"text"])
def test_damaged_activations_are_measured_again(loaded, data):
    store = chunks.open_store("tiny")
    tokens = chunks.last_tokens(store, tiny.prompts(3))
    (path,) = store.folder.glob("*.safetensors")
    path.write_bytes(data)
    assert torch.equal(chunks.last_tokens(store, tiny.prompts(3)), tokens)
    assert torch.equal(chunks.last_tokens(chunks.Store("tiny", store.facts), tiny.prompts(3)), tokens)


def test_damaged_metrics_are_measured_again(loaded):
    store = chunks.Store("tiny", FACTS)
    frame = pd.DataFrame({"value": [0.25, float("nan")], "layer": [1, 2]})
    chunks.metrics(store, "a", lambda: frame, [])
    (path,) = store.folder.glob("*.metrics.parquet")
    path.write_bytes(cut(path.read_bytes()))
    pd.testing.assert_frame_equal(chunks.metrics(store, "a", lambda: frame, []), frame)
    pd.testing.assert_frame_equal(chunks.metrics(store, "a", lambda: 1 / 0, []), frame)


# ---- runs that die


def test_a_run_that_dies_at_any_batch_goes_on_to_the_same_rows(batches, tmp_path, monkeypatch, tiny_models):
    whole = measure(chunks.open_store("tiny"))
    batches.clear()
    generate = steering.generate
    for moment in range(3):
        root = tmp_path / str(moment)
        tiny.install(root, tiny_models["qwen2"], monkeypatch.setattr)
        for where, count in (("generate", moment), ("_trunk_tokens", 0)):
            with monkeypatch.context() as patch:
                patch.setattr(steering, where, dying(getattr(steering, where), count))
                with pytest.raises(KeyboardInterrupt):
                    measure(chunks.open_store("tiny"))
            assert steering.generate is generate
            assert len(files(chunks.Store("tiny"))) == moment
        pd.testing.assert_frame_equal(measure(chunks.open_store("tiny")), whole)
        assert not [path for path in root.rglob(".*") if path.is_file()]


def dying(work, moment):
    calls = []

    def die(*given, **named):
        calls.append(1)
        if len(calls) > moment:
            raise KeyboardInterrupt
        return work(*given, **named)

    return die


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import conftest, tiny, torch
from refusal import chunks, models

torch.set_num_threads(1)  # threads would not survive the fork
root, kills = Path(sys.argv[1]), int(sys.argv[2])
tokenizer = conftest.make_tokenizer()
hf = conftest.make_hf("qwen2", len(tokenizer))
model = models.wrap(hf, tokenizer, "tiny", stop=("<|endoftext|>",))

def run(root):
    tiny.install(root, model)
    store = chunks.open_store("tiny")
    frame = chunks.completions(
        store, tiny.prompts(24), tiny.conditions(), max_new_tokens=12, rows=8, title="killed"
    )
    frame["token_ids"] = [" ".join(map(str, ids)) for ids in frame["token_ids"]]
    frame.to_parquet(root / "frame.pq")

def count():
    return len([path for path in root.rglob("*.parquet") if not path.name.startswith(".")])

random.seed(0)
seen = []
for _ in range(kills):
    child = os.fork()
    if child == 0:
        os.setsid()
        run(root)
        os._exit(0)
    time.sleep(random.uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seen.append([os.WIFSIGNALED(status), count()])
before = {str(path): path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
run(root)
kept = all(Path(path).stat().st_mtime_ns == when for path, when in before.items())
run(root.with_name("whole"))
print(json.dumps({"kills": seen, "kept": kept, "chunks": count()}))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_and_the_same_command_ends_with_the_same_rows(tmp_path):
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, tmp_path / "killed", "8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["chunks"] == 12
    killed_midway = {count for died, count in said["kills"] if died and 0 < count < 12}
    assert len(killed_midway) >= 2, said  # else the test shows nothing
    assert said["kept"]  # finished chunks were used, not measured again
    frames = [pd.read_parquet(tmp_path / name / "frame.pq") for name in ("killed", "whole")]
    assert len(frames[0]) == 96
    pd.testing.assert_frame_equal(*frames, check_exact=True)
