"""Headless Chromium for tests: the one of this machine, driven by Playwright; without either the tests are skipped."""

import contextlib
import functools
import http.server
import shutil
import threading

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A browser in a container, where shared memory is small, which asks nobody for anything.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]


@contextlib.contextmanager
def launched():
    """A running Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: ./run_all.sh test installs it")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


def patient():
    """A block in which a page that is not ready in time raises nothing, for those who try again."""
    return contextlib.suppress(pytest.importorskip("playwright.sync_api").TimeoutError)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The address at which a folder is served, on this machine only."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def opened(chromium, origin, **options):
    """A page that notes what goes wrong.

    Args:
        chromium: From `launched`.
        origin: The address that it may load from.
        options: Of the context, e.g. `color_scheme="dark"`.

    Returns:
        The page, and a list that grows with each error of the console or a script, and each request that fails or
        goes elsewhere.
    """
    page, faults = chromium.new_context(**options).new_page(), []

    def note(wrong, text):
        if wrong:
            faults.append(text)

    page.on("console", lambda said: note(said.type == "error", f"console: {said.text}"))
    page.on("pageerror", lambda error: note(True, f"script: {error}"))
    page.on("requestfailed", lambda request: note(True, f"failed: {request.url}"))
    page.on("response", lambda got: note(got.status >= 400, f"{got.status}: {got.url}"))
    page.on("request", lambda r: note(not r.url.startswith((origin, "data:", "blob:")), f"elsewhere: {r.url}"))
    return page, faults
