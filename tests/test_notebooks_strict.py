"""Strict execution on tiny notebooks, with the real papermill, and the rules for the committed notebooks.

Each way in which papermill or nbval is known to pass in silence has a test here.
"""

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import family
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from refusal import notebooks, summaries
from refusal.files import ROOT, CompendiumError
from refusal.options import DEFAULT_MODEL
from refusal.parameters import check, defaults, find, parse

PARAMETERS = "alpha: float = 1.0  # in units of raw_norm\nn: int = 3\nname = 'a'\nprompts_file: str | None = None"
SHOW = "print(alpha, n, repr(name), prompts_file)"


def write(path, *sources, parameters=PARAMETERS, tags=("parameters",)):
    cells = [new_markdown_cell("# A tiny notebook"), new_code_cell(parameters, metadata={"tags": list(tags)})]
    cells += [source if isinstance(source, dict) else new_code_cell(source) for source in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def outputs(path):
    node = nbformat.read(path, as_version=4)
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in node.cells if "outputs" in cell]


def error_of(call, *arguments, **named):
    with pytest.raises(CompendiumError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and message.endswith((".", "?")), message
    return message


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- before anything runs: the parameters cell and the values given for it


def refused(folder, *sources, given=None, **named):
    """The sentence with which a notebook is refused, after checking that no kernel ran and nothing was written."""
    witness = folder / "ran"
    path = write(folder / "in" / "03_x.ipynb", *sources, f"open({str(witness)!r}, 'w')", **named)
    message = error_of(notebooks.execute, path, folder / "out" / "x.ipynb", given)
    assert not witness.exists() and left_in(folder / "out") == []
    return message


def test_missing_parameters_tag_is_refused(tmp_path):
    assert "0 cells tagged" in refused(tmp_path, SHOW, tags=(), given={"n": 4})


def test_doubled_parameters_tag_is_refused(tmp_path):
    second = new_code_cell("n = 5", metadata={"tags": ["parameters"]})
    assert "2 cells tagged" in refused(tmp_path, second, SHOW, given={"n": 4})


def test_tag_on_a_markdown_cell_is_refused(tmp_path):
    cell = new_markdown_cell("n = 5", metadata={"tags": ["parameters"]})
    assert "a code cell" in refused(tmp_path, cell, SHOW, tags=())


def test_product_of_a_run_is_no_source(tmp_path):
    injected = new_code_cell("n = 5", metadata={"tags": ["injected-parameters"]})
    assert "product of a run" in refused(tmp_path, injected, SHOW)


def test_unknown_parameter_lists_the_known_ones_and_the_nearest(tmp_path):
    message = refused(tmp_path, SHOW, given={"alfa": 2.0})
    assert '"alfa"' in message and "alpha, n, name, prompts_file" in message and 'did you mean "alpha"' in message


@pytest.mark.parametrize(
    "line",
    [
        "beta = 2 * alpha",
        "beta = [n]",
        "beta = int('3')",
        "alpha = 2.0",
        "beta = gamma = 1",
        "beta, gamma = 1, 2",
        "beta: int",
        "import os",
        "print(n)",
        "'text'",
        "n += 1",
        "if n: m = 2",
    ],
)
def test_anything_but_one_literal_a_name_is_refused(tmp_path, line):
    assert "may hold one literal for each name" in refused(tmp_path, SHOW, parameters=f"{PARAMETERS}\n{line}")


def test_parameters_cell_that_is_no_python_is_refused(tmp_path):
    assert "is no Python" in refused(tmp_path, parameters="alpha = = 1")


@pytest.mark.parametrize(
    ("key", "value"),
    [("n", "3"), ("n", 3.0), ("n", True), ("alpha", "1.0"), ("alpha", True), ("alpha", None), ("name", 3), ("n", [3])],
)
def test_value_of_another_type_is_refused(key, value):
    known_values = {"alpha": 1.0, "n": 3, "name": "a"}
    assert f"parameter {key} of 03_x must be of type" in error_of(check, "03_x", known_values, {key: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_no_finite_number_is_refused(value):
    assert "no finite number" in error_of(check, "03_x", {"alpha": 1.0}, {"alpha": value})


def test_int_stands_for_a_float_and_none_takes_anything():
    given = check("03_x", {"alpha": 1.0, "free": None, "on": True}, {"alpha": 2, "free": [1], "on": False})
    assert given == {"alpha": 2.0, "free": [1], "on": False} and type(given["alpha"]) is float


def test_yaml_keeps_types_and_refuses_what_is_no_mapping():
    text = "name: '007'\nalpha: -1.5\nn: 7\nlist: [a, b]\nnone: null\nyes_: true"
    assert parse(text, "f") == {"name": "007", "alpha": -1.5, "n": 7, "list": ["a", "b"], "none": None, "yes_": True}
    assert parse("", "f") == {}
    assert "f is no YAML" in error_of(parse, "a: [1", "f")
    assert "must map names" in error_of(parse, "- a", "f")
    assert "gives alpha twice" in error_of(parse, "alpha: 1\nalpha: 2", "f")


def test_unknown_and_damaged_notebooks_end_in_a_sentence(tmp_path):
    assert 'no notebook "77"' in error_of(find, "77")
    damaged = tmp_path / "03_x.ipynb"
    damaged.write_text('{"cells": [')
    assert "cannot be read as a notebook" in error_of(notebooks.execute, damaged, tmp_path / "out.ipynb")


# --- execution


def test_parameters_arrive_as_given_and_what_changes_is_stripped(tmp_path):
    """Braces in a path are papermill's format fields; here they are letters."""
    path = write(tmp_path / "03_x.ipynb", SHOW, "print('one')\nimport sys; sys.stdout.flush()\nprint('two')")
    given = {"alpha": -2, "name": "{n} 'quoted' é \\", "prompts_file": "007"}
    out = notebooks.execute(path, tmp_path / "out_{alpha}" / "{n}.ipynb", given)
    assert out == tmp_path / "out_{alpha}" / "{n}.ipynb"
    assert outputs(out)[2:] == [f"-2.0 3 {given['name']!r} 007\n", "one\ntwo\n"]
    assert left_in(tmp_path) == ["03_x.ipynb", "{n}.ipynb"]
    node = nbformat.read(out, as_version=4)
    assert set(node.metadata) == {"kernelspec", "language_info"} and "version" not in node.metadata.language_info
    assert [dict(cell.metadata) for cell in node.cells] == [
        {},
        {"tags": ["parameters"]},
        {"tags": ["injected-parameters"]},
        {},
        {},
    ]
    assert "papermill" not in out.read_text() and str(tmp_path) not in out.read_text()


def test_failing_cell_leaves_no_output_and_keeps_the_old_one(tmp_path):
    path = write(tmp_path / "in" / "03_x.ipynb", SHOW, "raise ValueError('no good:\\nreally')")
    out = tmp_path / "out" / "x.ipynb"
    out.parent.mkdir()
    out.write_text("old")
    message = error_of(notebooks.execute, path, out)
    assert "cell 4 of 03_x failed with ValueError: no good;" in message
    assert out.read_text() == "old" and left_in(out.parent) == ["x.ipynb"]


def test_own_error_is_passed_on_word_for_word(tmp_path):
    sentence = "record data/x.parquet was made with alpha = 2.0: measure again."
    raising = f"from refusal.files import CompendiumError\nraise CompendiumError({sentence!r})"
    assert error_of(notebooks.execute, write(tmp_path / "03_x.ipynb", raising), tmp_path / "o.ipynb") == sentence


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.exit(0)", "cell 3 of 03_x did not complete"),
        ("import sys; sys.exit(3)", "failed with SystemExit: 3"),
        ("%no_such_magic", "cell 3 of 03_x failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the kernel died in cell 3 of 03_x"),
        (new_code_cell("1/0", metadata={"tags": ["raises-exception"]}), "ZeroDivisionError"),
        (new_code_cell("x = 1", metadata={"tags": ["skip-execution"]}), "cell 3 of 03_x did not complete"),
    ],
    ids=["exit-0", "exit-3", "magic", "killed", "tolerated", "skipped"],
)
def test_run_that_does_not_reach_its_end_is_refused(tmp_path, source, said):
    path = write(tmp_path / "in" / "03_x.ipynb", source, SHOW)
    assert said in error_of(notebooks.execute, path, tmp_path / "out" / "x.ipynb")
    assert left_in(tmp_path / "out") == []


def test_slow_cell_and_kernel_that_cannot_start_end_in_a_sentence(tmp_path, monkeypatch):
    path = write(tmp_path / "03_x.ipynb", "import time; time.sleep(60)")
    assert "cell 3 of 03_x took longer than 1 s" in error_of(notebooks.execute, path, tmp_path / "o.ipynb", timeout=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "could not be started or reached" in error_of(notebooks.execute, path, tmp_path / "o.ipynb")
    assert left_in(tmp_path) == ["03_x.ipynb"]


def test_kernel_is_of_this_environment_whatever_the_user_has(tmp_path, monkeypatch):
    """A user-wide kernelspec of the same name and a startup file would both win in plain papermill."""
    spec = tmp_path / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}')
    startup = tmp_path / ".ipython" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("print = None")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    show = (
        "import os, sys\nprint(sys.executable, os.getcwd(), os.environ['HF_HUB_OFFLINE'], os.environ['TQDM_DISABLE'])"
    )
    path = write(tmp_path / "in" / "03_x.ipynb", show)
    out = notebooks.execute(path, tmp_path / "o.ipynb")
    assert outputs(out)[1] == f"{sys.executable} {tmp_path / 'in'} 1 1\n"


def test_only_a_hub_model_may_reach_the_hub():
    assert notebooks._offline("qwen2.5-coder-0.5b") and notebooks._offline(None) and notebooks._offline("no such")
    assert not notebooks._offline("qwen2-7b")


def test_publish_writes_back_in_place_and_twice_the_same(tmp_path):
    path = write(tmp_path / "03_x.ipynb", SHOW, "import random; 6 * 7")
    ids = [cell.id for cell in nbformat.read(path, as_version=4).cells]
    first = notebooks.publish(path).read_bytes()
    assert [cell.id for cell in nbformat.read(path, as_version=4).cells] == ids
    assert outputs(path)[1] == "1.0 3 'a' None\n" and left_in(tmp_path) == ["03_x.ipynb"]
    assert notebooks.publish(path).read_bytes() == first


def test_output_folder_that_cannot_be_written_is_found_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "03_x.ipynb", f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = error_of(notebooks.execute, path, tmp_path / "file" / "x.ipynb")
    assert "a file lies where a folder is needed" in message and not (tmp_path / "ran").exists()


def test_command_line_passes_yaml_and_ends_in_one_sentence(tmp_path):
    path = write(tmp_path / "03_x.ipynb", SHOW)
    (tmp_path / "p.yaml").write_text("name: '007'\nn: 5\n")
    command = [sys.executable, "-m", "refusal.notebooks", "run", str(path), "--out", str(tmp_path / "o.ipynb")]
    done = subprocess.run([*command, "-p", str(tmp_path / "p.yaml"), "-y", '{"n": 6}'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert outputs(tmp_path / "o.ipynb")[2] == "1.0 6 '007' None\n"
    wrong = subprocess.run([*command, "-y", "m: 6"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: 03_x has no parameter") and wrong.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_killed_run_leaves_no_output_and_no_process(tmp_path, victim):
    """`kill -9` of the worker or of what started it: the kernel ends too, and no output looks finished."""
    mark = tmp_path / "kernel"
    sleeping = f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(120)"
    path = write(tmp_path / "03_x.ipynb", sleeping, SHOW)
    out = tmp_path / "out" / "x.ipynb"
    worker = [sys.executable, "-m", "refusal.notebooks", "run", str(path), "--out", str(out)]
    parent = subprocess.Popen(["bash", "-c", '"$@" & wait', "bash", *worker], start_new_session=True)
    try:
        wait_for(lambda: mark.exists() and mark.read_text())
        processes = family.of(parent.pid)
        assert int(mark.read_text()) in [process.pid for process in processes]
        (processes[0] if victim == "parent" else processes[1]).send_signal(signal.SIGKILL)
        parent.wait(10)
        assert family.survivors(processes, seconds=20) == []
        assert not out.exists() and all(name.startswith(".") for name in left_in(tmp_path / "out"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# --- the committed notebooks: nbval compares nothing in a cell without an execution count, no picture, and passes one
# that a bad magic aborted; a trailing semicolon no longer hides a value; what is in stderr differs between machines.

COMMITTED = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PARTS = ["Question", "claim", "Parameters", "Method", "Result", "What (it|this) does not show", "What next"]


def test_there_are_committed_notebooks():
    assert {path.stem for path in COMMITTED} >= {"01_extraction", *summaries.FIGURES.values()}


@pytest.fixture(params=COMMITTED, ids=lambda path: path.stem)
def committed(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(node):
    return [cell for cell in node.cells if cell.cell_type == "code"]


def compared(cell):
    """Whether nbval compares a text that this cell printed."""
    texts = ["".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
    pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    ignored = "NBVAL_IGNORE_OUTPUT" in cell.source or "nbval-ignore-output" in cell.metadata.get("tags", [])
    return bool(cell.execution_count and any(texts) and not pictures and not ignored)


def test_committed_notebook_is_executed_from_top_to_end(committed):
    counts = [cell.execution_count for cell in code_cells(committed) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `python -m refusal.notebooks publish`"


def test_committed_notebook_has_sound_parameters_and_the_defaults_of_all(committed):
    values = defaults(committed, "it")
    assert values["model"] == DEFAULT_MODEL and values["mode"] == "replay" and values["out"].startswith("build")


def test_committed_notebook_prints_what_nbval_compares_and_no_warning(committed):
    outputs = [output for cell in code_cells(committed) for output in cell.outputs]
    assert any(re.search(r"\d", str(cell.outputs)) and compared(cell) for cell in code_cells(committed))
    assert [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"] == []
    text = " ".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs
    )
    assert not re.search(r" at 0x[0-9a-f]{6}|/home/|/root/|/tmp/|\d\d:\d\d:\d\d", text)


def test_committed_notebook_uses_no_magic_but_inline_and_no_trailing_semicolon(committed):
    lines = [line for cell in code_cells(committed) for line in cell.source.splitlines()]
    magics = [line for line in lines if re.match(r"\s*(%|!)", line)]
    assert magics in ([], ["%matplotlib inline"]) and not [line for line in lines if line.rstrip().endswith(";")]
    markers = ("NBVAL_IGNORE", "NBVAL_SKIP", "NBVAL_RAISES", "nbval-", "raises-exception", "skip-execution")
    assert not [cell.source for cell in code_cells(committed) if any(mark in str(cell) for mark in markers)]


def test_committed_notebook_tells_its_story_in_small_cells(committed):
    headings = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^(?:#+ |\*\*)(.+)$", headings, re.MULTILINE)
    places = [next((i for i, heading in enumerate(headings) if re.search(part, heading)), part) for part in PARTS]
    assert all(isinstance(place, int) for place in places), f"a part is missing: {places}"
    assert places == sorted(places), headings
    for cell in code_cells(committed):
        assert len(cell.source.splitlines()) <= 30, cell.source
        for node in ast.walk(ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, node.name


def test_committed_notebook_holds_no_picture_that_nbval_would_compare_bytewise(committed):
    kinds = {kind for cell in code_cells(committed) for output in cell.outputs for kind in output.get("data", {})}
    assert not kinds & {"image/svg+xml", "application/javascript"}


@pytest.mark.slow
def test_nbval_fails_on_a_changed_number_and_on_a_stripped_notebook(tmp_path):
    """The second is our lint's doing: nbval alone passes a stripped notebook."""
    path = write(tmp_path / "03_x.ipynb", "print(round(alpha * 2, 1))")
    notebooks.publish(path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env", path]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    path.write_text(path.read_text().replace('"2.0\\n"', '"2.1\\n"'))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    node = nbformat.read(path, as_version=4)
    for cell in code_cells(node):
        cell.execution_count, cell.outputs = None, []
    with pytest.raises(AssertionError):
        test_committed_notebook_is_executed_from_top_to_end(node)
