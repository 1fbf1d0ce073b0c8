"""The contestants' processes and environments, seen from the harness."""

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from refusal.files import ROOT

# Peers whose pins disagree with the lock get an environment of their own. It sees the packages of this one, so that
# torch is the same, and holds what differs.
OWN = {
    "steering-vectors": ("steering-vectors==0.12.2", "transformers==4.57.6"),
    "repeng": ("repeng==0.4.0", "numpy==1.26.4"),
}
ENVIRONMENTS = ROOT / "build" / "benchmarks"


class ContestantError(Exception):
    """A contestant cannot be measured; the message says why."""


@functools.cache
def interpreter(contestant: str, folder: Path = ENVIRONMENTS) -> str:
    """The Python that a contestant runs in; makes its environment where that is missing.

    Raises:
        ContestantError: The environment cannot be made, for example without a network.
    """
    if contestant not in OWN:
        return sys.executable
    place = folder / contestant
    python, stamp = place / "bin" / "python", place / "stamp"
    base = sysconfig.get_paths()["purelib"]
    wanted = "\n".join((*OWN[contestant], base, sys.version))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and python.exists():
        return str(python)
    print(f"making the environment of {contestant} in {place.relative_to(ROOT)} (once)", flush=True)
    _call([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)])
    own = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (own / "base.pth").write_text(base + "\n", encoding="utf-8")
    # Wheels only: a build from source is hours away from a result.
    install = ["install", "--quiet", "--only-binary", ":all:", *OWN[contestant]]
    _call([sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *install])
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _call(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "rror:" in line]
        raise ContestantError(f"its environment cannot be made: {' '.join((said or ['no reason given'])[-1].split())}")


class Worker:
    """One contestant's process. It lives as long as this object is open, and computes only while it is asked."""

    def __init__(self, contestant: str, job: dict) -> None:
        log = ENVIRONMENTS / "logs" / f"{contestant}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.contestant, self.log = contestant, log
        # After `kill -9` of the harness a contestant would go on computing beside the next run.
        with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("a", encoding="utf-8") as stderr:
            self.process = subprocess.Popen(
                [*with_us, interpreter(contestant), "-m", "benchmarks.process", contestant],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            self.packages = self.ask(job | {"contestant": contestant})["packages"]
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict) -> dict:
        """Sends a request and waits for its answer.

        Raises:
            ContestantError: It failed or died.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the empty answer says so
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            why = "killed, as for want of memory" if status == -9 else f"ended with status {status}"
            raise ContestantError(f"its process was {why} (log: {self.log.relative_to(ROOT)})")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
