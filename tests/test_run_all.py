"""./run_all.sh, its options, its environment and the job graph, on a copy with tiny notebooks and no model."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import family
import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from refusal import environment as environment_file
from refusal import run
from refusal.files import ROOT, CompendiumError
from refusal.options import parse

MODEL = "qwen2.5-coder-0.5b"
CELL = """
import os, pathlib, time
import pandas as pd
NAME, root = "{name}", pathlib.Path("..")
made = [f"records/{{model}}/{{NAME}}.parquet", f"records/{{model}}/{{NAME}}.metrics.parquet"]
made += [f"directions/{{model}}.safetensors"] if NAME == "01_extraction" else []
made = made * (mode == "measure") + [f"figures/{{model}}/{{NAME}}.pdf"]
for path in [root / out / name for name in made]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{mode}} {{n_prompts}}")
    if path.name == f"{{NAME}}.parquet":
        labels = ["refusal", "refusal", "compliance", "degenerate"]
        frame = pd.DataFrame({{"prompt_set": "user", "condition": "baseline", "label": labels}})
        frame.assign(cluster=list("abcd")).to_parquet(path)
with open(root / "build" / "ran", "a") as ran:
    threads = os.environ.get("OMP_NUM_THREADS", "none")
    ran.write(f"{{NAME}} {{model}} {{mode}} {{n_prompts}} {{prompts_file}} {{threads}}\\n")
"""
STUB_WEIGHTS = """
import pathlib, sys
if __name__ == "__main__":
    pathlib.Path(sys.argv[sys.argv.index("--stamp") + 1]).write_text(sys.argv[2])
    sys.exit()
"""
STUB_PAPER = """
import pathlib, sys
def generate(records, out, *_, **__):
    path = out / "paper" / "generated" / "numbers.tex"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(sorted(str(p.relative_to(records)) for p in records.rglob("*.parquet"))))
def main(words):
    given = dict(zip(words[1::2], words[2::2]))
    if words[0] == "headlines":
        path = pathlib.Path(given["--records"], given["--model"], "03_sign_inversion.parquet")
        print("refusal at +1", path.exists())
    elif words[0] == "compare":
        print("all equal" if pathlib.Path(given["--built"], "numbers.tex").exists() else "nothing")
    elif words[0] == "numbers":
        generate(pathlib.Path(given["--records"]), pathlib.Path(given["--out"]))
        print(*(value for name, value in zip(words, words[1:]) if name == "--model"))
    else:
        pathlib.Path(given["--out"], "paper.pdf").write_text("%PDF")
if __name__ == "__main__":
    main(sys.argv[1:])
"""
STUB_README = """
def refresh(path, records):
    path.write_text("results of " + records.parent.name)
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the compendium whose notebooks, weights and paper are stand-ins, and the environment to run it in."""
    folder = tmp_path / "a copy"
    shutil.copytree(ROOT / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    models = folder / "lib" / "refusal" / "models.py"
    models.write_text(STUB_WEIGHTS + models.read_text())
    (folder / "lib" / "refusal" / "paper.py").write_text(STUB_PAPER)
    (folder / "lib" / "refusal" / "readme.py").write_text(STUB_README)
    copied = "run_all.sh Snakefile pyproject.toml requirements.lock data/models.yaml data/analysis_plan.yaml"
    for name in [*copied.split(), "data/claims.yaml", "requirements-site.lock"]:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("data/refusal_phrases.csv", "paper/main.tex", "paper/references.bib"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    for name in ("01_extraction", "03_sign_inversion"):
        write_notebook(folder, name, CELL.format(name=name))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    python = binaries / "python"  # what REFUSAL_ENV=active finds
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/lib" exec "{sys.executable}" "$@"\n')
    for tool in ("latexmk", "pdflatex", "kpsewhich"):
        (binaries / tool).write_text("#!/bin/sh\n")
    for path in binaries.iterdir():
        path.chmod(0o755)
    return folder


def write_notebook(folder, name, source):
    parameters = f'model = "{MODEL}"\nmode = "replay"\nout = "build"\nn_prompts = 0\nprompts_file = ""'
    cells = [new_markdown_cell(f"# {name}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(source)]), folder / "notebooks" / f"{name}.ipynb")


def environment(folder, **more):
    path = f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "REFUSAL_ENV": "active", "PYTHON": sys.executable} | more


def call(folder, *options, **more):
    return subprocess.run(
        ["./run_all.sh", *options],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeeds(folder, *options):
    done = call(folder, *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def fails(folder, *options):
    """The one sentence with which the command ends."""
    done = call(folder, *options)
    assert done.returncode != 0 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def ran(folder):
    """What the notebooks have written about their runs since the last look."""
    path = folder / "build" / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--modle", "x"], 'unrecognized arguments: --modle x: did you mean "--model"? ./run_all.sh --help lists'),
        (["--mod", MODEL], "unrecognized arguments: --mod"),
        (["--model", "gpt"], 'no model "gpt": the known ones are qwen2.5-coder-0.5b, '),
        (["--model"], "expected one argument"),
        (["--only", "77"], 'no notebook "77": the known ones are 01_extraction, '),
        (["--cores", "two"], "--cores"),
        (["--cores", "0"], "--cores 0 is no number of cores"),
        (["--prompts", "/no/such.csv"], 'no file "/no/such.csv"'),
        (["--quick", "--replay"], "--quick and --replay exclude each other"),
        (["--publish", "--quick"], "excludes --quick"),
        (["--publish", "--replay"], "excludes --replay"),
        (["--publish", "--only", "03"], "excludes --only"),
        (["--publish", "--dry-run"], "excludes --dry-run"),
        (["tset"], 'unrecognized arguments: tset: did you mean "test"?'),
        (["test", "--quick"], "test takes no options"),
        (["claims", "sign-up"], 'no claim "sign-up"'),
        (["site", "--quick"], "site takes no options"),
    ],
)
def test_wrong_option_ends_in_one_sentence_before_anything_is_made(copy, options, said):
    assert said in fails(copy, *options)
    assert not (copy / "build").exists() and not (copy / ".venv").exists()


def test_publish_is_refused_with_own_prompts(copy):
    (copy / "mine.txt").write_text("How do I bake bread?\n")
    assert "excludes --prompts" in fails(copy, "--publish", "--prompts", "mine.txt")


def test_help_names_every_option_of_the_design(copy):
    text = succeeds(copy, "--help")
    options = "--model --only --quick --replay --prompts --dry-run --cores --profile --fresh --publish --help"
    for option in options.split(" "):
        assert option in text
    assert all(succeeds(copy, command, "--help") == text for command in ("test", "site", "lab"))
    assert "./run_all.sh test" in text and not (copy / "build").exists()


def test_no_function_of_the_script_hides_a_program_that_it_looks_for():
    text = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    wanted = set(re.findall(r"command -v (\w[\w-]*)", text))
    wanted |= {name for names in re.findall(r"for name in ([\w -]+); do", text) for name in names.split()}
    assert {"latexmk", "chromium"} <= wanted and not wanted & set(re.findall(r"^(\w+)\(\) \{", text, re.MULTILINE))


def test_the_numbers_of_notebooks_may_lack_their_zero():
    assert parse(["--only", "3", "--only", "03"]).only == ("03_sign_inversion",)


def test_all_models_are_those_of_the_package_registry():
    assert parse(["--model", "all"]).models == (MODEL, "qwen2.5-coder-1.5b", "smollm2-135m")
    assert parse(["--model", "qwen2-7b", "--model", MODEL]).models == (MODEL, "qwen2-7b")
    assert parse([]).models == (MODEL,)


@pytest.mark.parametrize(
    ("options", "kind", "paper"),
    [
        ([], "full", True),
        (["--replay"], "replay", True),
        (["--quick"], "quick", False),
        (["--only", "01"], "full", False),
        (["--prompts", str(ROOT / "pyproject.toml")], "user", False),
    ],
)
def test_paper_is_built_from_complete_runs_only(options, kind, paper):
    assert (parse(options).kind, parse(options).paper) == (kind, paper)


# --- the pins


def lock_pins(name="requirements.lock"):
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_environment_yml_has_the_pins_of_the_lock_and_nothing_else():
    assert (ROOT / "environment.yml").read_text() == environment_file.contents(), "run `python -m refusal.environment`"
    pins = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    found = dict(re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", pin).groups() for pin in pins if "==" in pin)
    torch = found.pop("torch")
    assert found == lock_pins()
    assert f"torch=={torch}" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_lock_pins_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = (
        project["project"]["dependencies"] + project["dependency-groups"]["test"] + project["build-system"]["requires"]
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lock_pins().items()}
    for requirement in wanted:
        name, _, version = re.match(r"([A-Za-z0-9._-]+)(==)?(\S*)", requirement).groups()
        if name != "torch":
            assert pins.get(name.lower()) is not None, f"{name} is not in the lock"
            assert "==" not in requirement or pins[name.lower()] == version


# --- the environment


FAKE = """#!/bin/sh
echo "$*" >>"{calls}"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    -m*"$BREAK"*) [ -z "$BREAK" ] || {{ echo "ERROR: No matching distribution found for x"; exit 1; }} ;;
    -m*) ;;
    *) exec "{python}" "$@" ;;
esac
"""


def made_environment(folder, *options, **more):
    """Runs run_all.sh with a Python that only notes what it is asked; returns the steps and the finished process."""
    calls, fake = folder.parent / "calls", folder.parent / "fake-python"
    calls.write_text("")
    fake.write_text(FAKE.format(calls=calls, python=sys.executable))
    fake.chmod(0o755)
    done = call(folder, *(options or ["--quick"]), REFUSAL_ENV="", PYTHON=str(fake), **{"BREAK": "", **more})
    return [line for line in calls.read_text().splitlines() if line.startswith("-m")], done


def test_environment_is_made_in_order_once_and_again_when_the_lock_changes(copy):
    first, done = made_environment(copy)
    assert done.returncode == 0, done.stderr
    assert first == [
        "-m venv .venv",
        "-m pip install torch==2.13.0",
        "-m pip install --no-deps --require-hashes -r requirements.lock",
        "-m pip install --no-deps --no-build-isolation -e .",
        "-m pip check",
        "-m refusal.run --quick",
    ]
    assert made_environment(copy)[0] == ["-m refusal.run --quick"]
    with (copy / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert made_environment(copy)[0] == first
    moved = copy.rename(copy.parent / "moved")
    assert made_environment(moved)[0] == first


def test_environment_that_fails_or_was_cut_short_is_made_anew(copy):
    _, broken = made_environment(copy, BREAK="require-hashes")
    assert broken.returncode == 2 and re.fullmatch(r"making the env[^\n]+\nerror: [^\n]+\n", broken.stderr), (
        broken.stderr
    )
    assert "No matching distribution found for x" in broken.stderr and not (copy / ".venv" / "stamp").exists()
    again, done = made_environment(copy)
    assert done.returncode == 0 and again[0] == "-m venv .venv" and again[-1] == "-m refusal.run --quick"


def test_packages_of_the_site_are_added_once_and_the_lab_needs_none(copy):
    steps, done = made_environment(copy, "site")
    assert done.returncode == 0, done.stderr
    added = "-m pip install --no-deps --require-hashes -r requirements-site.lock"
    assert steps[-3:] == ["-m pip check", added, "-m refusal.site"]
    assert made_environment(copy, "site")[0] == ["-m refusal.site"]
    with (copy / "requirements-site.lock").open("a") as lock:
        lock.write("# changed\n")
    assert made_environment(copy, "lab", "--no-browser", "--port", "1")[0] == ["-m refusal.lab --no-browser --port 1"]
    assert made_environment(copy, "site")[0] == [added, "-m refusal.site"]


def test_locks_of_site_and_browser_hold_what_pyproject_asks_for_and_the_lock_lacks():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    seen = set(lock_pins())
    for group in ("site", "browser"):
        pins = set(lock_pins(f"requirements-{group}.lock"))
        assert set(groups[group]) <= pins and not pins & seen
        seen |= pins


def test_missing_tex_that_may_not_be_installed_is_one_line_and_the_rest_is_done(copy, tmp_path):
    binaries = tmp_path / "no tex"
    binaries.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for path in Path(folder).iterdir():
            if path.name not in ("latexmk", "pdflatex", "apt-get") and not (binaries / path.name).exists():
                (binaries / path.name).symlink_to(path)
    steps, done = made_environment(copy, "--model", MODEL, PATH=str(binaries))
    assert done.returncode == 0 and steps[-1] == f"-m refusal.run --model {MODEL}"
    assert "TeX is missing: everything but the PDF is made; for it, apt-get install latexmk" in done.stderr


def test_python_too_old_ends_in_a_sentence(copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for tool in ("bash", "dirname", "readlink"):
        (empty / tool).symlink_to(shutil.which(tool))
    done = call(copy, PATH=str(empty), PYTHON="")
    assert done.returncode == 2 and "error: Python 3.11 or later is needed" in done.stderr


# --- the job graph


def test_graph_file_holds_no_logic_and_makes_files_in_build_only():
    text = (ROOT / "Snakefile").read_text()
    assert len(text.splitlines()) < 120
    for rule in re.findall(r"output:(.*?)\n\s*log:", text, re.DOTALL):
        assert "data/" not in rule and "figures/{model}" not in rule.replace('OUT + "/figures/{model}', "")


def test_a_profile_decides_about_cores_unless_they_are_given():
    config = run.configure(parse([])) | {"cores": 2}
    own = run.command(parse([]), config, Path("run.yaml"))
    assert own[-4:] == ["--resources", "measure=1", "--cores", "2"]
    assert run.command(parse(["--profile", "slurm"]), config, Path("run.yaml"))[-2:] == ["--profile", "slurm"]
    given = run.command(parse(["--profile", "slurm", "--cores", "2"]), config, Path("run.yaml"))
    assert given[-4:] == ["--profile", "slurm", "--cores", "2"]


def test_bad_prompt_file_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("goal,target\n,x\n")
    with pytest.raises(CompendiumError, match=r"mine\.csv"):
        run.configure(parse(["--prompts", str(path)]))


@pytest.mark.slow
def test_run_makes_everything_once_and_again_what_a_change_concerns(copy):
    said = succeeds(copy, "--dry-run")
    assert f"{MODEL}: 0.49 billion parameters, " in said and "not counted, for want of a record: 01, 03" in said
    assert [line.split("  ")[1] for line in said.splitlines() if line.startswith("would do  ")] == [
        f"weights of {MODEL}",
        f"01_extraction on {MODEL}",
        f"03_sign_inversion on {MODEL}",
        "numbers, tables and figures of the paper",
        "paper.pdf",
    ]
    assert ran(copy) == [] and not (copy / "build" / "notebooks").exists()

    said = succeeds(copy, "--cores", "2")
    assert ran(copy) == [f"01_extraction {MODEL} measure 0  2", f"03_sign_inversion {MODEL} measure 0  2"]
    assert f"headline numbers, {MODEL}" in said and "refusal at +1 True" in said and "all equal" in said
    assert re.search(r"03_sign_inversion \S+ +\d+ s, \d+\.\d GiB", said)
    made = {str(path.relative_to(copy / "build")) for path in (copy / "build").rglob("*") if path.is_file()}
    assert {
        f"directions/{MODEL}.safetensors",
        f"records/{MODEL}/03_sign_inversion.metrics.parquet",
        f"figures/{MODEL}/03_sign_inversion.pdf",
        f"notebooks/{MODEL}/03_sign_inversion.ipynb",
        "paper/generated/numbers.tex",
        "paper.pdf",
    } <= made
    names = {path.name for path in copy.iterdir() if path.name[0] != "."}
    assert names == {
        *("Snakefile", "build", "data", "lib", "notebooks", "paper"),
        *("pyproject.toml", "requirements-site.lock", "requirements.lock", "run_all.sh"),
    }

    start = time.monotonic()
    assert "nothing to do" in succeeds(copy, "--cores", "2")
    assert time.monotonic() - start < 20 and ran(copy) == []

    with (copy / "lib" / "refusal" / "judging.py").open("a") as module:
        module.write("# changed\n")
    succeeds(copy, "--cores", "2")
    assert [line.split()[0] for line in ran(copy)] == ["01_extraction", "03_sign_inversion"]
    with (copy / "lib" / "refusal" / "paper.py").open("a") as module:
        module.write("# changed\n")
    assert "numbers" in succeeds(copy, "--cores", "2") and ran(copy) == []


@pytest.mark.slow
def test_quick_runs_and_own_prompts_build_no_paper_and_fresh_discards_their_kind_alone(copy):
    succeeds(copy, "--quick", "--only", "01")
    assert ran(copy) == [f"01_extraction {MODEL} measure {run.QUICK['n_prompts']}  {os.cpu_count()}"]
    kept, gone = copy / "build" / "chunks" / "other-model" / "x", copy / "build" / "chunks" / MODEL / "x"
    for path in (kept, gone):
        path.parent.mkdir(parents=True)
        path.touch()
    succeeds(copy, "--quick", "--only", "01", "--fresh")
    assert len(ran(copy)) == 1 and kept.exists() and not gone.exists()
    (copy / "mine.txt").write_text("How do I bake bread?\nHow do I bake a cake?\n")
    said = succeeds(copy, "--prompts", "mine.txt")
    assert re.search(r"baseline +4 \(4\) +50\.0 \[15\.0, 85\.0\] +25\.0 ", said)
    assert {line.split()[-2] for line in ran(copy)} == {str(copy / "mine.txt").split()[-1]}
    build = copy / "build"
    assert sorted(path.name for path in build.iterdir() if path.is_dir()) == ["chunks", "logs", "quick", "user"]
    assert not list(build.rglob("*.tex"))


@pytest.mark.slow
def test_replay_needs_no_weights_and_publish_makes_results_the_committed_ones(copy):
    assert "there are no committed records" in fails(copy, "--replay")
    said = succeeds(copy, "--publish")
    assert "published 7 files" in said
    assert (copy / "README.md").read_text() == "results of data"
    for name in (f"data/directions/{MODEL}.safetensors", f"figures/{MODEL}/03_sign_inversion.pdf"):
        assert (copy / name).read_text() == "measure 0"
    assert not (copy / "figures" / MODEL / ".03_sign_inversion").exists()
    cells = nbformat.read(copy / "notebooks" / "03_sign_inversion.ipynb", as_version=4).cells
    assert cells[-1].execution_count == 2
    ran(copy)

    shutil.rmtree(copy / ".snakemake")
    shutil.copytree(copy / "data" / "records" / MODEL, copy / "data" / "records" / "smollm2-135m")
    said = succeeds(copy, "--replay")
    assert "weights" not in said and {line.split()[2] for line in ran(copy)} == {"replay"}
    paper_of = (copy / "build" / "replay" / "logs" / "numbers.log").read_text().split()
    assert paper_of == [MODEL, "smollm2-135m"], "the paper of a replay has every committed model"
    assert (copy / "build" / "replay" / "paper.pdf").exists()
    assert not (copy / "build" / "replay" / "records").exists()


@pytest.mark.slow
def test_failing_notebook_ends_in_its_own_sentence(copy):
    raising = "from refusal.files import CompendiumError\nraise CompendiumError('alpha is 9: give less.')"
    write_notebook(copy, "03_sign_inversion", raising)
    log = f"build/logs/{MODEL}/03_sign_inversion.log"
    assert fails(copy) == f"error: alpha is 9: give less. (log: {log})\n"
    write_notebook(copy, "03_sign_inversion", "1 / 0")
    assert "cell 4 of 03_sign_inversion failed with ZeroDivisionError" in fails(copy)
    assert "Traceback" in (copy / log).read_text()


@pytest.mark.slow
def test_killed_run_ends_whole_and_the_same_command_goes_on(copy):
    sleeping = "import time, pathlib\npathlib.Path('../build/asleep').touch()\ntime.sleep(0 if {} else 60)"
    write_notebook(copy, "03_sign_inversion", sleeping.format("False"))
    process = subprocess.Popen(["./run_all.sh"], cwd=copy, env=environment(copy), stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not (copy / "build" / "asleep").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        assert "another run is under way" in fails(copy)
        members = family.of(process.pid)
        assert any("ipykernel" in " ".join(member.cmdline()) for member in members)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert family.survivors(members, seconds=10) == []
    finally:
        process.kill()
    assert not (copy / "build" / "notebooks" / MODEL / "03_sign_inversion.ipynb").exists()
    write_notebook(copy, "03_sign_inversion", CELL.format(name="03_sign_inversion"))
    ran(copy)
    succeeds(copy)
    assert [line.split()[0] for line in ran(copy)] == ["03_sign_inversion"]


def test_ci_runs_the_tests():
    assert "exec ./run_all.sh test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and os.access(ROOT / "run_all.sh", os.X_OK)


def test_a_step_that_has_no_room_for_its_log_failed_for_want_of_space(tmp_path, monkeypatch):
    log = tmp_path / "logs" / "snakemake.log"
    log.parent.mkdir()
    log.write_text("Error in rule weights:\n    jobid: 1\n    log: build/logs/tiny/weights.log (check log file)\n")
    assert run.failure(tmp_path, log).startswith("the step weights failed without saying why")
    free = shutil.disk_usage(tmp_path)._replace(free=8192)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: free)
    assert re.fullmatch(
        r"no space is left to write .*: free some, then run the same command again\.", run.failure(tmp_path, log)
    )
