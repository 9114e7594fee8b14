"""The fields that every run has."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs import digits, digits_detection, digits_segmentation
from vssd_jax import config as configs
from vssd_jax.config import base_config, check, total_steps
from vssd_jax.data.datasets import digits_detection as detection_data
from vssd_jax.data.datasets import digits_segmentation as segmentation_data
from vssd_jax.errors import UserError
from vssd_jax.models.family import make_config
from vssd_jax.tasks import make_task
from vssd_jax.training.optimizer import make_schedule
from vssd_jax.training.plan import make_plan
from vssd_jax.training.sharding import check_batch, make_mesh


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
        ("segmentation", "image_size", 10**5, "a whole number of pixels from 1 to 16384"),
        (
            "classification",
            "steps",
            2**31,
            "a whole number of at least 1 and at most 2147483647, or None",
        ),
        ("classification", "model", None, "a text that is not empty"),
        ("classification", "remat", 1, "True or False"),
        (
            "classification",
            "mesh",
            {"data": 0},
            "a size of at least 1 for each axis, of which one may be -1",
        ),
    ],
)
def test_values_that_cannot_be_used(task, field, value, allowed):
    config = getattr(configs, f"{task}_config")()
    check(config)
    with config.unlocked(), config.ignore_type():
        config[field] = value
    with pytest.raises(UserError) as error:
        check(config)
    assert str(error.value).startswith(f"config.{field}=")
    assert str(error.value).endswith(f" must be {allowed}")


def test_a_config_of_an_earlier_version_gets_the_new_fields():
    config = configs.detection_config()
    del config.max_pixels
    config.max_objects = 7
    config.lock()
    configs.add_missing(config)
    assert (config.max_pixels, config.max_objects) == (89_478_485, 7)


def test_what_differs_from_the_defaults():
    config = configs.segmentation_config()
    assert configs.changed_fields(config) == {}
    config.update(steps=7, scales=tuple(config.scales), image_shape=(3, 4))
    with config.unlocked():
        config.mine = 1
    assert configs.changed_fields(config) == {"steps": 7, "image_shape": (3, 4), "mine": 1}


def test_the_fields_of_the_augmentation():
    config = configs.classification_config()
    config.augmentation = {"crop_areas": (0.1, 1.0)}
    with pytest.raises(UserError, match="no field 'crop_areas'; did you mean 'crop_area'"):
        check(config)
    config.augmentation = {"crop_area": (0.0, 1.0)}
    with pytest.raises(UserError, match=r"config.augmentation.crop_area=.* must be two shares"):
        check(config)


# --- Whatever comes in ---------------------------------------------------------------------------

TASKS = {
    "classification": digits.get_config,
    "segmentation": digits_segmentation.get_config,
    "detection": digits_detection.get_config,
}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 40), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(["xla", "float32", "steps", "linear", "1:3", "vssd_nano", "vssd_micro", "0"]),
    st.lists(st.one_of(st.integers(-2, 300), st.floats(-2, 3)), max_size=4).map(tuple),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["data", "fsdp", "crop_area"]), st.integers(-2, 3), max_size=2),
)  # fmt: skip
# They decide how long an example takes, not whether it works.
LARGE = ("num_workers", "image_size", "long_side", "short_side", "short_sides", "padded_shapes",
         "batch_size", "eval_batch_size", "max_objects", "scales", "tta_ratios", "size_multiple",
         "short_sides")  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=settings.default.max_examples // 2)  # each reads pictures
@given(data=st.data())
def test_whatever_comes_in_works_or_is_one_line(few, task, data):
    """Everything up to the compilation."""
    config = TASKS[task]()
    config.update(data_dir=few, batch_size=4, eval_batch_size=2)
    for _ in range(data.draw(st.integers(1, 2))):
        name, value = data.draw(st.sampled_from(sorted(config))), data.draw(VALUES)
        with config.unlocked(), config.ignore_type():
            config[name] = value
    message = ""
    try:
        check(config)
        assume(all(not _is_large(config.get(name, 0)) for name in LARGE))
        config.num_workers = 0
        made = make_task(config)
        plan = make_plan(config, made.train_size)
        rate = make_schedule(config, plan.steps_per_epoch)
        assert all(np.isfinite(float(rate(step))) for step in (0, 1, plan.total))
        mesh = make_mesh(config.mesh)
        check_batch("batch_size", config.batch_size, mesh.size, config.accumulate)
        check_batch("eval_batch_size", config.eval_batch_size, mesh.size)
        if config.model != TASKS[task]().model or config.model_options:
            make_config(config.model, **config.model_options)
        for batches in (made.train_batches(0), made.eval_batches()):
            for array in jax.tree.leaves(next(batches)):
                assert np.isfinite(array).all()
            batches.close()
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def _is_large(value):
    return max(map(float, np.ravel(value)), default=0) > 300


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder with few scenes of digits."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # whatever comes in may be made as a folder
        detection = functools.partial(detection_data.prepare, train=8, test=3)
        patch.setattr(detection_data, "prepare", detection)
        sizes = {"training": 8, "validation": 3}
        segmentation = functools.partial(segmentation_data.write, sizes=sizes)
        patch.setattr(segmentation_data, "write", segmentation)
        yield str(folder)
