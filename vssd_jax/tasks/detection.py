"""Object detection and instance segmentation."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from vssd_jax.data.balance import sample_weights
from vssd_jax.data.detection_transforms import eval_transform, input_shape, train_transform
from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.grouping import Grouped, ShuffledByShape, by_key
from vssd_jax.data.source import DetectionSource
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError
from vssd_jax.models.family import Detections, Detector
from vssd_jax.tasks import coco_metrics, detection_report
from vssd_jax.tasks.base import BaseTask
from vssd_jax.tasks.pixels import normalized
from vssd_jax.tasks.protocol import Batch, Section


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
        self._results: list[dict[str, Any]] = []
        self._masks_left_out = False
        self._without: set[int | str] = set()
        self._by_class: dict[str, np.ndarray] | None = None  # of the last evaluation
        if save_predictions is not None:
            self._folder = pathlib.Path(save_predictions)
            try:  # better now than after the evaluation
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self._folder} cannot be written: {error.strerror}") from error

    def _open(self, split: str) -> DetectionSource:
        source = super()._open(split)
        without = int(source.object_counts.sum() - source.mask_counts.sum())
        if without:
            say(
                f"{without} of {source.object_counts.sum()} objects of {split} have a box and no "
                "mask: masks are neither learned from them nor judged by them"
            )
        return source

    def source(self, split: str) -> DetectionSource:
        """The samples of "train" or "val"; categories are told apart by their names."""
        opened = split in self._sources
        source = super().source(split)
        if not opened and split == "val" and "train" in self._sources:
            source.relabel(self._sources["train"].class_names)
        return source

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the categories, of those for training if these are open."""
        if self.dataset.class_names is None and "train" in self._sources:
            return self._sources["train"].class_names
        return super().class_names

    @property
    def preprocessing(self) -> dict[str, Any]:
        """See `Task`; with whether there was no mask to learn from."""
        masks = bool(self.source("train").mask_counts.any())
        return super().preprocessing | {"boxes_only": not masks}

    def align_classes(self, names: Sequence[str]) -> None:
        """Numbers the categories for evaluation as weights do that have the same ones."""
        source = self.source("val")
        if self.dataset.class_names is None and set(source.class_names) <= set(names):
            source.relabel(names)

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config, source = self.config, self.source("train")
        self._check_splits()
        self._say_losses(source)
        draw = functools.partial(
            draw_geometry,
            short_sides=tuple(config.short_sides),
            long_side=config.long_side,
            crop=config.crop,
            flip=config.flip,
        )
        grouped = ShuffledByShape(
            self.decoded("train"),
            source.sizes,
            config.batch_size,
            seed=config.seed,
            steps=self._total_steps(),
            draw=draw,
            shapes=_shapes(config),
            weights=sample_weights(self.class_counts() > 0) if config.balanced_sampling else None,
        )
        say(grouped.describe())
        transform = functools.partial(
            train_transform, draw=draw, max_objects=config.max_objects
        )
        return self._train_batches(grouped, transform, start_step, shuffle=False)

    def _say_losses(self, source: DetectionSource) -> None:
        """Says what of the training images is not seen."""
        limit = self.config.max_objects
        over = source.object_counts[source.object_counts > limit]
        if len(over):
            say(
                f"{len(over)} training images have more than config.max_objects={limit} objects; "
                f"{int((over - limit).sum())} objects beyond the first {limit} of each are left out"
            )

    def class_counts(self) -> np.ndarray:
        """(images, classes) numbers of objects in the training images."""
        return self.source("train").class_counts

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation batches; `valid` masks the padding images."""
        config = self.config
        options = {
            "short_side": max(config.short_sides),
            "long_side": config.long_side,
            "shapes": None if config.exact_padding else _shapes(config),
        }
        transform = functools.partial(eval_transform, **options)
        sizes = self.source("val").sizes
        groups = by_key(input_shape(size, **options) for size in map(tuple, sizes.tolist()))
        grouped = Grouped(self.decoded("val"), groups, sizes, config.eval_batch_size)
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
        weights = self.class_weights
        batch = batch | {"image": normalized(batch["image"], batch["image_shape"])}
        if weights is not None:
            batch["class_weights"] = jnp.asarray(weights)
        losses = model.losses(batch, rngs)
        counts = {
            "unreadable": batch["replaced"].mean(),
            "masks_left_out": batch["masks_left_out"].mean(),
        }
        return cast(jax.Array, sum(losses.values())), losses | counts

    def check(self, metrics: dict[str, float]) -> None:
        """See `Task`; and says, once, that masks are left out."""
        super().check(metrics)
        if metrics.get("train/masks_left_out", 0) > 0 and not self._masks_left_out:
            self._masks_left_out = True
            say(
                "warning: the masks of some training images cover them more than eight times, and "
                "the last of these masks are not learned from; train/masks_left_out counts them"
            )

    def eval_step(self, model: Detector, batch: Batch) -> dict[str, Any]:
        """The detections, and the rest of the batch, which says of what images they are."""
        images = normalized(batch["image"], batch["image_shape"])
        found = model.predict(images, batch["image_shape"])
        return {
            "detections": found._asdict(),
            **{name: value for name, value in batch.items() if name != "image"},
        }

    def summarize(self, outputs: Iterator[dict[str, Any]]) -> dict[str, float]:
        """COCO's twelve numbers for boxes, and for masks if there are any.

        Raises a UserError if too many pictures are unreadable.
        """
        source = self.source("val")
        results: list[dict[str, Any]] = []
        nonfinite, unreadable = 0, set()
        for output in outputs:
            replaced = output["valid"] & output["replaced"].astype(bool)
            unreadable |= {source.image_ids[index] for index in output["index"][replaced]}
            output["valid"] = output["valid"] & ~replaced
            lost = ~np.isfinite(output["detections"]["scores"]).all(1)
            nonfinite += int(np.count_nonzero(lost & output["valid"]))
            results += coco_metrics.to_results(Detections(**output["detections"]), output, source)
        if nonfinite:
            say(
                f"warning: the outputs for {nonfinite} of {len(source)} images are not finite; "
                "nothing counts as found in them"
            )
        share = len(unreadable) / len(source)
        self._check_unreadable(share, "the pictures for evaluation")
        self._results, self._without = results, unreadable
        self._by_class = {}
        scores = coco_metrics.evaluate(
            source,
            results,
            without=unreadable,
            masks=bool(source.mask_counts.any()),
            by_class=self._by_class,
        )
        return {"val/unreadable": share} | {
            f"val/{kind}_{name}": value
            for kind, numbers in scores.items()
            for name, value in numbers.items()
        }

    def report(self) -> list[Section]:
        """The data, AP of the classes, which was taken for which, and pictures."""
        sections = super().report()
        if self._by_class is not None:
            sections += detection_report.sections(
                self.source("val"),
                self.decoded("val"),
                self._results,
                self._by_class,
                without=self._without,
            )
        return sections

    def write_predictions(self) -> None:
        """Writes the detections of the last evaluation and pictures of them, if asked to."""
        if self._folder is not None and is_main():
            coco_metrics.save_predictions(
                self._folder,
                self.source("val"),
                self.decoded("val"),
                self._results,
                max_pictures=self.config.max_pictures,
            )


def _shapes(config: ml_collections.ConfigDict) -> tuple[tuple[int, int], ...]:
    """The padded sizes (H, W)."""
    return tuple((height, width) for height, width in config.padded_shapes)
