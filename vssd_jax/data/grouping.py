"""Sources in an order that lets every batch be stacked: each holds samples of one shape."""

import collections
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from vssd_jax.data.source import DetectionSource, Source
from vssd_jax.errors import UserError


class Grouped:
    """A source in an order in which each batch comes from one group.

    Elements i * batch_size to (i + 1) * batch_size are a batch.

    Args:
      source: the samples.
      groups: each the numbers of the samples of a group.
      batch_size: global.
      seed: with it, samples and batches are shuffled anew for each epoch, and the few of a group
        that fill no batch are left out of the epoch. Without, each sample comes once; batches are
        filled up with copies, and every element says by `valid` that it is none of them.
      steps: number of batches, with a seed.
    """

    def __init__(
        self,
        source: Source,
        groups: Sequence[np.ndarray],
        batch_size: int,
        *,
        seed: int | None = None,
        steps: int = 0,
    ):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._groups = groups
        if seed is None:
            batches = sum(-(-len(group) // batch_size) for group in groups)
        else:
            batches = sum(len(group) // batch_size for group in groups)
        self._per_epoch = batches * batch_size
        self._length = self._per_epoch if seed is None else steps * batch_size
        self._orders: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._length

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = self._make_order(epoch)
            while len(self._orders) > 2:  # other threads may be in other epochs
                self._orders.popitem(last=False)
        return order

    def _make_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed or 0, epoch])
        batches: list[np.ndarray] = []
        for group in self._groups:
            if self.seed is not None:
                group = rng.permutation(group)
                group = group[: len(group) // self.batch_size * self.batch_size]
            missing = -len(group) % self.batch_size
            # Copies are marked by the complement of their number.
            group = np.concatenate([group, ~group[:1].repeat(missing)])
            batches.extend(group.reshape(-1, self.batch_size))
        if self.seed is not None:
            rng.shuffle(batches)
        return np.concatenate(batches)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        epoch, place = divmod(index, self._per_epoch)
        number = int(self._order(epoch)[place])
        element = self.source[number if number >= 0 else ~number]
        return element if self.seed is not None else {**element, "valid": np.bool_(number >= 0)}


class GroupedByShape(Grouped):
    """Batches of samples of one shape, once each, the shapes in their order.

    Args:
      source: the samples.
      shapes: of each sample; a shape is anything that can be compared.
      batch_size: global.
    """

    def __init__(self, source: Source, shapes: Iterable[Hashable], batch_size: int):
        groups: dict[Any, list[int]] = {}
        for number, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(number)
        super().__init__(source, [np.array(groups[shape]) for shape in sorted(groups)], batch_size)


class GroupedByOrientation(Grouped):
    """Batches that are all landscape or all portrait; with a seed, both kinds are mixed.

    Args:
      source, batch_size, seed, steps: as of `Grouped`.

    Raises:
      UserError: with a seed, images of neither orientation fill a batch.
    """

    def __init__(
        self, source: DetectionSource, batch_size: int, *, seed: int | None = None, steps: int = 0
    ):
        portrait = source.sizes[:, 0] > source.sizes[:, 1]
        groups = [np.flatnonzero(portrait == kind) for kind in (False, True)]
        super().__init__(source, groups, batch_size, seed=seed, steps=steps)
        if not self._per_epoch:
            counts = " landscape and ".join(str(len(group)) for group in groups)
            raise UserError(
                f"a batch of {batch_size} has images of one orientation, and there are {counts} "
                "portrait images; use a smaller config.batch_size"
            )
