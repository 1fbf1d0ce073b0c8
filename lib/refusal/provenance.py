"""Where a result comes from: the commit and the processor."""

import platform
import subprocess
from pathlib import Path


def git(root: Path, *arguments: str) -> str:
    """What git prints for a repository, stripped; "" without git, outside of a repository, or where git fails."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""  # without a commit, git echoes the word HEAD


def processor() -> str:
    """The processor's name, as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
