"""Weights that are pushed to a hub on the loopback and loaded from there."""

import dataclasses
import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.conftest import ROOT
from tests.weights.classifier_nano import NANO, assert_identical
from tests.weights.loopback_hub import STRANGER, serve
from vssd_jax.weights.folder import Weights, read_folder, write_folder
from vssd_jax.weights.load import load

RUN = ROOT / "tests/earlier_versions/run"


@pytest.fixture(scope="module")
def weights() -> Weights:
    loaded = load(NANO)
    return dataclasses.replace(
        loaded,
        class_names=[f"kind {i}" for i in range(loaded.num_classes)],
        provenance=loaded.provenance | {"metrics": {"val/top1": 0.5}},
    )


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano"
    write_folder(path, weights)
    (path / "notes.txt").write_text("These stay here.")
    return path


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def push(environment, *arguments):
    return run(environment, "-m", "vssd_jax.hub", "push", *arguments)


def test_push_then_load(folder, weights, tmp_path):
    with serve() as hub:
        done = push(
            hub.environment(tmp_path / "cache"),
            "--weights", folder, "--repo=someone/nano", "--license=apache-2.0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "vssd_nano from " in done.stdout
        assert "-> hf://someone/nano (http" in done.stdout
        commits = hub.repos["someone/nano"].branches["main"]
        assert [commit.message for commit in commits] == ["initial commit", "Weights of vssd_nano"]
        files = {".gitattributes", "README.md", "config.json", "model.safetensors"}
        assert commits[-1].files.keys() == files
        for name in ("config.json", "model.safetensors"):
            assert commits[-1].files[name] == (folder / name).read_bytes()
        card = ModelCard(commits[-1].files["README.md"].decode())
        assert card.data.license == "apache-2.0"
        assert card.data.eval_results[0].metric_value == 0.5

        # Another machine.
        done = run(
            hub.environment(tmp_path / "fresh", token=None),
            "convert_torch_weights.py", "--input=hf://someone/nano", f"--output={tmp_path / 'w'}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_identical(read_folder(tmp_path / "w").params, weights.params)
        name = "model.safetensors"
        assert (tmp_path / "w" / name).read_bytes() == (folder / name).read_bytes()
        ours, theirs = (
            json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "w")
        )
        assert theirs.pop("preprocessing")["image_size"] == 224  # the converter fills it in
        ours.pop("preprocessing", None)
        assert ours == theirs


def test_a_run_to_a_branch_of_a_private_repository(tmp_path):
    with serve() as hub:
        done = push(
            hub.environment(tmp_path / "cache"),
            "--weights", RUN, "--repo", "someone/nano", "--private", "--revision", "v/1",
            "--message", "The first",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "-> hf://someone/nano@v%2F1" in done.stdout
        repo = hub.repos["someone/nano"]
    assert repo.private
    assert len(repo.branches["main"]) == 1
    commit = repo.branches["v/1"][-1]
    assert commit.message == "The first"
    assert 'weights="hf://someone/nano@v%2F1"' in commit.files["README.md"].decode()
    config = json.loads(commit.files["config.json"])
    assert (config["source"], config["dataset"]) == ("run", "digits")
    assert "training's config calls digits." in commit.files["README.md"].decode()
    (tmp_path / "w").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "w" / name).write_bytes(commit.files[name])
    assert_identical(read_folder(tmp_path / "w").params, load(RUN).params)


# Pushes one folder to each repository with each token, and prints the errors.
PUSH = """
import os, sys
from vssd_jax.errors import UserError
from vssd_jax.weights.publish import push
folder = sys.argv[1]
for case in sys.argv[2:]:
    repo, token, private = case.split(",")
    os.environ["HF_TOKEN"] = token
    try:
        print(push(folder, repo, private=bool(private)))
    except UserError as error:
        print(error)
"""


def test_refusals(folder, tmp_path):
    with serve() as hub:
        hub.create("someone/public")
        hub.commit("other/model", {"config.json": b"{}"})
        hub.create("someone/broken")
        hub.create("someone/full")
        hub.broken = {"broken/commit": 400, "full.git/info/lfs": 413}
        token = hub.environment(tmp_path)["HF_TOKEN"]
        expected = {
            "someone/new,,": "nothing can be uploaded without a token: log in with `hf auth login`",
            "someone/new,hf_wrong,": "nothing was uploaded to someone/new: the hub does not accept "
            "the token (status 401)",
            f"someone/new,{STRANGER},": "the token does not permit it (status 403); take one of "
            "someone that may write",
            f"other/model,{token},": "status 403",
            f"new,{token},": "write owner/name",
            f"someone/public,{token},1": "someone/public exists and is public: nothing was",
            f"someone/broken,{token},": "nothing was uploaded to someone/broken: BadRequestError",
            f"someone/full,{token},": "nothing was uploaded to someone/full: HfHubHTTPError",
        }
        done = run(hub.environment(tmp_path / "cache"), "-c", PUSH, folder, *expected)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        for (case, part), line in zip(expected.items(), lines, strict=True):
            assert part in line, (case, line)
            assert not line.count("hf_")
        assert "someone/new" not in hub.repos
        assert all(len(repo.branches["main"]) <= 2 for repo in hub.repos.values())
        for name in ("public", "broken", "full"):
            assert hub.repos[f"someone/{name}"].branches["main"][-1].files.keys() == {
                ".gitattributes"
            }


def test_no_hub(folder, tmp_path):
    with serve() as hub:
        environment = hub.environment(tmp_path)
    done = push(environment, "--weights", folder, "--repo", "someone/nano")
    assert done.returncode == 2
    assert "nothing was uploaded to someone/nano: the hub cannot be reached (Conn" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
