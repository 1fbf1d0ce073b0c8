"""Seconds, peak memory and profile of a piece of work, on the processor or the GPU."""

import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the peak of the resident set starts again from what it is now
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Peak memory in 10^9 bytes since `reset_peak`: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and its seconds and peak_gb."""
    reset_peak()
    synchronize()
    start = time.perf_counter()
    made = work()
    synchronize()
    return made, {"seconds": time.perf_counter() - start, "peak_gb": peak_gb()}


# Which of torch's operations belong together, by a part of their names; everything else stands under its own name.
PARTS = {
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "matrix products": ("linear", "mm", "gemm"),
}
SHOWN = 5  # of the other operations


def profiled(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """As `timed`, with the share of the seconds that each part of torch took, the largest others by their names.

    The profiler itself takes time, so the seconds are not for comparing contestants. "outside of torch" is Python,
    waiting, and the profiler.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=kinds) as profile:
        made, measured = timed(work)
    seconds = measured["seconds"]
    spent: dict[str, float] = dict.fromkeys(reversed(PARTS), 0.0)
    device = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::")
        part = next((part for part, names in PARTS.items() if any(one in name for one in names)), name)
        spent[part] = spent.get(part, 0.0) + getattr(event, device) / 1e6
    others = sorted(set(spent) - set(PARTS), key=lambda name: -spent[name])
    shares = {name: spent[name] / seconds for name in (*reversed(PARTS), *others[:SHOWN])}
    shares["other operations"] = sum(spent[name] for name in others[SHOWN:]) / seconds
    shares["outside of torch"] = max(0.0, 1 - sum(spent.values()) / seconds)
    return made, {**measured, "shares": shares}
