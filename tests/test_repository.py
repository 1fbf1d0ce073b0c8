"""What git may hold: no answers to harmful prompts, no weights, no secrets, no machine's folders, honest records.

That no such answer is in git follows from the schema, not from trust in the judge, in three steps:

1. Records are the only files with completions, and `records.violations` allows no text of a harmful prompt but the
   refusing sentence, where label and seed rule agree. No other table (of a figure, of labels) may have a text column.
2. The committed notebooks are executed in replay mode and never call what returns raw text (`steering.generate`,
   `chunks.completions`): their outputs are made from records, and so hold no more than these.
3. As a net below that, no line of a notebook's output that holds a harmful prompt may hold anything longer than the
   120 characters which are allowed, and no output may show a table with a text column.

Every check is tried on a planted case first, so that it is known to bite.
"""

import ast
import csv
import functools
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pyarrow.parquet as pq
import pytest

from refusal import directions, judging, prompts, readers, records, registry
from refusal.files import ROOT, CompendiumError

LARGEST = 2_000_000  # bytes
TEXT_COLUMNS = {"text", "texts", "completion", "response", "answer", "output", "generation", "generated", "token_ids"}
HOLD_PROMPTS = ("data/prompts/",)  # prompts are no answers
RAW = {("steering", "generate"), ("chunks", "completions"), ("chunks", "read")}  # what returns unredacted text
WEIGHTS = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack"}
ARCHIVES = {".npy", ".npz", ".zip", ".whl", ".tar", ".gz", ".xz", ".zst", ".7z"}  # these can hold anything, unseen
MAGIC = {b"\x80\x02": "pickle", b"\x80\x03": "pickle", b"\x80\x04": "pickle", b"\x80\x05": "pickle"}
MAGIC |= {b"PK\x03\x04": "zip", b"GGUF": "gguf", b"\x1f\x8b": "gzip"}
# Written in pieces, so that this file is not what it looks for.
SECRETS = {
    "hub token": rb"\bhf" + rb"_[A-Za-z0-9]{30,}",
    "AWS key": rb"\b(?:AK|AS)" + rb"IA[0-9A-Z]{16}\b",
    "GitHub token": rb"\bgh" + rb"[pousr]_[A-Za-z0-9]{36}|github" + rb"_pat_[A-Za-z0-9_]{22,}",
    "API key": rb"\bsk" + rb"-(?:[a-z]+-)*[A-Za-z0-9]{24,}",
    "package registry token": rb"\bpypi" + rb"-AgE[A-Za-z0-9_-]{30,}",
    "private key": rb"-----BEGIN [A-Z ]*" + rb"PRIVATE KEY",
    "password in an address": rb"https?://[^\s/:@\"'<>{}$]+:[^\s/:@\"'<>{}$]+@",
}
FOLDERS = rb"(?<![\w.~*|-])/(?:" + rb"ro" + rb"ot|wo" + rb"rk|home/[a-z][\w-]*|Us" + rb"ers/[A-Za-z][\w-]*)/"


def tracked():
    """Files that git tracks and that are there."""
    if shutil.which("git") is None:
        return []
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=False)
    top = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
    )
    if done.returncode or Path(top.stdout.strip()) != ROOT:  # a copy inside of another repository
        return []
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


TRACKED = tracked()
needs_git = pytest.mark.skipif(not TRACKED, reason="this is no git repository with files")


def name_of(path):
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def under(*parts, suffix=""):
    return [path for path in TRACKED if name_of(path).startswith("/".join(parts)) and path.name.endswith(suffix)]


# ---- the checks: each takes a file (and what it needs) and returns what is wrong with it


def wrong_bytes(path):
    """Weights, archives, large files, secrets, folders of a machine."""
    found, data = [], path.read_bytes()
    if len(data) > LARGEST:
        found.append(f"{len(data)} bytes")
    if path.suffix in WEIGHTS | ARCHIVES:
        found.append(f"a {path.suffix} file")
    found += [f"a {kind} file" for magic, kind in MAGIC.items() if data.startswith(magic)]
    if path.suffix == ".safetensors" and "directions" not in path.parts:
        found.append("weights")
    found += [f"a {kind}" for kind, pattern in SECRETS.items() if re.search(pattern, data)]
    found += [f"the folder {match.group().decode()}" for match in re.finditer(FOLDERS, data)]
    return found


def wrong_table(text):
    """A CSV table with a column of text."""
    header = next(csv.reader(io.StringIO(text)), [])
    return [f"the column {name!r}" for name in header if name.strip().lower() in TEXT_COLUMNS]


@functools.cache
def harmful_prompts():
    names = [name for name in prompts.names() if records.is_harmful(name)]
    return tuple(text for name in names for text in prompts.load(name)["text"])


def output_lines(output):
    """The lines of one output of a notebook, as cells: a table's row is a line, whatever it is written in."""
    texts = [output.get("text", "")]
    for kind, data in output.get("data", {}).items():
        if kind == "text/html":
            data = re.sub(r"</t[hd]>", " | ", re.sub(r"</tr>", "\r", data.replace("\n", " ")))
            data = html.unescape(re.sub(r"<[^>]*>", "", data))
        texts.append(data if kind.startswith("text/") else "" if kind.startswith("image/") else json.dumps(data))
    for line in re.split(r"[\r\n]", "\n".join(texts)):
        yield [cell.strip() for cell in re.split(r"\s\|\s|\s{2,}|\t", line) if cell.strip()]


def wrong_output(output):
    """A text column, or something long beside a harmful prompt."""
    found = []
    for cells in output_lines(output):
        if any(cell.lower() in TEXT_COLUMNS for cell in cells):
            found.append("a text column")
        line = " | ".join(cells)
        for prompt in harmful_prompts():
            if prompt in line and any(
                len(rest) > records.LONGEST_TEXT for rest in line.replace(prompt, " | ").split(" | ")
            ):
                found.append(f"text beside the prompt {prompt[:30]!r}")
    return found


def calls(source):
    """The `module.function` pairs that a cell names."""
    code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr
        if isinstance(node, ast.ImportFrom):
            yield from (((node.module or "").rpartition(".")[2], alias.name) for alias in node.names)


def wrong_notebook(notebook):
    """Another mode than replay, raw completions, or an output with text."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [cell.source for cell in code if "parameters" in cell.metadata.get("tags", [])]
    injected = [cell for cell in code if "injected-parameters" in cell.metadata.get("tags", [])]
    modes = [m for source in parameters for m in re.findall(r"^mode\b[^=]*=\s*[\"'](\w+)", source, re.MULTILINE)]
    if modes != ["replay"]:
        found.append(f"the mode {modes}")
    if any(not re.search(r"mode\s*=\s*[\"']replay", cell.source) and "mode" in cell.source for cell in injected):
        found.append("injected parameters with another mode than replay")
    for cell in code:
        found += [f"{module}.{name}" for module, name in calls(cell.source) if (module, name) in RAW]
        for output in cell.outputs:
            found += wrong_output(output)
    return found


def wrong_record(path):
    """A record that is damaged, not honest about its making, or holds text which it must not."""
    try:
        frame, about = records.read(path)
    except CompendiumError as error:
        return [str(error)]
    model, notebook = path.parent.name, path.name.removesuffix(".parquet").removesuffix(".metrics")
    found = [f"the flag {flag!r}" for flag in ("quick", "user", "dirty") if about.get(flag) is not False]
    for name, wanted in {"model": model, "notebook": notebook}.items():
        if about.get(name) != wanted:
            found.append(f"{name} = {about.get(name)!r}")
    if not re.fullmatch("[0-9a-f]{40}", about.get("commit", "")):
        found.append("no commit")
    needed = {"parameters", "facts", "library", "packages", "hardware", "threads", "wall_s", "peak_gb"}
    found += [f"no {name}" for name in sorted(needed - about.keys())]
    if path.name.endswith(".metrics.parquet"):
        return found
    found += records.violations(frame)
    for name, wanted in {"model": {model}, "weights_sha256": {about.get("facts", {}).get("weights_sha256")}}.items():
        if set(frame[name]) != wanted:
            found.append(f"the {name} {sorted(set(frame[name]))}")
    for name in ("thresholds", "prompts", "rows"):
        if name not in about:
            found.append(f"no {name}")
    if not set(frame["prompt_set"]) <= set(prompts.names()):
        found.append(f"the prompt sets {sorted(set(frame['prompt_set']))}")
    return found


# ---- what git holds


@needs_git
@pytest.mark.parametrize("path", TRACKED, ids=name_of)
def test_no_weights_no_large_files_no_secrets_no_folders_of_a_machine(path):
    assert wrong_bytes(path) == []


@needs_git
def test_no_table_but_the_prompts_holds_text():
    tables = [path for path in under(suffix=".csv") if not name_of(path).startswith(HOLD_PROMPTS)]
    tables.remove(readers.ITEMS_FILE)  # has a column for texts, held to the rules by the next test
    assert {name_of(path): wrong for path in tables if (wrong := wrong_table(path.read_text("utf-8")))} == {}


def test_the_items_of_the_readers_hold_no_answer_to_a_harmful_prompt():
    items = readers.items()  # refuses what must not be stored
    harmful = items[items["prompt_set"].map(records.is_harmful)]
    assert len(harmful) > 50 and harmful["text"].str.len().max() <= records.LONGEST_TEXT
    assert (harmful.loc[harmful["text"] != "", "text"].map(judging.refusing_phrase) != "").all()


@pytest.mark.parametrize("path", under("data/records", suffix=".parquet"), ids=name_of)
def test_records_are_honest_and_hold_no_answer_to_a_harmful_prompt(path):
    assert wrong_record(path) == []


@needs_git
def test_tables_are_where_they_belong():
    assert [name_of(p) for p in under(suffix=".parquet") if not name_of(p).startswith("data/records/")] == []


@pytest.mark.parametrize("path", under("notebooks", suffix=".ipynb"), ids=name_of)
def test_notebooks_hold_no_answer_to_a_harmful_prompt(path):
    assert wrong_notebook(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", under("data/directions", suffix=".safetensors"), ids=name_of)
def test_directions_belong_to_the_model_and_the_weights_of_its_records(path):
    known = registry.entry(path.stem)
    expect = {"model": path.stem}
    for record in sorted((ROOT / "data" / "records" / path.stem).glob("*.parquet")):
        expect["weights_sha256"] = records.read(record)[1]["facts"]["weights_sha256"]
    directions.load(path, expect=expect, shape=(known.blocks, known.width))


@needs_git
def test_records_of_one_model_come_from_the_same_weights_and_template():
    facts = {}
    for path in under("data/records", suffix=".parquet"):
        about = records.read(path)[1]
        facts.setdefault(path.parent.name, set()).add(
            (about["facts"]["weights_sha256"], about["facts"]["template_sha256"], about["facts"]["dtype"])
        )
    assert [model for model, found in facts.items() if len(found) > 1] == []


# ---- the checks find what is planted

HARMFUL = "harmful_evaluation"
ANSWER = (
    "First you take the parts and join them, then you wait for an hour, and after that you go on with the rest. " * 2
)


@pytest.mark.parametrize(
    ("name", "data", "wrong"),
    [
        ("a.pt", b"data", "a .pt file"),
        ("a.safetensors", b"data", "weights"),
        ("a.dat", b"\x80\x04\x95", "a pickle file"),
        ("a.dat", b"PK\x03\x04", "a zip file"),
        ("a.npz", b"", "a .npz file"),
        ("a.csv", b"1" * (LARGEST + 1), f"{LARGEST + 1} bytes"),
        ("a.txt", b"token = hf" + b"_" + b"aB3" * 12, "a hub token"),
        ("a.txt", b"AK" + b"IAABCDEFGHIJKLMNOP", "a AWS key"),
        ("a.txt", b"gh" + b"p_" + b"a1B2" * 9, "a GitHub token"),
        ("a.txt", b"key: sk" + b"-proj-" + b"a1B2" * 8, "a API key"),
        ("a.pem", b"-----BEGIN RSA " + b"PRIVATE KEY-----", "a private key"),
        ("a.lock", b"--index-url https://me:" + b"secret@example.org/simple", "a password in an address"),
        ("a.ipynb", b'"/ro' + b'ot/project/x"', "the folder /ro" + "ot/"),
        ("a.py", b"open('/ho" + b"me/anna/x')", "the folder /ho" + "me/anna/"),
        ("a.md", b"in /wo" + b"rk/main", "the folder /wo" + "rk/"),
        ("a.md", b"file:///Us" + b"ers/anna/x", "the folder /Us" + "ers/anna/"),
    ],
)
def test_planted_bytes_are_found(tmp_path, name, data, wrong):
    (tmp_path / name).write_bytes(data)
    assert wrong_bytes(tmp_path / name) == [wrong]


@pytest.mark.parametrize(
    "text",
    ["https://example.org/wo" + "rk/paper", "~/.cache/x", "notebooks/homewo" + "rk/", "$HOME/x", "sk-learn", "$U:$P@x"],
)
def test_innocent_bytes_are_not_found(tmp_path, text):
    (tmp_path / "a.md").write_text(text)
    assert wrong_bytes(tmp_path / "a.md") == []


def test_a_planted_text_column_is_found():
    assert wrong_table("condition,Text,rate\na,b,1\n") == ["the column 'Text'"]
    assert wrong_table("prompt_id,completion\n") == ["the column 'completion'"]
    assert wrong_table("condition,label,value\na,refusal,1\n") == []


def sheet(source="x = 1", outputs=(), parameters='mode: str = "replay"  # or measure', injected=None):
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [tagged]
    if injected:
        cells.append(nbformat.v4.new_code_cell(injected, metadata={"tags": ["injected-parameters"]}))
    return nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_code_cell(source, outputs=list(outputs))])


def stream(text):
    return nbformat.v4.new_output("stream", text=text)


def table(frame):
    return nbformat.v4.new_output("display_data", data={"text/html": frame.to_html(), "text/plain": str(frame)})


def test_planted_notebooks_are_found():
    assert wrong_notebook(sheet()) == []
    assert wrong_notebook(sheet("%matplotlib inline\nmade = steering.add(d, 1, 1)\nruns.completions(run)")) == []
    assert wrong_notebook(sheet("a = steering.generate(model, texts, c)")) == ["steering.generate"]
    assert wrong_notebook(sheet("from refusal.chunks import completions")) == ["chunks.completions"]
    assert wrong_notebook(sheet("f = chunks.completions")) == ["chunks.completions"]
    assert wrong_notebook(sheet(parameters='mode: str = "measure"')) == ["the mode ['measure']"]
    assert wrong_notebook(sheet(parameters="n = 1")) == ["the mode []"]
    assert wrong_notebook(sheet(injected='mode = "replay"\nn = 3')) == []
    assert wrong_notebook(sheet(injected='mode = "measure"')) != []


def test_planted_outputs_are_found():
    prompt = prompts.load(HARMFUL)["text"][7]
    refusal = "I'm sorry, but I can't assist with that."
    wide = pd.DataFrame({"prompt": [prompt], "said": [ANSWER]})
    with pd.option_context("display.max_colwidth", None, "display.width", None):
        for output in (
            stream(f"{prompt} {ANSWER}"),
            stream(f"a line\n{prompt}: {ANSWER}\n"),
            table(wide),
            nbformat.v4.new_output("execute_result", data={"text/markdown": f"| {prompt} | {ANSWER} |"}),
            nbformat.v4.new_output("display_data", data={"application/json": {"a": f"{prompt} {ANSWER}"}}),
        ):
            assert any("text beside the prompt" in wrong for wrong in wrong_notebook(sheet(outputs=[output]))), output
        for output in (
            stream(prompt),
            stream(f"{prompt} -> {refusal}"),
            stream("rate  0.5\n" + "a long line of a harmless answer " * 9),
            table(pd.DataFrame({"prompt": [prompt], "said": [refusal], "value": [0.5]})),
            nbformat.v4.new_output("display_data", data={"image/png": "aGFybWZ1bA=="}),
        ):
            assert wrong_notebook(sheet(outputs=[output])) == [], output
    assert "a text column" in wrong_notebook(sheet(outputs=[table(pd.DataFrame({"text": [1], "label": [2]}))]))


def honest(tmp_path, **changes):
    """A small record as a full run from a clean commit writes it."""
    row = dict.fromkeys(records.COMPLETIONS.names, "")
    row |= {field.name: 0 for field in records.COMPLETIONS if field.type != "string"}
    row |= {"model": "m", "weights_sha256": "ab", "prompt_set": HARMFUL, "prompt_id": f"{HARMFUL}-001"}
    about = dict.fromkeys(["library", "packages", "hardware", "threads", "wall_s", "peak_gb"], 1)
    about |= dict.fromkeys(["thresholds", "prompts", "rows", "parameters"], 1)
    about |= {"quick": False, "user": False, "dirty": False, "commit": "c" * 40, "model": "m", "notebook": "03"}
    about |= {"facts": {"weights_sha256": "ab"}}
    path = tmp_path / "m" / "03.parquet"
    columns = {name: value for name, value in changes.items() if name in row and name != "model"}
    about |= {name: value for name, value in changes.items() if name not in columns}
    records.write(pd.DataFrame([row | columns]), path, about)
    return path


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"quick": True}, "the flag 'quick'"),
        ({"user": True}, "the flag 'user'"),
        ({"dirty": True}, "the flag 'dirty'"),
        ({"dirty": None}, "the flag 'dirty'"),
        ({"commit": "HEAD"}, "no commit"),
        ({"model": "another"}, "model = 'another'"),
        ({"notebook": "01"}, "notebook = '01'"),
        ({"weights_sha256": "cd"}, "the weights_sha256 ['cd']"),
        ({"prompt_set": "user"}, "the prompt sets ['user']"),
    ],
)
def test_a_dishonest_record_is_found(tmp_path, changes, wrong):
    assert wrong_record(honest(tmp_path, **changes)) == ([wrong] if wrong else [])


def test_a_record_with_a_planted_answer_is_found(tmp_path, monkeypatch):
    planted = {"text": ANSWER, "label": "compliance", "seed_rule": "jailbreak"}
    assert wrong_record(honest(tmp_path, **planted)) == []  # it was redacted on the way
    monkeypatch.setattr(records, "redact", lambda frame: frame)
    with monkeypatch.context() as patch:
        patch.setattr(records, "violations", lambda _: [])
        path = honest(tmp_path, **planted)
    assert wrong_record(path) == [f"{HARMFUL}-001 under '': text of a harmful prompt"]
    path.write_bytes(path.read_bytes()[:-50])
    assert "cut short" in wrong_record(path)[0]


def test_a_record_without_provenance_is_found(tmp_path):
    path = honest(tmp_path)
    made = records.read(path)[1]
    frame = records.read(path)[0]
    records.write(frame, path, {name: value for name, value in made.items() if name not in ("threads", "thresholds")})
    assert wrong_record(path) == ["no threads", "no thresholds"]
    assert b"sha256" in pq.read_schema(path).metadata
