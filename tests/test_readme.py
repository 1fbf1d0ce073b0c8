"""The README says what the records say, and names only what exists."""

import re
import shutil
from pathlib import Path

from refusal import options, readme
from refusal.files import ROOT
from refusal.records import COMMITTED as RECORDS

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_come_from_the_records() -> None:
    inside = TEXT.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert inside == readme.table(RECORDS, options.measured(RECORDS)), "run ./run_all.sh --publish"


def test_a_model_without_a_notebook_is_said_not_to_have_been_measured(tmp_path: Path) -> None:
    model, other = options.DEFAULT_MODEL, "qwen2.5-coder-1.5b"
    shutil.copytree(RECORDS / model, tmp_path / model)
    shutil.copytree(RECORDS / model, tmp_path / other, ignore=shutil.ignore_patterns("04*"))
    cells = {
        line.split(" | ")[0]: line.split(" | ")[1:3] for line in readme.table(tmp_path, [model, other]).split("\n")
    }
    by_rule = next(row for what, row in cells.items() if "collapse of safety" in what)
    assert by_rule[0] != by_rule[1] == "not measured yet"
    assert sum("not measured yet" in row for row in cells.values()) == 1


def test_the_ledger_comes_from_the_records() -> None:
    inside = TEXT.split(readme.CLAIMS_BEGIN)[1].split(readme.CLAIMS_END)[0].strip()
    assert inside == readme.ledger(RECORDS), "run ./run_all.sh --publish"


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
