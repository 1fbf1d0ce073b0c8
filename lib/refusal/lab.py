"""JupyterLab on the notebooks, with the kernel of this very environment: `./run_all.sh lab`.

Usage:
    python -m refusal.lab [options of jupyter lab, e.g. --no-browser --port 8890]
"""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

from refusal.files import ROOT, CompendiumError, cli

SETTINGS = (
    f"--ServerApp.root_dir={ROOT}",
    "--LabApp.default_url=/lab/tree/notebooks",
    "--LabApp.news_url=None",  # asks nobody for news or newer versions
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
)


def command(arguments: Sequence[str], root: bool) -> list[str]:
    """The command line of JupyterLab.

    Args:
        arguments: The user's own options, which come last and so prevail.
        root: Whether the superuser asks, as in a container; Jupyter wants to be told.
    """
    return [sys.executable, "-m", "jupyterlab", *SETTINGS, *(["--allow-root"] if root else []), *arguments]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the server, and so of the kernels.

    The kernel "python3" is this environment's, also where the user has another of that name; REFUSAL_LAB lets notebooks
    show what can be moved (`refusal.explore`).
    """
    own = {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "REFUSAL_LAB": "1"}
    return {**given, **own}


def main(arguments: Sequence[str]) -> int:
    """Becomes JupyterLab."""
    for name in ("jupyterlab", "ipykernel"):
        if importlib.util.find_spec(name) is None:
            raise CompendiumError(f"the environment lacks {name}: make it with ./run_all.sh, or from environment.yml.")
    words = command(arguments, root=hasattr(os, "geteuid") and os.geteuid() == 0)
    os.execve(words[0], words, environment(os.environ))


if __name__ == "__main__":
    cli(main)
