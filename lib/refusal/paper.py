"""The paper: its numbers, tables and figures, from records only; the check that its text types none; its PDF."""

import argparse
import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from refusal import __version__, appendix, claims, summaries, tex
from refusal.files import ROOT, CompendiumError, atomic, cli, sha256_file, sha256_text
from refusal.options import measured

# What the numbers depend on beside the records of a model.
SHARED = (
    "data/analysis_plan.yaml",
    "data/claims.yaml",
    "data/keyword_rules.csv",
    "data/study_cones.csv",
    "data/study_controls.csv",
    "data/study_sign_inversion.csv",
    "data/study_sweep.csv",
    "data/study_threshold.csv",
    "data/study_window.csv",
    "data/validation/items.csv",
)
# Tables whose cells wrap: shares of the text's width for the first columns; the others share the rest.
WIDTHS = {"hierarchy": (0.28,), "models": (0.34,), "pairs": (0.26, 0.34, 0.2), "study_sign": (0.2,), "compute": (0.3,)}
ONE_VERDICT, SOME_VERDICTS = (0.28, 0.22, 0.34), (0.22, 0.18, 0.24)  # the same of the ledger


def _record_files(records: Path, model: str) -> list[Path]:
    paths = sorted((records / model).glob("*.parquet"))
    if not paths:
        raise CompendiumError(f"there is no record of {model} in {records}: run ./run_all.sh --model {model} first.")
    return paths


def _refuse_flagged(path: Path) -> None:
    try:
        metadata = json.loads((pq.read_schema(path).metadata or {})[b"refusal"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CompendiumError(f"{path} is no complete record: delete it and run ./run_all.sh again.") from error
    for flag, what in {"quick": "a quick run", "user": "the user's own prompts"}.items():
        if metadata.get(flag) or metadata.get("parameters", {}).get(flag):
            raise CompendiumError(f"{path} comes from {what} and cannot go into the paper: measure it in full.")


def _header(records: Path, models: Sequence[str]) -> str:
    paths = [path for model in models for path in _record_files(records, model)]
    sources = {f"records/{path.parent.name}/{path.name}": path for path in paths}
    sources |= {name: ROOT / name for name in SHARED if (ROOT / name).exists()}
    lines = ["made by `python -m refusal.paper numbers`; never edit it by hand", f"refusal {__version__}"]
    lines += [f"model {model}" for model in models]
    lines += [f"source {name} {sha256_file(path)}" for name, path in sources.items()]
    return "".join(f"% {line}\n" for line in lines)


def macros(values: Mapping[str, Mapping[str, str]]) -> str:
    """The definitions of all macros: the first model's as they are named, the others' behind `tex.letters(model)`.

    Args:
        values: For each model its macros, from letters-only name to plain text.

    Raises:
        CompendiumError: A name that TeX does not allow, or that occurs twice.
    """
    lines: dict[str, str] = {}
    for model, numbers in values.items():
        for name, value in sorted(numbers.items()):
            name = name if model == next(iter(values)) else tex.letters(model) + name
            if not re.fullmatch(r"[A-Z][A-Za-z]*", name):
                raise CompendiumError(f"the macro name {name!r} must be made of letters, with a capital first.")
            if name in lines or name in tex.STANDARD:
                raise CompendiumError(f"the macro name {name!r} occurs twice, or is one of TeX's own: rename it.")
            lines[name] = f"\\newcommand{{\\{name}}}{{{tex.escape(value)}}}\n"
    return "".join(lines.values())


def headlines(records: Path, model: str | None = None) -> dict[str, str]:
    """The values of the headline numbers (`summaries.HEADLINES`) of a model; by default of the default model."""
    values = summaries.numbers(records, model or summaries.DEFAULT_MODEL)
    return {name: values[name] for name in summaries.HEADLINES if name in values}


def generate(records: Path, out: Path, figures: Path | None = None, models: Sequence[str] = ()) -> Path:
    """Writes numbers.tex and the tables, and copies the figures; the same records give the same bytes.

    The text is about one model: the default where it is among `models`, else the first of them.

    Args:
        records: The folder that holds a folder of records for each model.
        out: Where paper/generated and paper/figures are made.
        figures: The folder that holds a folder of figures for each model; without it no figure is copied.
        models: Model ids; when empty, all that have records.

    Returns:
        The folder of generated files.

    Raises:
        CompendiumError: No records, or records of a quick run or of the user's own prompts.
    """
    models = sorted(dict.fromkeys(models or measured(records)), key=lambda model: model != summaries.DEFAULT_MODEL)
    if not models:
        raise CompendiumError(f"there is no record in {records}: run ./run_all.sh first.")
    for path in [path for model in models for path in _record_files(records, model)]:
        _refuse_flagged(path)
    ledger = claims.all_verdicts(records, models)
    values = {model: summaries.numbers(records, model) | claims.numbers(ledger[model], model) for model in models}
    values[models[0]] |= appendix.across(ledger)
    headed = {name: label for name, label in summaries.HEADLINES.items() if any(name in v for v in values.values())}
    rows = [[label, *(values[model].get(name, "—") for model in models)] for name, label in headed.items()]
    tables = {**summaries.tables(records, models[0]), "models": pd.DataFrame(rows, columns=["", *models])}
    tables |= appendix.tables(records, models)
    bodies = {f"tab_{name}": _table(name, frame) for name, frame in tables.items()}
    for name, frame in claims.paper_tables(ledger).items():
        bodies[f"tab_{name}"] = _wrapped(frame, ONE_VERDICT if frame.columns[-1] == "verdict" else SOME_VERDICTS)
    bodies["numbers"] = macros(values)
    generated, header = out / "paper" / "generated", _header(records, models)
    for old in set(generated.glob("*.tex")) - {generated / f"{name}.tex" for name in bodies}:
        old.unlink()
    for name, body in bodies.items():
        with atomic(generated / f"{name}.tex") as path:
            path.write_text(f"{header}% content {sha256_text(body)}\n{body}", encoding="utf-8")
    for name in tex.FIGURE.findall(_text("main.tex")) if figures else ():
        source = Path(figures or "") / models[0] / f"{name}.pdf"
        if not source.exists():
            raise CompendiumError(f"{source} is missing: run the notebook {summaries.FIGURES.get(name)} first.")
        with atomic(out / "paper" / "figures" / f"{name}.pdf") as path:
            shutil.copyfile(source, path)
    return generated


def _table(name: str, frame: pd.DataFrame) -> str:
    """A table that fits a page."""
    return _wrapped(frame, WIDTHS[name]) if name in WIDTHS else tex.tabular(frame)


def _wrapped(frame: pd.DataFrame, first: Sequence[float]) -> str:
    others = frame.shape[1] - len(first)
    return tex.longtable(frame, [*first, *[(1 - sum(first)) / others] * others])


def _text(name: str) -> str:
    return (ROOT / "paper" / name).read_text(encoding="utf-8")


def _read(generated: Path) -> tuple[list[str], dict[str, str]]:
    text = (generated / "numbers.tex").read_text(encoding="utf-8")
    values = {name: tex.plain(value) for name, value in tex.DEFINITION.findall(text)}
    return re.findall(r"^% model (\S+)$", text, re.MULTILINE), values


def _change(was: str, now: str) -> str:
    try:
        return f" ({float(now.replace('−', '-')) - float(was.replace('−', '-')):+.4g})"
    except ValueError:
        return ""


def compare(built: Path, committed: Path) -> list[str]:
    """How the headline numbers in one folder of generated files differ from those in another, in lines to print."""
    if not (built / "numbers.tex").exists():
        raise CompendiumError(f"{built / 'numbers.tex'} is missing: run `python -m refusal.paper numbers` first.")
    if not (committed / "numbers.tex").exists():
        return [f"nothing is committed yet in {committed}: --publish would make these numbers the first."]
    (new_models, new), (old_models, old) = _read(built), _read(committed)
    lines = [f"{model}: nothing is committed for this model yet" for model in new_models if model not in old_models]
    count = 0
    for model in [model for model in new_models if model in old_models]:
        for name, label in summaries.HEADLINES.items():
            now = new.get(("" if model == new_models[0] else tex.letters(model)) + name, "missing")
            was = old.get(("" if model == old_models[0] else tex.letters(model)) + name, "missing")
            count += now != "missing"
            if was != now:
                lines.append(f"{model}: {label}: committed {was}, now {now}{_change(was, now)}")
    of = f"{len(new_models)} model{'s' * (len(new_models) > 1)}"
    return lines or [f"all {count} headline numbers of {of} equal the committed ones."]


def check(paper: Path, generated: Path, records: Path = ROOT / "data" / "records") -> list[str]:
    """What is wrong with the paper's sources, one finding each; nothing when it may be built.

    Args:
        paper: The folder with main.tex and references.bib.
        generated: The folder of generated files.
        records: The records that the generated files must come from.
    """
    source = (paper / "main.tex").read_text(encoding="utf-8")
    problems = [f"main.tex:{line}: the number {number!r} is typed" for line, number in tex.typed_numbers(source)]
    source = tex.strip_comments(source)
    problems += [f"main.tex: the space after \\{name} is lost: add {{}}" for name in tex.swallowed_spaces(source)]
    problems += tex.citation_problems(source, (paper / "references.bib").read_text(encoding="utf-8"))
    for name in tex.FIGURE.findall(source):
        if not (ROOT / "notebooks" / f"{summaries.FIGURES.get(name)}.ipynb").exists():
            problems.append(f"main.tex: no notebook makes the figure {name!r}")
    for name in sorted({*tex.INPUT.findall(source), "numbers"}):
        if not (generated / f"{name}.tex").exists():
            return [*problems, f"{generated / name}.tex is missing: run `python -m refusal.paper numbers`"]
    models, values = _read(generated)
    used, others = tex.used_macros(source), tuple(tex.letters(model) for model in models[1:])
    problems += [f"main.tex uses \\{name}, which is not defined" for name in sorted(used - values.keys())]
    unused = [name for name in sorted(values.keys() - used) if not name.startswith(others)]
    problems += [f"numbers.tex defines \\{name}, which main.tex does not use" for name in unused]
    try:
        header = _header(records, models)
    except CompendiumError as error:
        return [*problems, str(error)]
    for path in sorted(generated.glob("*.tex")):
        head, _, rest = path.read_text(encoding="utf-8").partition("% content ")
        digest, _, body = rest.partition("\n")
        if head != header:
            problems.append(f"{path.name} is stale: its records or the library changed, so generate it again")
        elif digest != sha256_text(body):
            problems.append(f"{path.name} was edited by hand: generate it again")
    return problems


def pdf(out: Path, records: Path) -> Path:
    """Builds `out`/paper.pdf in `out`/paper, where the text is copied and checked first, and packs its sources.

    Raises:
        CompendiumError: The check's findings, no TeX on this machine, an error of TeX, or an undefined reference.
    """
    folder = out / "paper"
    for name in ("main.tex", "references.bib"):
        with atomic(folder / name) as path:
            path.write_text(_text(name), encoding="utf-8")
    if problems := check(folder, folder / "generated", records):
        raise CompendiumError("the paper cannot be built: " + "; ".join(problems) + ".")
    if shutil.which("latexmk") is None:
        raise CompendiumError("the paper needs TeX: install latexmk, texlive-latex-recommended and lmodern.")
    command = ["latexmk", "-norc", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "main.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    log = folder / "main.log"
    lines = (log.read_text("utf-8", errors="replace") if log.exists() else done.stderr).splitlines()
    faults = [line for line in lines if re.search(r"^\S+:\d+: |^!", line)]
    faults += [line for line in lines if re.search(r"Warning: (?:Reference|Citation).*undefined", line)]
    if done.returncode or faults:
        raise CompendiumError(f"TeX failed on {folder / 'main.tex'}: {' '.join(faults[:3]) or lines[-1:]}; see {log}.")
    with atomic(out / "paper.pdf") as path:
        shutil.copyfile(folder / "main.pdf", path)
    bundle(folder, out / "paper-arxiv.tar.gz")
    return out / "paper.pdf"


def bundle(folder: Path, path: Path) -> None:
    """Packs a built paper's sources for arXiv, which runs TeX and no BibTeX; the same sources give the same bytes.

    Args:
        folder: With main.tex, main.bbl and the generated files and figures that the text uses.
        path: The tarball.
    """
    source = tex.strip_comments((folder / "main.tex").read_text(encoding="utf-8"))
    names = ["main.tex", "main.bbl", "references.bib", "generated/numbers.tex"]
    names += [f"generated/{name}.tex" for name in dict.fromkeys(tex.INPUT.findall(source)) if name != "numbers"]
    names += [f"figures/{name}.pdf" for name in dict.fromkeys(tex.FIGURE.findall(source))]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            data = (folder / name).read_bytes()
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(packed.getvalue(), mtime=0))


def main(arguments: Sequence[str]) -> int:
    """The commands `numbers`, `headlines`, `compare`, `check` and `pdf`."""
    parser = argparse.ArgumentParser(prog="python -m refusal.paper", description="The paper, from records only.")
    commands = parser.add_subparsers(dest="command", required=True)
    folders = {"numbers": "records out", "headlines": "records", "compare": "built committed"}
    for name, options in (folders | {"check": "paper generated records", "pdf": "records out"}).items():
        command = commands.add_parser(name)
        for option in options.split():
            command.add_argument(f"--{option}", type=Path, required=True, metavar="DIR")
        if name == "numbers":
            command.add_argument("--figures", type=Path, metavar="DIR")
            command.add_argument("--model", action="append", default=[], metavar="ID", help="repeatable; default: all")
        if name == "headlines":
            command.add_argument("--model", metavar="ID")
    given = parser.parse_args(arguments)
    if given.command == "numbers":
        lines = [str(generate(given.records, given.out, given.figures, given.model))]
    elif given.command == "headlines":
        values, width = headlines(given.records, given.model), max(map(len, summaries.HEADLINES.values()))
        lines = [f"{summaries.HEADLINES[name]:<{width}}  {value}" for name, value in values.items()]
    elif given.command == "compare":
        lines = compare(given.built, given.committed)
    elif given.command == "check":
        lines = check(given.paper, given.generated, given.records)
    else:
        lines = [str(pdf(given.out, given.records))]
    print("\n".join(lines) or "nothing is wrong with the paper's sources.")
    return 1 if given.command == "check" and lines else 0


if __name__ == "__main__":
    cli(main)
