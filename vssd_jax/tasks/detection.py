"""Object detection and instance segmentation: what the training loop needs to know of them."""

import functools
import os
import pathlib
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from flax import nnx

from vssd_jax.config import total_steps
from vssd_jax.data import coco, pipeline
from vssd_jax.distributed import say
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.models.mask_rcnn import Detections
from vssd_jax.tasks import coco_metrics, common

DATASETS = ("coco", "digits_detection")


class Detection:
    """A detector, its batches, its losses and its mean average precision.

    Args:
      config: of the run.
      save_predictions: a folder for the detections of an evaluation and pictures of them.
    """

    best_metric = "val/box_map"
    table = None

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        save_predictions: str | os.PathLike | None = None,
    ):
        self.config = config
        if config.dataset not in DATASETS:
            near = did_you_mean(config.dataset, DATASETS)
            raise UserError(f"unknown dataset {config.dataset!r}{near}")
        if config.exact_padding and config.eval_batch_size != 1:
            raise UserError(
                "config.exact_padding pads every image differently; add --config.eval_batch_size=1"
            )
        self._folder = None
        if save_predictions is not None:
            self._folder = pathlib.Path(save_predictions)
            try:  # better now than after the evaluation
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self._folder} cannot be written: {error.strerror}") from error

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width for which multiply-adds and throughput are given."""
        return tuple(self.config.image_shape)

    @property
    def num_classes(self) -> int:
        """Of `config.num_classes`, or else of the dataset."""
        if self.config.num_classes is not None:
            return self.config.num_classes
        return self.dataset_classes

    @property
    def dataset_classes(self) -> int:
        """The number of categories in the annotations."""
        return len(self._source("val").names)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        return common.build(self.config, self.num_classes, rngs)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _source(self, split: str) -> coco.CocoSource:
        """The images and annotations of "train" or "val"."""
        config = self.config
        folder = pathlib.Path(config.data_dir)
        if config.dataset == "digits_detection":
            from vssd_jax.data import digits_detection

            folder, name = digits_detection.prepare(folder), {"val": "test"}.get(split, split)
        else:
            name = f"{split}2017"
            if not folder.is_dir():
                raise UserError(
                    f"there is no folder {folder}; config.data_dir holds train2017/, val2017/ and "
                    "annotations/ of COCO"
                )
        source = coco.CocoSource(
            folder / name,
            folder / "annotations" / f"instances_{name}.json",
            training=split == "train",
            bad_annotations=config.bad_annotations,
        )
        if source.problems:
            say(f"left out of {source.describe_problems()}")
        return source

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._source("train"))

    def train_batches(self, start_step: int) -> Iterator[dict]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config, source = self.config, self._source("train")
        if not np.array_equal(source.category_ids, self._source("val").category_ids):
            raise UserError(
                f"the categories of {source.annotations} are not those of "
                f"{self._source('val').annotations}"
            )
        steps = total_steps(config, len(source) // config.batch_size)
        grouped = coco.GroupedByOrientation(
            source, config.batch_size, seed=config.seed, steps=steps
        )
        transform = functools.partial(
            coco.train_transform,
            short_sides=tuple(config.short_sides),
            long_side=config.long_side,
            crop=config.crop,
            shapes=_shapes(config),
            max_objects=config.max_objects,
            flip=config.flip,
        )
        return common.batches(
            pipeline.train_batches,
            self.config,
            grouped,
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            shuffle=False,
        )

    def eval_batches(self) -> Iterator[dict]:
        """This process's share of the evaluation batches; `valid` masks the padding images."""
        config = self.config
        transform = functools.partial(
            coco.eval_transform,
            short_side=max(config.short_sides),
            long_side=config.long_side,
            shapes=None if config.exact_padding else _shapes(config),
        )
        grouped = coco.GroupedByOrientation(self._source("val"), config.eval_batch_size)
        return common.batches(
            pipeline.eval_batches,
            self.config,
            grouped,
            transform,
            batch_size=config.eval_batch_size,
        )

    def loss(self, model, batch, *, step, rngs, teacher):
        """The sum of the five losses, and each of them."""
        losses = model.losses(batch, rngs)
        return sum(losses.values()), losses

    def check(self, metrics: dict[str, float]) -> None:
        """Nothing to find here: annotations are checked when they are read."""

    def eval_step(self, model, batch) -> dict:
        """The detections, and what tells their images apart."""
        found = model.predict(batch["image"], batch["image_shape"])
        return {
            "detections": found._asdict(),
            **{name: value for name, value in batch.items() if name != "image"},
        }

    def summarize(self, outputs: Iterator[dict]) -> dict[str, float]:
        """COCO's twelve numbers for boxes and for masks; writes the predictions if asked to."""
        source, results = self._source("val"), []
        for output in outputs:
            results += coco_metrics.to_results(Detections(**output["detections"]), output, source)
        if self._folder is not None and jax.process_index() == 0:
            coco_metrics.save_predictions(
                self._folder, source, results, max_pictures=self.config.max_pictures
            )
        return {
            f"val/{kind}_{name}": value
            for kind, numbers in coco_metrics.evaluate(source, results).items()
            for name, value in numbers.items()
        }


def _shapes(config) -> tuple[tuple[int, int], ...]:
    """The padded sizes (H, W)."""
    return tuple(map(tuple, config.padded_shapes))
