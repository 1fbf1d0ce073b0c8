"""The study's models from the same command: ./run_all.sh on tiny ones of their four architectures, as from the hub.

A copy of the compendium whose registry holds them too; the notebooks, the library and the job graph are the real ones.
"""

import os
import secrets
import shutil
import subprocess
import sys

import nbformat
import pytest
from hub import FAMILIES, LAYERS, WIDTH, fill, write_registry

from refusal import directions, records, summaries
from refusal.files import ROOT

pytestmark = pytest.mark.slow
MODELS = [f"tiny-{architecture}" for architecture in FAMILIES]
NOTEBOOKS = ["01_extraction", "03_sign_inversion"]
COPIED = ["Snakefile", "lib", "pyproject.toml", "requirements.lock", "run_all.sh", "data/prompts"]


class Copy:
    """A copy of the compendium, with an environment that finds no hub but holds a token."""

    def __init__(self, root):
        self.folder, self.token = root / "copy", f"hf_{secrets.token_hex(16)}"
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        tables = [path.relative_to(ROOT) for path in (ROOT / "data").glob("*.*")]
        for name in [*COPIED, *tables, *(f"notebooks/{name}.ipynb" for name in NOTEBOOKS)]:
            source, target = ROOT / name, self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=skip)
            else:
                shutil.copy(source, target)
        self.snapshots, entries = fill(root / "hub", loud=2.0)
        registry = self.folder / "data" / "models.yaml"
        write_registry(registry, entries, registry.read_text(encoding="utf-8"))
        python = root / "bin" / "python"  # what REFUSAL_ENV=active finds
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{self.folder}/lib" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "REFUSAL_ENV": "active",
            "REFUSAL_CACHE": str(root / "unused"),
            "PYTHON": sys.executable,
            "HF_HUB_CACHE": str(root / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": self.token,
            "OMP_NUM_THREADS": "1",
        }
        self.said = ""

    def run(self, *options, models=MODELS, **more):
        """Exit status of ./run_all.sh, its standard output and its errors; `more` are environment variables."""
        words = ["./run_all.sh", *options, *(word for model in models for word in ("--model", model))]
        environment = self.environment | more
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Notebooks 01 and 03 on all four, from one command."""
    copy = Copy(tmp_path_factory.mktemp("study"))
    status, copy.said, errors = copy.run("--quick", "--only", "01", "--only", "03", "--cores", "1")
    assert (status, errors) == (0, ""), f"{copy.said}\n{errors}"
    return copy


@pytest.mark.parametrize("model", MODELS)
def test_the_records_are_those_of_any_other_model(copy, model):
    build = copy.folder / "build" / "quick"
    first, made = records.read(records.paths(build, model, NOTEBOOKS[0])[0])
    metrics, _ = records.read(records.paths(build, model, NOTEBOOKS[0])[1])
    sign, about = records.read(records.paths(build, model, NOTEBOOKS[1])[0])
    assert records.violations(first) == records.violations(sign) == []
    assert {frame["model"].iloc[0] for frame in (first, sign)} == {model}
    facts = about["facts"]
    assert (facts["layers"], facts["width"]) == (LAYERS, WIDTH) and facts["dtype"] in ("bfloat16", "float32")
    assert set(first["weights_sha256"]) == set(sign["weights_sha256"]) == {facts["weights_sha256"]}
    assert about["quick"] and made["thresholds"] == about["thresholds"]
    assert sign.groupby(["prompt_set", "condition"]).size().tolist() == [12] * 9
    # alpha is in mean differences, at the layer that the rule selected
    kept = build / "directions" / f"{model}.safetensors"
    expect = {"model": model, "weights_sha256": facts["weights_sha256"], "template_sha256": facts["template_sha256"]}
    found, layer = directions.load(kept, expect=expect, shape=(LAYERS, WIDTH))
    plus = sign[sign["condition"] == "extracted +1"].iloc[0]
    assert plus["layers"] == str(layer) == str(summaries.selected_layer(metrics, LAYERS))
    assert plus["alpha_absolute"] == pytest.approx(float(found.raw_norm[layer]), rel=1e-5)
    # steering these weights says other things: what is recorded is no baseline thrice
    texts = sign.pivot(index="prompt_id", columns="condition", values="text_sha256")
    assert (texts["extracted +1"] != texts["extracted -1"]).mean() > 0.5
    assert "refusal" in set(first["label"]) and first["label"].nunique() > 1


@pytest.mark.parametrize("model", MODELS)
def test_the_notebooks_ran_to_their_end_and_drew(copy, model):
    build = copy.folder / "build" / "quick"
    for name in NOTEBOOKS:
        cells = nbformat.read(build / "notebooks" / model / f"{name}.ipynb", as_version=4).cells
        assert all(cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source.strip())
        for figure in (figure for figure, notebook in summaries.FIGURES.items() if notebook == name):
            for ending in ("pdf", "png", "csv"):
                assert (build / "figures" / model / f"{figure}.{ending}").stat().st_size > 100
    assert f"results, {model}:" in copy.said


def test_different_weights_are_not_taken_for_each_other(copy):
    build = copy.folder / "build" / "quick"
    found = [records.read(records.paths(build, model, NOTEBOOKS[1])[0])[1]["facts"] for model in MODELS]
    for name in ("weights_sha256", "template_sha256"):
        assert len({facts[name] for facts in found}) == len(MODELS)


def test_the_token_is_in_no_file_and_in_nothing_that_is_printed(copy):
    assert copy.token not in copy.said
    hidden = [*copy.folder.rglob("*"), *copy.folder.parent.glob("unused/**/*")]
    files = [path for path in hidden if path.is_file()]
    assert len(files) > 100 and any(path.name == "weights.log" for path in files)
    assert [path for path in files if copy.token.encode() in path.read_bytes()] == []


def test_the_same_command_again_does_nothing_and_a_dry_run_says_what_they_take(copy):
    status, said, _ = copy.run("--quick", "--only", "01", "--only", "03", "--cores", "1")
    assert status == 0 and "nothing to do" in said
    status, said, errors = copy.run("--only", "03", "--dry-run", HF_TOKEN="")
    assert (status, errors) == (0, "")
    for model in MODELS:
        assert f"would do  03_sign_inversion on {model}" in said
        gated = "; gated, and HF_TOKEN is not set" if model in ("tiny-llama", "tiny-gemma2") else ""
        assert f"{model}: 0.00 billion parameters, 0.0 GB to get{gated}\n" in said
    assert said.count("stated, not measured") == len(MODELS) and copy.token not in said


def test_a_gated_model_without_a_token_ends_in_a_sentence(copy):
    status, _, errors = copy.run("--only", "01", "--cores", "1", models=["tiny-llama"], HF_TOKEN="")  # into build/
    assert status == 2 and errors.count("\n") == 1 and "is gated: accept its licence" in errors
