"""A contestant's process: `python -m benchmarks.process NAME` answers requests from the harness.

It reads one JSON object a line from stdin and answers each with one on stdout. The first says which model to load.
Times are taken in here, around the work alone. Only the engine imports this repository's library, because the peers'
environments lack it.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import IO

Operations = dict[str, Callable[[dict], dict]]
PACKAGES = ("torch", "transformers", "numpy", "nnsight", "steering-vectors", "repeng")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def serve(load: Callable[[dict], Operations], asked: IO[str], answers: IO[str]) -> None:
    """Loads what the first line says, then answers each line; whatever goes wrong is an answer too."""

    def answer(made: dict) -> None:
        print(json.dumps(made), file=answers, flush=True)

    operations: Operations = {}
    for line in asked:
        request = json.loads(line)
        try:
            if not operations:
                operations = load(request)
                answer({"packages": versions()})
            else:
                answer(operations[request["op"]](request))
        except Exception as error:  # the harness decides what a contestant's failure means
            said = " ".join(str(error).split())[:300]
            answer({"error": f"{type(error).__name__}: {said}"})


def main() -> None:
    # Libraries print to stdout; what they say goes to stderr, and the answers to where stdout was.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if sys.argv[1] == "engine":
        from benchmarks.engine import load
    else:
        from benchmarks.contestants import load
    serve(load, sys.stdin, answers)


if __name__ == "__main__":
    main()
