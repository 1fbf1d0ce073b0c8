"""Atomic writes under kill, exceptions and full disks; bad input in one sentence; hashes; progress shown or silent."""

import errno
import fcntl
import hashlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from refusal import files
from refusal.files import CompendiumError, atomic, progress, sha256_file, sha256_text


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- atomic


def test_atomic_makes_the_folder_and_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "result.csv"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # a rename from another file system would not be atomic
        assert temporary.suffix == ".csv"  # some writers choose the format by it
        assert not path.exists()
    assert path.read_text() == "new"
    assert left_in(path.parent) == ["result.csv"]
    assert path.stat().st_mode & 0o777 == 0o644  # not the 0600 of mkstemp: others may read results


def test_atomic_takes_a_string_and_replaces_the_old_file_at_the_end_only(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    with atomic(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EIO, "io")])
def test_an_exception_keeps_the_old_file_and_leaves_no_temporary(tmp_path, error):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(type(error)), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["result"]


def test_a_reader_sees_an_old_or_a_new_file_only(tmp_path):
    path, size, stop, seen = tmp_path / "result", 300_000, threading.Event(), []
    path.write_bytes(b"0" * size)

    def look():
        while not stop.is_set():
            data = path.read_bytes()
            seen.append(len(data) == size and len(set(data)) == 1)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(1, 30):
        with atomic(path) as temporary, temporary.open("wb") as stream:
            for _ in range(3):
                stream.write(str(number % 10).encode() * (size // 3))
                stream.flush()
    stop.set()
    reader.join()
    assert len(seen) > 10
    assert all(seen)


WRITER = """
import sys
from refusal.files import atomic
for number in range(10**9):
    with atomic(sys.argv[1]) as temporary, temporary.open("wb") as stream:
        for _ in range(20):
            stream.write(str(number % 10).encode() * 20_000)
            stream.flush()
    if number == 1:
        print("ready", flush=True)
"""


def test_kill_9_leaves_a_whole_file(tmp_path):
    path = tmp_path / "result"
    path.write_bytes(b"9" * 400_000)
    for delay in (0.0, 0.003, 0.013, 0.029, 0.041):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        data = path.read_bytes()
        assert (len(data), len(set(data))) == (400_000, 1)


# ---- bad places


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "no space is left to write {}: free some, then run the same command again."),
        (errno.EDQUOT, "no space is left to write {}: free some, then run the same command again."),
        (errno.EACCES, "no permission to write {}: change its owner or mode, or choose another folder."),
        (errno.EROFS, "no permission to write {}: change its owner or mode, or choose another folder."),
    ],
)
@pytest.mark.parametrize("moment", ["mkstemp", "write", "fsync", "replace"])
def test_no_space_and_no_permission_end_in_one_sentence_at_every_moment(tmp_path, monkeypatch, code, sentence, moment):
    path = tmp_path / "result"
    path.write_text("old")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    if moment in ("mkstemp", "fsync"):
        monkeypatch.setattr(tempfile if moment == "mkstemp" else os, moment, fail)
    if moment == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(CompendiumError) as caught, atomic(path) as temporary:
        temporary.write_text("half")
        if moment == "write":
            fail()
    assert str(caught.value) == sentence.format(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["result"]


def test_a_full_disk_under_safetensors_is_explained_too(tmp_path):
    # Its error is no OSError; this is what it says on a full file system.
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(CompendiumError, match="no space is left"), atomic(tmp_path / "x.safetensors"):
        raise SafetensorError(said)
    with pytest.raises(SafetensorError, match="header"), atomic(tmp_path / "x.safetensors"):
        raise SafetensorError("Error while deserializing header")
    assert left_in(tmp_path) == []


def test_safetensors_replaces_the_temporary_file_and_atomic_bears_it(tmp_path):
    with atomic(tmp_path / "x.safetensors") as temporary:
        save_file({"a": torch.arange(3)}, temporary)
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
    assert left_in(tmp_path) == ["x.safetensors"]


def test_no_permission_for_real():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        root = os.geteuid() == 0  # root may write everywhere, so it becomes nobody for a moment
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(CompendiumError, match="no permission to write") as caught, atomic(folder / "s" / "x"):
                raise AssertionError("the block must not run")
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deeper", ["", "sub"])
def test_a_file_where_a_folder_is_needed(tmp_path, deeper):
    (tmp_path / "build").write_text("a file")
    path = tmp_path / "build" / deeper / "result"
    with pytest.raises(CompendiumError, match="a file lies where a folder is needed"), atomic(path):
        raise AssertionError("the block must not run")
    assert (tmp_path / "build").read_text() == "a file"


def test_a_folder_where_a_file_is_needed(tmp_path):
    (tmp_path / "result").mkdir()
    with pytest.raises(CompendiumError, match="a folder lies there"), atomic(tmp_path / "result") as temporary:
        temporary.write_text("new")
    assert left_in(tmp_path) == ["result"]


def test_other_errors_of_the_system_are_not_disguised(tmp_path):
    with pytest.raises(OSError, match="no such device"), atomic(tmp_path / "result"):
        raise OSError(errno.ENXIO, "no such device")


# ---- cli


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (0, 0, ""),
        (3, 3, ""),
        (CompendiumError("alpha is 'x', but must be a number."), 2, "error: alpha is 'x', but must be a number.\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here.\n"),
    ],
)
def test_cli(monkeypatch, capsys, outcome, status, said):
    monkeypatch.setattr(sys, "argv", ["program", "--one", "two"])

    def main(argv):
        assert argv == ["--one", "two"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ended:
        files.cli(main)
    assert ended.value.code == status
    assert capsys.readouterr() == ("", said)


def test_a_reader_that_has_gone_is_no_fault_of_ours():
    command = f"{sys.executable} -c \"from refusal.files import cli; cli(lambda _: print('x' * 10**6))\" | head -c 1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")


def test_cli_does_not_hide_our_own_faults():
    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files.cli(main)


# ---- hashes


@pytest.mark.parametrize("text", ["", "plain", "I can’t — 不能", "line\nbreak\r\n", "a lone surrogate \udc80"])
def test_hashes(tmp_path, text):
    data = text.encode("utf-8", "surrogatepass")
    (tmp_path / "text").write_bytes(data)
    assert sha256_text(text) == sha256_file(tmp_path / "text") == hashlib.sha256(data).hexdigest()


# ---- progress


def test_progress_is_silent_without_a_terminal(monkeypatch, capfd):
    monkeypatch.delenv("REFUSAL_TTY", raising=False)
    with progress(5, "work", "row") as bar:
        for _ in range(5):
            bar.set_postfix_str("7 tokens/s")
            bar.update()
    assert capfd.readouterr() == ("", "")
    assert bar.disable


def on_terminal(work, monkeypatch):
    """What a terminal of 120 columns shows while `work` runs."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    monkeypatch.setenv("REFUSAL_TTY", os.ttyname(terminal))
    shown = bytearray()

    def watch():
        while b"END" not in shown:
            shown.extend(os.read(controller, 4096))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work()
    os.write(terminal, b"END")
    watcher.join(timeout=10)
    os.close(controller)
    os.close(terminal)
    return shown.decode()


def test_progress_shows_rate_and_remaining_time_on_the_named_terminal(monkeypatch, capfd):
    def work():
        with progress(40, "03_sign_inversion", "row") as bar:
            for _ in range(4):
                time.sleep(0.12)
                bar.update(5)

    shown = on_terminal(work, monkeypatch)
    assert "03_sign_inversion" in shown
    assert re.search(r"\b(15|20)/40 \[", shown)
    assert re.search(r"\[00:0\d<00:0\d, +[\d.]+row/s", shown)  # elapsed < remaining, rate
    assert capfd.readouterr() == ("", "")


def test_a_terminal_that_went_away_does_not_stop_the_work(monkeypatch, capfd):
    monkeypatch.setenv("REFUSAL_TTY", "/dev/no-such-terminal")
    with progress(2, "work", "row") as bar:
        bar.update(2)
    assert capfd.readouterr() == ("", "")
