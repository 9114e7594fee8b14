"""Checkpoints and weights folders of an earlier version still load; see README.md beside this."""

import json
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
from absl import flags
from flax import nnx

import vssd_jax
from vssd_jax.tasks import make_task
from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics
from vssd_jax.weights.load import load
from vssd_jax.weights.state import get_state

FOLDER = pathlib.Path(__file__).parent
IMAGES = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)


@pytest.mark.parametrize("source", ["weights", "run"])
def test_weights_give_the_same_logits(source):
    model = vssd_jax.create_model("vssd_nano", weights=FOLDER / source)
    logits = nnx.jit(lambda model, images: model(images))(model, IMAGES)
    np.testing.assert_allclose(logits, np.load(FOLDER / "logits.npy"), rtol=0, atol=1e-6)


def test_a_workdirs_weights_are_those_of_its_folder():
    expected = load(FOLDER / "weights").params
    found = load(FOLDER / "run").params
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    filled = get_state(vssd_jax.create_model("vssd_nano", weights=FOLDER / "run"))
    assert filled.keys() == expected.keys()


def resumed(tmp_path, steps):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain reads absl flags
    workdir = tmp_path / "run"
    shutil.copytree(FOLDER / "run", workdir)
    fields = json.loads((workdir / "config.json").read_text())
    config = ml_collections.ConfigDict(fields | {"steps": steps, "data_dir": str(tmp_path)})
    return train(make_task(config), config, workdir), workdir


def test_a_run_is_restored(tmp_path, capsys):
    results, _ = resumed(tmp_path, steps=3)
    assert results["val/loss"] == 2.3065508524576823
    assert "resumed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on(tmp_path):
    _, workdir = resumed(tmp_path, steps=5)
    lines = {line["step"]: line for line in read_metrics(workdir) if "train/loss" in line}
    assert list(lines) == [1, 2, 3, 4, 5]
    # The programs are compiled anew, perhaps by another XLA: not bit for bit.
    assert lines[5]["train/loss"] == pytest.approx(2.245598316192627, rel=1e-4)
