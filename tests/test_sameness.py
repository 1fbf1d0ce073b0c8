"""Sameness: across chunk sizes, numbers of threads and dtypes, rows agree at the rate that the README states.

On a planted model, whose labels mean something, they do to the letter in float32. A random one, whose tokens are
decided by a hair, has one label for all that it says: there texts are compared, which part sooner than labels do.
"""

import dataclasses

import pandas as pd
import planted
import pytest
import tiny
import torch

from refusal import chunks, judging, prompts, steering
from refusal.directions import Directions
from refusal.options import LEVEL

TOKENS = 16
THRESHOLDS = judging.Thresholds(repetition=0.06, nll=50.0, n=1000)


@pytest.fixture(scope="module")
def kinds(tiny_models):
    """Models by name, with the conditions and prompts to try them on."""
    made = planted.build()
    unit = made.directions[:1].expand(made.model.n_layers, -1).contiguous()
    along = Directions("extracted", unit, unit.new_full((len(unit),), 4.0), unit.new_full((len(unit),), 8.0))
    doses = [steering.baseline(), steering.sampled(3), *(steering.add(along, 3, alpha) for alpha in (0.3, 0.4, 1, -1))]
    words = planted.requests(planted.HARMFUL, 6, 1) + planted.requests(planted.HARMLESS, 6, 2)
    own = pd.DataFrame({"prompt_id": [f"p-{i}" for i in range(12)], "text": words})
    real = prompts.load("harmful_selection").head(8)[["prompt_id", "text"]]
    return {"planted": (made.model, doses, own), "random": (tiny_models["qwen2"], tiny.conditions(), real)}


def rounded():
    """The planted model in bfloat16."""
    model = planted.build().model
    model.hf.to(torch.bfloat16)
    return dataclasses.replace(model, dtype="bfloat16")


def labels(root, kind, model, rows, threads=1):
    """What a store of its own measures: tokens and labels by condition and prompt."""
    _, conditions, frame = kind
    facts = {"weights_sha256": "ab", "template_sha256": "cd", "dtype": str(model.dtype), "stop_tokens": ["a"]}
    store = chunks.Store(f"{model.id}-{rows}-{threads}-{model.dtype}", facts, loaded=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ROOT", root)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            made = chunks.completions(store, frame, conditions, max_new_tokens=TOKENS, rows=rows, title="same")
        finally:
            torch.set_num_threads(before)
    joined = made.merge(frame.rename(columns={"text": "prompt"}), on="prompt_id")
    found = judging.label_frame(joined, THRESHOLDS).set_index(["condition", "prompt_id"]).sort_index()
    return found[["label", "text", "n_tokens"]]


def agree(one, other, column="text"):
    return (one[column] == other[column]).mean() >= LEVEL / 100


@pytest.mark.parametrize("name", ["planted", "random"])
def test_across_chunk_sizes(kinds, tmp_path, name):
    kind = kinds[name]
    whole = labels(tmp_path, kind, kind[0], 512)
    assert whole["text"].nunique() > 1
    for rows in (6, 24):
        found = labels(tmp_path, kind, kind[0], rows)
        assert agree(found, whole)
        if name == "planted":
            assert set(whole["label"]) == {"refusal", "compliance"}
            pd.testing.assert_frame_equal(found, whole)


@pytest.mark.parametrize("name", ["planted", "random"])
def test_across_threads(kinds, tmp_path, name):
    kind = kinds[name]
    assert agree(*(labels(tmp_path, kind, kind[0], 24, threads) for threads in (1, 2)))


def test_across_dtypes_and_within_bfloat16(kinds, tmp_path):
    kind = kinds["planted"]
    exact = labels(tmp_path, kind, kind[0], 24)
    model = rounded()
    first = labels(tmp_path, kind, model, 24)
    for found in (labels(tmp_path, kind, model, 7), exact):
        assert agree(first, found, "label")


def test_the_same_command_twice_gives_the_same_rows(kinds, tmp_path):
    for name, kind in kinds.items():
        pair = [labels(tmp_path / f"{name}{i}", kind, kind[0], 24) for i in range(2)]
        pd.testing.assert_frame_equal(*pair)
