"""Rare classes: weights of the loss, and samples drawn more often."""

from typing import Any

import numpy as np

from vssd_jax.data.source import Source

LIMIT = 10.0  # of a weight and of its inverse: a class of three samples must not rule the loss


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """(K,) numbers of samples of each class -> (K,) float32 weights of the loss.

    n / (K n_c), so that every class weighs as much in all and the mean over the samples is 1; but
    within `LIMIT`. A class without samples has weight 1.
    """
    counts = np.asarray(counts, np.float64)
    weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights.clip(1 / LIMIT, LIMIT), 1).astype(np.float32)


def sample_weights(present: np.ndarray) -> np.ndarray:
    """(N, K) bool, which classes a sample has -> (N,) how often it is to be drawn, in proportion.

    The inverse square root of the share of samples that have its rarest class, as the repeat
    factors of LVIS (arXiv 1908.03195, section 4.2).
    """
    share = np.maximum(present.mean(0), 1 / len(present))
    factors = np.where(present, share[None] ** -0.5, 0).max(1)
    return np.maximum(factors, 1)


def resample(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) numbers of samples in random order, each as often as its weight says.

    Not more than one above or below count * weight / sum(weights).
    """
    ends = np.cumsum(weights / weights.sum()) * count
    places = np.arange(count) + rng.random()
    drawn = np.searchsorted(ends, places, side="right").clip(0, len(weights) - 1)
    return rng.permutation(drawn)


class Resampled:
    """A source that shuffles and repeats by itself, in the shares that weights say.

    Args:
      source: the samples.
      weights: (samples,) how often each is drawn, in proportion.
      batch_size: global; an epoch has as many samples as fill batches.
      seed: of the order.
      steps: number of batches.
    """

    def __init__(
        self, source: Source, weights: np.ndarray, batch_size: int, *, seed: int, steps: int
    ):
        self._source, self._weights, self._seed = source, weights, seed
        self._per_epoch = len(source) // batch_size * batch_size
        self._length = steps * batch_size
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> dict[str, Any]:
        epoch, place = divmod(int(index), self._per_epoch)
        order = self._orders.get(epoch)
        if order is None:
            rng = np.random.default_rng([self._seed, epoch])
            order = resample(self._weights, self._per_epoch, rng)
            # Other threads may be in the epoch before.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order
        return self._source[int(order[place])]
