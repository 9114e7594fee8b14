"""Sources in an order that lets every batch be stacked: each holds samples of one shape."""

import collections
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vssd_jax.data.balance import resample
from vssd_jax.data.geometry import Geometry
from vssd_jax.data.sizes import Size, common_shapes
from vssd_jax.data.source import Source


class Grouped:
    """A source in an order in which each batch comes from one group, each sample once.

    Elements i * batch_size to (i + 1) * batch_size are a batch. Batches are filled up with copies;
    every element says by `valid` that it is none, and by `like` what size (H, W) the samples of its
    batch have.

    Args:
      source: the samples.
      groups: each the numbers of the samples of a group.
      sizes: (samples, 2) height and width.
      batch_size: global.
    """

    def __init__(
        self, source: Source, groups: Iterable[np.ndarray], sizes: np.ndarray, batch_size: int
    ):
        self.source, self._sizes = source, sizes
        batches = []
        for group in groups:
            missing = -len(group) % batch_size
            # Copies are marked by the complement of their number.
            filled = np.concatenate([group, ~group[:1].repeat(missing)])
            batches.append(np.stack([filled, np.full_like(filled, group[:1])]))
        self._numbers, self._likes = np.concatenate(batches, axis=1)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        number, like = int(self._numbers[index]), self._likes[index]
        element = self.source[number if number >= 0 else ~number]
        return {**element, "like": _size(self._sizes[like]), "valid": np.bool_(number >= 0)}


def by_key(keys: Iterable[Hashable]) -> list[np.ndarray]:
    """The numbers of the samples of each key, for keys that can be compared, in their order."""
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return [np.array(groups[key]) for key in sorted(groups)]


class ShuffledByShape:
    """Batches for a detector's training, whose pictures are all padded to one of a few shapes.

    An epoch has as many samples as fill batches, in random order. Where the pictures of a shape do
    not fill its last batch, they go with those of others into the shape that holds them all, if
    there is one; no more than one batch of an epoch must be scaled down, or as many as there are
    pictures that no shape holds.

    An element has its `geometry`, drawn anew in every epoch, and the `shape` of its batch.

    Args:
      source: the samples.
      sizes: (samples, 2) height and width.
      batch_size: global; not more than there are samples.
      seed: of the order and of the geometry.
      steps: number of batches.
      draw: `draw_geometry` with its options.
      shapes: some (H, W).
      weights: (samples,) how often each is drawn, in proportion; None takes each once an epoch.
    """

    def __init__(
        self,
        source: Source,
        sizes: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        steps: int,
        draw: Callable[[np.ndarray, np.random.Generator], Geometry],
        shapes: Sequence[Size],
        weights: np.ndarray | None = None,
    ):
        self.source, self._sizes, self._draw, self._weights = source, sizes, draw, weights
        # Landscape and portrait apart, so that what does not fill a batch goes with its like.
        self.shapes = sorted(shapes, key=lambda s: (s[0] > s[1], s[0] * s[1]))
        self._batch_size, self._seed, self._length = batch_size, seed, steps * batch_size
        self._per_epoch = len(sizes) // batch_size * batch_size
        self._epochs: collections.OrderedDict[int, Epoch] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> dict[str, Any]:
        number, place = divmod(int(index), self._per_epoch)
        epoch = self.epoch(number)
        shape = _size(epoch.shapes[place // self._batch_size])
        element = self.source[int(epoch.samples[place])]
        return {**element, "geometry": epoch.geometry.row(place), "shape": shape}

    def describe(self) -> str:
        """How many shapes the first epoch has, its padding, and what no shape holds."""
        epoch = self.epoch(0)
        sizes, scale = epoch.geometry.size, epoch.scale()
        text = (
            f"padded shapes of the training images: {len(np.unique(epoch.shapes, axis=0))}, each "
            f"compiles a program; padding is {epoch.padding():.1%} of the pixels"
        )
        alone = common_shapes(sizes[:, None], self.shapes)
        unheld = (sizes > np.array(self.shapes)[alone]).any(-1)
        for shrunk, why in (
            (unheld, "no shape of config.padded_shapes holds them"),
            ((scale < 1) & ~unheld, "they fill the batch of another shape"),
        ):
            if shrunk.any():
                text += (
                    f"; {np.count_nonzero(shrunk)} of the {scale.size} images of the first epoch "
                    f"are scaled down, to {scale[shrunk].min():.2f} at worst: {why}"
                )
        return text

    def epoch(self, number: int) -> "Epoch":
        """What an epoch holds, and in which order."""
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._epochs[number] = self._make_epoch(number)
            while len(self._epochs) > 2:  # other threads may be in other epochs
                self._epochs.popitem(last=False)
        return epoch

    def _make_epoch(self, number: int) -> "Epoch":
        rng = np.random.default_rng([self._seed, number])
        if self._weights is None:
            chosen = rng.permutation(len(self._sizes))[: self._per_epoch]
        else:
            chosen = resample(self._weights, self._per_epoch, rng)
        geometry = self._draw(self._sizes[chosen], rng)
        shape = common_shapes(geometry.size[:, None], self.shapes)
        full, rest = [], []
        for places in (np.flatnonzero(shape == k) for k in range(len(self.shapes))):
            end = len(places) // self._batch_size * self._batch_size
            full.append(places[:end])
            rest.append(places[end:])  # together none, or some batches
        batches = np.concatenate([*full, *rest]).reshape(-1, self._batch_size)
        places = rng.permutation(batches).ravel()
        geometry = Geometry(*(field[places] for field in geometry))
        together = geometry.size.reshape(-1, self._batch_size, 2)
        shapes = np.array(self.shapes)[common_shapes(together, self.shapes)]
        return Epoch(chosen[places], geometry, shapes)


class Epoch(NamedTuple):
    """The samples of an epoch in their order, their geometry, and the shape of each batch.

    Attributes:
      samples: (N,) numbers.
      geometry: of each.
      shapes: (batches, 2) height and width to which those of each are padded.
    """

    samples: np.ndarray
    geometry: Geometry
    shapes: np.ndarray

    def scale(self) -> np.ndarray:
        """(N,) to which each must be scaled down to fit into its shape; 1 where it fits."""
        shapes = self.shapes.repeat(len(self.samples) // len(self.shapes), axis=0)
        return np.minimum(1, shapes / self.geometry.size).min(-1)

    def padding(self) -> float:
        """The share of all pixels that is padding."""
        used = self.geometry.size.prod(-1) * self.scale() ** 2
        return 1 - used.sum() / (self.shapes.prod(-1).mean() * len(self.samples))


def _size(size: Sequence[int] | np.ndarray) -> Size:
    height, width = size
    return int(height), int(width)
