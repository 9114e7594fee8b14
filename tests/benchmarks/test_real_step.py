"""The real step on made-up batches, also where the packages of training are missing."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import real_step
from tests.conftest import ROOT

SMALL = {"batch_size": 2, "eval_batch_size": 2}
NANO = {"model": "vssd_nano", "image_size": 32, "dtype": "float32", **SMALL}

WITHOUT = """
import sys

class Blocked:
    names = "grain ml_collections clu tensorflow_datasets array_record pycocotools".split()
    names += "tensorboardX sklearn matplotlib filelock beartype".split()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import jax
from benchmarks import model, real_step

sizes = {"batch_size": 2, "eval_batch_size": 2}
nano = {"model": "vssd_nano", "image_size": 32, **sizes}
for name, fields in (
    ("tiny:mesa", nano),
    ("mask_rcnn:tiny,1x", {**sizes, "model": "mask_rcnn_vssd_nano"}),
    ("upernet:tiny", {**sizes, "model": "upernet_vssd_nano"}),
):
    trainer, batch = real_step.training(real_step.config_of(name, **fields))
    jax.eval_shape(trainer.function, trainer.abstract, batch, jax.random.key(0))
    print(name)
"""


@pytest.mark.slow
def test_packages_of_training_may_be_missing():
    run = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in run.stdout.splitlines() if " " not in line]
    assert names == ["tiny:mesa", "mask_rcnn:tiny,1x", "upernet:tiny"], run.stderr


def test_a_step_and_a_prediction():
    config = real_step.config_of("tiny:mesa", **NANO)
    trainer, batch = real_step.training(config)
    state = trainer.fresh_state()
    batch = next(trainer.device_batches(iter([batch])))
    state, metrics = trainer.program(state, batch)(state, batch, jax.random.key(0))
    assert int(state.step) == 1
    assert metrics["mesa"] > 0  # from the first step on
    assert metrics["skipped"] == 0

    predict, trainer, batch = real_step.prediction(config)
    outputs = jax.jit(predict)(trainer.fresh_state().ema, batch)
    assert outputs["count"] == 2


@pytest.mark.parametrize("name", ["digits_detection", "digits_segmentation"])
def test_batches_of_the_other_tasks(name):
    config = real_step.config_of(name, **SMALL)
    trainer, batch = real_step.training(config)
    height, width = config.image_shape
    assert batch["image"].shape == (2, height, width, 3)
    assert not np.array_equal(*batch["image"])
    if name == "digits_detection":
        assert batch["valid"].all()
        assert batch["masks"].any()
    predict, trainer, batch = real_step.prediction(config)
    jax.eval_shape(predict, trainer.abstract.ema, batch)
