"""The fields that every run has."""

import pytest

from vssd_jax import config as configs
from vssd_jax.config import base_config, check, total_steps
from vssd_jax.errors import UserError


def test_total_steps_are_given_or_follow_from_the_epochs():
    config = base_config()
    config.epochs = 3
    assert total_steps(config, 7) == 21
    config.steps = 5
    assert total_steps(config, 7) == 5


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_each_task_has_the_fields_of_every_run(task):
    config = getattr(configs, f"{task}_config")()
    assert config.task == task
    assert set(base_config()) < set(config)


@pytest.mark.parametrize(
    ("task", "field", "value", "allowed"),
    [
        ("classification", "steps", 0, "a whole number of at least 1, or None"),
        ("classification", "eval_every_epochs", 0, "a whole number of at least 1"),
        ("classification", "log_every_steps", 0, "a whole number of at least 1"),
        ("classification", "learning_rate", 0.0, "greater than 0"),
        ("classification", "learning_rate", float("nan"), "greater than 0"),
        ("classification", "betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("classification", "ema_decay", 1.0, "0 or more and less than 1"),
        ("classification", "dtype", "int8", "one of float32, bfloat16, float64"),
        ("classification", "schedule", "cosin", "one of cosine, linear, steps"),
        ("detection", "short_sides", (), "one or more lengths of at least 1"),
        ("detection", "padded_shapes", ((800, 0),), "one or more pairs of height and width"),
        ("detection", "decay_epochs", (8, 8), "growing numbers greater than 0"),
        ("segmentation", "scales", (2.0, 0.5), "two factors greater than 0, the smaller first"),
        ("segmentation", "flip", 1.5, "from 0 to 1"),
    ],
)
def test_values_that_cannot_be_used(task, field, value, allowed):
    config = getattr(configs, f"{task}_config")()
    check(config)
    config[field] = value
    with pytest.raises(UserError) as error:
        check(config)
    assert str(error.value) == f"config.{field}={value!r} must be {allowed}"
