"""Which steps log, evaluate, save and end a run."""

import pytest

from vssd_jax.config import base_config
from vssd_jax.errors import UserError
from vssd_jax.training.plan import make_plan


def plan(train_size=45, **changes):
    """Four steps an epoch, unless the changes say otherwise."""
    config = base_config()
    config.update(batch_size=10, epochs=3, log_every_steps=5)
    config.update(changes)
    return make_plan(config, train_size)


def steps(rule, total):
    return [step for step in range(1, total + 1) if rule(step)]


def test_an_epoch_has_whole_batches_alone():
    assert (plan().steps_per_epoch, plan().total, plan().batch_size) == (4, 12, 10)
    assert plan(10).steps_per_epoch == 1


def test_the_last_step_logs_and_evaluates_too():
    short = plan(steps=11)
    assert short.total == 11
    assert steps(short.logs, 11) == [5, 10, 11]
    assert steps(short.evaluates, 11) == [4, 8, 11]
    assert steps(short.saves, 11) == [4, 8, 11]


def test_evaluations_every_few_epochs():
    assert steps(plan(eval_every_epochs=2).evaluates, 12) == [8, 12]


def test_saves_between_the_evaluations():
    often = plan(save_every_steps=3)
    assert steps(often.saves, 12) == [3, 4, 6, 8, 9, 12]
    assert steps(often.evaluates, 12) == [4, 8, 12]


@pytest.mark.parametrize(
    ("text", "profiled"), [("", []), ("10:12", [10, 11, 12]), ("1:1", [1]), ("90:91", [90, 91])]
)
def test_profiled_steps(text, profiled):
    assert list(plan(profile_steps=text).profiled) == profiled


@pytest.mark.parametrize("text", ["10", "10:", "15:10", "0:3", "-1:3", "a:b", "1:2:3", " 1:2"])
def test_profiled_steps_that_are_no_range(text):
    with pytest.raises(UserError, match="must be like 10:15"):
        plan(profile_steps=text)


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(UserError, match="batch_size=10 is more than the 9 images"):
        plan(9)
