"""A byte changed, one at a time, in each kind of file that is read: noticed, measured again, or harmless.

What the format itself notices was tested beside each module; here many places of each file are changed in turn.
"""

import hashlib
import json
import random
import shutil
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import save

from refusal import chunks, directions, judging, models, parameters, prompts, records, registry, runs, steering, weights
from refusal.files import ROOT, CompendiumError, sha256_file

PLACES = 60  # of each file


@pytest.fixture
def loaded(tmp_path, monkeypatch, tiny_models):
    return tiny.install(tmp_path, tiny_models["qwen2"], monkeypatch.setattr)


def changed(path, places=PLACES, seed=0):
    """Writes the file with one byte changed, in many places one after the other, and yields where."""
    data, rng = path.read_bytes(), random.Random(seed)
    for place in sorted(rng.sample(range(len(data)), min(places, len(data)))):
        other = bytearray(data)
        other[place] ^= rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
        path.write_bytes(bytes(other))
        yield place
    path.write_bytes(data)


def one_sentence(error):
    assert "\n" not in str(error) and str(error).endswith((".", "?")), error


def test_chunks_of_completions_and_metrics(loaded, tmp_path):
    store = chunks.Store("tiny")
    frame = pd.DataFrame(
        {
            "prompt_id": [f"p-{i}" for i in range(6)],
            "token_ids": [[i, i + 1] for i in range(6)],
            "text": [f"text {i}" for i in range(6)],
            "value": [0.5, float("nan"), 2.0, 3.0, 4.0, 5.0],
        }
    )
    path = tmp_path / "chunk.parquet"
    chunks.write(store, frame, path, began=0.0)
    whole, cost = chunks.read(store, path), store.costs[-1]
    noticed = 0
    for place in changed(path, places=300):
        store.costs.clear()
        found = chunks.read(store, path)
        if found is None:
            noticed += 1
            assert not path.exists() and not store.costs  # so that it is measured again
        else:
            pd.testing.assert_frame_equal(found, whole, obj=f"the chunk with byte {place} changed")
            assert store.costs == [cost]
    assert noticed > 100
    older = pq.read_table(path)
    pq.write_table(older.replace_schema_metadata({b"cost": older.schema.metadata[b"cost"]}), path)
    pd.testing.assert_frame_equal(chunks.read(store, path), whole)  # chunks of an older version are used still


def test_activations(loaded, monkeypatch):
    store = chunks.open_store("tiny")
    frame = tiny.prompts(2)
    whole = chunks.last_tokens(store, frame)
    (path,) = store.folder.glob("*.safetensors")
    again = []
    monkeypatch.setattr(chunks.activations, "last_token", lambda *_: again.append(1) or whole)
    places = list(changed(path, places=0))
    for _ in changed(path):
        places.append(1)
        found = chunks.last_tokens(store, frame)
        assert found.dtype == whole.dtype and torch.equal(found, whole)
    assert len(again) > 0.9 * len(places)  # almost every byte is a value
    assert torch.equal(chunks.last_tokens(store, frame), whole)


def test_facts_of_the_model(loaded):
    whole = dict(chunks.open_store("tiny").facts)
    (path,) = chunks.Store("tiny").folder.glob("model-*.json")
    for place in changed(path, places=120):
        assert chunks.open_store("tiny").facts == whole, place


def test_records_and_metrics(tmp_path):
    frame = pd.DataFrame([{name: index for name in records.METRICS.names} for index in range(4)])
    frame = frame.astype({name: str for name in ("experiment", "metric", "operation", "direction_id", "prompt_id")})
    path = tmp_path / "m" / "01.metrics.parquet"
    records.write(frame, path, {"model": "m", "parameters": {"a": 1}})
    whole = records.read(path)
    for place in changed(path, places=400):
        try:
            found = records.read(path)
        except CompendiumError as error:
            one_sentence(error)
        else:
            pd.testing.assert_frame_equal(found[0], whole[0], obj=f"the record with byte {place} changed")
            assert found[1] == whole[1]


def test_directions_that_belong_to_a_record(loaded, tmp_path):
    run = runs.start(runs.FIRST, model=tiny.ID, mode="measure", out="build", rows=8)
    runs.completions(run, tiny.prompts(2), [steering.baseline()], max_new_tokens=4, thresholds=tiny.THRESHOLDS)
    runs.save_directions(run, tiny.directions(), 1, tiny.prompts(2))
    runs.finish(run)
    whole, layer = runs.load_directions(run)
    path = tmp_path / "build" / "directions" / "tiny.safetensors"
    for _ in changed(path):
        with pytest.raises(CompendiumError, match="is not the file that was written with the record") as caught:
            runs.load_directions(run)
        one_sentence(caught.value)
    found, again = runs.load_directions(run)
    assert again == layer and torch.equal(found.unit, whole.unit)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CompendiumError):
        runs.load_directions(run)


def test_directions_alone_end_in_a_sentence_or_load(tmp_path):
    """Those of a record from before the hash was kept: git guards their bytes."""
    path, about = tmp_path / "d.safetensors", {"model": "tiny"}
    directions.save(tiny.directions(), path, layer=1, about=about)
    for _ in changed(path, places=400):
        try:
            directions.load(path, expect=about, shape=(tiny.LAYERS, tiny.WIDTH))
        except CompendiumError as error:
            one_sentence(error)


def test_prompts_never_change_under_the_same_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    shutil.copy(ROOT / "data" / "prompts" / "harmless_selection.csv", tmp_path / "harmless_selection.csv")
    whole, texts = prompts.load("harmless_selection"), ["prompt_id", "text"]
    refused = 0
    for place in changed(tmp_path / "harmless_selection.csv", places=400):
        try:
            found = prompts.load("harmless_selection")
        except CompendiumError as error:
            refused += 1
            one_sentence(error)
            assert "harmless_selection.csv" in str(error)
        else:
            if prompts.digest(found) == prompts.digest(whole):
                pd.testing.assert_frame_equal(found[texts], whole[texts], obj=f"byte {place}")
    assert refused


def test_the_registry_gives_another_hash_or_a_sentence(tmp_path, monkeypatch):
    shutil.copy(registry.REGISTRY, tmp_path / "models.yaml")
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    refused = 0
    for _ in changed(tmp_path / "models.yaml"):
        try:
            registry.registry()
        except CompendiumError as error:
            refused += 1
            one_sentence(error)
    assert refused


def test_phrases_and_notebooks_end_in_a_sentence_or_are_read(tmp_path):
    for source, read in (
        (ROOT / "data" / "refusal_phrases.csv", judging.phrases),
        (ROOT / "notebooks" / "01_extraction.ipynb", lambda path: parameters.defaults(parameters.read(path), "01")),
    ):
        path = tmp_path / source.name
        shutil.copy(source, path)
        for _ in changed(path, places=60):
            try:
                read(path)
            except CompendiumError as error:
                one_sentence(error)


def test_the_plan_ends_in_a_sentence_or_is_read(tmp_path, monkeypatch):
    from refusal import analyses

    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "analysis_plan.yaml"
    shutil.copy(ROOT / "data" / "analysis_plan.yaml", path)
    monkeypatch.setattr(analyses, "ROOT", tmp_path)
    refused = 0
    for _ in changed(path, places=40):
        try:
            analyses.plan.__wrapped__()
        except CompendiumError as error:
            refused += 1
            one_sentence(error)
    assert refused


def test_a_converted_model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(random.Random(name).randbytes(300))
    files = {path.name: sha256_file(path) for path in folder.iterdir()}
    known = SimpleNamespace(id="tiny", gguf_sha256="ab" * 32)
    about = {"gguf_sha256": known.gguf_sha256, "conversion": weights.CONVERSION, "files": files}
    kept = json.dumps(about | {"weights_sha256": files["model.safetensors"]})
    (folder / "provenance.json").write_text(kept)
    assert weights._whole(folder, known)
    for name in [*files, "provenance.json"]:
        for place in changed(folder / name, places=120):
            try:
                assert not weights._whole(folder, known), f"byte {place} of {name} was not noticed"
            except CompendiumError as error:
                one_sentence(error)
                (aside,) = folder.glob("*.corrupt")
                aside.replace(folder / aside.stem)
    assert weights._whole(folder, known)


def test_every_file_of_a_hub_snapshot(tmp_path):
    """Large files are named by sha256, small ones as git names them; a tokenizer is as good as weights to be wrong."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    for path in (blobs, snapshot):
        path.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = save({"w": torch.arange(8)}) if name.endswith("safetensors") else random.Random(name).randbytes(200)
        small = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = blobs / (hashlib.sha256(data).hexdigest() if name.endswith("safetensors") else small)
        blob.write_bytes(data)
        (snapshot / name).symlink_to(blob)
    whole = weights.identity(snapshot)
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        for _ in changed(blob, places=40):
            with pytest.raises(CompendiumError, match=blob.name) as caught:
                models.identity(snapshot)
            one_sentence(caught.value)
            blob.with_name(blob.name + ".corrupt").replace(blob)
    assert weights.identity(snapshot) == whole


def test_the_claims_end_in_a_sentence_or_are_read(tmp_path):
    claim_file = pytest.importorskip("refusal.claim_file", reason="there is no ledger yet")
    path = tmp_path / "claims.yaml"
    shutil.copy(claim_file.FILE, path)
    whole, refused = len(claim_file.read(path).claims), 0
    for place in changed(path, places=40):
        try:
            assert len(claim_file.read(path).claims) == whole, f"byte {place}"
        except CompendiumError as error:
            refused += 1
            one_sentence(error)
    assert refused
