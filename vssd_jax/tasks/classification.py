"""Image classification."""

import collections
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vssd_jax.data import normalization
from vssd_jax.data.cached import CachedSource
from vssd_jax.data.classification_transforms import EvalTransform, TrainTransform
from vssd_jax.data.source import LabelledSource, Source
from vssd_jax.distributed import say
from vssd_jax.models.family import Classifier
from vssd_jax.tasks import report_parts as parts
from vssd_jax.tasks.base import BaseTask
from vssd_jax.tasks.mixup import mixup_cutmix
from vssd_jax.tasks.protocol import Batch, Confusion, Gallery, Picture, Section, Table
from vssd_jax.tasks.random_erasing import erase

# Of each picture of an evaluation, for the report.
_EACH = ("label", "predicted", "confidence", "counted")


class Classification(BaseTask[LabelledSource]):
    """A classifier, its batches, its loss and its top-1 and top-5 accuracy."""

    name = "classification"
    best_metric = "val/top1"
    _last: dict[str, np.ndarray] | None = None  # of each picture of the last evaluation

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.config.image_size, self.config.image_size

    def _transforms(self) -> tuple[Callable, Callable]:
        """For training and for evaluation."""
        config = self.config
        if self.dataset.transforms is not None:
            return self.dataset.transforms(config)
        size = config.image_size
        return TrainTransform(size, **config.augmentation), EvalTransform(size, config.eval_crop)

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config = self.config
        self._check_splits()
        source: Source = self.decoded("train")
        if config.cache_decoded:
            source = CachedSource(source, config.cache_decoded, num_workers=config.num_workers)
        return self._train_batches(source, self._transforms()[0], start_step)

    def class_counts(self) -> np.ndarray:
        """(samples, classes) of the training pictures: 1 for the label of each."""
        source = self.source("train")
        labels = getattr(source, "labels", None)
        if labels is None:
            labels = [int(source[index]["label"]) for index in range(len(source))]
        return np.eye(self.num_classes, dtype=np.uint8)[np.asarray(labels)]

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation batches; `valid` masks the padding."""
        return self._eval_batches(self.decoded("val"), self._transforms()[1])

    def normalize(self, images: jax.Array) -> jax.Array:
        """The pictures of a batch as the model takes them."""
        return normalization.normalize(images)

    def augment(self, batch: Batch, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """A training batch as normalised, erased and mixed images and their target distributions.

        Returns:
          (B, H, W, 3) images and (B, num_classes) float32 targets.
        """
        config = self.config
        images = self.normalize(batch["image"])
        if "erase" in batch:
            images = erase(rngs.erase(), images, batch["erase"])
        return mixup_cutmix(
            rngs.mixup(),
            images,
            batch["label"],
            num_classes=self.num_classes,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            switch_prob=config.cutmix_probability,
            smoothing=config.label_smoothing,
        )

    def loss(
        self,
        model: Classifier,
        batch: Batch,
        *,
        step: jax.Array,
        rngs: nnx.Rngs,
        teacher: Callable[..., Any],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy with mixed and smoothed labels, and MESA's to the averaged model."""
        config = self.config
        images, targets = self.augment(batch, rngs)
        logits = model(images, rngs)
        loss = soft_cross_entropy(logits, targets, self.class_weights)
        metrics = {"unreadable": batch["replaced"].mean()}
        if config.mesa:
            start = round(config.mesa_start_epoch * (self.train_size // config.batch_size))
            metrics["mesa"] = mesa_loss(logits, teacher, images, active=step >= start)
            loss += config.mesa * metrics["mesa"]
        return loss, metrics

    def eval_step(self, model: Classifier, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the images of a batch, without padding and unreadable ones.

        And of each image its label, the predicted class (`num_classes` where none is first), the
        probability of that, and whether it counts, for the report.
        """
        logits = model(self.normalize(batch["image"]))
        replaced = batch["replaced"].astype(bool)  # its neighbour counts in its own place
        valid = batch["valid"] & ~replaced
        rank = label_rank(logits, batch["label"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "top1": jnp.sum((rank < 1) & valid),
            "top5": jnp.sum((rank < 5) & valid),
            "loss": jnp.sum(jnp.where(valid, losses, 0)),
            "count": jnp.sum(valid),
            "nonfinite": jnp.sum(valid & ~jnp.isfinite(logits).all(1)),
            "unreadable": jnp.sum(batch["valid"] & replaced),
            "label": batch["label"],
            "predicted": first_class(logits),
            "confidence": jax.nn.softmax(logits.astype(jnp.float32)).max(1),
            "counted": valid,
        }

    def summarize(self, outputs: Iterator[dict[str, Any]]) -> dict[str, float]:
        """The metrics of an evaluation, from the host copies of all `eval_step` outputs.

        Raises a UserError if too many pictures are unreadable.
        """
        sums: collections.Counter = collections.Counter()
        each: dict[str, list[np.ndarray]] = {name: [] for name in _EACH}
        for output in outputs:
            sums.update({name: float(value) for name, value in output.items() if name not in each})
            for name, values in each.items():
                values.append(output[name])
        # Batches come in the order of the source: a picture's place is its number.
        self._last = {name: np.concatenate(values) for name, values in each.items()}
        count, unreadable = sums.pop("count"), sums.pop("unreadable")
        if nonfinite := int(sums.pop("nonfinite")):
            say(
                f"warning: the scores of {nonfinite} of {count:.0f} pictures are not finite; they "
                "count as wrong"
            )
        share = unreadable / (count + unreadable)
        self._check_unreadable(share, "the pictures for evaluation")
        means = {f"val/{name}": value / count for name, value in sums.items()}
        return {**means, "val/unreadable": share}

    def report(self) -> list[Section]:
        """The data, the classes, which was taken for which, and pictures."""
        sections = super().report()
        if self._last is None:
            return sections
        names = self._shown_names()
        columns = [*names, "no class"]
        counted = np.flatnonzero(self._last["counted"])
        label, predicted, confidence = (
            self._last[name][counted] for name in ("label", "predicted", "confidence")
        )
        right = label == predicted
        confusion = parts.pairs(label, predicted)
        totals = np.bincount(label, minlength=len(names))
        hits = np.bincount(label[right], minlength=len(names))
        accuracy = np.divide(hits, totals, out=np.full(len(names), np.nan), where=totals > 0)
        others = parts.taken_for(confusion, columns, len(names))
        order = np.lexsort((-totals, accuracy))  # not-a-number comes last
        rows = [(names[i], int(totals[i]), float(accuracy[i]), others[i]) for i in order]
        wrong = np.flatnonzero(~right)
        worst = wrong[np.argsort(-np.nan_to_num(confidence[wrong]), kind="stable")]

        def pictures(chosen: np.ndarray | list[int]) -> list[Picture]:
            decoded, shown = self.decoded("val"), []
            for i in chosen:
                index = int(counted[i])
                element = decoded[index]
                if element["replaced"]:  # it could be read a moment ago
                    continue
                lines = [f"predicted: {columns[predicted[i]]}"]
                if predicted[i] < len(names):
                    lines[0] += f" ({confidence[i]:.0%})"
                lines.append("right" if right[i] else f"class: {names[label[i]]}")
                name = self.source("val")[index].get("name")
                lines.append(f"number {index}" if name is None else os.path.basename(str(name)))
                shown.append(Picture([("", parts.reduced(element["image"]))], lines))
            return shown

        sections += [
            Table(
                "Classes",
                ("class", "pictures", "accuracy", "most often taken for"),
                rows,
                "The least accurate first.",
            ),
            Confusion(
                "Confusion matrix",
                names,
                columns if (predicted == len(names)).any() else names,
                confusion,
                "Pictures by class (rows) and predicted class (columns). No class: equal scores, "
                "or scores that are not finite.",
            ),
            Gallery(
                "Worst mistakes",
                pictures(worst[: parts.WORST]),
                f"{len(wrong):,} of {len(counted):,} pictures are wrong; these with the highest "
                "probability."
                if len(wrong)
                else f"None: all {len(counted):,} pictures are right.",
            ),
            Gallery(
                "A few predictions",
                pictures(parts.spread(len(counted))),
                "At equal distances through the pictures for evaluation.",
            ),
        ]
        return sections


def soft_cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: np.ndarray | None = None
) -> jax.Array:
    """Mean cross-entropy of (B, classes) logits with target distributions.

    Each class counts by its weight, if there are (classes,) weights.
    """
    if weights is not None:
        targets = targets * weights
    return optax.softmax_cross_entropy(logits, targets).mean()


def mesa_loss(
    logits: jax.Array, teacher: Callable[..., Any], images: jax.Array, *, active: jax.Array
) -> jax.Array:
    """Cross-entropy to the averaged model's softmax (MESA), 0 while not `active`.

    The averaged model runs only while active.
    """
    targets = jax.lax.cond(
        active,
        lambda: jax.nn.softmax(teacher(images)).astype(logits.dtype),
        lambda: jnp.zeros_like(logits),
    )
    return soft_cross_entropy(logits, jax.lax.stop_gradient(targets))


def label_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many other classes do not score below the label's; (B, classes), (B,) -> (B,).

    The greatest number, if a score of the picture is not finite.
    """
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = jnp.sum(logits >= score, axis=1) - 1
    return jnp.where(jnp.isfinite(logits).all(1), rank, jnp.iinfo(rank.dtype).max)


def first_class(logits: jax.Array) -> jax.Array:
    """(B, classes) -> (B,) int32: the class that scores above all others.

    The number of classes where there is none, or a score of the picture is not finite.
    """
    best = logits.max(1, keepdims=True)
    alone = ((logits == best).sum(1) == 1) & jnp.isfinite(logits).all(1)
    return jnp.where(alone, jnp.argmax(logits, 1), logits.shape[1]).astype(jnp.int32)
