"""Semantic segmentation: what the training loop needs to know of it."""

import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from vssd_jax.data import ade20k, digits_segmentation, pipeline
from vssd_jax.data.segmentation_pictures import save_prediction
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.tasks import common
from vssd_jax.tasks import segmentation_metrics as metrics

CLASSES = {"ade20k": ade20k.CLASSES, "digits_segmentation": digits_segmentation.CLASSES}


class Segmentation:
    """A segmentor, its batches, its loss and its mIoU at the images' original sizes.

    Args:
      config: of the run.
      tta: also evaluate class probabilities averaged over `config.tta_ratios`, and over mirrored
        images if training mirrors them too (`config.flip`).
      save_predictions: a folder for the predicted label maps and overlays of them; with `tta`
        they are those of the average.
    """

    best_metric = "val/miou"

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        tta: bool = False,
        save_predictions: str | os.PathLike | None = None,
    ):
        self.config = config
        if config.dataset not in CLASSES:
            near = did_you_mean(config.dataset, tuple(CLASSES))
            raise UserError(f"unknown dataset {config.dataset!r}{near}")
        self.table = None
        self._class_names = CLASSES[config.dataset]
        self._tta, self._folder = tta, save_predictions

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
        """The number of classes that the labels come from."""
        return len(self._class_names)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        return common.build(self.config, self.num_classes, rngs)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _source(self, split: str) -> ade20k.ADE20K:
        """The pictures and label maps of "training" or "validation"."""
        folder = self.config.data_dir
        if self.config.dataset == "digits_segmentation":
            folder = digits_segmentation.prepare(folder)
        return ade20k.ADE20K(folder, split, num_classes=self.dataset_classes)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._source("training"))

    def train_batches(self, start_step: int) -> Iterator[dict]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config = self.config
        if self.num_classes != self.dataset_classes:
            raise UserError(
                f"config.num_classes={self.num_classes}, and {config.dataset} has "
                f"{self.dataset_classes} classes"
            )
        transform = functools.partial(
            ade20k.train_transform,
            crop=config.image_size,
            short=config.short_side,
            long=config.long_side,
            scales=tuple(config.scales),
            max_ratio=config.max_class_share,
            flip=config.flip,
        )
        return common.batches(
            pipeline.train_batches,
            self.config,
            self._source("training"),
            transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
        )

    def _eval_options(self) -> dict:
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
    def _eval_source(self) -> ade20k.SizeGrouped:
        return ade20k.SizeGrouped(
            self._source("validation"), self.config.eval_batch_size, **self._eval_options()
        )

    def eval_batches(self) -> Iterator[dict]:
        """This process's share of the evaluation batches; `valid` masks the padding."""
        return common.batches(
            pipeline.eval_batches,
            self.config,
            self._eval_source,
            functools.partial(ade20k.eval_transform, **self._eval_options()),
            batch_size=self.config.eval_batch_size,
        )

    def loss(self, model, batch, *, step, rngs, teacher):
        """Cross-entropy of both heads."""
        outputs = model(batch["image"], rngs)
        return metrics.segmentation_loss(
            outputs, batch["label"], aux_weight=model.config.aux_weight
        )

    def check(self, metrics: dict[str, float]) -> None:
        """Nothing to find here: damaged pictures and labels end a run when they are read."""

    def eval_step(self, model, batch) -> dict:
        """Confusion matrices, and for `save_predictions` the predicted labels."""
        size, shape = batch["size"], batch["label"].shape[1:]
        label = jnp.where(batch["valid"][:, None, None], batch["label"], ade20k.IGNORE)
        views = metrics.model_views(model, batch["images"], flip=self._tta and self.config.flip > 0)
        predicted = metrics.predict_labels(views[:1], size, shape)
        outputs = {"confusion": metrics.confusion_matrix(predicted, label, self.num_classes)}
        if self._tta:
            predicted = metrics.predict_labels(views, size, shape)
            outputs["multi_scale_confusion"] = metrics.confusion_matrix(
                predicted, label, self.num_classes
            )
        if self._folder is not None:
            outputs["predicted"] = predicted.astype(jnp.uint8)
            outputs |= {name: batch[name] for name in ("index", "size", "valid")}
        return outputs

    def summarize(self, outputs: Iterator[dict]) -> dict[str, float]:
        """mIoU, mean and pixel accuracy; writes the predictions if asked to.

        `table` becomes the table of the classes.
        """
        totals = {}
        for output in outputs:
            for name, matrix in output.items():
                if name.endswith("confusion"):
                    totals[name] = totals.get(name, 0) + matrix.astype(np.int64)
            if self._folder is not None and jax.process_index() == 0:
                self._save(output)
        results, tables = {}, []
        for name, total in totals.items():
            prefix = name.removesuffix("confusion")
            numbers = metrics.summarize_confusion(total)
            results |= {f"val/{prefix}{key}": value for key, value in numbers.items()}
            tables.append(metrics.format_per_class(total, self._class_names))
        self.table = tables[-1]
        return results

    def _save(self, output: dict) -> None:
        source = self._source("validation")
        for i in np.flatnonzero(output["valid"]):
            index, (height, width) = output["index"][i], output["size"][i]
            save_prediction(
                self._folder,
                source.names[index],
                source[index]["image"],
                output["predicted"][i, :height, :width],
                self._class_names,
            )
