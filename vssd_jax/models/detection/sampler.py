"""The random choice of the boxes that enter a loss."""

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
      num: number of boxes to choose; K is the lesser of `num` and N.
      positive_fraction: at most `int(num * positive_fraction)` positives are chosen.

    Returns:
      indices (K,) into the boxes, positives first, and valid (K,): False where there were too few.
    """
    num = min(num, len(assigned))
    limit = min(int(num * positive_fraction), num)
    priority = jax.random.uniform(key, assigned.shape)
    positive = assigned >= 0
    if limit:
        highest, indices = jax.lax.top_k(jnp.where(positive, priority, -1), limit)
        chosen = jnp.zeros(assigned.shape, bool).at[indices].set(highest >= 0)
    else:
        chosen = jnp.zeros(assigned.shape, bool)
    order = jnp.where(chosen, 2 + priority, jnp.where(assigned == NEGATIVE, priority, -1))
    order, indices = jax.lax.top_k(order, num)
    return indices, order >= 0
