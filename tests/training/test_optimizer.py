"""Schedules and AdamW against their formulas."""

import math

import numpy as np
import pytest

from vssd_jax.config import base_config
from vssd_jax.training.optimizer import make_schedule


def test_cosine_with_warm_up_scales_with_the_batch():
    config = base_config()
    config.update(
        batch_size=2048, epochs=30, learning_rate=5e-4, learning_rate_batch=512, warmup_epochs=2,
        min_learning_rate=5e-6, warmup_learning_rate=5e-7,
    )  # fmt: skip
    schedule = make_schedule(config, 100)
    for step in np.linspace(0, 3000, 20, dtype=int):
        if step < 200:
            expected = 4 * (5e-7 + (5e-4 - 5e-7) * step / 200)
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 200) / 2800))
            expected = 4 * (5e-6 + (5e-4 - 5e-6) * cosine)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_steps_and_linear():
    config = base_config()
    config.update(
        epochs=12, learning_rate=1e-4, schedule="steps", decay_epochs=(8, 11), warmup_steps=50,
        warmup_learning_rate=1e-7,
    )  # fmt: skip
    schedule = make_schedule(config, 100)
    for step, expected in ((0, 1e-7), (25, 5.005e-5), (50, 1e-4), (799, 1e-4), (801, 1e-5),
                           (1099, 1e-5), (1101, 1e-6)):  # fmt: skip
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
    config.update(schedule="linear", steps=1000, learning_rate=6e-5)
    schedule = make_schedule(config, 100)
    assert float(schedule(525)) == pytest.approx(3e-5, rel=1e-5)
    assert float(schedule(1000)) == pytest.approx(0, abs=1e-9)
