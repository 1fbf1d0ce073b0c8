"""The site: executed notebooks, figures, plan, benchmark and paper as a static book, built by Sphinx.

Usage:
    python -m refusal.site [--out build/site] [--no-paper]

It is made from what git holds, and needs neither a model nor a network. `./run_all.sh site` installs what it needs.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import yaml

from refusal import claim_file, claims, readme, site_claims, site_pages
from refusal.files import ROOT, CompendiumError, cli
from refusal.options import measured, notebooks
from refusal.records import COMMITTED

BOOK = ROOT / "book"
COPIED = {  # what the pages link, as it is in git
    "figures": "figures",
    "data/records": "records",
    "data/analysis_plan.yaml": "analysis_plan.yaml",
    "data/claims.yaml": "claims.yaml",
    "paper/references.bib": "references.bib",
    "CITATION.cff": "CITATION.cff",
}


def alternatives() -> Mapping[str, str]:
    """What each figure shows, in words.

    Raises:
        CompendiumError: book/figures.yaml is no mapping from names to texts.
    """
    path = BOOK / "figures.yaml"
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CompendiumError(f"{path} is no YAML ({str(error).splitlines()[0]}): mend it.") from error
    if not isinstance(read, dict) or not all(isinstance(text, str) and text.strip() for text in read.values()):
        raise CompendiumError(f"{path} must map each figure's name to a text.")
    return read


def _results() -> str:
    """The results table of the README, which is made from the records."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(readme.BEGIN)[2].partition(readme.END)[0].strip()


def _claims(files: Path, placed: set[str]) -> str:
    """The page of claims, with the verdicts on all models that have records."""
    ledger = claim_file.read()
    tables = claims.all_verdicts(COMMITTED, measured(COMMITTED))
    about = {claim.id: {"behind": claim.behind, "replicated": claim.replicated} for claim in ledger.claims}
    return site_claims.claims_page(tables, ledger.documents, about, files, placed)


def lay_out(source: Path, pdf: Path | None) -> None:
    """Writes the pages, and what they link, into an empty folder.

    Args:
        source: The folder.
        pdf: The paper, where there is one.
    """
    files = source / "files"
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("__pycache__"))
    for name, target in COPIED.items():
        path = ROOT / name
        (files / target).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, files / target)
        elif path.exists():
            shutil.copyfile(path, files / target)
    if pdf:
        shutil.copyfile(pdf, files / "paper.pdf")
    known, words = notebooks(), alternatives()
    folder = source / "notebooks"
    folder.mkdir()
    (files / "notebooks").mkdir()
    pages = {}
    for name in known:
        shutil.copyfile(ROOT / "notebooks" / f"{name}.ipynb", files / "notebooks" / f"{name}.ipynb")
        node = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        pages[name] = site_pages.notebook_page(name, node, words, files, known)
        nbformat.write(pages[name], folder / f"{name}.ipynb")
    models = sorted(path.name for path in (files / "figures").iterdir() if path.is_dir())
    models.sort(key=lambda model: model != site_pages.DEFAULT)
    made = {
        "notebooks/index.md": site_pages.notebooks_page(pages),
        "figures.md": site_pages.figures_page(pages, models, words, files),
        "plan.md": site_pages.plan_page(),
        "paper.md": site_pages.paper_page(files),
        "claims.md": _claims(files, site_pages.placed(pages)),
    }
    evidence = ["claims", "figures", "plan"]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.*")):
        (source / "benchmark").mkdir(exist_ok=True)
        if path.suffix in (".md", ".png"):
            shutil.copyfile(path, source / "benchmark" / path.name)
        if path.suffix == ".md":
            evidence.append(f"benchmark/{path.stem}")
    index = (source / "index.md").read_text(encoding="utf-8")
    hero = site_pages.DEFAULT, "03_sign_inversion", "fig_sign"
    for marker, text in {
        "hero": site_pages.hero(files, *hero, words[hero[-1]]),
        "results": _results(),
        "contents": site_pages.contents(pages, evidence),
    }.items():
        index = index.replace(f"<!-- {marker} -->", text)
    for name, text in {**made, "index.md": index}.items():
        (source / name).write_text(text, encoding="utf-8")


def paper(out: Path) -> Path | None:
    """The PDF from the committed records, or None where TeX is missing."""
    if not (shutil.which("latexmk") and shutil.which("pdflatex")):
        return None
    from refusal import paper as made

    made.generate(COMMITTED, out, ROOT / "figures")
    return made.pdf(out, COMMITTED)


def build(out: Path, pdf: Path | None = None) -> Path:
    """Builds the site in `out`/html; the one that was there stays until the new one is whole.

    Args:
        out: The folder for the site and what it is made from.
        pdf: The paper, where there is one.

    Returns:
        The first page.

    Raises:
        CompendiumError: Sphinx is missing, or found something wrong (a dead link, a missing picture); its first word.
    """
    if not importlib.util.find_spec("myst_nb"):
        raise CompendiumError(
            "the site needs the packages of requirements-site.lock: run ./run_all.sh site, which installs them; "
            "in an environment of your own, pip install --no-deps -r requirements-site.lock."
        )
    source, making, html = out / "source", out / "making", out / "html"
    for path in (source, making):
        shutil.rmtree(path, ignore_errors=True)
    lay_out(source, pdf)
    words = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-E"]
    done = subprocess.run(
        [*words, "-d", str(out / "doctrees"), str(source), str(making)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line or "rror:" in line]
        (out / "sphinx.log").write_text(done.stderr, encoding="utf-8")
        raise CompendiumError(f"the site could not be built ({(said or ['?'])[0]}): its log is {out / 'sphinx.log'}.")
    shutil.rmtree(html, ignore_errors=True)
    making.rename(html)
    return html / "index.html"


def main(arguments: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m refusal.site", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder (default: build/site)")
    parser.add_argument("--no-paper", action="store_true", help="leave the PDF out")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    pdf = None if given.no_paper else paper(out)
    first = build(out, pdf)
    print(f"made {first}{'' if pdf else ' (without the PDF)'}: open it in a browser; it needs no network.")
    return 0


if __name__ == "__main__":
    cli(main)
