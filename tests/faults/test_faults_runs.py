"""Faults in whole runs: ./run_all.sh, the job graph, the strict runner and its kernels, on a planted model.

After each fault there is one sentence, or the same command goes on; never another row than those of a run in peace.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import family
import psutil
import pytest
import stage as stages
from stage import MODEL, NOTEBOOKS, TOKEN, flip, same, sentence

from refusal import chunks, records
from refusal.options import LEVEL

pytestmark = pytest.mark.slow
SPACES = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
DARK = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")


def works(*words):
    """Whether this machine lets a process have name spaces of its own."""
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(
    not works(*SPACES, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"), reason="no mounts of one's own here"
)
needs_dark = pytest.mark.skipif(not works(*DARK, "true"), reason="no network of one's own here")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return stages.make(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def peace(stage):
    """The rows of a run in peace, and how long it took."""
    began = time.monotonic()
    status, said, error = stage.run()
    assert (status, error) == (0, ""), error
    assert f"01_extraction {MODEL}" in said and TOKEN not in said
    rows = stage.rows()
    assert set(rows) == {f"{name}{kind}.parquet" for name in NOTEBOOKS for kind in ("", ".metrics")}
    labels = rows["03_sign_inversion.parquet"]["label"].value_counts()
    assert labels["refusal"] > 10 < labels["compliance"], labels  # else equal rows would say little
    stage.keep()
    return rows, time.monotonic() - began


@pytest.fixture
def whole(stage, peace):
    """The stage as the run in peace left it."""
    stage.restore()
    return stage


def goes_on(stage, rows):
    """The same command ends well, with the rows of a run in peace."""
    status, _, error = stage.run()
    assert (status, error) == (0, ""), error
    same(stage.rows(), rows)


def wait_for(found, process, seconds=120):
    """Waits until `found()` gives something, while the process runs."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert process.poll() is None and time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result


def kernels(process):
    """The kernels of a run that have begun to work: they have their libraries, and so some memory."""
    found = []
    for member in family.of(process.pid):
        try:
            if "ipykernel_launcher" in " ".join(member.cmdline()) and member.memory_info().rss > 200e6:
                found.append(member)
        except psutil.NoSuchProcess:
            pass
    return found


# ---- in the shortened selection too


def test_a_run_in_peace_is_quiet_about_tokens_and_asks_the_network_nothing(stage, peace):
    """In a folder with blanks and foreign letters, under a locale and a clock from elsewhere."""
    assert stage.leaks() == []
    assert not stage.connections.exists(), stage.connections.read_text()
    for notebook in NOTEBOOKS:
        about = records.read(stage.out / "records" / MODEL / f"{notebook}.parquet")[1]
        assert about["quick"] and str(stage.folder) not in str(about)


RNG = random.Random(20)


@pytest.mark.parametrize(
    "moments",
    [[0.75], pytest.param([RNG.uniform(0.02, 0.95) for _ in range(20)], marks=pytest.mark.long)],
    ids=["once, in 03", "20 times"],
)
def test_killed_at_random_moments_the_same_command_ends_with_the_same_rows(stage, peace, moments):
    """Moments are parts of the time that a run in peace takes."""
    rows, seconds = peace
    left, rng, from_nothing = list(moments), random.Random(0), True
    stage.clear()
    while left:
        process = stage.start()
        try:
            process.wait(left[-1] * seconds)
        except subprocess.TimeoutExpired:
            members = family.of(process.pid)
            rng.choice([process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)])()  # noqa: B023
            left.pop()
            from_nothing = False
            process.communicate()
            assert family.survivors(members, seconds=20) == []
            there = stage.rows()  # each record that is there is whole
            same(there, {name: rows[name] for name in there})
        else:
            assert process.returncode == 0, process.communicate()[1]
            same(stage.rows(), rows)
            if from_nothing:  # the machine was busier before: else this moment might never come
                seconds *= 0.8
            stage.clear()  # begin again, so that there is something to kill
            from_nothing = True
    goes_on(stage, rows)
    assert stage.leaks() == []


@needs_mounts
@pytest.mark.parametrize("place", ["build", "build/quick"])
def test_a_read_only_folder_is_one_sentence(stage, peace, place):
    stage.clear()
    (stage.folder / place).mkdir(parents=True)
    script = f'mount -t tmpfs -o ro none "{place}" && shift && exec "$@"'
    status, _, error = stage.run(before=(*SPACES, "sh", "-c", script, "sh", "--"))
    assert status == 2 and "no permission to write" in sentence(error)


# ---- the whole suite


@pytest.mark.long
def test_the_same_command_twice_gives_the_same_rows(stage, peace):
    status, _, error = stage.run("--fresh")
    assert (status, error) == (0, ""), error
    same(stage.rows(), peace[0])
    status, said, _ = stage.run()
    assert status == 0 and "nothing to do" in said


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_kernel_that_dies_is_one_sentence(stage, peace, seed):
    stage.clear()
    process = stage.start()
    (kernel, *_) = wait_for(lambda: kernels(process), process)
    time.sleep(random.Random(seed).uniform(0, 5))
    kernel.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "kernel" in sentence(error)
    goes_on(stage, peace[0])


@pytest.mark.long
@pytest.mark.parametrize("step", ["snakemake", "refusal.notebooks"])
def test_a_step_that_is_killed_is_one_sentence(stage, peace, step):
    stage.clear()
    process = stage.start()
    wait_for(lambda: kernels(process), process)
    next(member for member in family.of(process.pid) if f"-m {step}" in " ".join(member.cmdline())).kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and sentence(error)
    goes_on(stage, peace[0])


@needs_mounts
@pytest.mark.long
@pytest.mark.parametrize("size", ["16k", "48k", "128k", "256k"])
def test_a_full_disk_is_one_sentence_and_with_more_space_the_run_goes_on(stage, peace, tmp_path, size):
    stage.clear()
    (stage.folder / "build").mkdir()
    script = f"""
        mount -t tmpfs -o size={size} none build && shift
        "$@" 2>"{tmp_path}/error" >/dev/null; echo $? >"{tmp_path}/status"
        mount -o remount,size=500m build
        "$@" && cp -r build/quick "{tmp_path}/quick"
    """
    status, _, error = stage.run(before=(*SPACES, "sh", "-c", script, "sh", "--"))
    first = (tmp_path / "error").read_text()
    assert (tmp_path / "status").read_text().strip() == "2", first
    assert "no space is left" in sentence(first)
    assert status == 0, error
    same(stage.rows(tmp_path / "quick"), peace[0])
    stage.clear()


@needs_mounts
@pytest.mark.long
def test_a_repository_that_cannot_be_written_but_for_build(stage, peace):
    """Snakemake keeps its notes beside the job graph, so that it has to say what it lacks."""
    stage.clear()
    (stage.folder / "build").mkdir()
    script = (
        'mount --bind . . && mount -o remount,ro,bind . && cd "$PWD" && mount -t tmpfs none build && shift && exec "$@"'
    )
    status, _, error = stage.run(before=(*SPACES, "sh", "-c", script, "sh", "--"))
    assert status == 2 and sentence(error)
    stage.clear()


@pytest.mark.long
def test_two_runs_at_once_the_second_is_refused_and_the_first_is_whole(stage, peace):
    stage.clear()
    first = stage.start()
    wait_for(lambda: (stage.folder / "build" / ".lock").exists() and len(family.of(first.pid)) > 1, first)
    status, _, error = stage.run()
    assert status == 2 and "another run is under way" in sentence(error)
    _, error = first.communicate(timeout=300)
    assert (first.returncode, error) == (0, "")
    same(stage.rows(), peace[0])


@pytest.mark.long
def test_two_workers_at_once_on_one_folder_write_the_same_record(stage, peace, tmp_path):
    """Without the lock, as on two nodes of a cluster that share a disk."""
    stage.clear()
    parameters = "{mode: measure, out: build/quick, model: planted, n_prompts: 12}"
    both = [stage.notebook(NOTEBOOKS[0], parameters, tmp_path / f"{i}.ipynb") for i in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = {name: frame for name, frame in peace[0].items() if name.startswith(NOTEBOOKS[0])}
    same(stage.rows(), rows)


@pytest.mark.long
@pytest.mark.parametrize("what", ["lib/refusal/figures.py", "build/quick/models/planted.json"])
def test_a_clock_that_jumps_back_while_a_step_runs(stage, peace, what):
    """What was there before the jump is then from the future."""
    stage.clear()
    process = stage.start()
    wait_for(lambda: kernels(process), process)
    ahead = time.time() + 86400
    os.utime(stage.folder / what, (ahead, ahead))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0 or "clock" in sentence(error)
    goes_on(stage, peace[0])
    status, said, error = stage.run()
    assert (status, error) == (0, "") and "nothing to do" in said
    same(stage.rows(), peace[0])


@pytest.mark.long
@pytest.mark.parametrize("hours", [-24 * 365 * 30, 24 * 365])
def test_files_from_another_time(stage, peace, hours):
    """A clone made under a clock that was far off, and then was set."""
    stage.clear()
    then = time.time() + 3600 * hours
    for path in [
        *stage.folder.glob("lib/**/*.py"),
        *stage.folder.glob("data/**/*.*"),
        *stage.folder.glob("notebooks/*"),
    ]:
        os.utime(path, (then, then))
    goes_on(stage, peace[0])
    status, said, _ = stage.run()
    assert status == 0 and "nothing to do" in said


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_byte_flipped_in_stamps_and_notes(whole, peace, seed):
    """The stamps of steps, the configuration, what Snakemake keeps: the same rows, or one sentence and then they."""
    stage = whole
    rng = random.Random(seed)
    paths = [stage.out / "models" / f"{MODEL}.json", stage.out / "run.yaml", stage.folder / "build" / ".lock"]
    paths += [path for path in (stage.folder / ".snakemake").rglob("*") if path.is_file()]
    paths += list((stage.folder / "build" / "chunks").rglob("*.json"))
    for path in paths:
        flip(path, rng)
    status, _, error = stage.run()
    if status:
        assert sentence(error)
        shutil.rmtree(stage.folder / ".snakemake")  # what the sentence names
    goes_on(stage, peace[0])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_byte_flipped_in_the_chunks_and_a_new_run_has_the_same_rows(whole, peace, seed):
    rng = random.Random(seed)
    for path in (whole.folder / "build" / "chunks").rglob("*.*"):
        flip(path, rng)
    for name in ("build/quick", ".snakemake"):
        shutil.rmtree(whole.folder / name)
    goes_on(whole, peace[0])


@pytest.mark.long
@pytest.mark.parametrize("name", ["records/planted/01_extraction.parquet", "directions/planted.safetensors"])
def test_a_byte_flipped_in_what_03_reads_is_one_sentence(whole, name, tmp_path):
    flip(whole.out / name, random.Random(1))
    parameters = "{mode: measure, out: build/quick, model: planted, n_prompts: 12}"
    process = whole.notebook(NOTEBOOKS[1], parameters, tmp_path / "x.ipynb")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2 and Path(name).name in sentence(error)


@pytest.mark.long
def test_a_byte_flipped_in_the_weights_is_one_sentence(stage, peace):
    stage.clear()
    for kind in ("model.safetensors", "tokenizer.json", "config.json"):
        (path,) = (stage.hub / "hub").rglob(f"snapshots/*/{kind}")
        blob = path.resolve()
        kept = blob.read_bytes()
        flip(blob, random.Random(2))
        status, _, error = stage.run()
        assert status == 2 and blob.name in sentence(error)
        blob.write_bytes(kept)  # which a machine with a network gets from the hub
    goes_on(stage, peace[0])


@pytest.mark.long
def test_under_half_of_the_memory_that_it_wants_fewer_rows_are_taken_and_labels_stay(stage, peace, tmp_path):
    stage.clear()
    (snapshot,) = (stage.hub / "hub").rglob(f"snapshots/{stages.REVISION}")
    row = chunks.row_bytes(snapshot, "bfloat16", 48)
    limit = int(chunks.ADDRESSES + chunks.FIXED_BYTES + 2 * 20 * row)
    before = ("prlimit", f"--as={limit}")
    status, _, error = stage.run(before=before)
    assert (status, error) == (0, ""), error
    _, about = records.read(stage.out / "records" / MODEL / "03_sign_inversion.parquet")
    assert 1 < about["rows"] < 36
    key = ["condition", "prompt_id"]
    for name in (f"{notebook}.parquet" for notebook in NOTEBOOKS):
        both = stage.rows()[name].merge(peace[0][name], on=key, validate="one_to_one")
        assert len(both) == len(peace[0][name])
        assert (both["label_x"] == both["label_y"]).mean() >= LEVEL / 100
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != limit  # it was the run's alone
    stage.clear()


@pytest.mark.long
@pytest.mark.parametrize("locale", ["C.utf8", "POSIX", "de_DE.iso88591", "tr_TR.utf8"])
def test_a_foreign_locale_changes_nothing(stage, peace, locale):
    if locale not in stages.locales():
        pytest.skip(f"{locale} is not installed here")
    stage.clear()
    status, _, error = stage.run(LC_ALL=locale, LANG=locale, TZ="America/St_Johns")
    assert (status, error) == (0, ""), error
    same(stage.rows(), peace[0])


@needs_dark
@pytest.mark.long
def test_with_the_network_off_a_run_whose_weights_are_there_is_the_same(stage, peace):
    stage.clear()
    status, _, error = stage.run(before=DARK)
    assert (status, error) == (0, ""), error
    same(stage.rows(), peace[0])
