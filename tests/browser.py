"""A headless Chromium for tests of pages; they are skipped where there is none."""

import contextlib
import functools
import http.server
import shutil
import subprocess
import threading

import pytest


def find():
    """The path of Chromium; skips the test without it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium")
    return browser


@contextlib.contextmanager
def served(folder):
    """The address of a folder on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
            ".mjs": "text/javascript", ".wasm": "application/wasm",
        }  # fmt: skip

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def dump_dom(browser, address, profile, *, seconds=120):
    """The finished process, whose output is the page as it is after its programs ran.

    Args:
      browser: of `find`.
      address: of the page.
      profile: a folder for what the browser keeps.
      seconds: that the page may take, by its own clock.
    """
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", f"--timeout={1000 * seconds}",
        f"--virtual-time-budget={1000 * seconds}", "--dump-dom", address,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
