"""Tasks by name, those of the package and others."""

import pytest
from flax import nnx

from vssd_jax import tasks
from vssd_jax.config import classification_config, segmentation_config
from vssd_jax.data import registry
from vssd_jax.errors import UserError
from vssd_jax.models.family import abstract
from vssd_jax.models.layers import BatchNorm
from vssd_jax.tasks.base import BaseTask


class Sorting(BaseTask):
    name = "sorting"
    best_metric = "val/sorted"


def test_a_task_from_elsewhere(monkeypatch):
    monkeypatch.setattr(tasks, "_registered", {})
    monkeypatch.setattr(registry, "_registered", {})
    tasks.register("sorting", Sorting)
    registry.register(
        registry.Dataset("cards", "sorting", lambda config, split: [], class_names=("a", "b"))
    )
    config = classification_config()
    config.update(task="sorting", dataset="cards")
    task = tasks.make_task(config)
    assert isinstance(task, Sorting)
    assert (task.num_classes, task.train_size) == (2, 0)
    with pytest.raises(UserError, match="vssd_jax has a task 'detection'; choose another name"):
        tasks.register("detection", Sorting)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("classifikation", {}, "unknown task 'classifikation'; did you mean 'classification'"),
        ("classification", {"tta": True}, "--tta is not for classification"),
        ("detection", {"tta": True}, "--tta is not for detection"),
        ("classification", {"save_predictions": "x"}, "--save-predictions is not for classific"),
    ],
)
def test_wrong_names_and_options(task, options, message):
    config = classification_config()
    config.task = task
    with pytest.raises(UserError, match=message):
        tasks.make_task(config, **options)


def test_batch_norm_images_share_their_statistics():
    config = segmentation_config()
    config.update(model="upernet_vssd_nano", batch_norm_images=2, num_classes=3)
    model = abstract(tasks.make_task(config).build)
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchNorm)]
    assert len(norms) == 21  # 5 of the stem, 3 of the ways down, 13 of the heads
    assert {norm.images for norm in norms} == {2}
