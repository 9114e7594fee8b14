"""The folder of a run: kept for one process, and refused where it cannot be used."""

import json

import pytest

from vssd_jax.errors import UserError
from vssd_jax.training.workdir import claim


def test_the_config_is_noted_and_a_difference_said(tmp_path, capsys):
    workdir = tmp_path / "a/b"
    with claim(workdir, {"batch_size": 8, "model": "m"}, checkpoint_bytes=0):
        assert json.loads((workdir / "config.json").read_text()) == {"batch_size": 8, "model": "m"}
    assert capsys.readouterr().out == ""
    with claim(workdir, {"batch_size": 9, "seed": 3, "model": "m"}, checkpoint_bytes=0):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "the config differs from this workdir's: batch_size was 8, is 9",
        "the config differs from this workdir's: seed was null, is 3",
    ]
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 9
    assert {path.name for path in workdir.iterdir()} <= {"config.json", "lock", "lock.txt"}


def test_an_error_of_other_files_is_not_the_folders(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"dog\.jpg"),
        claim(tmp_path / "run", {}, checkpoint_bytes=0),
    ):
        (tmp_path / "dog.jpg").read_bytes()
    with (
        pytest.raises(UserError, match="run cannot be written: No such file"),
        claim(tmp_path / "run", {}, checkpoint_bytes=0),
    ):
        (tmp_path / "run/gone/metrics.jsonl").read_bytes()


def test_one_claim_at_a_time(tmp_path):
    with claim(tmp_path, {}, checkpoint_bytes=0):
        for _ in range(2):
            with (
                pytest.raises(UserError, match="in use by process"),
                claim(tmp_path, {}, checkpoint_bytes=0),
            ):
                pass
    with claim(tmp_path, {}, checkpoint_bytes=0):
        pass


def test_a_disk_without_room_for_a_checkpoint(tmp_path):
    with (
        pytest.raises(UserError, match="a checkpoint takes 1000000000000 MB"),
        claim(tmp_path, {}, checkpoint_bytes=10**18),
    ):
        pass
    assert not (tmp_path / "config.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="run cannot be written: Not a directory"),
        claim(tmp_path / "file/run", {}, checkpoint_bytes=0),
    ):
        pass


def test_a_run_of_other_classes_is_not_resumed(tmp_path, capsys):
    for names in (["a", "b"], ["a", "b"]):
        with claim(tmp_path, {"class_names": names}, checkpoint_bytes=0):
            pass
    with claim(tmp_path, {}, checkpoint_bytes=0):  # of a version that kept none
        pass
    with claim(tmp_path, {"class_names": ["a", "b"]}, checkpoint_bytes=0):
        pass
    assert capsys.readouterr().out == ""
    with (
        pytest.raises(UserError, match=r"label 1 is 'b' and 'c' \(1 of 2 names differ\); use ano"),
        claim(tmp_path, {"class_names": ["a", "c"]}, checkpoint_bytes=0),
    ):
        pass
