"""`hf://` against a server on the loopback that speaks the hub's protocol."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.weights.classifier_nano import NANO
from tests.weights.loopback_hub import serve
from vssd_jax import UserError
from vssd_jax.weights.hub import Address, check_upload, parse
from vssd_jax.weights.load import load


def convert(environment, tmp_path, uri):
    """The command, in a process of its own: the hub's settings are read when it is imported."""
    return subprocess.run(
        [sys.executable, "convert_torch_weights.py", f"--input={uri}",
         f"--output={tmp_path / 'w'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


# Loads each address and prints the error or, if there is none, the number of tensors.
LOAD = """
import sys
from vssd_jax.errors import UserError
from vssd_jax.weights.load import load
for uri in sys.argv[1:]:
    try:
        weights = load(uri)
        print(len(weights.params), weights.provenance["source"])
    except UserError as error:
        print(error)
"""


def load_each(environment, *uris):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *uris],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(uris)
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a weights folder."""
    path = tmp_path_factory.mktemp("converted") / "nano"
    from vssd_jax.weights.convert import convert

    convert(NANO, path)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("hf://a/b", Address("a/b", None, "")),
        ("hf://a/b/", Address("a/b", None, "")),
        ("hf://a/b@v1", Address("a/b", "v1", "")),
        ("hf://a/b/c.pth", Address("a/b", None, "c.pth")),
        ("hf://a/b@0123abc/c/d.pth", Address("a/b", "0123abc", "c/d.pth")),
        ("hf://a/b@refs/pr/3/c/d", Address("a/b", "refs/pr/3", "c/d")),
        ("hf://a/b@my%2Fbranch/c/", Address("a/b", "my/branch", "c")),
    ],
)
def test_addresses(uri, address):
    assert parse(uri) == address


@pytest.mark.parametrize(
    "uri", ["hf://", "hf://a", "hf://a/", "hf:///b/c", "hf://a/b@", "hf://@/b"]
)
def test_what_is_no_address(uri):
    with pytest.raises(UserError, match="write hf://owner/repo/file, or hf://owner/repo for"):
        load(uri)


def test_a_file_then_offline(tmp_path):
    with serve() as hub:
        commit = hub.commit("someone/VSSD", {"vssd_nano.pth": NANO.read_bytes()})
        uri = "hf://someone/VSSD/vssd_nano.pth"
        done = convert(hub.environment(tmp_path / "cache"), tmp_path, uri)
        assert done.returncode == 0, done.stderr
        assert "its EMA, 158 tensors" in done.stdout
        paths = [f"/someone/VSSD/resolve/{at}/vssd_nano.pth" for at in ("main", commit.oid)]
        assert any(("GET", path) in hub.requests for path in paths)
        assert json.loads((tmp_path / "w/config.json").read_text())["source"] == uri
        (tmp_path / "w").rename(tmp_path / "first")

        count = len(hub.requests)
        offline = hub.environment(tmp_path / "cache", HF_HUB_OFFLINE="1")
        done = convert(offline, tmp_path, uri)  # from the cache
        assert done.returncode == 0, done.stderr
        assert len(hub.requests) == count
        arrays = "model.safetensors"
        assert (tmp_path / "w" / arrays).read_bytes() == (tmp_path / "first" / arrays).read_bytes()


def test_a_file_that_is_not_there(tmp_path):
    with serve() as hub:
        hub.create("someone/VSSD")
        done = convert(hub.environment(tmp_path), tmp_path, "hf://someone/VSSD/other.pth")
    assert done.returncode == 2
    assert (
        "hf://someone/VSSD/other.pth cannot be downloaded: someone/VSSD has no such file at "
        "revision 'main'"
    ) in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_folders_revisions_and_errors(tmp_path, folder):
    with serve() as hub:
        hub.commit("someone/nano", folder)
        hub.commit("someone/nano", folder | {"model.safetensors": b"no"}, branch="my/branch")
        first = hub.commit("someone/many", {f"a/b/{name}": file for name, file in folder.items()})
        hub.commit("someone/many", {"a/b/config.json": b"{}", "checkpoints/x.pth": b"no"})
        hub.commit("someone/many", {"nano.ckpt": NANO.read_bytes()})
        hub.create("someone/hidden", private=True)
        hub.commit("someone/half", {"config.json": folder["config.json"]})
        expected = {
            "hf://someone/nano": "158 classification_nano.pth",
            "hf://someone/nano@my%2Fbranch": "hf://someone/nano@my%2Fbranch/model.safetensors "
            "cannot be read: ",
            f"hf://someone/many@{first.oid}/a/b": "158 classification_nano.pth",
            "hf://someone/many/a/b": "hf://someone/many/a/b/config.json is no description",
            "hf://someone/many/checkpoints/x.pth": "hf://someone/many/checkpoints/x.pth: not a",
            # A name without a known ending, of a file.
            "hf://someone/many/nano.ckpt": "158 hf://someone/many/nano.ckpt",
            "hf://someone/many": "hf://someone/many is no weights folder: it has no config.json",
            "hf://someone/many/c": "cannot be downloaded: someone/many has no such file",
            "hf://someone/half": "cannot be downloaded: someone/half has no such file",
            "hf://someone/nano@v2": "someone/nano has no revision 'v2'",
            "hf://someone/none": "there is no repository someone/none, or none that you may read",
            "hf://someone/hidden": "no repository someone/hidden, or none that you may read "
            "(status 401); if it is private, log in with `hf auth login`, or set HF_TOKEN",
            "hf://some..one/nano": "HFValidationError",
        }
        cache = tmp_path / "cache"
        lines = load_each(hub.environment(cache, token=None), *expected)
        for (uri, part), line in zip(expected.items(), lines, strict=True):
            assert part in line, (uri, line)
            assert str(cache) not in line
        assert not any("/tree/" in path for _, path in hub.requests)

        count = len(hub.requests)
        offline = hub.environment(cache, HF_HUB_OFFLINE="1")
        others = ("hf://someone/half", "hf://someone/other", "hf://someone/nano/other.pth")
        lines = load_each(offline, "hf://someone/nano", *others)
        assert lines[0] == "158 classification_nano.pth"
        for line in lines[1:]:
            assert line.endswith("HF_HUB_OFFLINE is set, and the cache does not have it")
        assert len(hub.requests) == count


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("nano", "write owner/name"),
        ("a/b/c", "write owner/name"),
        ("a/-b", "HFValidationError"),
        ("a/b", "nothing can be uploaded: HF_HUB_OFFLINE is set"),  # as in all tests
    ],
)
def test_uploads_that_cannot_begin(repo, message):
    with pytest.raises(UserError, match=message) as error:
        check_upload(repo)
    assert "\n" not in str(error.value)
