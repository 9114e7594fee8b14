"""Semantic segmentation."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from vssd_jax.data.decode import UnreadableImage
from vssd_jax.data.grouping import Grouped, by_key
from vssd_jax.data.segmentation_pictures import save_prediction
from vssd_jax.data.segmentation_transforms import (
    IGNORE,
    eval_shapes,
    eval_transform,
    train_transform,
)
from vssd_jax.data.source import SegmentationSource
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError
from vssd_jax.models.family import Segmentor
from vssd_jax.tasks import segmentation_metrics as metrics
from vssd_jax.tasks import segmentation_report
from vssd_jax.tasks.base import BaseTask
from vssd_jax.tasks.pixels import normalized
from vssd_jax.tasks.protocol import Batch, Section


class Segmentation(BaseTask[SegmentationSource]):
    """A segmentor, its batches, its loss and its mIoU at the images' original sizes.

    Args:
      config: of the run.
      tta: also evaluate class probabilities averaged over `config.tta_ratios`, and over mirrored
        images if training mirrors them too (`config.flip`).
      save_predictions: a folder for the predicted label maps and overlays of them; with `tta`
        they are those of the average.
    """

    name = "segmentation"
    best_metric = "val/miou"

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        tta: bool = False,
        save_predictions: str | os.PathLike | None = None,
    ):
        super().__init__(config)
        self._tta, self._folder = tta, save_predictions
        self._save_error: Exception | None = None
        self._class_counts: np.ndarray | None = None
        self._confusion: np.ndarray | None = None  # of the last evaluation
        self._kept = segmentation_report.Kept(0)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """See `Task`; with the numbers that label maps have."""
        reduced = getattr(self.source("val"), "reduce_zero_label", True)
        return super().preprocessing | {"reduce_zero_label": bool(reduced)}

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from `start_step` on, as NumPy arrays.

        Raises a UserError where there is nothing to learn from.
        """
        config = self.config
        if self.num_classes != self.dataset_classes:
            raise UserError(
                f"config.num_classes={self.num_classes}, and {config.dataset} has "
                f"{self.dataset_classes} classes"
            )
        transform = functools.partial(
            train_transform,
            crop=config.image_size,
            short=config.short_side,
            long=config.long_side,
            scales=tuple(config.scales),
            max_ratio=config.max_class_share,
            flip=config.flip,
        )
        self._check_splits()
        for split in ("train", "val"):
            _check_labels(self.source(split), f"{split} label maps of {config.data_dir}")
        numbers = _numbers(self.source("train"))
        return _checked(numbers, self._train_batches(self.decoded("train"), transform, start_step))

    def class_counts(self) -> np.ndarray:
        """(pictures, classes) numbers of pixels in the training label maps, all of which it reads.

        None of a label map that cannot be read.
        """
        if self._class_counts is None:
            source = self.source("train")
            counts = np.zeros((len(source), self.num_classes), np.int64)
            for index in tqdm(range(len(source)), "counting classes", disable=not is_main()):
                try:
                    label = source[index]["label"]
                except (UnreadableImage, OSError):
                    continue
                counts[index] = np.bincount(label.ravel(), minlength=256)[: self.num_classes]
            self._class_counts = counts
        return self._class_counts

    def _eval_options(self) -> dict[str, Any]:
        config = self.config
        # The single scale comes first.
        others = [ratio for ratio in config.tta_ratios if ratio != 1] if self._tta else []
        return {
            "short": config.short_side,
            "long": config.long_side,
            "ratios": (1.0, *others),
            "multiple": config.size_multiple,
        }

    @functools.cached_property
    def _eval_source(self) -> Grouped:
        source, options = self.source("val"), self._eval_options()
        sizes: list[tuple[int, int] | None] = []
        for index in range(len(source)):
            try:
                sizes.append(source.size(index))
            except (UnreadableImage, OSError):
                sizes.append(None)
        known = [size for size in sizes if size is not None]
        if not known:
            raise UserError(f"no label map for evaluation in {self.config.data_dir} can be read")
        # A picture that cannot be read is replaced, and may be in any batch.
        filled = np.array([size or known[0] for size in sizes])
        groups = by_key(eval_shapes(size, **options) for size in filled)
        return Grouped(self.decoded("val"), groups, filled, self.config.eval_batch_size)

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation batches; `valid` masks the padding."""
        transform = functools.partial(eval_transform, **self._eval_options())
        return self._eval_batches(self._eval_source, transform)

    def loss(
        self,
        model: Segmentor,
        batch: Batch,
        *,
        step: jax.Array,
        rngs: nnx.Rngs,
        teacher: Callable[..., Any],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of both heads."""
        outputs = model(normalized(batch["image"], batch["image_shape"]), rngs)
        loss, parts = metrics.segmentation_loss(
            outputs,
            batch["label"],
            aux_weight=model.aux_weight,
            class_weights=self.class_weights,
        )
        return loss, {**parts, "unreadable": batch["replaced"].mean()}

    def eval_step(self, model: Segmentor, batch: Batch) -> dict[str, jax.Array]:
        """Confusion matrices, and of each picture its IoU and predicted labels.

        The labels are small ones, for the report, and for `save_predictions` all.
        """
        size, shape = batch["size"], batch["label"].shape[1:]
        replaced = batch["replaced"].astype(bool)
        valid = batch["valid"] & ~replaced
        label = jnp.where(valid[:, None, None], batch["label"], IGNORE)
        images = {name: normalized(pixels) for name, pixels in batch["images"].items()}
        views = metrics.model_views(model, images, flip=self._tta and self.config.flip > 0)
        predicted = metrics.predict_labels(views[:1], size, shape)
        confusions = metrics.picture_confusions(predicted, label, self.num_classes)
        outputs = {
            "confusion": confusions.sum(0),
            "unreadable": jnp.sum(batch["valid"] & replaced),
            "index": batch["index"],
            "size": batch["size"],
            "valid": valid,
        }
        if self._tta:
            predicted = metrics.predict_labels(views, size, shape)
            confusions = metrics.picture_confusions(predicted, label, self.num_classes)
            outputs["multi_scale_confusion"] = confusions.sum(0)
        predicted = predicted.astype(jnp.uint8)
        step = segmentation_report.stride(shape)
        outputs["picture_iou"] = metrics.picture_iou(confusions)
        outputs["small"], outputs["step"] = predicted[:, ::step, ::step], jnp.int32(step)
        if self._folder is not None:
            outputs["predicted"] = predicted
        return outputs

    def summarize(self, outputs: Iterator[dict[str, Any]]) -> dict[str, float]:
        """mIoU, mean and pixel accuracy; writes the predictions if asked to.

        `table` becomes the table of the classes.

        Raises a UserError if too many pictures are unreadable.
        """
        totals: dict[str, np.ndarray] = {}
        unreadable = 0
        self._kept = segmentation_report.Kept(len(self.source("val")))
        for output in outputs:
            unreadable += int(output["unreadable"])
            self._kept.add(output)
            for name, matrix in output.items():
                if name.endswith("confusion"):
                    totals[name] = totals.get(name, 0) + matrix.astype(np.int64)
            # The metrics are worth more than the pictures, and come first.
            if self._folder is not None and self._save_error is None and is_main():
                try:
                    self._save(self._folder, output)
                except Exception as error:
                    self._save_error = error
        share = unreadable / len(self.source("val"))
        self._check_unreadable(share, "the pictures for evaluation")
        results: dict[str, float] = {"val/unreadable": share}
        for name, total in totals.items():
            prefix = name.removesuffix("confusion")
            if undecided := int(total[:, -1].sum()):
                say(
                    f"warning: {undecided} of {total.sum()} pixels have no most probable class "
                    "(equal scores, or scores that are not finite); they count as wrong"
                )
            numbers = metrics.summarize_confusion(total)
            results |= {f"val/{prefix}{key}": value for key, value in numbers.items()}
            self.table = metrics.format_per_class(total, self.class_names)
            self._confusion = total
        return results

    def report(self) -> list[Section]:
        """The data, IoU of the classes, which was taken for which, and pictures."""
        sections = super().report()
        if self._confusion is not None:
            sections += segmentation_report.sections(
                self.source("val"),
                self.decoded("val"),
                self._confusion,
                self._kept,
                self._shown_names(),
            )
        return sections

    def write_predictions(self) -> None:
        """Raises what kept `summarize` from writing the predictions."""
        if self._save_error is not None:
            error = self._save_error
            if not isinstance(error, UserError):
                raise UserError(f"{self._folder} cannot be written: {error}") from error
            raise error

    def _save(self, folder: str | os.PathLike, output: dict[str, Any]) -> None:
        source, decoded = self.source("val"), self.decoded("val")
        for i in np.flatnonzero(output["valid"]):
            index, (height, width) = output["index"][i], output["size"][i]
            save_prediction(
                folder,
                source.image_names[index],
                decoded[index]["image"],
                output["predicted"][i, :height, :width],
                self.class_names,
                reduce_zero_label=getattr(source, "reduce_zero_label", True),
            )


def _numbers(source: SegmentationSource) -> str:
    """What the numbers of the label maps mean."""
    if getattr(source, "reduce_zero_label", True):
        return "label 0 is no class and ignored, 1 is the first class"
    return "label 0 is the first class (config.reduce_zero_label=False)"


def _checked(numbers: str, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Raises a UserError if nothing is to be learned from the first batch."""
    first = next(batches)
    if (first["label"] == IGNORE).all():
        raise UserError(f"every pixel of the first batch is ignored: {numbers}")
    yield first
    yield from batches


def _check_labels(source: SegmentationSource, what: str) -> None:
    """Raises a UserError if the label maps have fewer than two classes in all.

    It reads only until it has found two.
    """
    classes: set[int] = set()
    for index in range(len(source)):
        try:
            classes |= set(np.unique(source[index]["label"]).tolist()) - {IGNORE}
        except (UnreadableImage, OSError):
            continue
        if len(classes) > 1:
            return
    if not classes:
        raise UserError(f"every pixel of the {what} is ignored: {_numbers(source)}")
    raise UserError(
        f"all pixels of the {what} that count are of one class, "
        f"{source.class_names[classes.pop()]!r}: there is nothing to tell apart; "
        f"{_numbers(source)}"
    )
