"""A random choice of the boxes that count in a loss."""

import jax
import jax.numpy as jnp

from vssd_jax.models.detection.assigner import NEGATIVE
from vssd_jax.types import Array, Bool, Int


def sample(
    key: jax.Array, assigned: Int[Array, " N"], num: int, positive_fraction: float
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """Chooses `num` boxes, at most `positive_fraction` of them positive, filled up by negatives.

    Args:
      key: of jax.random.
      assigned: (N,) as from `assign`.
      num: number of boxes, the length of the result if N is not less.
      positive_fraction: the positives take at most `int(num * positive_fraction)` places.

    Returns:
      indices (K,) into the boxes, positives first, and valid (K,): False where there were too few.
    """
    num = min(num, len(assigned))
    limit = min(int(num * positive_fraction), num)
    luck = jax.random.uniform(key, assigned.shape)
    positive = assigned >= 0
    if limit:
        lucky, places = jax.lax.top_k(jnp.where(positive, luck, -1), limit)
        chosen = jnp.zeros(assigned.shape, bool).at[places].set(lucky >= 0)
    else:
        chosen = jnp.zeros(assigned.shape, bool)
    order = jnp.where(chosen, 2 + luck, jnp.where(assigned == NEGATIVE, luck, -1))
    order, indices = jax.lax.top_k(order, num)
    return indices, order >= 0
