"""Image classification: what the training loop needs to know of it."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

from vssd_jax.data import pipeline
from vssd_jax.errors import UserError
from vssd_jax.models import registry


class Classification:
    """A classifier, its batches, its loss and its top-1 and top-5 accuracy."""

    best_metric = "val/top1"

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        if config.dataset == "digits":
            from vssd_jax.data import digits

            self.num_classes = digits.NUM_CLASSES
            self._load = functools.partial(digits.load, config.data_dir)
            self._splits = ("train", "test")
            self._train_transform = functools.partial(
                digits.train_transform, size=config.image_size
            )
            self._eval_transform = functools.partial(digits.eval_transform, size=config.image_size)
        else:
            near = registry.did_you_mean(config.dataset, ["digits"])
            raise UserError(f"unknown dataset {config.dataset!r}{near}")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        config = self.config
        return registry.build(
            config.model,
            num_classes=self.num_classes,
            dtype=jnp.dtype(config.dtype),
            implementation=config.implementation,
            remat=config.remat,
            rngs=rngs,
            **config.model_options,
        )

    @functools.cached_property
    def _train_source(self):
        return self._load(self._splits[0])

    @functools.cached_property
    def _eval_source(self):
        return self._load(self._splits[1])

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._train_source)

    def _batches(self, make, source, transform, **options) -> Iterator[dict]:
        return make(
            source,
            transform,
            num_workers=self.config.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **options,
        )

    def train_batches(self, start_step: int) -> Iterator[dict]:
        """This process's share of the batches from `start_step` on, as NumPy arrays."""
        return self._batches(
            pipeline.train_batches,
            self._train_source,
            self._train_transform,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
        )

    def eval_batches(self) -> Iterator[dict]:
        """This process's share of the evaluation batches; `valid` masks the padding."""
        return self._batches(
            pipeline.eval_batches,
            self._eval_source,
            self._eval_transform,
            batch_size=self.config.eval_batch_size,
        )

    def loss(self, model, batch, *, step, rngs, teacher):
        """Cross-entropy with smoothed labels, and MESA's distance to the averaged model."""
        config = self.config
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch["label"], self.num_classes), config.label_smoothing
        )
        logits = model(batch["image"], rngs)
        loss, metrics = soft_cross_entropy(logits, targets), {}
        if config.mesa:
            steps = self.train_size // config.batch_size
            start = round(config.mesa_start_epoch * steps)
            metrics["mesa"] = mesa_loss(logits, teacher, batch["image"], active=step >= start)
            loss += config.mesa * metrics["mesa"]
        return loss, metrics

    def eval_step(self, model, batch) -> dict:
        """Sums over the valid images of a batch."""
        logits = model(batch["image"])
        valid = batch["valid"]
        rank = label_rank(logits, batch["label"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {
            "top1": jnp.sum((rank < 1) & valid),
            "top5": jnp.sum((rank < 5) & valid),
            "loss": jnp.sum(jnp.where(valid, losses, 0)),
            "count": jnp.sum(valid),
        }

    def summarize(self, outputs: list[dict]) -> dict[str, float]:
        """The metrics of an evaluation, from the host copies of all `eval_step` outputs."""
        sums = {name: sum(float(output[name]) for output in outputs) for name in outputs[0]}
        count = sums.pop("count")
        return {f"val/{name}": value / count for name, value in sums.items()}


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
