"""The contestant (e): what its process does, and all that needs the model's tokenizer, directions and judge."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable

import pandas as pd
import torch

from benchmarks import exactness
from benchmarks.contestants import random_llama
from benchmarks.summary import LLAMA
from benchmarks.timing import profiled, timed
from refusal import activations, analyses, directions, judging, models, prompts, records, steering
from refusal.files import ROOT, CompendiumError, sha256_text


def load(job: dict) -> dict[str, Callable[[dict], dict]]:
    """Loads a model through the library.

    The directions are the committed ones, else extracted from 64 + 64 prompts, with the layer at 75 % of the depth.
    """
    if job["folder"] == LLAMA:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(models.fetch(job["tokenizer"]))
        model = models.wrap(random_llama(job), tokenizer, job["model"])
        unit = torch.nn.functional.normalize(torch.randn(model.n_layers, model.width), dim=-1)
        found = directions.Directions("random", unit, torch.ones(model.n_layers), torch.ones(model.n_layers))
        return operations(model, found, round(0.75 * model.n_layers), "random")
    model = models.load(job["model"], job["dtype"])
    path = ROOT / "data" / "directions" / f"{model.id}.safetensors"
    about = {"model": model.id, "weights_sha256": model.weights_sha256, "template_sha256": model.template_sha256}
    if path.is_file():
        found, layer = directions.load(path, expect=about, shape=(model.n_layers, model.width))
        return operations(model, found, layer, "the committed one, at the layer that its rule selects")
    texts = [prompts.load(f"{kind}_extraction").head(64)["text"].tolist() for kind in ("harmful", "harmless")]
    harmful, harmless = (activations.last_token(model, part) for part in texts)
    source = "from 64 + 64 extraction prompts, at 75 % of the depth"
    return operations(model, directions.extract(harmful, harmless), round(0.75 * model.n_layers), source)


def recorded(model_id: str) -> tuple[judging.Thresholds, list[int]]:
    """The judge's thresholds and the refusal openings, from the committed record; none of either without one."""
    limits, openings = judging.Thresholds(float("inf"), float("inf"), 0), []
    with contextlib.suppress(CompendiumError):
        completions, metrics = records.paths(ROOT / "data", model_id, "01_extraction")
        limits = judging.Thresholds(**records.read(completions)[1]["thresholds"])
        openings = analyses.opening_tokens(records.read(metrics)[0])
    return limits, openings


def operations(
    model: models.Model, found: directions.Directions, layer: int, source: str
) -> dict[str, Callable[[dict], dict]]:
    """What the engine's process answers.

    Args:
        model: The model.
        found: Directions of all its layers.
        layer: Where the sweeps steer.
        source: Where the directions come from, in words.
    """
    limits, openings = recorded(model.id)

    def conditions(asked: dict) -> list[steering.Condition]:
        layers = asked.get("layers", [layer])
        return [steering.add(found, one, alpha) for one in layers for alpha in asked["alphas"]]

    def describe(asked: dict) -> dict:
        return {
            "layer": layer,
            "layers": model.n_layers,
            "direction": source,
            "direction_sha256": sha256_text(conditions({"alphas": [1.0]})[0].key()),
            "dtype": model.dtype,
            "weights_sha256": model.weights_sha256,
            "stop_ids": list(model.stop_ids),
            "pad": model.tokenizer.pad_token_id,
            "vocabulary": len(model.tokenizer),
            "openings": openings,
            "thresholds": bool(limits.n),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            "accelerator_gb": torch.cuda.get_device_properties(0).total_memory / 1e9
            if torch.cuda.is_available()
            else 0,
        }

    def encode(asked: dict) -> dict:
        batch = models.encode(model, asked["texts"])
        pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        return {"prompts": [[token for token, kept in zip(*pair, strict=True) if kept] for pair in pairs]}

    def vectors(asked: dict) -> dict:
        # `vectors` is None only where there is no intervention, which `add` never gives.
        return {"vectors": [one.vectors[0].tolist() for one in conditions(asked) if one.vectors is not None]}

    def generate(asked: dict) -> dict:
        of = dataclasses.replace(model, stop_ids=(-1,)) if asked["forced"] else model
        wanted, limit, score = conditions(asked), asked["max_new_tokens"], asked.get("score", False)
        clock = profiled if asked.get("profile") else timed
        made, measured = clock(lambda: steering.generate(of, asked["texts"], wanted, max_new_tokens=limit, score=score))
        return {"tokens": [[list(one.token_ids) for one in column] for column in zip(*made, strict=True)], **measured}

    def screen(asked: dict) -> dict:
        wanted = conditions(asked)
        values, measured = timed(lambda: steering.screen(model, asked["texts"], wanted, openings))
        return {"values": values.T.tolist(), **measured}

    def labels(asked: dict) -> dict:
        """Of conditions x prompts x ids. Without a reference NLL: the judge's rule "incoherent" takes no part."""
        rows = [
            {"text": model.tokenizer.decode(ids, skip_special_tokens=True), "prompt": text, "n_tokens": len(ids)}
            for column in asked["tokens"]
            for ids, text in zip(column, asked["texts"], strict=True)
        ]
        judged = judging.label_frame(pd.DataFrame(rows).assign(reference_nll=float("nan")), limits)["label"].tolist()
        n = len(asked["texts"])
        return {"labels": [judged[first : first + n] for first in range(0, len(judged), n)]}

    def exact(asked: dict) -> dict:
        return exactness.compare(model, found, layer, asked["texts"])

    def release(asked: dict) -> dict:
        """Gives back the memory that torch keeps for later, so that another process can have it."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    return {one.__name__: one for one in (describe, encode, vectors, generate, screen, labels, exact, release)}
