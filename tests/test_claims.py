"""The ledger: the file and its faults, verdicts that follow the records, the tables, the page and the command."""

import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from refusal import claim_file, claims, options, records, registry, summaries, tex
from refusal.claim_evidence import VERDICTS, Evidence
from refusal.claim_file import BEHIND, FILE
from refusal.claim_tests import TESTS
from refusal.files import ROOT, CompendiumError

MODEL, OTHER, SIGN = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "03_sign_inversion"
LEDGER = claim_file.read()


# ---- the file


def test_the_committed_claims_load_and_are_many():
    assert len(LEDGER.claims) >= 30 and len({one.id for one in LEDGER.claims}) == len(LEDGER.claims)
    by_document = pd.Series([one.document for one in LEDGER.claims]).value_counts()
    assert set(by_document.index) == set(LEDGER.documents) and by_document["study"] >= 30
    assert sum(not one.test for one in LEDGER.claims) < len(LEDGER.claims) / 4


def test_every_row_of_the_studys_tables_and_of_the_readmes_is_there():
    places = [f"{one.source} {one.quote}" for one in LEDGER.claims]
    for model in ("mistral-7b-v0.3", "qwen2-7b", "llama-3.1-8b"):
        short = {"m": "Mistral-7B", "q": "Qwen2-7B", "l": "Llama-3.1-8B"}[model[0]]
        for column in ("Extracted", "Random", "Orthogonal", "Opposite"):
            assert sum(f"row {short}" in one and column in one for one in places) >= 1, (short, column)
    for short in ("Mistral-7B", "Qwen2-7B"):
        for row in ("Baseline", "Standard +alpha", "Standard -alpha", "Inverted +alpha"):
            assert any(f"{short}, row {row}" in one for one in places), (short, row)
    for short in ("Llama-3.1-8B", "Mistral-7B", "Qwen2.5-7B", "Gemma-2-9B"):
        assert any(f"readme, key finding, row {short}" in one for one in places), short


def test_figures_and_notebooks_of_claims_exist():
    known = options.notebooks()
    for claim in LEDGER.claims:
        assert claim.notebook in known or claim.notebook.startswith("08_"), claim.id
        assert bool(claim.figure) == bool(claim.test), claim.id
        if claim.test and claim.notebook in known:
            assert summaries.FIGURES[claim.figure] == claim.notebook, claim.id


def test_every_test_serves_a_claim_and_every_claim_says_what_stands_behind_it():
    assert {one.test for one in LEDGER.claims} - {""} == set(TESTS) == set(LEDGER.rules)
    kinds = {one.behind.split(":")[0] for one in LEDGER.claims}
    assert kinds == set(BEHIND)


def test_no_verdict_is_typed():
    """Not with a claim, and not in the paper's text; rules say what a verdict takes, for all claims of a kind."""
    words = re.compile(r"\b(replicated|contradicted|inconclusive|not testable)\b", re.IGNORECASE)
    given = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    for claim in given["claims"]:
        assert not [name for name, value in claim.items() if words.search(str(value))], claim["id"]
        assert set(claim) <= set(claim_file.KNOWN) and not set(claim) & {"verdict", "result", "p"}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, end in (("results", "results"), ("claims", "claims")):
        text = re.sub(rf"<!-- {begin}:.*?<!-- /{end} -->", "", text, flags=re.DOTALL)
    assert not words.search(text.replace("what would count as replicated", ""))


def faulty(tmp_path, change=None, text=None):
    """A file of one sound claim, changed."""
    sound = {
        "documents": {"study": "A draft"},
        "rules": dict.fromkeys(TESTS, "A rule."),
        "claims": [
            {"id": "sign-up", "source": "study, section 1", "quote": "6 %", "claim": "It rises.",
             "replicated": "it does", "behind": "nothing: no data", "notebook": SIGN, "figure": "fig_sign",
             "test": "refusals", "arguments": {"comparison": "plus", "claimed": "rises"}}
        ],
    }  # fmt: skip
    if change:
        change(sound)
    path = tmp_path / "claims.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(sound, sort_keys=False), encoding="utf-8")
    return path


def test_a_sound_file_is_read(tmp_path):
    claim = claim_file.read(faulty(tmp_path)).claim("sign-up")
    assert (claim.document, claim.place, claim.test) == ("study", "section 1", "refusals")
    with pytest.raises(CompendiumError, match=r"^there is no claim 'sign-down': .*\.$"):
        claim_file.read(faulty(tmp_path)).claim("sign-down")


def claim_with(**fields):
    return lambda sound: sound["claims"][0].update(fields)


def claim_without(*names):
    def change(sound):
        for name in names:
            del sound["claims"][0][name]

    return change


LINE = 5 + len(TESTS)
HERE = rf"^claims\.yaml, line {LINE} \(sign-up\): "


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (claim_without("quote"), HERE + r"the field 'quote' is missing\.$"),
        (claim_without("id"), rf"^claims\.yaml, line {LINE}: the field 'id' is missing\.$"),
        (claim_with(verdict="replicated"), HERE + r"there is no field 'verdict', only id, .*\.$"),
        (claim_with(claim=""), HERE + r"the field 'claim' must be a text\.$"),
        (claim_with(quote=6), HERE + r"the field 'quote' must be a text\.$"),
        (claim_with(id="Sign_1"), r"\(Sign_1\): an id is made of lower-case words joined by hyphens\.$"),
        (claim_with(source="draft, section 1"), HERE + r"the source must begin with one of study, a comma, .*\.$"),
        (claim_with(source="study"), HERE + r"the source must begin with one of study, .*\.$"),
        (
            claim_with(behind="good data"),
            HERE + r"what stands behind a figure must begin with one of raw counts, .*\.$",
        ),
        (claim_with(notebook="03"), HERE + r"'03' is no name of a notebook\.$"),
        (claim_with(test="guess"), HERE + r"there is no test 'guess', only .*\.$"),
        (claim_with(arguments={"claimed": "rises"}), HERE + r"the test 'refusals' does not take .*comparison.*\.$"),
        (claim_with(arguments={"comparison": "plus", "claimed": "rises", "n": 1}), HERE + r"the test .*'n'.*\.$"),
        (claim_with(arguments=["plus"]), HERE + r"arguments must map names to values\.$"),
        (claim_with(needs="a GPU"), HERE + r"a claim has a test, or says what it needs, and not both\.$"),
        (claim_without("test"), HERE + r"a claim has a test, or says what it needs, and not both\.$"),
        (
            lambda sound: sound["claims"].append(dict(sound["claims"][0])),
            r"\(sign-up\): another claim has the same id\.$",
        ),
        (lambda sound: sound["claims"].append("sign-down"), r"a claim must map fields to values\.$"),
        (lambda sound: sound.update(claims=[]), r"^claims\.yaml: claims must be a list of claims: .*\.$"),
        (
            lambda sound: sound.pop("rules"),
            r"^claims\.yaml: it must hold documents, rules, claims and nothing else: .*\.$",
        ),
        (lambda sound: sound["rules"].pop("judge"), r"^claims\.yaml: there is no rule for 'judge': .*\.$"),
        (lambda sound: sound["rules"].update(guess="So."), r"a rule for what is no test, 'guess': .*\.$"),
        (lambda sound: sound["documents"].update(study=1), r"^claims\.yaml: documents must map names to texts: .*\.$"),
    ],
)
def test_each_fault_has_one_sentence(tmp_path, change, sentence):
    with pytest.raises(CompendiumError, match=sentence):
        claim_file.read(faulty(tmp_path, change))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("documents: {a: b\nrules: [", r"^claims\.yaml, line \d: this is no YAML .*\.$"),
        ("- a\n- b\n", r"^claims\.yaml: it must hold .*\.$"),
        ("", r"^claims\.yaml: it must hold .*\.$"),
        (
            "documents: {}\nrules: {}\nclaims:\n  - id: a\n    id: b\n",
            r"^claims\.yaml, line 5: 'id' stands there twice: .*\.$",
        ),
        ("documents: {}\nrules: {}\ndocuments: {}\nclaims: []\n", r"^claims\.yaml, line 3: 'documents' stands .*\.$"),
        ("documents: !!python/object:os.system {}\n", r"^claims\.yaml, line 1: this is no YAML .*\.$"),
    ],
)
def test_what_yaml_takes_in_silence_is_refused(tmp_path, text, sentence):
    with pytest.raises(CompendiumError, match=sentence):
        claim_file.read(faulty(tmp_path, text=text))


def test_a_file_that_is_gone_or_not_utf_8(tmp_path):
    with pytest.raises(CompendiumError, match=r"cannot be read \(FileNotFoundError\): restore it with git\.$"):
        claim_file.read(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompendiumError, match=r"^.*\.$"):
        claim_file.read(tmp_path / "claims.yaml")


# ---- verdicts follow the records


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The committed record of 03 in a folder of its own, and what the ledger says of it."""
    root = tmp_path_factory.mktemp("records")
    (root / MODEL).mkdir()
    for tail in ("", ".metrics"):
        shutil.copy(ROOT / "data" / "records" / MODEL / f"{SIGN}{tail}.parquet", root / MODEL)
    return root, claims.verdicts(root, MODEL)


def altered(copied, tmp_path, change):
    """The same with some labels changed: a sound record of other counts."""
    root = tmp_path / "records"
    shutil.copytree(copied[0], root)
    path = root / MODEL / f"{SIGN}.parquet"
    frame, about = records.read(path)
    records.write(change(frame), path, about)
    return claims.verdicts(root, MODEL)


def test_only_what_is_measured_gets_a_verdict(copied):
    table = copied[1].set_index("claim")
    unmeasured = table[~table["notebook"].isin([SIGN]) & (table["test"] != "")]
    free = unmeasured["test"].str.startswith("published")
    assert set(unmeasured.loc[~free, "verdict"]) == {"not measured yet"} and free.sum() == 2
    assert unmeasured.loc[~free, "numbers"].str.startswith("there is no record of ").all()
    assert set(table.loc[table["test"] == "", "verdict"]) == {"not testable here"}
    assert table.loc[table["test"] == "", "numbers"].str.startswith("needs ").all()
    assert {"replicated", "contradicted", "inconclusive"} <= set(table["verdict"]) <= set(VERDICTS)


def test_changing_counts_changes_the_verdict_the_macro_and_the_sentence(copied, tmp_path):
    before = copied[1].set_index("claim")

    def obey(frame):  # what was refused at +1 is complied with, and what was complied with at -1 is refused
        plus, minus = (frame["condition"] == f"extracted {sign}1" for sign in "+-")
        frame = frame.assign(text=frame["text"].mask(plus | minus, ""))
        label = frame["label"].mask(plus, "compliance").mask(minus, "refusal")
        rule = frame["seed_rule"].mask(plus, "jailbreak").mask(minus, "refusal")
        return frame.assign(label=label, seed_rule=rule)

    table = altered(copied, tmp_path, obey)
    after = table.set_index("claim")
    for claim in ("sign-inversion", "sign-mistral-plus", "sign-mistral-minus", "mechanism-recognised"):
        assert (before.loc[claim, "verdict"], after.loc[claim, "verdict"]) == ("replicated", "contradicted"), claim
    assert (before.loc["controls-llama-extracted", "verdict"], after.loc["controls-llama-extracted", "verdict"]) == (
        "contradicted",
        "replicated",
    )
    macros = [claims.numbers(one, MODEL) for one in (copied[1], table)]
    for name in ("LedgerReplicated", "LedgerAgainst", "LedgerSentence"):
        assert macros[0][name] != macros[1][name], name
    assert "sign-inversion" in macros[1]["LedgerAgainst"] and "sign-inversion" not in macros[0]["LedgerAgainst"]
    for name in ("LedgerClaims", "LedgerComparisons", "LedgerDocuments"):
        assert macros[0][name] == macros[1][name], name
    rows = [claims.shown({MODEL: one}).set_index("claim")["verdict"] for one in (copied[1], table)]
    name = next(one for one in rows[0].index if one.startswith("sign-inversion: "))
    assert (rows[0][name], rows[1][name]) == ("replicated", "contradicted")


def test_one_completion_more_changes_the_numbers(copied, tmp_path):
    def one_more(frame):
        steered = frame["condition"] == "extracted +1"
        first = frame.index[steered & (frame["prompt_set"] == "harmful_evaluation") & (frame["label"] == "refusal")][0]
        frame.loc[first, ["label", "seed_rule", "text"]] = ["compliance", "jailbreak", ""]
        return frame

    before, after = (one.set_index("claim")["numbers"] for one in (copied[1], altered(copied, tmp_path, one_more)))
    assert before["sign-inversion"] != after["sign-inversion"]
    assert before["controls-mistral-extracted"] != after["controls-mistral-extracted"]
    assert before["sign-mistral-plus"] == after["sign-mistral-plus"]  # other prompts


def test_a_damaged_record_ends_in_a_sentence(copied, tmp_path):
    root = tmp_path / "records"
    shutil.copytree(copied[0], root)
    path = root / MODEL / f"{SIGN}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CompendiumError, match=r"^claim [a-z-]+: .*03_sign_inversion\.parquet is cut short, .*\.$"):
        claims.verdicts(root, MODEL)


def test_a_record_that_lacks_a_condition_names_the_claim(copied, tmp_path):
    with pytest.raises(CompendiumError, match=r"^claim [a-z-]+: the record has no condition 'extracted -1': .*\.$"):
        altered(copied, tmp_path, lambda frame: frame[frame["condition"] != "extracted -1"])


def test_nothing_is_measured_where_there_is_nothing(tmp_path):
    table = claims.verdicts(tmp_path, MODEL)
    assert set(table["verdict"]) >= {"not measured yet", "not testable here"}
    assert options.measured(tmp_path) == []
    with pytest.raises(CompendiumError, match=r"^there is no record in .*: run ./run_all.sh first\.$"):
        claims.all_verdicts(tmp_path, [])


def test_verdicts_are_the_same_twice_and_tell_the_power_where_it_matters(copied):
    root, table = copied
    pd.testing.assert_frame_equal(claims.verdicts(root, MODEL), table)
    assert ((table["power"] != "") == (table["verdict"] == "inconclusive")).all()
    assert (table["numbers"] != "").all() and not table["numbers"].str.contains("nan").any()
    settled = table[table["verdict"].isin(["replicated", "contradicted", "inconclusive"])]
    assert settled["numbers"].str.contains(r"\[.+\]|\bp [=<] ").all()  # an interval or a p
    ours = settled[~settled["test"].str.startswith("published")]
    assert ours["numbers"].str.contains(r"n = \d+|clusters").all()


def test_what_the_plan_decides_is_not_decided_again(copied):
    frame = records.read(copied[0] / MODEL / f"{SIGN}.parquet")[0]
    from refusal import analyses

    planned = analyses.sign_verdict(analyses.comparisons(frame), analyses.rates(frame))
    assert copied[1].set_index("claim").loc["sign-inversion", "verdict"] == planned


def test_each_row_links_command_record_and_figure(copied):
    table = copied[1].set_index("claim")
    row = table.loc["sign-mistral-plus"]
    assert (
        row["command"] == "./run_all.sh --only 03"
        and (ROOT / row["record"]).exists()
        and (ROOT / row["figure"]).exists()
    )
    other = claims.verdicts(copied[0], OTHER).set_index("claim").loc["sign-mistral-plus"]
    assert other["command"] == f"./run_all.sh --model {OTHER} --only 03" and other["verdict"] == "not measured yet"
    assert (table.loc[table["test"] == "", ["command", "record", "figure"]] == "").all(axis=None)


# ---- words


def test_tables_and_sentence_count_the_same(copied):
    table = copied[1]
    of = claims.counts(table)
    assert sum(of.values()) == len(table) == len(LEDGER.claims)
    said = claims.sentence(table, MODEL)
    assert f"{of['replicated']} of {len(table)} claims are replicated, {of['contradicted']} contradicted" in said
    paper = claims.paper_tables({MODEL: table})
    assert set(paper) == {f"claims_{document}" for document in LEDGER.documents}
    assert sum(map(len, paper.values())) == len(table)
    for frame in paper.values():
        assert tex.longtable(frame, (0.28, 0.22, 0.34, 0.16)).count(r"\addlinespace") == len(frame) - 1


def test_several_models_stand_beside_each_other(copied):
    tables = {MODEL: copied[1], OTHER: claims.verdicts(copied[0], OTHER)}
    cell = claims.shown(tables)["verdict"].iloc[0]
    assert re.fullmatch(r"Qwen2.5-Coder-0.5B-Instruct: [a-z ]+; Qwen2.5-Coder-1.5B-Instruct: not measured yet", cell)
    for name, frame in claims.paper_tables(tables).items():
        assert list(frame.columns[3:]) == ["Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct"]
        own = copied[1][copied[1]["document"] == name.removeprefix("claims_")]
        assert list(frame.iloc[:, 3]) == list(own["verdict"])
    many = claims.paper_tables(dict.fromkeys(list(registry.registry())[: claims.BESIDE + 1], copied[1]))
    assert all(list(frame.columns[3:]) == ["verdict"] for frame in many.values())
    text = claims.markdown(tables)
    assert "| verdict | Qwen2.5-Coder-0.5B-Instruct | Qwen2.5-Coder-1.5B-Instruct |" in text
    assert text.count("<details>") == text.count("</details>") == len(LEDGER.documents)


def test_the_page_of_the_readme_holds_every_claim_and_links_what_is_there(copied):
    text = claims.markdown({MODEL: copied[1]})
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) == len(LEDGER.claims) and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / target).exists(), target


# ---- the command


def test_the_command_shows_one_claim_in_full(copied, capsys):
    assert claims.main(["--records", str(copied[0]), "sign-mistral-plus", "hierarchy"]) == 0
    out = capsys.readouterr().out
    for words in (
        "6 % [2.8 %, 12.5 %], p = 0.038",
        "REPLICATED: jailbreaks",
        "counts as replicated",
        "behind the figure",
        "./run_all.sh --only 03",
        f"data/records/{MODEL}/{SIGN}.parquet",
        "NOT TESTABLE HERE: needs",
    ):
        assert words in " ".join(out.split()), words


def test_only_the_claims_asked_for_are_tested(copied, capsys, monkeypatch):
    """The whole ledger takes half a minute; a claim alone has the same page as among all."""
    chosen = LEDGER.claim("sign-mistral-plus")
    for name in list(TESTS):
        if name != chosen.test:
            monkeypatch.delitem(TESTS, name)
    with monkeypatch.context() as patch:
        patch.setattr(claims.claim_file, "read", lambda: LEDGER)
        assert claims.main(["--records", str(copied[0]), chosen.id]) == 0
    page = claims.page(chosen, LEDGER.rules[chosen.test], {MODEL: copied[1]})
    assert capsys.readouterr().out.strip() == page.strip()


def test_the_command_prints_the_ledger(copied, capsys):
    assert claims.main(["--records", str(copied[0])]) == 0
    out = capsys.readouterr().out
    assert claims.sentence(copied[1], MODEL) in out
    assert all(f"\n  {one.id}: {one.claim.split()[0]}" in out for one in LEDGER.claims)
    assert len(re.findall(r"^ {6}[a-z ]+ on Qwen2.5-Coder-0.5B-Instruct: ", out, re.MULTILINE)) == len(LEDGER.claims)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sign-invertion"], 'there is no claim "sign-invertion": did you mean "sign-inversion"?'),
        (["sign-m"], 'there is no claim "sign-m": did you mean "sign-'),
        (["mistral-random"], 'there is no claim "mistral-random": did you mean "controls-mistral-random"?'),
        (["--model", "gpt"], 'there is no model "gpt": the known ones are qwen2.5-coder-0.5b'),
        (["--model", "llama"], 'there is no model "llama": did you mean "llama-3.1-8b"?'),
        (["--records", "nowhere"], 'there is no folder "nowhere" with records'),
        (["--mod", MODEL], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_ends_in_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        options.parse_claims(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_options_need_python_alone():
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "lib/refusal/options.py"), "claims", "hierarchy", "--model", OTHER],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    script = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    assert '-m refusal.claims "${@:2}"' in script and "bench | claims" in script


# ---- the committed records


@pytest.fixture(scope="module")
def committed():
    models = options.measured(ROOT / "data" / "records")
    return claims.all_verdicts(ROOT / "data" / "records", models)


def test_the_committed_ledger_is_sound(committed):
    for model, table in committed.items():
        assert set(table["verdict"]) <= set(VERDICTS)
        settled = table["verdict"].isin(["replicated", "contradicted", "inconclusive"])
        assert ((table["power"] != "") == (table["verdict"] == "inconclusive")).all(), model
        assert not table["numbers"].str.contains("nan").any(), model
        measured = [(ROOT / "data" / "records" / model / f"{name}.parquet").exists() for name in table["notebook"]]
        tested = (table["test"] != "") & pd.Series(measured)
        with_others = ("window_widens", "sign_everywhere", "hierarchy")  # need other models too
        alone = ~table["test"].str.startswith(with_others)
        assert settled[tested & alone].all(), table[tested & alone & ~settled]
        for frame in claims.paper_tables({model: table}).values():
            tex.longtable(frame, (0.28, 0.22, 0.34, 0.16))  # every character has a TeX form


def test_claims_about_one_comparison_share_one_verdict(committed):
    for model, table in committed.items():
        by_test = table[table["test"] != ""].groupby("test")["verdict"].nunique()
        assert (by_test == 1).all(), model


def test_comparisons_are_fewer_than_claims_and_say_the_same(committed):
    for table in committed.values():
        tested = table[table["comparison"] != ""]
        assert tested["comparison"].nunique() < 0.8 * len(tested)
        jailbreaks = tested[tested["test"].str.startswith("jailbreaks")]
        assert (jailbreaks.groupby("comparison")["numbers"].nunique() == 1).all()


def test_opposite_claims_are_never_both_replicated(committed):
    """Among them are claims of the same table: adding raises jailbreaks on one model and lowers them on another."""
    pairs = [
        ("controls-mistral-extracted", "controls-llama-extracted"),
        ("controls-mistral-random", "controls-qwen-random"),
        ("controls-llama-orthogonal", "controls-qwen-orthogonal"),
        ("bypass-llama", "bypass-qwen"),
    ]
    for table in committed.values():
        of = table.set_index("claim")["verdict"]
        assert all((of[one], of[other]) != ("replicated", "replicated") for one, other in pairs)


def test_evidence_reads_a_record_once(monkeypatch):
    here, read, count = Evidence(ROOT / "data" / "records", MODEL), records.read, []
    monkeypatch.setattr(records, "read", lambda path: (count.append(path), read(path))[1])
    for _ in range(3):
        here.record(SIGN)
    assert len(count) == 2
