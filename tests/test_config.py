"""The fields that every run has."""

import pytest

from vssd_jax import config as configs
from vssd_jax.config import base_config, total_steps


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
