"""A stage for faults: a copy of the compendium and a planted model in a hub's cache, on which whole runs take seconds.

The copy lies in a folder with blanks and foreign letters, its environment too; the library, the job graph, the strict
runner and the notebooks 01 and 03 are the real ones. Prompts are the planted model's own, so that it refuses some of
them and labels mean something. Every process notes where it connects to, and there is a token to be leaked.
"""

import csv
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hub
import pandas as pd
import planted
import yaml

from refusal import records
from refusal.files import ROOT


def locales() -> list[str]:
    """What is installed here; others make bash warn."""
    found = shutil.which("locale")
    return subprocess.run([found, "-a"], capture_output=True, text=True).stdout.split() if found else ["C"]


MODEL = "planted"
REVISION = "0123456789abcdef" * 2 + "01234567"
NOTEBOOKS = ("01_extraction", "03_sign_inversion")
MADE = ("build", ".snakemake")  # by a run
# A run dies with the test that started it, also where that is killed.
DIES = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
TOKEN = "hf_" + "kanarienvogel" * 3  # no real one has such letters
PROMPTS = 16  # a set; a quick run takes 12
SETS = ["harmful_extraction", "harmful_selection", "harmful_evaluation", "harmful_study"]
SETS += ["harmless_extraction", "harmless_selection", "harmless_evaluation", "harmless_topics"]
# A Turkish one, whose small i is another letter; where there is none, the one without any letters beyond ASCII.
FOREIGN = next((name for name in ("tr_TR", "tr_TR.iso88599", "tr_TR.utf8") if name in locales()), "C")
# Notes every address that is looked up or connected to, in every Python that is started.
WATCH = """
import os, sys
def watch(event, given):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = given[1][0] if event == "socket.connect" and isinstance(given[1], tuple) else given[0]
        if event == "socket.connect" and not isinstance(given[1], tuple):
            return  # a socket of this machine
        if host not in (None, "", "localhost", "127.0.0.1", "::1", b"127.0.0.1"):
            with open(os.environ["REFUSAL_WATCH"], "a") as seen:
                seen.write(f"{event} {host} in {sys.argv[:3]}\\n")
sys.addaudithook(watch)
"""


@dataclass(frozen=True)
class Stage:
    """Where everything lies: the copy of the compendium, the hub's cache, and what was connected to."""

    folder: Path
    hub: Path
    connections: Path
    python: Path

    @property
    def out(self) -> Path:
        """Where a quick run writes."""
        return self.folder / "build" / "quick"

    def environment(self, **more: str) -> dict[str, str]:
        """That of a user with a foreign locale and clock, a token, and no network."""
        own = ("HF_", "LC_", "LANG", "PYTHON", "TQDM", "JUPYTER")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return kept | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "REFUSAL_ENV": "active",
            "PYTHON": sys.executable,
            "HF_HOME": str(self.hub),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": TOKEN,
            "REFUSAL_WATCH": str(self.connections),
            "LC_ALL": FOREIGN,
            "TZ": "Pacific/Kiritimati",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def start(self, *options: str, before: tuple[str, ...] = (), **more: str) -> subprocess.Popen:
        """Starts ./run_all.sh in a session of its own."""
        words = [*DIES, *before, "./run_all.sh", "--quick", "--only", "03", "--model", MODEL, "--cores", "2", *options]
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

    def run(
        self, *options: str, before: tuple[str, ...] = (), seconds: float = 300, **more: str
    ) -> tuple[int, str, str]:
        """Runs ./run_all.sh to its end: exit status, stdout, stderr."""
        process = self.start(*options, before=before, **more)
        out, error = process.communicate(timeout=seconds)
        return process.returncode, out, error

    def notebook(self, name: str, parameters: str, out: Path) -> subprocess.Popen:
        """Starts the strict runner alone, as the job graph does."""
        words = [*DIES, str(self.python), "-m", "refusal.notebooks", "run", name, "--out", str(out), "-y", parameters]
        return subprocess.Popen(
            words, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip

    def clear(self) -> None:
        """Forgets all runs."""
        for name in MADE:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def keep(self) -> None:
        """Keeps what a run has made, for `restore`."""
        for name in MADE:
            shutil.copytree(self.folder / name, self.folder.parent / "kept" / name, symlinks=True)

    def restore(self) -> None:
        """Puts the run that was kept in place of all others."""
        self.clear()
        for name in MADE:
            shutil.copytree(self.folder.parent / "kept" / name, self.folder / name, symlinks=True)

    def rows(self, out: Path | None = None) -> dict[str, pd.DataFrame]:
        """The records and metrics of a run that are there; each must be whole."""
        folder = (out or self.out) / "records" / MODEL
        return {path.name: records.read(path)[0] for path in sorted(folder.glob("[0-9]*.parquet"))}

    def leaks(self) -> list[str]:
        """Files with the token in them, of all that a run leaves."""
        places = [self.folder / name for name in (*MADE, "notebooks", "data")]
        paths = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [str(path) for path in paths if TOKEN.encode() in path.read_bytes()]


def sentence(text: str) -> str:
    """The one sentence that a failed run ends with."""
    found = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in text, text
    assert re.search(r"[.)?]$", found[0]), found[0]
    return found[0]


def same(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> None:
    """Asserts that two runs have the same rows: none lost, none doubled, every value equal."""
    assert one.keys() == other.keys()
    for name in one:
        pd.testing.assert_frame_equal(one[name], other[name], check_exact=True)


def flip(path: Path, rng: random.Random) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))


def make(tmp_path: Path) -> Stage:
    """Builds a stage."""
    folder = tmp_path / "Kopie für 写し"
    shutil.copytree(ROOT / "lib" / "refusal", folder / "lib" / "refusal", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    for name in NOTEBOOKS:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks")
    for name in ("run_all.sh", "Snakefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "data" / "prompts").mkdir(parents=True)
    for path in [*(ROOT / "data").glob("*.csv"), ROOT / "data" / "analysis_plan.yaml"]:
        shutil.copy(path, folder / "data")
    write_prompts(folder / "data" / "prompts")
    blocks, width = write_model(tmp_path / "hub")
    about = {
        "source": "hub", "licence": "MIT", "blocks": blocks, "width": width, "stop": ["<end>"], "gated": True,
        "note": "planted", "hub_id": f"nobody/{MODEL}", "revision": REVISION,
    }  # fmt: skip
    others = (ROOT / "data" / "models.yaml").read_text(encoding="utf-8")
    registry = f"{others}\n{yaml.safe_dump({MODEL: about}, sort_keys=False)}"
    (folder / "data" / "models.yaml").write_text(registry, encoding="utf-8")
    watch, binaries = tmp_path / "watch", tmp_path / "bin"
    for path in (watch, binaries):
        path.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/lib:{watch}" exec "{interpreter(folder)}" "$@"\n', "utf-8")
    python.chmod(0o755)
    return Stage(folder, tmp_path / "hub", tmp_path / "connections", python)


def interpreter(folder: Path) -> Path:
    """A virtual environment below `folder` that has the packages of this one: its path has blanks, as a user's may."""
    own = Path(sys.prefix)
    if not (own / "pyvenv.cfg").is_file():  # conda
        return Path(sys.executable)
    made = folder / ".venv"
    (made / "bin").mkdir(parents=True)
    shutil.copy(own / "pyvenv.cfg", made)
    (made / "lib").symlink_to(own / "lib")
    (made / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    return made / "bin" / "python"


def write_prompts(folder: Path) -> None:
    """Prompt sets of planted requests, all different, in four categories and, for the study's, in clusters of four."""
    harmful, harmless = (iter(planted.requests(w, 4 * PROMPTS, 1)) for w in (planted.HARMFUL, planted.HARMLESS))
    for name in SETS:
        source = harmful if name.startswith("harmful") else harmless
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["prompt_id", "category", "cluster", "text"])
            for number in range(PROMPTS):
                prompt_id = f"{name}-{number + 1:03d}"
                cluster = f"base-{number // 4:02d}" if name == "harmful_study" else prompt_id
                table.writerow([prompt_id, f"kind-{number % 4}", cluster, next(source)])


def write_model(cache: Path) -> tuple[int, int]:
    """A planted model as the hub's client keeps it."""
    made, plain = planted.build().model, cache / "plain"
    made.hf.save_pretrained(plain)
    made.tokenizer.save_pretrained(plain)
    hub.place(plain, cache / "hub" / f"models--nobody--{MODEL}", REVISION)
    return made.n_layers, made.width
