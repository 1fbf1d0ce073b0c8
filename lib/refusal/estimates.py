"""What a run takes, said before it is begun: memory and time of each model, from the registry's shapes.

Memory is the weights, the keys and values of the rows that fit, and what the libraries take. Time is floating-point
operations (refusal.workload counts them) over a rate, and what Python takes for each block of each pass. The rate is
that of matrix products of the model's shape with as many rows, measured here and now; for a GPU that is not here it is
stated. Expect to be wrong by a factor of two, and by more on a GPU, where nothing has been held against a run yet.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refusal import chunks, models, provenance, records
from refusal.registry import Entry, entry
from refusal.runs import FIRST
from refusal.workload import parameters, record_of, work

RECORDS = records.COMMITTED
ROWS, NEW_TOKENS = 384, 48  # the notebooks' defaults
PYTHON_S = 1.5e-3  # a block and pass, however few its rows: the tiny models of the tests take 1 to 4 ms


@dataclass(frozen=True)
class Machine:
    """Where a model might run.

    Attributes:
        name: For people.
        memory: Bytes, of the GPU where there is one.
        gpu: Whether it has one.
        dtype: "bfloat16" or "float32".
        rate: Floating-point operations a second, of a model's matrix products at a number of rows.
    """

    name: str
    memory: float
    gpu: bool
    dtype: str
    rate: Callable[[Entry, int], float]


def roofline(operations: float, bandwidth: float) -> Callable[[Entry, int], float]:
    """A stated rate: `operations` at most, and with few rows what reading bfloat16 weights at `bandwidth` allows."""
    return lambda known, rows: min(operations, rows * bandwidth)


GPU_SHARE = 1 / 3  # of a GPU's matrix products: assumed
# What the makers say of a consumer's card of 24 GB: 165 TFLOP/s, 1 TB/s, and memory less what the driver keeps.
GPU_24 = Machine("a GPU of 24 GB (stated, not measured)", 25e9, True, "bfloat16", roofline(165e12 * GPU_SHARE, 1e12))


@dataclass(frozen=True)
class Estimate:
    """What a model takes on a machine.

    Attributes:
        rows: Rows at once.
        peak: Bytes.
        fits: Whether that is there.
        seconds: A notebook; NaN where no record says how much there is to do.
    """

    rows: int
    peak: float
    fits: bool
    seconds: dict[str, float]


def row_bytes(known: Entry, dtype: str, tokens: int = NEW_TOKENS) -> float:
    """What a row takes in memory, as the run itself reckons it from the model's config.json."""
    shape = known.shape
    assert shape is not None
    config = {"num_hidden_layers": known.blocks, "num_attention_heads": shape.heads, "head_dim": shape.head_width}
    return chunks.config_row_bytes(config | {"num_key_value_heads": shape.kv_heads}, dtype, tokens)


def estimate(known: Entry, machine: Machine, notebooks: Sequence[str], root: Path = RECORDS) -> Estimate:
    """What some notebooks take for a model on a machine; arguments as in `report`."""
    size = 2 if machine.dtype == "bfloat16" else 4
    weights, row = size * parameters(known)[2], row_bytes(known, machine.dtype)
    rows = chunks.rows_that_fit(ROWS, row, weights, machine.memory, machine.gpu)
    peak = weights + rows * row + chunks.FIXED_BYTES
    found = {notebook: record_of(known.id, notebook, root) for notebook in notebooks}
    rate = machine.rate(known, rows) if peak <= machine.memory and any(found.values()) else float("nan")
    seconds = dict.fromkeys(notebooks, float("nan"))
    for notebook, path in found.items():
        if path:
            operations, passes = work(known, notebook, path, rows)
            seconds[notebook] = operations / rate + passes * known.blocks * PYTHON_S
    return Estimate(rows, peak, peak <= machine.memory, seconds)


def measured(known: Entry, rows: int, dtype: str, seconds: float = 0.5) -> float:
    """Operations a second of matrix products of the model's shape, here: large weights, so that caches do not help."""
    assert known.shape is not None
    place: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": "cuda" if torch.cuda.is_available() else "cpu"}
    weights = [torch.full((known.shape.feed_forward, known.width), 0.01, **place) for _ in range(3)]
    states = torch.full((rows, known.width), 0.01, **place)

    def once() -> None:
        for weight in weights:
            made = torch.nn.functional.linear(states, weight)
        float(made[0, 0])  # waits for a GPU

    with torch.inference_mode():
        once()
        began, times = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            once()
            times += 1
        took = time.monotonic() - began
    share = GPU_SHARE if torch.cuda.is_available() else 1.0
    return share * 2.0 * times * sum(weight.numel() for weight in weights) * rows / took


def here() -> Machine:
    """This machine, whose rate is measured when it is asked for."""
    dtype, memory, gpu = models.choose_dtype(), chunks.machine_memory(), torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name() if gpu else f"{provenance.processor() or 'processor'}, {cores} cores"
    return Machine(
        f"here ({name}, {memory / 1e9:.0f} GB, {dtype})", memory, gpu, dtype, lambda known, n: measured(known, n, dtype)
    )


def duration(seconds: float) -> str:
    """Time for people, as exactly as an estimate deserves."""
    if seconds < 90:
        return "a minute or so"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h" if seconds < 36e4 else "> 100 h"


def _line(machine: Machine, found: Estimate) -> str:
    if not found.fits:
        return f"  {machine.name}: does not fit, since it takes {found.peak / 1e9:.1f} GB with a single row"
    known = {name: value for name, value in found.seconds.items() if value == value}
    rows = "1 row" if found.rows == 1 else f"{found.rows} rows"
    said = f"  {machine.name}: {rows} at once, {found.peak / 1e9:.1f} GB at most"
    if known:
        parts = ", ".join(f"{name[:2]} {duration(value)}" for name, value in known.items())
        said += f", {duration(sum(known.values()))} ({parts})"
    unknown = [name[:2] for name in found.seconds if name not in known]
    return said + (f"; not counted, for want of a record: {', '.join(unknown)}" if unknown else "")


def report(chosen: Sequence[str], notebooks: Sequence[str], root: Path = RECORDS) -> str:
    """What `--dry-run` says of memory and time: a paragraph a model.

    Args:
        chosen: Model ids.
        notebooks: Their names; time is that of measuring them in full, with nothing measured before, and of
            notebook 01, which they need.
        root: Where the committed records lie.
    """
    machine, needed = here(), sorted({FIRST, *notebooks})
    lines = ["", "memory and time of measuring, all anew and in full, estimated within a factor of two:"]
    for known in map(entry, chosen):
        if known.shape is None:
            lines.append(f"{known.id}: no estimate, since its entry in data/models.yaml gives no shape")
            continue
        count = parameters(known)[2]
        token = "" if os.environ.get("HF_TOKEN") else "; gated, and HF_TOKEN is not set" if known.gated else ""
        size = known.gguf_bytes or 2 * count
        lines.append(f"{known.id}: {count / 1e9:.2f} billion parameters, {size / 1e9:.1f} GB to get{token}")
        places = [machine] if machine.gpu or known.source == "wheels" else [machine, GPU_24]
        lines += [_line(place, estimate(known, place, needed, root)) for place in places]
    return "\n".join(lines)
