"""Sources in an order that lets every batch be stacked: each holds samples of one shape."""

import collections
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from vssd_jax.data.balance import resample
from vssd_jax.data.source import Source

Size = tuple[int, int]  # height and width


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


def is_portrait(sizes: np.ndarray) -> np.ndarray:
    """(N, 2) heights and widths -> (N,) bool."""
    return sizes[:, 0] > sizes[:, 1]


class ShuffledByOrientation:
    """Batches for training that are all landscape or all portrait, but for one of an epoch.

    An epoch has as many samples as fill batches, in random order. Where neither orientation fills
    its last batch, the rest of both makes one; all its elements are `like` (height, width) a sample
    of the orientation that most of them have.

    Args:
      source: the samples.
      sizes: (samples, 2) height and width.
      batch_size: global; not more than there are samples.
      seed: of the order.
      steps: number of batches.
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
        weights: np.ndarray | None = None,
    ):
        self._weights = weights
        self.source, self._sizes, self._portrait = source, sizes, is_portrait(sizes)
        self._batch_size, self._seed, self._length = batch_size, seed, steps * batch_size
        self._per_epoch = len(sizes) // batch_size * batch_size
        self._orders: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> dict[str, Any]:
        epoch, place = divmod(index, self._per_epoch)
        batch = self._order(epoch)[place // self._batch_size]
        portrait = self._portrait[batch]
        like = batch[np.argmax(portrait == (2 * np.count_nonzero(portrait) > len(batch)))]
        element = self.source[int(batch[place % self._batch_size])]
        return {**element, "like": _size(self._sizes[like])}

    def _order(self, epoch: int) -> np.ndarray:
        """(batches, batch_size) numbers of samples."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = self._make_order(epoch)
            while len(self._orders) > 2:  # other threads may be in other epochs
                self._orders.popitem(last=False)
        return order

    def _make_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        if self._weights is None:
            chosen = rng.permutation(len(self._portrait))[: self._per_epoch]
        else:
            chosen = resample(self._weights, self._per_epoch, rng)
        portrait = self._portrait[chosen]
        full, rest = [], []
        for group in (chosen[~portrait], chosen[portrait]):
            end = len(group) // self._batch_size * self._batch_size
            full.append(group[:end])
            rest.append(group[end:])  # together none, or a batch
        return rng.permutation(np.concatenate([*full, *rest]).reshape(-1, self._batch_size))


def _size(size: Sequence[int] | np.ndarray) -> Size:
    height, width = size
    return int(height), int(width)
