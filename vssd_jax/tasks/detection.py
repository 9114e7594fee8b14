"""Object detection and instance segmentation."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import ml_collections
import numpy as np
from flax import nnx

from vssd_jax.config import total_steps
from vssd_jax.data.detection_transforms import eval_transform, train_transform
from vssd_jax.data.grouping import GroupedByOrientation
from vssd_jax.data.source import DetectionSource
from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.models.family import Detections, Detector
from vssd_jax.tasks import coco_metrics
from vssd_jax.tasks.base import BaseTask
from vssd_jax.tasks.protocol import Batch


class Detection(BaseTask[DetectionSource]):
    """A detector, its batches, its losses and its mean average precision.

    Args:
      config: of the run.
      save_predictions: a folder for the detections of an evaluation and pictures of them.
    """

    name = "detection"
    best_metric = "val/box_map"

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        save_predictions: str | os.PathLike | None = None,
    ):
        super().__init__(config)
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

    def _open(self, split: str) -> DetectionSource:
        source = super()._open(split)
        if problems := source.describe_problems():
            say(f"left out of {problems}")
        return source

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config, source = self.config, self.source("train")
        if not np.array_equal(source.category_ids, self.source("val").category_ids):
            raise UserError(
                f"the categories of the training images of {config.dataset} in {config.data_dir} "
                "are not those of the evaluation images; give both annotation files the same"
            )
        steps = total_steps(config, len(source) // config.batch_size)
        grouped = GroupedByOrientation(source, config.batch_size, seed=config.seed, steps=steps)
        transform = functools.partial(
            train_transform,
            short_sides=tuple(config.short_sides),
            long_side=config.long_side,
            crop=config.crop,
            shapes=_shapes(config),
            max_objects=config.max_objects,
            flip=config.flip,
        )
        return self._train_batches(grouped, transform, start_step, shuffle=False)

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation batches; `valid` masks the padding images."""
        config = self.config
        transform = functools.partial(
            eval_transform,
            short_side=max(config.short_sides),
            long_side=config.long_side,
            shapes=None if config.exact_padding else _shapes(config),
        )
        grouped = GroupedByOrientation(self.source("val"), config.eval_batch_size)
        return self._eval_batches(grouped, transform)

    def loss(
        self,
        model: Detector,
        batch: Batch,
        *,
        step: jax.Array,
        rngs: nnx.Rngs,
        teacher: Callable[..., Any],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of the five losses, and each of them."""
        losses = model.losses(batch, rngs)
        return cast(jax.Array, sum(losses.values())), losses

    def eval_step(self, model: Detector, batch: Batch) -> dict[str, Any]:
        """The detections, and the rest of the batch, which says of what images they are."""
        found = model.predict(batch["image"], batch["image_shape"])
        return {
            "detections": found._asdict(),
            **{name: value for name, value in batch.items() if name != "image"},
        }

    def summarize(self, outputs: Iterator[dict[str, Any]]) -> dict[str, float]:
        """COCO's twelve numbers for boxes and for masks; writes the predictions if asked to."""
        source = self.source("val")
        results: list[dict[str, Any]] = []
        nonfinite = 0
        for output in outputs:
            lost = ~np.isfinite(output["detections"]["scores"]).all(1)
            nonfinite += int(np.count_nonzero(lost & output["valid"]))
            results += coco_metrics.to_results(Detections(**output["detections"]), output, source)
        if nonfinite:
            say(
                f"warning: the outputs for {nonfinite} of {len(source)} images are not finite; "
                "nothing counts as found in them"
            )
        if self._folder is not None and jax.process_index() == 0:
            coco_metrics.save_predictions(
                self._folder, source, results, max_pictures=self.config.max_pictures
            )
        return {
            f"val/{kind}_{name}": value
            for kind, numbers in coco_metrics.evaluate(source, results).items()
            for name, value in numbers.items()
        }


def _shapes(config: ml_collections.ConfigDict) -> tuple[tuple[int, int], ...]:
    """The padded sizes (H, W)."""
    return tuple((height, width) for height, width in config.padded_shapes)
