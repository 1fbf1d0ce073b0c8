"""Chunks: parts of a measurement, written whole or not at all, and used again while they would come out the same.

A chunk's key holds the weights, the template, the dtype, the prompts, the conditions and the source of the modules that
decide tokens. Labels are not in it: they are made anew from the stored text.
"""

import contextlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from refusal import (
    activations,
    conditions,
    conversion,
    directions,
    engine,
    models,
    packing,
    prefixes,
    prompts,
    records,
    steering,
    weights,
)
from refusal.conditions import Condition
from refusal.files import ROOT, atomic, progress, sha256_file, sha256_text

DECIDE_TOKENS = (conversion, packing, models, prefixes, directions, conditions, engine, steering)
DECIDE_METRICS = (*DECIDE_TOKENS, activations)
PROMPT_TOKENS = 128
LOADING = 1.5  # times the weights, beside the processor: copies are made of parts while they are loaded and multiplied
ADDRESSES = 4e9  # a process limit counts addresses, of which the libraries map so many without taking memory
FIXED_BYTES = 1.2e9  # the libraries, and the vocabulary's logits of a block of rows: measured on the 0.5B


@dataclass
class Store:
    """The chunks of one model, and the model itself once something must be measured.

    Attributes:
        model: Registry id.
        facts: What identifies the model: weights_sha256, template_sha256, dtype, layers, width, stop_tokens.
        costs: Wall time in s and peak memory in GB of every chunk used so far, measured now or before.
        loaded: The model, where it had to be loaded.
    """

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    costs: list[dict[str, float]] = field(default_factory=list)
    loaded: models.Model | None = None

    @property
    def folder(self) -> Path:
        """Where the chunks lie: one place for all kinds of runs, since the key tells them apart."""
        return ROOT / "build" / "chunks" / self.model


def open_store(model: str) -> Store:
    """Finds out what identifies the model, which is kept, since the template's hash needs the loaded tokenizer."""
    store = Store(model)
    folder = models.fetch(model)
    about = folder / "provenance.json"
    source = sha256_file(about) if about.is_file() else weights.identity(folder)
    stop = models.entry(model).stop  # of the registry, which the weights' provenance does not hold
    key = sha256_text(json.dumps([source, stop, models.choose_dtype(), _sources((models,))]))[:24]
    path = store.folder / f"model-{key}.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # missing, or damaged
        facts, _, seal = path.read_text().partition("\n")
        if not seal or seal == sha256_text(facts):  # older ones have none
            store.facts = json.loads(facts)
    if not store.facts:
        model_ = load_model(store)
        store.facts = {
            "weights_sha256": model_.weights_sha256,
            "template_sha256": model_.template_sha256,
            "dtype": model_.dtype,
            "layers": model_.n_layers,
            "width": model_.width,
            "stop_tokens": [model_.tokenizer.convert_ids_to_tokens(i) for i in model_.stop_ids],
        }
        with atomic(path) as temporary:
            facts = json.dumps(store.facts)
            temporary.write_text(f"{facts}\n{sha256_text(facts)}")  # JSON alone does not notice a flipped bit
    return store


def load_model(store: Store) -> models.Model:
    """The model, loaded at the first need only: a run whose chunks are all there needs none."""
    if store.loaded is None:
        store.loaded = models.load(store.model)
    return store.loaded


def _sources(modules: Sequence[ModuleType]) -> list[str]:
    return [sha256_file(str(module.__file__)) for module in modules]


def key(store: Store, modules: Sequence[ModuleType], *parts: object) -> str:
    """The name of a chunk: a hash of the model, the modules' sources and whatever else decides it (JSON values)."""
    known = {name: store.facts[name] for name in ("weights_sha256", "template_sha256", "dtype", "stop_tokens")}
    return sha256_text(json.dumps([store.model, known, _sources(modules), *parts], sort_keys=True))[:32]


def row_bytes(folder: Path, dtype: str, tokens: int, letters: int = 0) -> float:
    """What a row takes in memory: keys and values of trunk and branch.

    Args:
        folder: Of the model, with its config.json.
        dtype: "bfloat16" or "float32".
        tokens: The most that are generated.
        letters: Of the longest prompt, which has at most as many tokens; a prompt counts 128 at least.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config_row_bytes(config, dtype, tokens, letters)


def config_row_bytes(config: Mapping[str, Any], dtype: str, tokens: int, letters: int = 0) -> float:
    """The same from the sizes that a model's config.json holds."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    each = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width
    return 2.0 * each * (2 if dtype == "bfloat16" else 4) * (max(PROMPT_TOKENS, letters) + tokens)


def rows_that_fit(
    rows: int, row: float, weights_bytes: float, memory: float | None = None, gpu: bool | None = None
) -> int:
    """The row count, halved until a batch fits half of the memory that the weights leave.

    It follows from the machine's size, not from what happens to be free, so that a resumed run cuts the same chunks. On
    a GPU the weights lie once, and nothing else of their size: 8 billion parameters leave a third of 24 GB for rows.

    Args:
        rows: What the parameters ask for.
        row: Bytes a row, of `row_bytes`.
        weights_bytes: Size of the weights in memory.
        memory: Bytes; None for this machine's (or its control group's, or its process limit).
        gpu: Whether they are a GPU's; None asks the machine.
    """
    memory = memory or machine_memory()
    times = 1.0 if (torch.cuda.is_available() if gpu is None else gpu) else LOADING
    while rows > 1 and rows * row > 0.5 * max(memory - times * weights_bytes - FIXED_BYTES, 0):
        rows //= 2
    return rows


def machine_memory() -> float:
    """Bytes of the GPU where there is one, else of this machine (or its control group, or its process limit)."""
    if torch.cuda.is_available():  # weights and rows lie there, whatever the processor has
        return float(torch.cuda.get_device_properties(0).total_memory)
    limits = [float(psutil.virtual_memory().total)]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(name).is_file() and (text := Path(name).read_text().strip()).isdigit():
            limits.append(float(text))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min([*limits, *([] if soft == resource.RLIM_INFINITY else [max(0.0, soft - ADDRESSES)])])


def completions(
    store: Store, frame: pd.DataFrame, conditions: Sequence[Condition], *, max_new_tokens: int, rows: int, title: str
) -> pd.DataFrame:
    """Completions with scores, chunk by chunk; unlabelled and unredacted, they stay in build/.

    A chunk is a group of consecutive prompts under all conditions, `rows` rows in all, and one batch of the model.

    Returns:
        `prompt_id, condition, token_ids, n_tokens, stop_reason, text, reference_nll`.
    """
    parts, tokens, began = [], 0, time.monotonic()
    with progress(len(frame) * len(conditions), title, "row") as bar:
        for group in (conditions[i : i + rows] for i in range(0, len(conditions), rows)):
            size = max(1, rows // len(group))
            for first in range(0, len(frame), size):
                chunk = frame.iloc[first : first + size]
                named = [(condition.name, condition.key()) for condition in group]
                name = key(store, DECIDE_TOKENS, prompts.digest(chunk), named, max_new_tokens, rows)
                path = store.folder / f"{name}.parquet"
                measured = read(store, path)
                if measured is None:
                    measured = _generate(store, chunk, group, max_new_tokens, path)
                    tokens += int(measured["n_tokens"].sum())
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.0f} tokens/s")
                parts.append(measured)
                bar.update(len(measured))
    return pd.concat(parts, ignore_index=True)


def _generate(
    store: Store, chunk: pd.DataFrame, conditions: Sequence[Condition], max_new_tokens: int, path: Path
) -> pd.DataFrame:
    model, began = load_model(store), time.monotonic()
    texts = chunk["text"].tolist()
    made = steering.generate(model, texts, conditions, max_new_tokens=max_new_tokens)
    measured = pd.DataFrame(
        {
            "prompt_id": prompt_id,
            "condition": condition.name,
            "token_ids": list(completion.token_ids),
            "n_tokens": len(completion.token_ids),
            "stop_reason": completion.stop_reason,
            "text": completion.text,
            "reference_nll": completion.reference_nll,
        }
        for prompt_id, row in zip(chunk["prompt_id"], made, strict=True)
        for condition, completion in zip(conditions, row, strict=True)
    )
    write(store, measured, path, began)
    return measured


def write(store: Store, frame: pd.DataFrame, path: Path, began: float) -> None:
    """Writes a chunk with what it cost since `began` (of `time.monotonic`)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():  # whichever is the larger: the process's memory or the GPU's
        peak = max(peak, torch.cuda.max_memory_allocated() / 2**30)
    cost = {"wall_s": time.monotonic() - began, "peak_gb": peak}
    table, described = pa.Table.from_pandas(frame, preserve_index=False), json.dumps(cost)
    with atomic(path) as temporary:
        sealed = table.replace_schema_metadata({b"cost": described.encode(), b"sha256": records.seal(table, described)})
        pq.write_table(sealed, temporary, write_page_checksum=True)
    store.costs.append(cost)


def read(store: Store, path: Path) -> pd.DataFrame | None:
    """A finished chunk; None where it is missing, or damaged and so to be measured again."""
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        about = table.schema.metadata or {}
        described = about[b"cost"].decode()
        if b"sha256" in about and about[b"sha256"] != records.seal(table, described):  # older chunks have none
            raise ValueError("flipped bits")
        store.costs.append(json.loads(described))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        path.unlink(missing_ok=True)
        return None
    return table.to_pandas()


def last_tokens(store: Store, frame: pd.DataFrame) -> torch.Tensor:
    """Last-token activations `[prompts, layers, width]` of prompts, kept as one chunk."""
    name = key(store, (conversion, models, prefixes, engine, activations), prompts.digest(frame))
    path = store.folder / f"{name}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError, ValueError), safe_open(path, framework="pt") as stream:
        kept = stream.get_tensor("activations")
        wanted = (stream.metadata() or {}).get("sha256")  # older ones have none
        if wanted in (None, _digest(kept)):
            return kept
    measured = activations.last_token(load_model(store), frame["text"].tolist())
    with atomic(path) as temporary:
        save_file({"activations": measured}, temporary, metadata={"sha256": _digest(measured)})
    return measured


def _digest(tensor: torch.Tensor) -> str:
    """A hash of a float32 tensor's shape and values, which safetensors does not check."""
    return sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()).hexdigest()


def metrics(
    store: Store,
    name: str,
    measure: Callable[[], pd.DataFrame],
    inputs: Sequence[object],
    modules: Sequence[ModuleType] = (),
) -> pd.DataFrame:
    """Metric rows, kept as one chunk; `inputs` (JSON values) and `modules` decide them besides the model."""
    path = store.folder / f"{key(store, (*DECIDE_METRICS, *modules), name, list(inputs))}.metrics.parquet"
    measured = read(store, path)
    if measured is None:
        began = time.monotonic()
        measured = measure()
        write(store, measured, path, began)
    return measured
