"""Seconds and peak memory of a piece of work, on the processor or the GPU."""

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
