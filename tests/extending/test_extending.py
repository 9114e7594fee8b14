"""A backbone, a dataset, a head and a kernel that the package does not know, each in one file.

Each is registered from its file, trained for a few steps through `train.py` and, but for the
kernel, evaluated through `eval.py`; nothing in the package names them.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from vssd_jax.data.datasets import digits_detection, digits_segmentation
from vssd_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """One folder for all tasks: COCO's layout, ADE20K's, and the digits that a run prepares."""
    folder = tmp_path_factory.mktemp("data") / "data"
    digits_segmentation.write(folder, sizes={"training": 8, "validation": 4})
    scenes = digits_detection.prepare(folder, train=8, test=4)
    for ours, theirs in (("train", "train2017"), ("test", "val2017")):
        (scenes / ours).rename(folder / theirs)
        annotations = scenes / "annotations" / f"instances_{ours}.json"
        annotations.rename(folder / "annotations" / f"instances_{theirs}.json")
    return folder


def command(script, config, *arguments):
    done = subprocess.run(
        [sys.executable, script, f"--config=tests/extending/{config}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(config, workdir, data_dir, *, says=None):
    """The lines of metrics.jsonl; `says` is printed on the way."""
    printed = command("train.py", config, f"--workdir={workdir}", f"--config.data_dir={data_dir}")
    assert says is None or says in printed
    return read_metrics(workdir)


def losses(lines):
    return [line["train/loss"] for line in lines if "train/loss" in line]


def evaluate(config, workdir, data_dir, lines):
    """The last line of `eval.py`, whose metrics must be those that training has written."""
    printed = command(
        "eval.py", config, f"--weights={workdir}", f"--config.data_dir={data_dir}"
    )
    results = json.loads(printed.splitlines()[-1])
    saved = {name: value for name, value in lines[-1].items() if name.startswith("val/")}
    assert saved
    assert {name: results[name] for name in saved} == saved
    return results


@pytest.mark.parametrize(
    ("config", "metric"),
    [
        pytest.param("toy_backbone.py:classification", "val/top1", marks=pytest.mark.slow),
        pytest.param("toy_backbone.py:detection", "val/box_map", marks=pytest.mark.slow),
        pytest.param("toy_backbone.py:segmentation", "val/miou", marks=pytest.mark.slow),
        ("toy_dataset.py", "val/top5"),
        pytest.param("toy_head.py", "val/miou", marks=pytest.mark.slow),
    ],
)
def test_a_stranger_trains_and_is_evaluated(config, metric, tmp_path, data_dir):
    lines = train(config, tmp_path, data_dir)
    assert len(losses(lines)) == 3
    assert np.isfinite(losses(lines)).all()
    results = evaluate(config, tmp_path, data_dir, lines)
    assert results["parameters"] > 0
    assert results["multiply_adds"] > 0
    assert 0 <= results[metric] <= 1


def test_a_kernel_takes_part_and_agrees(tmp_path, data_dir):
    """The same run with the toy kernel and without: losses agree but for rounding."""
    lines = train("toy_kernel.py", tmp_path / "toy", data_dir, says="by all pairs of tokens")
    expected = train("toy_kernel.py:xla", tmp_path / "xla", data_dir)
    np.testing.assert_allclose(losses(lines), losses(expected), rtol=1e-4)
    assert lines[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], rel=1e-4)
