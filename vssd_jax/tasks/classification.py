"""Image classification: what the training loop needs to know of it."""

import collections
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from vssd_jax.data import pipeline
from vssd_jax.data.decode import DecodedSource
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.tasks import common, device_transforms
from vssd_jax.tasks.mixup import mixup_cutmix

DATASETS = ("digits", "imagenet2012")


class Classification:
    """A classifier, its batches, its loss and its top-1 and top-5 accuracy."""

    best_metric = "val/top1"
    table = None

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        if config.dataset not in DATASETS:
            near = did_you_mean(config.dataset, DATASETS)
            raise UserError(f"unknown dataset {config.dataset!r}{near}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.config.image_size,) * 2

    @property
    def num_classes(self) -> int:
        """Of `config.num_classes`, or else of the dataset."""
        if self.config.num_classes is not None:
            return self.config.num_classes
        return self.dataset_classes

    @property
    def dataset_classes(self) -> int:
        """The number of classes that the labels come from."""
        return self._pictures("val").num_classes

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        return common.build(self.config, self.num_classes, rngs)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _pictures(self, split: str):
        """The encoded pictures of "train" or "val"."""
        if self.config.dataset == "digits":
            from vssd_jax.data.digits import Digits

            return Digits(self.config.data_dir, split)
        from vssd_jax.data.imagenet import open_imagenet

        return open_imagenet(self.config.data_dir, split)

    def _transforms(self):
        """For training and for evaluation."""
        size = self.config.image_size
        if self.config.dataset == "digits":
            from vssd_jax.data import digits

            return digits.TrainTransform(size), digits.EvalTransform(size)
        from vssd_jax.data.transforms import EvalTransform, TrainTransform

        return TrainTransform(size, **self.config.augmentation), EvalTransform(size)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._pictures("train"))

    def train_batches(self, start_step: int) -> Iterator[dict]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        config = self.config
        source = DecodedSource(self._pictures("train"))
        if config.cache_decoded:
            from vssd_jax.data.cached import CachedSource

            source = CachedSource(source, config.cache_decoded, num_workers=config.num_workers)
        return common.batches(
            pipeline.train_batches,
            self.config,
            source,
            self._transforms()[0],
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
        )

    def eval_batches(self) -> Iterator[dict]:
        """This process's share of the evaluation batches; `valid` masks the padding."""
        return common.batches(
            pipeline.eval_batches,
            self.config,
            DecodedSource(self._pictures("val")),
            self._transforms()[1],
            batch_size=self.config.eval_batch_size,
        )

    def loss(self, model, batch, *, step, rngs, teacher):
        """Cross-entropy with mixed and smoothed labels, and MESA's to the averaged model."""
        config = self.config
        images = device_transforms.normalize(batch["image"])
        if "erase" in batch:
            images = device_transforms.erase(rngs.erase(), images, batch["erase"])
        images, targets = mixup_cutmix(
            rngs.mixup(),
            images,
            batch["label"],
            num_classes=self.num_classes,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            switch_prob=config.cutmix_probability,
            smoothing=config.label_smoothing,
        )
        logits = model(images, rngs)
        loss = soft_cross_entropy(logits, targets)
        metrics = {"unreadable": batch["replaced"].mean()}
        if config.mesa:
            start = round(config.mesa_start_epoch * (self.train_size // config.batch_size))
            metrics["mesa"] = mesa_loss(logits, teacher, images, active=step >= start)
            loss += config.mesa * metrics["mesa"]
        return loss, metrics

    def check(self, metrics: dict[str, float]) -> None:
        """Raises a UserError if the averages of the last steps show broken data."""
        self._check_unreadable(metrics["train/unreadable"], "the last pictures")

    def _check_unreadable(self, share: float, pictures: str) -> None:
        if share > self.config.max_unreadable:
            raise UserError(
                f"{share:.1%} of {pictures} of {self.config.data_dir} are unreadable, more than "
                f"config.max_unreadable={self.config.max_unreadable:.1%}; check the files"
            )

    def eval_step(self, model, batch) -> dict:
        """Sums over the images of a batch, without padding and unreadable ones."""
        logits = model(device_transforms.normalize(batch["image"]))
        replaced = batch["replaced"].astype(bool)  # its neighbour counts in its own place
        valid = batch["valid"] & ~replaced
        rank = label_rank(logits, batch["label"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "top1": jnp.sum((rank < 1) & valid),
            "top5": jnp.sum((rank < 5) & valid),
            "loss": jnp.sum(jnp.where(valid, losses, 0)),
            "count": jnp.sum(valid),
            "unreadable": jnp.sum(batch["valid"] & replaced),
        }

    def summarize(self, outputs: Iterator[dict]) -> dict[str, float]:
        """The metrics of an evaluation, from the host copies of all `eval_step` outputs.

        Raises a UserError if too many pictures are unreadable.
        """
        sums = collections.Counter()
        for output in outputs:
            sums.update({name: float(value) for name, value in output.items()})
        count, unreadable = sums.pop("count"), sums.pop("unreadable")
        share = unreadable / (count + unreadable)
        self._check_unreadable(share, "the pictures for evaluation")
        means = {f"val/{name}": value / count for name, value in sums.items()}
        return {**means, "val/unreadable": share}


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of (B, classes) logits with target distributions."""
    return optax.softmax_cross_entropy(logits, targets).mean()


def mesa_loss(logits, teacher, images, *, active) -> jax.Array:
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
    """How many classes score above the label's; (B, classes), (B,) -> (B,)."""
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return jnp.sum(logits > score, axis=1)
