"""The sum at the end of a residual branch."""

import jax
import jax.numpy as jnp


def add_branch(x: jax.Array, branch: jax.Array, weights: jax.Array | None) -> jax.Array:
    """`x + weights * branch`.

    Args:
      x, branch: (B, ...), of one dtype.
      weights: (B,), stochastic depth's: 0 for a dropped branch, more than 1 for a kept one. None
        stands for ones.
    """
    if weights is None:
        return x + branch
    acc = jnp.promote_types(x.dtype, jnp.float32)
    weights = weights.reshape(-1, *(1,) * (x.ndim - 1)).astype(acc)
    return (x.astype(acc) + weights * branch.astype(acc)).astype(x.dtype)
