"""The README says what the records say, and names only what exists."""

import re

from refusal import options, readme, summaries
from refusal.files import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_come_from_the_records() -> None:
    inside = TEXT.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert inside == readme.table(ROOT / "data" / "records", summaries.DEFAULT_MODEL), "run ./run_all.sh --publish"


def test_the_ledger_comes_from_the_records() -> None:
    inside = TEXT.split(readme.CLAIMS_BEGIN)[1].split(readme.CLAIMS_END)[0].strip()
    assert inside == readme.ledger(ROOT / "data" / "records"), "run ./run_all.sh --publish"


def test_links_resolve() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), f"README links {target}, which does not exist"


def test_options_are_named_as_they_are() -> None:
    known = set(re.findall(r"--[a-z]+", (ROOT / "lib" / "refusal" / "options.py").read_text(encoding="utf-8")))
    table = TEXT.split("| option |")[1].split("\n\n")[0]
    assert set(re.findall(r"--[a-z]+", table)) <= known
    assert {f"--{name}" for name in ("quick", "replay", "only", "model", "prompts", "publish")} <= known


def test_every_notebook_is_on_the_map() -> None:
    for name in options.notebooks():
        assert f"notebooks/{name}.ipynb" in TEXT
