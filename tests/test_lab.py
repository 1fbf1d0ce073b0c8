"""JupyterLab: `./run_all.sh lab` opens the notebooks, and each runs from the menu, in replay mode, to its last cell."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import browser
import nbformat
import pytest

from refusal import lab, site_pages
from refusal.files import ROOT
from refusal.options import DEFAULT_MODEL, notebooks

INDICATOR = ".jp-Notebook-ExecutionIndicator[data-status='{}']"
TOKEN = "for-a-test-on-this-machine"
MEASURED = [n for n in notebooks() if (ROOT / "data" / "records" / DEFAULT_MODEL / f"{n}.parquet").exists()]


def test_the_users_options_come_last_and_root_is_allowed_where_root_asks():
    plain = lab.command(["--port", "1"], root=False)
    assert plain[-2:] == ["--port", "1"] and "--allow-root" not in plain
    assert "--allow-root" in lab.command([], root=True)
    assert plain[0] == sys.executable and f"--ServerApp.root_dir={ROOT}" in plain


def test_the_kernel_is_this_environments():
    made = lab.environment({"PATH": "x"})
    assert made["PATH"] == "x" and made["JUPYTER_PREFER_ENV_PATH"] == "1" and made["REFUSAL_LAB"] == "1"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """JupyterLab on a copy of the compendium."""
    folder = tmp_path_factory.mktemp("lab")
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "__pycache__", "*.egg-info", ".ipynb_checkpoints", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    homes = {
        name: str(folder / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    environment = os.environ | homes | {"PYTHONPATH": str(copy / "lib"), "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        "-m",
        "refusal.lab",
        "--no-browser",
        "--ServerApp.port=0",
        f"--IdentityProvider.token={TOKEN}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=copy, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield found[0], copy
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as started:
        yield started


def opened(page, address):
    """Opens a notebook, waits for its kernel, and makes it the one that menus speak of."""
    page.goto(address)
    page.locator(INDICATOR.format("idle")).wait_for(timeout=90_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()


def declined(page):
    """Closes the dialogs that are open, with No where there is one, and returns what they said."""
    said = []
    while (dialog := page.locator("dialog.jp-Dialog")).count():
        said.append(dialog.last.inner_text())
        no = dialog.last.locator("button.jp-mod-reject")
        (no if no.count() else dialog.last.locator("button.jp-mod-accept")).first.click(timeout=5000)
        page.wait_for_timeout(100)
    return said


def menu(page, name, entry):
    """Chooses an entry of a menu; one that is not to be had yet is looked for again.

    On a busy machine a click may fall on a neighbouring entry, such as "Restart Kernel and Run All Cells", which asks
    first, a moment later: such a question bars every other click, so that none is waited for long, and is declined.
    """
    said = []
    for _ in range(40):
        with browser.patient():
            said += declined(page)
            page.get_by_role("menuitem", name=name, exact=True).click(timeout=3000)
            item = page.get_by_role("menuitem", name=entry, exact=True).first
            if item.get_attribute("aria-disabled", timeout=3000) != "true":
                item.click(timeout=3000)
                return
        page.keyboard.press("Escape")
        page.wait_for_timeout(250)
    raise AssertionError(f"{entry} in the menu {name} is not to be had; the dialogs before: {said}")


def saved(page, path):
    """The notebook as it is now, written to disk from the menu."""
    before = path.stat().st_mtime_ns
    menu(page, "File", re.compile(r"^Save Notebook(?! As)"))
    for _ in range(60):
        with contextlib.suppress(nbformat.reader.NotJSONError):  # it is being written
            if path.stat().st_mtime_ns != before:
                return nbformat.read(path, as_version=4)
        page.wait_for_timeout(250)
    raise AssertionError(f"{path.name} was not saved")


def code(node):
    return [cell for cell in node.cells if cell.cell_type == "code" and cell.source.strip()]


def errors(node):
    return [output for cell in code(node) for output in cell.outputs if output.output_type == "error"]


def run_all(page, path):
    """Runs all cells from the menu and returns the notebook as saved thereafter.

    Cells asked for before the kernel listens are never run, and a busy page may take one click for two: so the menu is
    asked again where all is still, and what counts is that the last run went through every cell.
    """
    deadline, counts = time.monotonic() + 480, None
    while time.monotonic() < deadline:
        menu(page, "Run", "Run All Cells")
        still, before = 0, None
        while still < 4 and time.monotonic() < deadline:
            page.wait_for_timeout(1500)
            if page.locator(INDICATOR.format("idle")).count():
                node = saved(page, path)
                counts = [cell.execution_count for cell in code(node)]
                if errors(node) or (None not in counts and counts == list(range(counts[0], counts[0] + len(counts)))):
                    return node
                still, before = (still + 1 if counts == before else 0), counts
            else:
                still = 0
    raise AssertionError(f"{path.name} is not run to its last cell: {counts}; dialogs: {declined(page)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_a_notebook_runs_from_the_menu_to_its_last_cell(chromium, address, name):
    origin, copy = address
    path = copy / "notebooks" / f"{name}.ipynb"
    node = nbformat.read(path, as_version=4)
    for cell in code(node):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(node, path)
    page = chromium.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    thrown = []
    page.on("pageerror", lambda error: thrown.append(str(error)))
    opened(page, f"{origin}/lab/tree/notebooks/{name}.ipynb?reset&token={TOKEN}")
    node = run_all(page, path)
    assert errors(node) == []
    kinds = [kind for cell in code(node) for output in cell.outputs for kind in output.get("data", {})]
    committed = code(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))
    images = sum("image/png" in output.get("data", {}) for cell in committed for output in cell.outputs)
    sliders = sum(len(site_pages.explored(cell)) for cell in committed)
    assert kinds.count("image/png") == images - sliders
    assert kinds.count("application/vnd.jupyter.widget-view+json") == sliders
    assert page.locator(".jp-OutputArea img").count() and thrown == []
    page.close()
    with urllib.request.urlopen(f"{origin}/api/sessions?token={TOKEN}", timeout=10) as answer:
        for session in json.load(answer):  # so that kernels do not add up
            kernel = session["kernel"]["id"]
            request = urllib.request.Request(f"{origin}/api/kernels/{kernel}?token={TOKEN}", method="DELETE")
            urllib.request.urlopen(request, timeout=30).close()


SLIDER = """
%matplotlib inline
import pandas as pd
from refusal import explore
points = pd.DataFrame(
    {"outcome": outcome, "alpha": alpha, "rate": 0.5 + alpha / 10, "low": 0.3, "high": 0.7}
    for outcome in explore.BARS for alpha in (-1.0, 0.0, 1.0, 2.0)
)
explore.doses(points)
"""


@pytest.mark.slow
def test_a_slider_moves_its_figure(chromium, address):
    origin, copy = address
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLIDER)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, copy / "notebooks" / "slider.ipynb")
    page = chromium.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    opened(page, f"{origin}/lab/tree/notebooks/slider.ipynb?reset&token={TOKEN}")
    menu(page, "Run", re.compile("^Restart Kernel and Run All Cells"))
    page.locator("dialog.jp-Dialog").wait_for()  # it asks first, which `menu` declines
    run_all(page, copy / "notebooks" / "slider.ipynb")
    picture = page.locator(".jp-OutputArea img").first
    picture.wait_for(timeout=60_000)
    before = picture.get_attribute("src")
    page.locator(".jp-OutputArea .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => { const i = document.querySelector('.jp-OutputArea img'); return i && i.src !== before }",
        arg=before,
        timeout=30_000,
    )
    page.close()
