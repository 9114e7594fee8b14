"""What the training loop and the evaluation know of a task."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np
from flax import nnx

# Arrays by name, with the batch as the first axis; a value may be a dict of such arrays.
Batch = dict[str, Any]


# --- What a report is made of -----------------------------------------------------------------


class Table(NamedTuple):
    """Named columns; a whole number is a count, a float a share (not-a-number: undefined)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    note: str = ""


class Confusion(NamedTuple):
    """How often each class was taken for which.

    Attributes:
      rows, columns: names, of what is there and of what was predicted; the first ones of both are
        the same classes.
      cells: (N, 3) integers, row, column and count of all counts above 0.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: np.ndarray
    note: str = ""


class Picture(NamedTuple):
    """A picture, or several views of one: each a name and (H, W, 3) uint8 RGB, some 400 pixels."""

    views: Sequence[tuple[str, np.ndarray]]
    caption: Sequence[str]  # lines


class Gallery(NamedTuple):
    """Pictures with captions."""

    title: str
    pictures: Sequence[Picture]
    note: str = ""


Section = Table | Confusion | Gallery


class Task(Protocol):
    """A model and how it is trained and evaluated on a dataset.

    Attributes:
      config: of the run.
      best_metric: the metric of `summarize` whose greatest value marks the best checkpoint.
      table: what an evaluation prints besides the metrics, once `summarize` has run; or None.
    """

    config: ml_collections.ConfigDict
    best_metric: str
    table: str | None

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width for which multiply-adds and throughput are given."""
        ...

    @property
    def num_classes(self) -> int:
        """Of the model."""
        ...

    @property
    def dataset_classes(self) -> int:
        """The number of classes that the dataset's labels come from."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """Of the labels of the dataset."""
        ...

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the model takes, see `vssd_jax.weights.folder.Weights`."""
        ...

    @property
    def train_size(self) -> int:
        """Number of samples of an epoch."""
        ...

    def align_classes(self, names: Sequence[str]) -> None:
        """Numbers the labels for evaluation as weights with these class names do, if names can."""
        ...

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The fresh model, in training mode."""
        ...

    def train_batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from `start_step` on, as NumPy arrays.

        Batch i depends on the config alone, so that a run that resumes sees what it would have
        seen. The iterator may be endless.
        """
        ...

    def eval_batches(self) -> Iterator[Batch]:
        """This process's share of the evaluation batches, as NumPy arrays.

        All are full, so that every process and device has its rows; what fills them up must not
        count.
        """
        ...

    def loss(
        self,
        model: Any,
        batch: Batch,
        *,
        step: jax.Array,
        rngs: nnx.Rngs,
        teacher: Callable[..., Any],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a training batch, a scalar, and further scalars to be logged. Traced.

        Args:
          model: in training mode.
          batch: of `train_batches`, on the device.
          step: number of steps before this one, a scalar.
          rngs: random streams of this step.
          teacher: the averaged model, in evaluation mode.
        """
        ...

    def check(self, metrics: dict[str, float]) -> None:
        """Raises a UserError if the averages over the last steps show broken data.

        Args:
          metrics: the logged ones, as "train/<name>".
        """
        ...

    def eval_step(self, model: Any, batch: Batch) -> dict[str, Any]:
        """What `summarize` needs of an evaluation batch. Traced.

        Args:
          model: in evaluation mode.
          batch: of `eval_batches`, on the device.
        """
        ...

    def summarize(self, outputs: Iterator[dict[str, Any]]) -> dict[str, float]:
        """The metrics of an evaluation as "val/<name>".

        Args:
          outputs: of `eval_step` for the whole evaluation set, as NumPy arrays.
        """
        ...

    def write_predictions(self) -> None:
        """Writes the predictions of the last evaluation, where that was asked for.

        Called once its metrics are printed. Raises a UserError if they cannot be written.
        """
        ...

    def report(self) -> list[Section]:
        """What a report says of the data, and of the last evaluation if there was one.

        Only the process that writes the report calls it; no other takes part.
        """
        ...
