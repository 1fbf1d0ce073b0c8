"""pytest in a process that has imported the heavy libraries already, but nothing of the compendium."""

import multiprocessing
import os
import sys
from pathlib import Path

HEAVY = [
    "nnsight",
    "pandas",
    "pyarrow.parquet",
    "pytest",
    "scipy.stats",
    "sklearn.metrics",
    "statsmodels.api",
    "transformers",
]


def _main(root: str, words: list[str], said: str) -> None:
    with Path(said).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.dont_write_bytecode = True
    sys.path[:0] = [f"{root}/lib"]
    import pytest

    status = int(pytest.main(words))
    sys.stdout.flush()
    os._exit(status)


def pytest_in(root: Path, words: list[str], seconds: float) -> tuple[int | None, str]:
    """Runs pytest in a folder, with its `lib` in front of what is installed.

    Args:
        root: The folder.
        words: Arguments of pytest.
        seconds: After which it is killed.

    Returns:
        Its exit status (negative where it was killed), and what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)  # imported once, by the server from which all these processes are forked
    said = root / "said.txt"
    process = context.Process(target=_main, args=(str(root), words, str(said)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, said.read_text(encoding="utf-8", errors="replace")
