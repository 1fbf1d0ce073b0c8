"""The options of ./run_all.sh. Needs Python alone, so that a wrong one is found before the environment is made."""

import argparse
import difflib
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = "qwen2.5-coder-0.5b"
LEVEL = 90  # percent of labels that `verify` wants to agree with the records; the README states it
EPILOG = """\
commands:
  ./run_all.sh [options]  run: weights, notebooks, records, figures and the paper, into build/
  ./run_all.sh test       the tests, with the same set-up; test faults: the fault suite whole, which takes half an hour
  ./run_all.sh site       notebooks, figures and paper as a book of web pages, into build/site/html
  ./run_all.sh lab        the notebooks in JupyterLab; options of jupyter lab may follow, e.g. --no-browser
  ./run_all.sh bench      the benchmark of the steering engine, into benchmarks/results/; bench --help lists its options
  ./run_all.sh claims     every published claim with its verdict, from the committed records; claims ID shows one whole
  ./run_all.sh verify     a random sample of the committed completions made again and compared; verify --help says more

The environment lies in .venv; REFUSAL_ENV=active uses the active one (conda) instead. Weights lie in REFUSAL_CACHE,
or else in ~/.cache/crystallized-safety. A run that was stopped goes on with the same command.
"""


@dataclass(frozen=True)
class Options:
    """What one run is to do.

    Attributes:
        models: Model ids, in the order of the registry.
        only: Notebook names; empty for all.
        prompts: The user's own prompts, as an absolute path.
        kind: "full", "quick", "user" or "replay".
        cores: How many processor cores may be used; 0 for all.
        profile: A Snakemake profile, "" for none.
    """

    models: tuple[str, ...]
    only: tuple[str, ...]
    prompts: str
    kind: str
    cores: int
    profile: str
    dry_run: bool
    fresh: bool
    publish: bool

    @property
    def paper(self) -> bool:
        """Whether the paper is built: from all notebooks in full, never from small or private measurements."""
        return self.kind in ("full", "replay") and not self.only


COMMANDS = tuple(re.findall(r"run_all\.sh (\w+)", EPILOG))


def _near(word: str, known: Sequence[str]) -> str:
    """A question after the known word that is meant, "" where none is near: the likest, or one that holds it."""
    found = difflib.get_close_matches(word, known, n=1) or [one for one in known if len(word) > 2 and word in one]
    return f': did you mean "{found[0]}"?' if found else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            first = message.partition(": ")[2].split()[0]
            known = [*self._option_string_actions] if first.startswith("-") else COMMANDS
            message += _near(first.partition("=")[0], known)
        joint = " " if message.endswith("?") else "; "
        self.exit(2, f"error: {message.rstrip('.')}{joint}{self.prog} --help lists the options.\n")

    def add_model(self) -> None:
        """The option of commands that take one model."""
        said = f"a model of data/models.yaml (default: {DEFAULT_MODEL})"
        self.add_argument("--model", default=DEFAULT_MODEL, metavar="ID", help=said)

    def check_models(self, given: Sequence[str]) -> dict[str, str]:
        """The registry; a model that it lacks exits with a sentence."""
        registry = _models()
        for model in given:
            if model not in registry:
                hint = _near(model, list(registry)) or f": the known ones are {', '.join(registry)}"
                self.error(f'there is no model "{model}"{hint}')
        return registry


def _models() -> dict[str, str]:
    """The ids in data/models.yaml with their source. `refusal.registry` reads the file in earnest, with PyYAML."""
    text = (ROOT / "data" / "models.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+):[^\n]*\n(?:[ #][^\n]*\n)*?  source: (\w+)", text, re.MULTILINE))


def notebooks() -> list[str]:
    """The names of the compendium's notebooks, in order."""
    return sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def measured(records: Path) -> list[str]:
    """The ids of the models that have a record in a folder of records, the default one first."""
    found = sorted({path.parent.name for path in records.glob("*/*.parquet")})
    return sorted(found, key=lambda model: model != DEFAULT_MODEL)


def parse(arguments: Sequence[str]) -> Options:
    """The options, checked against the registry, the notebooks and each other; a wrong one exits with a sentence."""
    parser = _Parser(
        prog="./run_all.sh",
        description="One command from real weights to a paper.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="ID", help="a model of data/models.yaml, or all; repeatable")
    add("--only", action="append", default=[], metavar="03", help="this notebook, and those it needs; repeatable")
    add("--quick", action="store_true", help="few prompts, for a first look; into build/quick")
    add("--replay", action="store_true", help="figures and paper from the committed records: no model, no network")
    add("--prompts", metavar="FILE", help="evaluate on your own prompts, with the direction from ours; printed")
    add("--dry-run", action="store_true", help="print what would be done, and the memory and time it takes; do nothing")
    add("--cores", type=int, metavar="N", help="processor cores to use (default: all)")
    add("--profile", default="", metavar="NAME", help="a Snakemake profile, e.g. for a cluster")
    add("--fresh", action="store_true", help="discard what this kind of run has made, chunks too, and begin again")
    add("--publish", action="store_true", help="afterwards make the results the committed ones")
    given = parser.parse_args(list(arguments))

    registry = parser.check_models([model for model in given.model if model != "all"])
    chosen = {name for name, source in registry.items() if "all" in given.model and source == "wheels"}
    chosen |= set(given.model) - {"all"} or ({DEFAULT_MODEL} if not chosen else set())
    known, only = notebooks(), []
    for name in given.only:
        matches = [notebook for notebook in known if name.zfill(2) in (notebook, notebook.split("_")[0])]
        if not matches:
            parser.error(f'there is no notebook "{name}": the known ones are {", ".join(known) or "none yet"}')
        only += matches
    if given.cores is not None and given.cores < 1:
        parser.error(f"--cores {given.cores} is no number of cores: give 1 or more")
    kinds = {"--quick": given.quick, "--replay": given.replay, "--prompts": given.prompts is not None}
    chosen_kinds = [option for option, on in kinds.items() if on]
    if len(chosen_kinds) > 1:
        parser.error(f"{' and '.join(chosen_kinds)} exclude each other: give one of them")
    if given.publish and (chosen_kinds or only or given.dry_run):
        other = [*chosen_kinds, *(["--only"] if only else []), *(["--dry-run"] if given.dry_run else [])]
        parser.error(f"--publish takes the results of a full run, so it excludes {' and '.join(other)}: leave one out")
    if given.prompts is not None and not Path(given.prompts).is_file():
        parser.error(f'there is no file "{given.prompts}" with prompts: check the path')
    return Options(
        models=tuple(name for name in registry if name in chosen),
        only=tuple(dict.fromkeys(only)),
        prompts=str(Path(given.prompts).resolve()) if given.prompts is not None else "",
        kind={"--quick": "quick", "--replay": "replay", "--prompts": "user"}[chosen_kinds[0]]
        if chosen_kinds
        else "full",
        cores=given.cores or 0,
        profile=given.profile,
        dry_run=given.dry_run,
        fresh=given.fresh,
        publish=given.publish,
    )


@dataclass(frozen=True)
class BenchOptions:
    """What a benchmark is to do: the model, how many minutes it may take, and whether the largest cells are wanted."""

    model: str
    minutes: float
    long: bool
    fresh: bool


def parse_bench(arguments: Sequence[str]) -> BenchOptions:
    """The options of ./run_all.sh bench; a wrong one exits with a sentence."""
    parser = _Parser(
        prog="./run_all.sh bench",
        description="Time the steering engine against what people use, and write benchmarks/results/.",
        epilog="A benchmark that was stopped goes on with the same command. Nothing else should run meanwhile.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    parser.add_model()
    add("--minutes", type=float, default=60, metavar="N", help="leave out stages that would end later (default: 60)")
    add("--long", action="store_true", help="the scaling table's cells of up to 6,144 rows as well")
    add("--fresh", action="store_true", help="measure everything anew")
    given = parser.parse_args(list(arguments))
    parser.check_models([given.model])
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g} is no time: give more than 0")
    return BenchOptions(given.model, given.minutes, given.long, given.fresh)


@dataclass(frozen=True)
class ClaimsOptions:
    """Which claims are shown in full (none: all in short), of which models (none: all measured), from which records."""

    claims: tuple[str, ...]
    models: tuple[str, ...]
    records: str


def parse_claims(arguments: Sequence[str]) -> ClaimsOptions:
    """The options of ./run_all.sh claims; a wrong one exits with a sentence."""
    parser = _Parser(
        prog="./run_all.sh claims",
        description="Every published claim with its verdict on each measured model, from records.",
        epilog="data/claims.yaml holds the claims and the rule of each test; no verdict is written there.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help="show all there is to know about this claim; repeatable")
    add("--model", action="append", default=[], metavar="ID", help="a model of data/models.yaml; repeatable")
    add("--records", metavar="DIR", help="a folder with a folder of records a model (default: data/records)")
    given = parser.parse_args(list(arguments))
    parser.check_models(given.model)
    text = (ROOT / "data" / "claims.yaml").read_text(encoding="utf-8")
    known = re.findall(r"^  - id: (\S+)", text, re.MULTILINE)
    for claim in given.claims:
        if claim not in known:
            parser.error(f'there is no claim "{claim}"{_near(claim, known) or ": data/claims.yaml lists them"}')
    if given.records is not None and not Path(given.records).is_dir():
        parser.error(f'there is no folder "{given.records}" with records: check the path')
    return ClaimsOptions(tuple(given.claims), tuple(given.model), given.records or "")


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared with the records: how many rows of which model, drawn by which seed, and the share to reach."""

    model: str
    rows: int
    seed: int
    level: float


def parse_verify(arguments: Sequence[str]) -> VerifyOptions:
    """The options of ./run_all.sh verify; a wrong one exits with a sentence."""
    parser = _Parser(
        prog="./run_all.sh verify",
        description="Make a random sample of the committed completions again, and fail where too few labels agree.",
        epilog="Three to four minutes for the default model on two cores. Row by row in build/verify/.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    parser.add_model()
    add("--rows", type=int, default=240, metavar="N", help="about how many completions (default: 240)")
    add("--seed", type=int, metavar="N", help="of the sample (default: another one each time; it is printed)")
    add("--level", type=float, default=LEVEL, metavar="P", help=f"percent that must agree (default: {LEVEL})")
    given = parser.parse_args(list(arguments))
    parser.check_models([given.model])
    if given.rows < 1:
        parser.error(f"--rows {given.rows} is no number of completions: give 1 or more")
    if not 0 <= given.level <= 100:
        parser.error(f"--level {given.level:g} is no percentage: give 0 to 100")
    if given.seed is not None and given.seed < 0:
        parser.error(f"--seed {given.seed} is no seed: give 0 or more")
    seed = secrets.randbelow(100_000) if given.seed is None else given.seed
    return VerifyOptions(given.model, given.rows, seed, given.level / 100)


if __name__ == "__main__":
    import sys

    commands: dict[str, Callable[[Sequence[str]], object]]
    commands = {"bench": parse_bench, "claims": parse_claims, "verify": parse_verify}
    if sys.argv[1:2] and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
    else:
        options = parse(sys.argv[1:])
        print("paper" if options.paper else "", "dry-run" if options.dry_run else "")
