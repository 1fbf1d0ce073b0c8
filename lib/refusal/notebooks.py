"""Strict execution of a notebook with parameters: papermill, without the ways in which it passes silently.

Usage:
    python -m refusal.notebooks list
    python -m refusal.notebooks run 03 --out build/notebooks/03_sign_inversion.ipynb [-p FILE.yaml] [-y YAML]
    python -m refusal.notebooks publish 01 03
"""

import argparse
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from zmq.error import ZMQError

from refusal.files import CompendiumError, atomic, cli
from refusal.options import notebooks as known
from refusal.parameters import check, defaults, find, parse, read
from refusal.registry import registry

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
START_SECONDS = 180  # a kernel starts in two seconds, but a machine may be busy


def _manager(folder: Path, model: object) -> AsyncKernelManager:
    """A kernel of this very environment that knows nothing of the user's IPython or Jupyter settings.

    It talks over sockets in `folder`, so that two runs cannot race for a port; TCP only where the path is too long.
    """
    environment = {
        "HF_HUB_OFFLINE": "1" if _offline(model) else os.environ.get("HF_HUB_OFFLINE", "0"),
        "IPYTHONDIR": str(folder),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "TQDM_DISABLE": "1",  # bars go to the terminal that REFUSAL_TTY names, never into the notebook
    }
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": argv, "env": environment, **KERNELSPEC}))
    manager = AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(spec.parent.parent)])
    )
    manager.connection_file = str(folder / "kernel.json")
    manager.transport = "ipc" if len(manager.connection_file) < 90 else "tcp"  # a socket's path has 107 characters
    return manager


def _offline(model: object) -> bool:
    """Whether the kernel needs no hub, as for every model whose weights come as wheels."""
    entry = registry().get(model) if isinstance(model, str) else None
    return entry is None or entry.source != "hub"


def _run(path: Path, parameters: Mapping[str, object], timeout: int | None) -> NotebookNode:
    """Executes a notebook in memory and returns it complete, or raises a CompendiumError."""
    name, node = path.stem, read(path)
    known_values = defaults(node, name)
    given = check(name, known_values, parameters)
    node.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=NotebookNode(LANGUAGE))
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    at = [0]
    with tempfile.TemporaryDirectory(prefix="refusal-", ignore_cleanup_errors=True) as folder:
        manager = _manager(Path(folder), {**known_values, **given}.get("model"))
        try:
            done = papermill.execute_notebook(
                node,
                None,
                given,
                kernel_name="python3",
                progress_bar=False,
                cwd=path.parent,
                start_timeout=START_SECONDS,
                execution_timeout=timeout,
                km=manager,
                on_cell_start=lambda cell, cell_index: at.__setitem__(0, cell_index + 1),
            )
        except papermill.PapermillExecutionError as error:
            if error.ename == "CompendiumError":
                raise CompendiumError(error.evalue) from None
            cause = f"{error.ename}: {error.evalue}".strip().partition("\n")[0].rstrip(" .:")
            raise CompendiumError(f"cell {at[0]} of {name} failed with {cause}; its traceback is above.") from error
        except CellTimeoutError as error:
            raise CompendiumError(
                f"cell {at[0]} of {name} took longer than {timeout} s: allow it more time."
            ) from error
        except DeadKernelError as error:
            raise CompendiumError(
                f"the kernel died in cell {at[0]} of {name}, most often for want of memory: close other programs, then "
                "run the same command again."
            ) from error
        except (OSError, RuntimeError, ZMQError) as error:
            cause = str(error).strip().partition("\n")[0].rstrip(" .:") or type(error).__name__
            raise CompendiumError(
                f"the kernel of {name} could not be started or reached ({cause}): run the same command again."
            ) from error
        finally:
            if manager.has_kernel:
                run_sync(manager.shutdown_kernel)(now=True)
    _completed(done, name)
    return done


def _completed(node: NotebookNode, name: str) -> None:
    """Refuses a notebook that stopped early without an error, as after `sys.exit(0)`."""
    for number, cell in enumerate(node.cells, 1):
        state = cell.metadata.get("papermill", {})
        ran = state.get("status") == "completed" and not state.get("exception") and cell.get("execution_count")
        if cell.cell_type == "code" and cell.source.strip() and not ran:
            raise CompendiumError(
                f"cell {number} of {name} did not complete (status {state.get('status')}), although no error was "
                "raised: a notebook must run to its end, without sys.exit or skipped cells."
            )


def _tidy(node: NotebookNode) -> str:
    """The notebook as text, without what changes from run to run: timings, versions, paths, chunks of one stream."""
    node.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=NotebookNode(LANGUAGE))
    for cell in node.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = NotebookNode(tags=tags) if tags else NotebookNode()
        if "injected-parameters" in tags:
            cell.id = "injected-parameters"
        joined: list[NotebookNode] = []
        for output in cell.get("outputs", []):
            if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        if cell.cell_type == "code":
            cell.outputs = joined
    return nbformat.writes(node) + "\n"


def execute(
    notebook: str | Path, output: str | Path, parameters: Mapping[str, object] | None = None, timeout: int | None = None
) -> Path:
    """Executes a notebook with parameters; the output file appears only when every code cell has completed.

    Args:
        notebook: Its number, name or path.
        output: Where the executed notebook goes.
        parameters: Values for some of its parameters; the others keep their defaults.
        timeout: Seconds that one cell may take; None is no limit.

    Returns:
        The path of the output.

    Raises:
        CompendiumError: Bad parameters, a failing cell (its own CompendiumError is passed on word for word), a kernel
            that died or could not be started, no space or permission; nothing is written then.
    """
    path, output = find(notebook), Path(output).resolve()
    with atomic(output) as temporary:  # before the run, so that a folder that cannot be written is found at once
        temporary.write_text(_tidy(_run(path, parameters or {}, timeout)), encoding="utf-8")
    return output


def publish(notebook: str | Path, parameters: Mapping[str, object] | None = None, timeout: int | None = None) -> Path:
    """Executes a notebook with its defaults, which is replay mode on the default model, and writes it back in place.

    Args:
        notebook: Its number, name or path.
        parameters: None, for the defaults; a test may give others.
        timeout: Seconds that one cell may take; None is no limit.

    Raises:
        CompendiumError: As `execute`; the notebook is left as it was then.
    """
    path = find(notebook)
    text = _tidy(_run(path, parameters or {}, timeout))
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _end_with_parent() -> None:
    """Ends this process, and with it its kernel, when the one that started it is gone (`kill -9` of a whole run)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # unwinds the main thread, which ends the kernel
        time.sleep(5)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m refusal.notebooks", description=(__doc__ or "").split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the notebooks and their parameters")
    run = actions.add_parser("run", help="execute a notebook with parameters")
    run.add_argument("notebook")
    run.add_argument("--out", required=True, type=Path, help="where the executed notebook goes")
    run.add_argument("-p", "--parameters", type=Path, help="a YAML file of parameters")
    run.add_argument("-y", "--yaml", default="", help="parameters as YAML text; they override the file's")
    run.add_argument("--timeout", type=int, help="seconds that one cell may take (default: no limit)")
    publishing = actions.add_parser("publish", help="execute notebooks with their defaults, in place")
    publishing.add_argument("notebooks", nargs="+")
    options = parser.parse_args(arguments)

    if options.action == "list":
        for name in known():
            values = defaults(read(find(name)), name)
            print(name, *(f"{key}={value!r}" for key, value in values.items()))
        return 0
    _end_with_parent()
    try:
        if options.action == "publish":
            for notebook in options.notebooks:
                print(f"wrote {publish(notebook)}")
            return 0
        given = parse(options.yaml, "-y")
        if options.parameters:
            try:
                given = parse(options.parameters.read_text(encoding="utf-8"), str(options.parameters)) | given
            except (OSError, UnicodeDecodeError) as error:
                raise CompendiumError(f"{options.parameters} cannot be read: give a YAML file.") from error
        print(f"wrote {execute(options.notebook, options.out, given, options.timeout)}")
    except CompendiumError as error:
        if isinstance(error.__cause__, papermill.PapermillExecutionError):
            print(re.sub(r"\x1b\[[0-9;]*m", "", str(error.__cause__)), file=sys.stderr)
        raise
    return 0


if __name__ == "__main__":
    cli(main)
