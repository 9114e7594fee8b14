"""What the tasks share: the dataset, the model and the batches of a config."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from vssd_jax.config import DATASET_FIELDS, PREPROCESSING, total_steps
from vssd_jax.data import pipeline, registry
from vssd_jax.data.balance import LIMIT, Resampled, balanced_weights, sample_weights
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD
from vssd_jax.data.source import LabelledSource, Source
from vssd_jax.distributed import say
from vssd_jax.errors import UserError, describe_difference
from vssd_jax.known_classes import readable
from vssd_jax.models import family
from vssd_jax.models.layers import batch_norm_groups
from vssd_jax.tasks.protocol import Batch, Section, Table

SourceT = TypeVar("SourceT", bound=LabelledSource)


class BaseTask(Generic[SourceT]):
    """A task on a registered dataset; what remains of `Task` is left to the subclasses.

    Args:
      config: of the run.

    Raises:
      UserError: `config.dataset` is unknown or for another task, or reads no such fields.
    """

    name: str  # as in `config.task` and `Dataset.task`
    best_metric: str
    table: str | None = None

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        self.dataset = registry.find(config.dataset, self.name)
        for field in DATASET_FIELDS:
            if config.get(field) is not None and field not in self.dataset.fields:
                raise UserError(f"config.{field} is not for the dataset {config.dataset!r}")
        self._sources: dict[str, SourceT] = {}

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width for which multiply-adds and throughput are given."""
        height, width = self.config.image_shape
        return height, width

    @property
    def num_classes(self) -> int:
        """Of `config.num_classes`, or else of the dataset."""
        if self.config.num_classes is not None:
            return self.config.num_classes
        return self.dataset_classes

    @property
    def dataset_classes(self) -> int:
        """The number of classes that the labels come from."""
        return len(self.class_names)

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes that the labels come from."""
        if self.dataset.class_names is not None and self.config.get("class_names") is None:
            return self.dataset.class_names
        return self.source("val").class_names

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the model takes, for those who use its weights."""
        fields = {field: self.config[field] for field in PREPROCESSING[self.name]}
        return {**fields, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.source("train"))

    def source(self, split: str) -> SourceT:
        """The samples of "train" or "val"."""
        if split not in self._sources:
            self._sources[split] = self._open(split)
        return self._sources[split]

    def _open(self, split: str) -> SourceT:
        source = self.dataset.open(self.config, split)
        if problems := getattr(source, "describe_problems", str)():
            say(f"left out of {problems}")
        return cast(SourceT, source)

    def _check_splits(self) -> None:
        """Raises a UserError if labels differ in meaning between training and evaluation.

        Or if the model has no class for some of them.
        """
        if self.num_classes < self.dataset_classes:
            raise UserError(
                f"config.num_classes={self.num_classes}, and {self.config.dataset} in "
                f"{self.config.data_dir} has {self.dataset_classes} classes"
            )
        _ = self.class_weights  # a mistake in it had better be said now than in the first step
        train, val = (list(self.source(split).class_names) for split in ("train", "val"))
        if train != val:
            raise UserError(
                f"the classes for training of {self.config.dataset} in {self.config.data_dir} are "
                f"not those for evaluation: {describe_difference(train, val)}"
            )

    def align_classes(self, names: Sequence[str]) -> None:
        """Numbers the labels for evaluation as given weights do, where names tell how."""

    def write_predictions(self) -> None:
        """Writes the predictions of an evaluation, where that was asked for; here there are none.

        Called once the metrics are printed.
        """

    def report(self) -> list[Section]:
        """The data; subclasses add what the last evaluation found."""
        rows: list[tuple[str, str | int]] = [
            ("dataset", str(self.config.dataset)), ("folder", str(self.config.data_dir)),
            ("classes", self.dataset_classes),
        ]  # fmt: skip
        for split, what in (("train", "for training"), ("val", "for evaluation")):
            if split in self._sources:
                rows.append((f"pictures {what}", len(self._sources[split])))
                if problems := getattr(self._sources[split], "describe_problems", str)():
                    rows.append((f"left out {what}", problems))
        return [Table("Data", ("", ""), rows)]

    def _shown_names(self) -> list[str]:
        """The names of the model's classes, ImageNet's ids as words."""
        names = readable(self.class_names)
        return names + [f"class {i}" for i in range(len(names), self.num_classes)]

    def decoded(self, split: str) -> DecodedSource:
        """The samples of "train" or "val" with pixels; unreadable pictures are replaced."""
        return DecodedSource(self.source(split), max_pixels=self.config.max_pixels)

    def class_counts(self) -> np.ndarray:
        """(samples, classes) of the training samples, numbers of what has each class."""
        raise UserError(f"config.class_weights and balanced_sampling are not for {self.name}")

    @functools.cached_property
    def class_weights(self) -> np.ndarray | None:
        """(num_classes,) float32 weights of the loss; None if all are 1.

        Raises:
          UserError: `config.class_weights` has not one number for each class.
        """
        given = self.config.class_weights
        if given is None:
            return None
        if given == "balanced":
            counts = self.class_counts().sum(0)
            weights = balanced_weights(counts)
            limited = int(np.isclose(weights, LIMIT).sum() + np.isclose(weights, 1 / LIMIT).sum())
            if limited:
                say(f"the weights of {limited} classes are limited to 1/{LIMIT:g} or {LIMIT:g}")
            if (empty := int((counts == 0).sum())):
                say(f"{empty} classes have no training samples; their weight is 1")
        else:
            weights = np.array([float(number) for number in given.split(",")], np.float32)
        if len(weights) != self.num_classes:
            raise UserError(
                f"config.class_weights has {len(weights)} numbers for {self.num_classes} classes"
            )
        return weights

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        config = self.config
        model = family.build(
            config.model,
            num_classes=self.num_classes,
            dtype=jnp.dtype(config.dtype),
            implementation=config.implementation,
            remat=config.remat,
            rngs=rngs,
            **config.model_options,
        )
        batch_norm_groups(model, config.batch_norm_images)
        return model

    def check(self, metrics: dict[str, float]) -> None:
        """Raises a UserError if too many of the last pictures were unreadable."""
        self._check_unreadable(metrics.get("train/unreadable", 0), "the last pictures")

    def _check_unreadable(self, share: float, pictures: str) -> None:
        if share > self.config.max_unreadable:
            raise UserError(
                f"{share:.1%} of {pictures} of {self.config.data_dir} are unreadable, more than "
                f"config.max_unreadable={self.config.max_unreadable:.1%}; check the files"
            )

    def _train_batches(
        self, source: Source, transform: Callable, start_step: int, *, shuffle: bool = True
    ) -> Iterator[Batch]:
        if self.config.balanced_sampling and shuffle:
            weights = sample_weights(self.class_counts() > 0)
            size, steps = self.config.batch_size, self._total_steps()
            source = Resampled(source, weights, size, seed=self.config.seed, steps=steps)
            shuffle = False
        return pipeline.train_batches(
            source,
            transform,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            shuffle=shuffle,
            **self._reading(),
        )

    def _total_steps(self) -> int:
        return total_steps(self.config, self.train_size // self.config.batch_size)

    def _eval_batches(self, source: Source, transform: Callable) -> Iterator[Batch]:
        return pipeline.eval_batches(
            source, transform, batch_size=self.config.eval_batch_size, **self._reading()
        )

    def _reading(self) -> dict[str, Any]:
        return {
            "num_workers": self.config.num_workers,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
