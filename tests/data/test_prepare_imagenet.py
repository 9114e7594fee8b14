"""What the command refuses; that it works is seen in datasets/test_imagenet2012.py."""

import importlib.util
import subprocess
import sys

import pytest

from vssd_jax.data import prepare_imagenet
from vssd_jax.errors import UserError


def run_prepare(manual_dir, data_dir):
    # A process of its own: TensorFlow and Triton in one process abort it.
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "vssd_jax.data.prepare_imagenet",
            f"--manual-dir={manual_dir}",
            f"--data-dir={data_dir}",
        ],
        capture_output=True,
        text=True,
    )


def test_missing_archives_are_named(tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    result = run_prepare(tmp_path, tmp_path / "data")
    assert result.returncode == 2
    assert "Missing in" in result.stderr
    assert "ILSVRC2012_img_train.tar" in result.stderr
    assert "ILSVRC2012_img_val.tar" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


def archives_in_name_only(folder):
    for name in prepare_imagenet.ARCHIVES:
        (folder / name).write_bytes(b"")


def test_missing_tensorflow_is_named(tmp_path, monkeypatch):
    archives_in_name_only(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorflow.*pip install 'vssd_jax\[imagenet\]'"):
        prepare_imagenet.prepare(tmp_path, tmp_path / "data")


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    archives_in_name_only(tmp_path)
    (tmp_path / prepare_imagenet.ARCHIVES[0]).write_bytes(b"x" * 100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    usage = prepare_imagenet.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda path: usage._replace(free=50))
    with pytest.raises(UserError, match="GB free"):
        prepare_imagenet.prepare(tmp_path, tmp_path / "data")
