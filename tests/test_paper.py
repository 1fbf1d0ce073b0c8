import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from refusal import __version__, paper, summaries, tex
from refusal.files import ROOT, CompendiumError

DEFAULT, OTHER = "qwen2.5-coder-0.5b", "smollm2-135m"
FIGURES = summaries.FIGURES
HEADLINES = {"RefusalPlus": "refusal rate at α = +1, %", "SignVerdict": "verdict", "SignPlusHolm": "Holm p at +1"}


def write_record(path: Path, value: float = 62.0, **metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"value": [value]})
    pq.write_table(table.replace_schema_metadata({b"refusal": json.dumps(metadata).encode()}), path)
    return path


def stub_numbers(records: Path, model: str) -> dict[str, str]:
    """A value for every macro that the text uses, as the real summaries would give it, but from one number."""
    value = pq.read_table(records / model / "03_sign_inversion.parquet")["value"][0].as_py()
    names = tex.used_macros((ROOT / "paper" / "main.tex").read_text("utf-8"))
    values = {name: f"{value:.1f}" for name in names} | {
        name: "[52.2, 70.9]" for name in names if name.endswith("Interval")
    }
    words = {"SignVerdict": "replicated", "SignPlusHolm": "< 0.0001", "SourceFormat": "Q4_K_M", "ScreenMinus": "-3.1"}
    return values | {name: text for name, text in words.items() if name in names}


def stub_tables(records: Path, model: str) -> dict[str, pd.DataFrame]:
    rates = pd.DataFrame({"condition": ["extracted +1", "extracted -1"], "refusal %": ["94.0", "31.0 [22.7, 40.6]"]})
    return {
        "hierarchy": rates,
        "pairs": pd.DataFrame([["unsteered refusal", "a minus b", "+3.0 [1.0, 5.0]", "0.010", "0.020"]]),
        "sign": rates,
        "tests": rates,
        "setup": pd.DataFrame({"quantity": ["dtype"], "value": ["bfloat16"]}),
    }


DOCUMENTS = ("study", "readme", "pilot", "essays")


def stub_claims(tables) -> dict[str, pd.DataFrame]:
    """A ledger of one row a document."""
    row = pd.DataFrame([["sign: it is so", "“6 %” (section 3)", "−9 points", "replicated"]], columns=list("abcd"))
    return {f"claims_{document}": row for document in DOCUMENTS}


APPENDIX = ("study_sign", "study_threshold", "compute", "figures")


def stub_appendix(records: Path, models) -> dict[str, pd.DataFrame]:
    """The appendices' tables, of one row."""
    row = pd.DataFrame([["baseline", "15.0 [9.3, 23.3]"]], columns=["condition", "α"])
    return dict.fromkeys(APPENDIX, row)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the paper with notebooks, records and generated files that belong together."""
    stub = SimpleNamespace(
        DEFAULT_MODEL=DEFAULT, HEADLINES=HEADLINES, FIGURES=FIGURES, numbers=stub_numbers, tables=stub_tables
    )
    monkeypatch.setattr(paper, "summaries", stub)
    ledger = SimpleNamespace(
        all_verdicts=lambda _, models: dict.fromkeys(models), numbers=lambda *_: {}, paper_tables=stub_claims
    )
    monkeypatch.setattr(paper, "claims", ledger)
    monkeypatch.setattr(paper, "appendix", SimpleNamespace(across=lambda _: {}, tables=stub_appendix))
    for name in ("paper/main.tex", "paper/references.bib", "data/study_sign_inversion.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    for notebook in set(FIGURES.values()):
        (tmp_path / "notebooks" / f"{notebook}.ipynb").touch()
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    records = tmp_path / "records"
    write_record(records / DEFAULT / "03_sign_inversion.parquet")
    write_record(records / DEFAULT / "01_extraction.metrics.parquet")
    paper.generate(records, tmp_path)
    return tmp_path


def findings(project: Path) -> list[str]:
    return paper.check(project / "paper", project / "paper" / "generated", project / "records")


# Generated files ------------------------------------------------------------------------------------------------------


def test_macro_names_with_digits_and_doubles_are_refused():
    with pytest.raises(CompendiumError, match="letters"):
        paper.macros({DEFAULT: {"Refusal1": "62.0"}})
    with pytest.raises(CompendiumError, match="occurs twice"):
        paper.macros({DEFAULT: {"BRate": "1"}, "b": {"Rate": "2"}})
    with pytest.raises(CompendiumError, match="TeX's own"):
        paper.macros({DEFAULT: {"Delta": "2"}})


def test_definitions_fail_on_doubles_in_tex_too():
    text = paper.macros({DEFAULT: {"RefusalPlus": "94 %"}})
    assert text == "\\newcommand{\\RefusalPlus}{94 \\%}\n"


def test_the_same_records_give_the_same_bytes(project, tmp_path):
    first = {path.name: path.read_bytes() for path in (project / "paper" / "generated").iterdir()}
    again = paper.generate(project / "records", tmp_path / "again")
    assert first == {path.name: path.read_bytes() for path in again.iterdir()}
    ledger = {f"tab_claims_{document}.tex" for document in DOCUMENTS}
    tables = {f"tab_{name}.tex" for name in (*APPENDIX, "hierarchy", "pairs", "sign", "tests", "setup", "models")}
    assert set(first) == ledger | tables | {"numbers.tex"}


def test_header_names_records_hashes_and_version(project):
    text = (project / "paper" / "generated" / "tab_sign.tex").read_text()
    digest = paper.sha256_file(project / "records" / DEFAULT / "03_sign_inversion.parquet")
    assert f"% source records/{DEFAULT}/03_sign_inversion.parquet {digest}\n" in text
    assert "% source data/study_sign_inversion.csv " in text
    assert f"% refusal {__version__}\n" in text
    assert str(project) not in text


def test_other_models_come_behind_a_prefix_and_may_stay_unused(project):
    write_record(project / "records" / OTHER / "03_sign_inversion.parquet", 3.0)
    generated = paper.generate(project / "records", project, models=[OTHER, DEFAULT])
    text = (generated / "numbers.tex").read_text()
    assert r"\newcommand{\RefusalPlus}{62.0}" in text
    assert r"\newcommand{\SmollmTwoOneThreeFiveMRefusalPlus}{3.0}" in text
    assert findings(project) == []
    assert "62.0 & 3.0" in (generated / "tab_models.tex").read_text()


def test_without_the_default_model_the_text_is_about_the_first(project):
    write_record(project / "records" / OTHER / "03_sign_inversion.parquet", 3.0)
    text = (paper.generate(project / "records", project, models=[OTHER]) / "numbers.tex").read_text()
    assert r"\newcommand{\RefusalPlus}{3.0}" in text


def test_a_table_that_is_no_longer_made_goes_away(project):
    old = project / "paper" / "generated" / "tab_old.tex"
    old.write_text("old")
    paper.generate(project / "records", project)
    assert not old.exists()


def test_figures_of_the_first_model_are_copied(project):
    for name in FIGURES:
        path = project / "figures" / DEFAULT / f"{name}.pdf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    paper.generate(project / "records", project, project / "figures")
    used = set(tex.FIGURE.findall((project / "paper" / "main.tex").read_text("utf-8")))
    assert {path.stem for path in (project / "paper" / "figures").iterdir()} == used <= set(FIGURES)
    (project / "figures" / DEFAULT / "fig_sign.pdf").unlink()
    with pytest.raises(CompendiumError, match="run the notebook 03_sign_inversion"):
        paper.generate(project / "records", project, project / "figures")


@pytest.mark.parametrize("metadata", [{"quick": True}, {"user": True}, {"parameters": {"quick": True}}])
def test_records_of_quick_and_user_runs_are_refused(project, metadata):
    before = (project / "paper" / "generated" / "numbers.tex").read_bytes()
    write_record(project / "records" / DEFAULT / "03_sign_inversion.parquet", 5.0, **metadata)
    with pytest.raises(CompendiumError, match="cannot go into the paper"):
        paper.generate(project / "records", project)
    assert (project / "paper" / "generated" / "numbers.tex").read_bytes() == before


def test_broken_and_missing_records_are_refused(project, tmp_path):
    with pytest.raises(CompendiumError, match="no record"):
        paper.generate(tmp_path / "nowhere", project)
    with pytest.raises(CompendiumError, match="no record of smollm"):
        paper.generate(project / "records", project, models=[OTHER])
    record = project / "records" / DEFAULT / "03_sign_inversion.parquet"
    record.write_bytes(record.read_bytes()[:-7])
    with pytest.raises(CompendiumError, match="no complete record"):
        paper.generate(project / "records", project)


# The check ------------------------------------------------------------------------------------------------------------


def test_the_papers_text_passes(project):
    assert findings(project) == []


@pytest.mark.parametrize(
    "old, new, finding",
    [
        (r"\section{Ethics}", "\\section{Ethics}\nIn 62 cases it failed.", "the number '62' is typed"),
        (r"\section{Ethics}", "\\section{Ethics}\nIn fifty cases it failed.", "the number 'fifty' is typed"),
        (r"\RefusalBaseline{}\,\%", r"61.5\,\%", "the number '61.5' is typed"),
        (r"\section{Ethics}", "\\section{Ethics}\n\\NoSuchNumber{} failed.", r"uses \NoSuchNumber"),
        (r"\section{Ethics}", "\\section{Ethics}\n\\RefusalPlus failed.", r"the space after \RefusalPlus is lost"),
        (r"\EverydayPlus{}", "some", r"numbers.tex defines \EverydayPlus"),
        ("figures/fig_sign", "figures/fig_other", "no notebook makes the figure 'fig_other'"),
        (r"\citep{turner2023activation,", r"\citep{nobody1999,", "no entry 'nobody1999'"),
        ("generated/tab_sign", "generated/tab_other", "tab_other.tex is missing"),
    ],
)
def test_check_finds_what_is_wrong_in_the_text(project, old, new, finding):
    path = project / "paper" / "main.tex"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert any(finding in problem for problem in findings(project))


@pytest.mark.parametrize("field", ["author", "title", "year", "doi"])
def test_check_finds_incomplete_references(project, field):
    path = project / "paper" / "references.bib"
    before, entry = path.read_text().split("@article{wilson1927probable")
    path.write_text(before + "@article{wilson1927probable" + re.sub(rf"(?m)^  {field} .*\n", "", entry, count=1))
    assert findings(project) == [f"the entry 'wilson1927probable' of references.bib has no {field}"]


def test_check_finds_a_figure_whose_notebook_is_gone(project):
    (project / "notebooks" / "03_sign_inversion.ipynb").unlink()
    assert findings(project) == [
        f"main.tex: no notebook makes the figure '{name}'" for name in ["fig_sign", "fig_study"]
    ]


def test_check_finds_stale_and_edited_files(project):
    table = project / "paper" / "generated" / "tab_sign.tex"
    table.write_text(table.read_text().replace("94.0", "95.0"))
    assert findings(project) == ["tab_sign.tex was edited by hand: generate it again"]
    write_record(project / "records" / DEFAULT / "03_sign_inversion.parquet", 63.0)
    made = list((project / "paper" / "generated").glob("*.tex"))
    assert len([problem for problem in findings(project) if "is stale" in problem]) == len(made) > 4
    paper.generate(project / "records", project)
    assert findings(project) == []
    write_record(project / "records" / DEFAULT / "04_llama_threshold.parquet")
    assert any("numbers.tex is stale" in problem for problem in findings(project))


def test_check_finds_missing_numbers_and_records(project):
    shutil.rmtree(project / "records")
    assert any("there is no record" in problem for problem in findings(project))
    (project / "paper" / "generated" / "numbers.tex").unlink()
    assert any("numbers.tex is missing" in problem for problem in findings(project))


@pytest.mark.skipif(not (ROOT / "paper/generated/numbers.tex").exists(), reason="nothing is published yet")
def test_the_committed_paper_is_in_order():
    assert paper.check(ROOT / "paper", ROOT / "paper" / "generated", ROOT / "data" / "records") == []


# Comparison and commands ----------------------------------------------------------------------------------------------


def test_compare_says_what_differs_and_how(project, tmp_path):
    built = project / "paper" / "generated"
    assert "nothing is committed yet" in paper.compare(built, tmp_path / "empty")[0]
    write_record(project / "records" / OTHER / "03_sign_inversion.parquet", 3.0)
    new = paper.generate(project / "records", tmp_path / "new")
    assert paper.compare(built, new) == ["all 3 headline numbers of 1 model equal the committed ones."]
    assert paper.compare(new, built) == [f"{OTHER}: nothing is committed for this model yet"]
    write_record(project / "records" / DEFAULT / "03_sign_inversion.parquet", 60.5)
    newer = paper.generate(project / "records", tmp_path / "newer")
    assert paper.compare(newer, new) == [f"{DEFAULT}: refusal rate at α = +1, %: committed 62.0, now 60.5 (-1.5)"]
    with pytest.raises(CompendiumError, match="is missing"):
        paper.compare(tmp_path / "empty", new)


def test_commands(project, capsys):
    records = str(project / "records")
    assert paper.main(["headlines", "--records", records]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "refusal rate at α = +1, %  62.0",
        "verdict                    replicated",
        "Holm p at +1               < 0.0001",
    ]
    folders = ["--paper", str(project / "paper"), "--generated", str(project / "paper" / "generated")]
    assert paper.main(["check", *folders, "--records", records]) == 0
    (project / "paper" / "references.bib").write_text("")
    assert paper.main(["check", *folders, "--records", records]) == 1
    assert "no entry 'arditi2024refusal'" in capsys.readouterr().out


# What stands beside the paper -----------------------------------------------------------------------------------------


def test_the_studys_table_is_the_published_one():
    table = pd.read_csv(ROOT / "data" / "study_sign_inversion.csv").set_index(["model", "condition"])
    conditions = ["baseline", "standard_plus", "standard_minus", "inverted_plus"]
    counts = {model: [int(table.loc[(model, name), "k"]) for name in conditions] for model in table.index.levels[0]}
    assert counts == {"mistral-7b-v0.3": [15, 6, 96, 99], "qwen2-7b": [0, 0, 9, 7]}
    assert set(table["n"]) == {100} and set(table["clusters"]) == {10}


def test_citation_file_agrees_with_paper_and_library():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    title = re.search(r"\\title\{(.*?)\}", (ROOT / "paper" / "main.tex").read_text("utf-8"), re.DOTALL)
    assert title and citation["title"] == title.group(1).replace(r"\\ ", " ")
    assert str(citation["version"]) == __version__
    assert citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("latexmk") is None, reason="no TeX on this machine")
def test_the_pdf_builds_without_undefined_references_or_type_3_fonts(project):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    for name in FIGURES:
        path = project / "figures" / DEFAULT / f"{name}.pdf"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(5.5, 2))
        figure.subplots().set_title(name)
        with rc_context({"pdf.fonttype": 42}):
            figure.savefig(path, metadata={"CreationDate": None})
    paper.generate(project / "records", project / "out", project / "figures")
    first = paper.pdf(project / "out", project / "records").read_bytes()
    assert first.startswith(b"%PDF")
    if shutil.which("pdffonts"):
        fonts = subprocess.run(["pdffonts", project / "out" / "paper.pdf"], capture_output=True, text=True, check=True)
        assert "LMRoman" in fonts.stdout
        assert "Type 3" not in fonts.stdout
    bundle = (project / "out" / "paper-arxiv.tar.gz").read_bytes()
    alone = project / "alone"
    with tarfile.open(project / "out" / "paper-arxiv.tar.gz") as archive:
        archive.extractall(alone, filter="data")
    for _ in range(3):  # as arXiv does: TeX alone, no BibTeX
        subprocess.run(["pdflatex", "-interaction=nonstopmode", "main.tex"], cwd=alone, check=True, capture_output=True)
    assert "undefined" not in (alone / "main.log").read_text("utf-8", errors="replace")

    shutil.rmtree(project / "out")
    paper.generate(project / "records", project / "out", project / "figures")
    assert paper.pdf(project / "out", project / "records").read_bytes() == first
    assert (project / "out" / "paper-arxiv.tar.gz").read_bytes() == bundle

    main = project / "paper" / "main.tex"
    main.write_text(main.read_text().replace(r"\ref{tab:sign}", r"\ref{tab:nowhere}"))
    with pytest.raises(CompendiumError, match="tab:nowhere"):
        paper.pdf(project / "out", project / "records")
