"""environment.yml, for conda users, from the pins: `python -m refusal.environment` writes it."""

import re
from collections.abc import Sequence

import yaml

from refusal.files import ROOT, CompendiumError, atomic, cli


def contents() -> str:
    """The pins of requirements.lock without their hashes, and that of torch from pyproject.toml."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    torch = re.search(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert torch, "pyproject.toml pins torch"
    pins = re.findall(r"^([A-Za-z0-9][^\s\\;]*==[^\s\\;]+)[ \t]*(;[^\\\n]*)?", lock, re.MULTILINE)
    head = "# The pins of requirements.lock, for conda: `python -m refusal.environment` writes this file."
    dependencies = ["python=3.11", "pip", {"pip": [torch[1], *(f"{pin} {mark}".strip() for pin, mark in pins), "-e ."]}]
    tree = {"name": "refusal", "channels": ["conda-forge"], "dependencies": dependencies}
    return f"{head}\n{yaml.safe_dump(tree, sort_keys=False, width=1000)}"


def main(arguments: Sequence[str]) -> int:
    """Writes the file; takes no arguments."""
    if arguments:
        raise CompendiumError("python -m refusal.environment takes no arguments: it writes environment.yml.")
    with atomic(ROOT / "environment.yml") as path:
        path.write_text(contents(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    cli(main)
