"""The pipeline on the real default model, at small n: real weights, real papermill, killed and resumed."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot

from refusal import chunks, models, records, runs, summaries
from refusal.files import ROOT

pytestmark = pytest.mark.slow
MODEL = summaries.DEFAULT_MODEL
# Lengths and batches that no other run has, so that no chunk is there before.
SMALL = "n_prompts: 8, samples: 1, max_new_tokens: 14, rows: 16, draws: 3"
SIGN = "n_prompts: 8, max_new_tokens: 14, rows: 12"
FOLDER = chunks.Store(MODEL).folder
CHUNKS: list[Path] = []  # those of notebook 03's uninterrupted run


def execute(notebook: str, out: Path, parameters: str, first: Callable[[], None] | None = None) -> subprocess.Popen:
    words = [sys.executable, "-m", "refusal.notebooks", "run", notebook, "--out", str(out / f"{notebook}.ipynb")]
    words += ["-y", f"{{mode: measure, out: {out}, {parameters}}}"]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, preexec_fn=first
    )


def finished(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Notebooks 01 and 03 on a few prompts of each set."""
    out = tmp_path_factory.mktemp("pipeline")
    finished(execute("01", out, SMALL))
    before = set(FOLDER.glob("*.parquet"))
    finished(execute("03", out, SIGN))
    CHUNKS.extend(set(FOLDER.glob("*.parquet")) - before)
    yield out
    for path in CHUNKS:  # so that the next run of this test measures again
        path.unlink(missing_ok=True)


def test_small_run_writes_everything(small_run: Path) -> None:
    frame, about = records.read(records.paths(small_run, MODEL, "03_sign_inversion")[0])
    assert about["quick"] and not about["user"] and about["facts"]["layers"] == 24
    assert frame.groupby(["prompt_set", "condition"]).size().tolist() == [8] * 9
    assert records.violations(frame) == []
    for name in [figure for figure, maker in summaries.FIGURES.items() if maker[:2] in ("01", "03")]:
        for ending in ("pdf", "png", "csv"):
            assert (small_run / "figures" / MODEL / f"{name}.{ending}").stat().st_size > 100


def test_the_real_model_refuses_more_at_plus_one(small_run: Path) -> None:
    """Not a rate, a direction: summed over the sets, no refusals are lost at +1 or gained at -1."""
    frame, _ = records.read(records.paths(small_run, MODEL, "03_sign_inversion")[0])
    refused = frame.assign(refused=frame["label"] == "refusal").groupby("condition")["refused"].sum()
    assert refused["extracted +1"] > refused["extracted -1"]
    assert refused["extracted +1"] >= refused["baseline"] >= refused["extracted -1"]


def test_alpha_is_in_mean_differences(small_run: Path) -> None:
    frame, _ = records.read(records.paths(small_run, MODEL, "03_sign_inversion")[0])
    metrics, about = records.read(records.paths(small_run, MODEL, "01_extraction")[1])
    layer = summaries.selected_layer(metrics, about["facts"]["layers"])
    norms = metrics[(metrics["metric"] == "raw_norm") & (metrics["direction_id"] == "extracted")].set_index("layer")[
        "value"
    ]
    plus = frame[frame["condition"] == "extracted +1"].iloc[0]
    assert plus["layers"] == str(layer)
    assert plus["alpha_absolute"] == pytest.approx(norms[layer], rel=1e-5)


def test_killed_and_resumed_equals_uninterrupted(small_run: Path, tmp_path: Path) -> None:
    """`kill -9` of the runner while the real model measures, then the same command: the record is the same."""
    (tmp_path / "records" / MODEL).mkdir(parents=True)
    for path in (small_run / "records" / MODEL).glob("01_extraction*"):
        (tmp_path / "records" / MODEL / path.name).symlink_to(path)
    (tmp_path / "directions").symlink_to(small_run / "directions")
    assert len(CHUNKS) == 6, "an earlier test run left chunks behind: delete build/chunks"
    for path in CHUNKS:
        path.unlink()
    process = execute("03", tmp_path, SIGN)
    deadline = time.monotonic() + 300
    while not any(path.exists() for path in CHUNKS) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(random.Random(0).uniform(0, 3))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)  # the kernel ends itself when its parent has gone; a chunk that it still writes is written whole
    assert 0 < sum(path.exists() for path in CHUNKS) < len(CHUNKS), "killed before the first or after the last chunk"
    finished(execute("03", tmp_path, SIGN))
    resumed, whole = (
        records.read(records.paths(out, MODEL, "03_sign_inversion")[0])[0] for out in (tmp_path, small_run)
    )
    pd.testing.assert_frame_equal(resumed, whole)


def test_under_a_memory_limit_the_work_is_split_and_ends(small_run: Path, tmp_path: Path) -> None:
    """960 rows at once are asked for, and the process may have addresses for twenty of them: fewer are taken."""
    (tmp_path / "directions").symlink_to(small_run / "directions")
    (tmp_path / "records").mkdir()
    shutil.copytree(small_run / "records", tmp_path / "records", dirs_exist_ok=True)
    folder, before = models.fetch(MODEL), set(FOLDER.glob("*.parquet"))
    rows = 2 * 20 * chunks.row_bytes(folder, "bfloat16", 9)
    weights = 1.5 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = int(chunks.ADDRESSES + chunks.FIXED_BYTES + weights + rows)
    words = "n_prompts: 4, max_new_tokens: 9, rows: 960"
    finished(execute("03", tmp_path, words, lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))))
    frame, about = records.read(records.paths(tmp_path, MODEL, "03_sign_inversion")[0])
    assert 1 < about["rows"] < len(frame) == 36
    for path in set(FOLDER.glob("*.parquet")) - before:  # so that the next run of this test measures again
        path.unlink()


@pytest.mark.parametrize("notebook", sorted(set(summaries.FIGURES.values())))
def test_replay_draws_what_is_committed(notebook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, in this process and without a kernel, from the committed records, with no model in the cache."""
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "no models here"))
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    names: dict[str, object] = {}
    for cell in [cell for cell in cells if cell.cell_type == "code"]:
        exec(cell.source.replace("%matplotlib inline", ""), names)
        if "parameters" in cell.metadata.get("tags", []):
            assert names["mode"] == "replay"
            names["out"] = str(tmp_path)
    pyplot.close("all")
    figures = [figure for figure, maker in summaries.FIGURES.items() if maker == notebook]
    for name in figures:
        drawn, kept = (
            pd.read_csv(folder / MODEL / f"{name}.csv") for folder in (tmp_path / "figures", ROOT / "figures")
        )
        pd.testing.assert_frame_equal(drawn, kept)
    assert figures and not (tmp_path / "no models here").exists()


def test_runs_refuse_what_they_cannot_replay(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="was made with alpha"):
        runs.start(
            "03_sign_inversion", model=MODEL, mode="replay", out=str(tmp_path), n_prompts=0, prompts_file="", alpha=2.0,
            layer=-1, max_new_tokens=48, rows=96,
        )  # fmt: skip
