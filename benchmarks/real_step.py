"""The step that `train.py` runs and the one that `eval.py` runs, on made-up pictures.

Nothing is read from disk. The batches are those that the tasks make of pictures, so that shapes,
dtypes and ranges are a run's. Only the packages of a bare installation are needed: a step has no
use for Grain, and of ml_collections for no more than a dict.
"""

import contextlib
import importlib
import runpy
import sys
import types
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
# Of each task: training pictures, height and width of a picture, classes.
SIZES = {
    "classification": (1_281_167, (375, 500), 1000),
    "detection": (117_266, (480, 800), 80),  # of the largest padded shape
    "segmentation": (20_210, (512, 512), 150),
}
OBJECTS = 6  # of a picture; COCO has seven


class Fields(dict):
    """Stands in for a `ConfigDict` where ml_collections is missing."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__

    def unlocked(self):
        return contextlib.nullcontext()


def stand_in() -> None:
    """Puts modules with the few names that are used in place of packages that are missing."""
    placeholder = types.SimpleNamespace(placeholder=lambda kind: None)
    for name, content in {
        "ml_collections": {"ConfigDict": Fields, "config_dict": placeholder},
        "grain": {"MapDataset": object},
    }.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(content)


stand_in()

from vssd_jax.tasks import make_task  # noqa: E402
from vssd_jax.training.evaluator import make_eval_step  # noqa: E402
from vssd_jax.training.plan import make_plan  # noqa: E402
from vssd_jax.training.step import Trainer  # noqa: E402


def config_of(name: str, **fields):
    """The config of a file in configs/, "tiny" or "mask_rcnn:tiny,1x", with some fields set."""
    name, _, argument = name.partition(":")
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    config = get_config(argument) if argument else get_config()
    config.update(fields)
    config.mesa_start_epoch = 0  # where there is MESA, it is what should be measured
    return config


class Pictures:
    """A split of made-up samples: noise with labels, objects or a label map."""

    def __init__(self, task: str, count: int, classes: int):
        self.class_names = [str(label) for label in range(classes)]
        self.sizes = np.full((count, 2), SIZES[task][1])
        self.object_counts = self.mask_counts = np.full(count, OBJECTS)
        self._task = task

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return tuple(self.sizes[index].tolist())

    def __getitem__(self, index):
        rng, (height, width) = np.random.default_rng(int(index)), self.size(index)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        element = {"image": image, "replaced": np.int32(0)}
        classes = len(self.class_names)
        if self._task == "classification":
            return element | {"label": np.int32(rng.integers(classes))}
        element["index"] = int(index)
        if self._task == "segmentation":
            return element | {"label": rng.integers(0, classes, (height, width), np.uint8)}
        corners = rng.uniform(0, 0.5, (OBJECTS, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.5, (OBJECTS, 2))], 1)
        return element | {
            "boxes": (boxes * [width, height, width, height]).astype(np.float32),
            "labels": rng.integers(0, classes, OBJECTS).astype(np.int32),
            "segmentations": [{"counts": [0, height * width]}] * OBJECTS,  # the whole picture
        }


def made_up(config):
    """The task of a config, with made-up pictures in place of its dataset's."""
    kind = type(make_task(config))

    class MadeUp(kind):
        def source(self, split):
            if split not in self._sources:
                count = SIZES[self.name][0] if split == "train" else self.config.eval_batch_size
                self._sources[split] = Pictures(self.name, count, self.num_classes)
            return self._sources[split]

        def decoded(self, split):
            return self.source(split)

        def _train_batches(self, source, transform, start_step, *, shuffle=True):
            rng = np.random.default_rng(0)
            yield stacked(transform(source[i], rng) for i in range(self.config.batch_size))

        def _eval_batches(self, source, transform):
            elements = ({"valid": np.True_} | source[i] for i in range(self.config.eval_batch_size))
            yield stacked({"valid": e.pop("valid"), **transform(e)} for e in elements)

    task = MadeUp(config)
    if config.num_classes is None and task.dataset.class_names is None:
        config.num_classes = SIZES[task.name][2]
    return task


def stacked(elements) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *elements)


def training(config) -> tuple[Trainer, dict]:
    """The trainer of a config, and a made-up batch of `config.batch_size`."""
    task = made_up(config)
    return Trainer(task, config, make_plan(config, task.train_size)), next(task.train_batches(0))


def prediction(config):
    """What `eval.py` computes for a batch, `(arrays, batch) -> outputs`.

    Returns:
      The function, a trainer, whose state's `ema` it takes, and a made-up batch of
      `config.eval_batch_size`.
    """
    task = made_up(config)
    trainer = Trainer(task, config, make_plan(config, task.train_size))
    return make_eval_step(task, trainer.model), trainer, next(task.eval_batches())
