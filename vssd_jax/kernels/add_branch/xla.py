"""The sum at the end of a residual branch in plain JAX."""

import jax.numpy as jnp
from jax import Array


def add_branch(x: Array, branch: Array, branch_scale: Array | None) -> Array:
    """See `vssd_jax.kernels.add_branch.api.add_branch`."""
    if branch_scale is None:
        return x + branch
    acc = jnp.promote_types(x.dtype, jnp.float32)
    scale = branch_scale.reshape(-1, *(1,) * (x.ndim - 1)).astype(acc)
    return (x.astype(acc) + scale * branch.astype(acc)).astype(x.dtype)
