"""What every module needs of the file system: the root, atomic writes, hashes, progress and the one error type."""

import contextlib
import errno
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]


class CompendiumError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do."""


def explain(error: Exception, path: Path) -> CompendiumError | None:
    """A sentence on an error of writing to a path; None where it has another cause than the system."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors passes on the system's errors
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return CompendiumError(f"no space is left to write {path}: free some, then run the same command again.")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CompendiumError(f"no permission to write {path}: change its owner or mode, or choose another folder.")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return CompendiumError(f"{path} cannot be written, because a file lies where a folder is needed: move it away.")
    if code == errno.EISDIR:
        return CompendiumError(f"{path} cannot be written, because a folder lies there: move it away.")
    return None


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write to, and renames it to `path` when the block ends well.

    A reader therefore sees the old file or the whole new one, never a part, also after `kill -9`.

    Args:
        path: The file to make; its folder is made where it is missing.

    Raises:
        CompendiumError: No space, or no permission.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except Exception as error:
        explained = explain(error, path)
        if explained is None:
            raise
        raise explained from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def progress(total: int, what: str, unit: str) -> tqdm:
    """A progress bar with rate and remaining time; silent where there is no terminal.

    A notebook's kernel has no terminal of its own, so the runner names one in `REFUSAL_TTY`.

    Args:
        total: How many units there are.
        what: What is being done; stands before the bar.
        unit: What is counted, e.g. "row".
    """
    terminal = os.environ.get("REFUSAL_TTY", "")
    if terminal:
        with contextlib.suppress(OSError):
            stream = open(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), "w")  # noqa: PTH123, SIM115
            return tqdm(total=total, desc=what, unit=unit, file=stream, dynamic_ncols=True, leave=False, disable=False)
    return tqdm(total=total, desc=what, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def cli(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(arguments)`; bad input ends in one sentence on stderr and exit status 2."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except CompendiumError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read what we print has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
