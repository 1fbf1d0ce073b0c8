"""A tiny model in place of a registry's, with all that a run needs around it in a folder of its own; no network."""

import dataclasses
import json
from types import SimpleNamespace

import pandas as pd
import torch

from refusal import chunks, judging, models, runs, steering
from refusal.directions import Directions

ID = "tiny"
WEIGHTS = "ab" * 32
THRESHOLDS = judging.Thresholds(repetition=0.9, nll=50.0, n=1000)
LAYERS, WIDTH = 4, 32


def install(root, model, setattr=setattr, weights_sha256=WEIGHTS, stop=("<|endoftext|>",)):
    """Lets the library find `model` under the id "tiny", and `root` in place of the repository.

    Args:
        root: A folder for build/, data/ and the model's files.
        model: A tiny `Model`.
        setattr: That of pytest's monkeypatch, so that everything ends with the test.
        weights_sha256: What the model's provenance says.
        stop: What the model's entry says.

    Returns:
        A list that grows by one with every time that the model is loaded.
    """
    loaded = []
    folder = root / "cache" / ID
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "provenance.json").write_text(json.dumps({"weights_sha256": weights_sha256}))
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    (folder / "config.json").write_text(model.hf.config.to_json_string())

    def load(model_id, dtype="auto"):
        assert model_id == ID
        loaded.append(model_id)
        return dataclasses.replace(model, id=ID, weights_sha256=weights_sha256)

    known = models.entry

    def entry(model_id):
        return SimpleNamespace(stop=stop) if model_id == ID else known(model_id)

    setattr(models, "load", load)
    setattr(models, "fetch", lambda model_id: folder)
    setattr(models, "entry", entry)
    setattr(models, "choose_dtype", lambda: "float32")
    for module in (chunks, runs):
        setattr(module, "ROOT", root)
    return loaded


def prompts(count, prompt_set="harmful_evaluation"):
    """Prompts of different lengths, two a cluster."""
    return pd.DataFrame(
        {
            "prompt_id": f"{prompt_set}-{number:03d}",
            "prompt_set": prompt_set,
            "category": "fraud" if number % 2 else "cyber",
            "cluster": f"base-{(number + 1) // 2:02d}",
            "text": f"Tell me {'very ' * (number % 5)}much about number {number}" + "?" * (number % 3),
        }
        for number in range(1, count + 1)
    )


def directions(seed=0, layers=LAYERS, width=WIDTH):
    """Random directions of norms that move a tiny model's text."""
    drawn = torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))
    norm = drawn.norm(dim=-1)
    return Directions("extracted", drawn / norm[:, None], norm, 2 * norm)


def conditions():
    """Baseline, one sign and the other, and a sampled one."""
    made = directions()
    return [steering.baseline(), steering.add(made, 1, 1), steering.add(made, 1, -1.0), steering.sampled(7)]
