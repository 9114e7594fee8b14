"""`hf://` against a server on the loopback that speaks the hub's protocol."""

import contextlib
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NANO = ROOT / "tests/golden/checkpoints/classification_nano.pth"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = "/someone/VSSD/resolve/main/vssd_nano.pth"


@contextlib.contextmanager
def hub(content: bytes):
    """Serves one file; gives the endpoint and the requests so far."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.command, self.path))
            # A moved or missing file is told apart by the hub's own header.
            found = self.path in (PATH, PATH.replace("main", COMMIT))
            body = content if found else b""
            self.send_response(200 if found else 404)
            if found:
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()


def convert(tmp_path, endpoint, name="vssd_nano.pth", **environment):
    """The command, in a process of its own: the hub's settings are read when it is imported."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "convert_torch_weights.py", f"--input=hf://someone/VSSD/{name}",
         f"--output={tmp_path / 'w'}"],
        cwd=ROOT,
        env=plain | {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", **environment,
        },
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_download_then_offline(tmp_path):
    with hub(NANO.read_bytes()) as (endpoint, requests):
        done = convert(tmp_path, endpoint)
        assert done.returncode == 0, done.stderr
        assert "its EMA, 158 tensors" in done.stdout
        assert ("GET", PATH) in requests or ("GET", PATH.replace("main", COMMIT)) in requests
        assert '"source": "vssd_nano.pth"' in (tmp_path / "w/config.json").read_text()
        (tmp_path / "w").rename(tmp_path / "first")

        count = len(requests)
        done = convert(tmp_path, endpoint, HF_HUB_OFFLINE="1")  # from the cache
        assert done.returncode == 0, done.stderr
        assert len(requests) == count
        arrays = "model.safetensors"
        first = (tmp_path / "first" / arrays).read_bytes()
        assert (tmp_path / "w" / arrays).read_bytes() == first


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_file_that_is_not_there(offline, tmp_path):
    with hub(b"") as (endpoint, _):
        done = convert(tmp_path, endpoint, "other.pth", HF_HUB_OFFLINE=offline)
    assert done.returncode == 2
    assert "hf://someone/VSSD/other.pth cannot be downloaded" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()
