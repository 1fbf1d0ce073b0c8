"""A process and all that it has started, which a test may kill and must not leave behind."""

import contextlib
import time

import psutil


def of(pid):
    """The process and its descendants; none where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        whole = psutil.Process(pid)
        return [whole, *whole.children(recursive=True)]
    return []


def survivors(members, seconds):
    """Those that still run after so long; a dead one that nobody has asked for yet (a zombie) does not."""
    end = time.monotonic() + seconds
    while (left := [member for member in members if _runs(member)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _runs(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
