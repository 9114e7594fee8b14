"""A one that small loops have in common, so that a GPU runs them as one kernel."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch


def shared_one() -> Array | float:
    """1, which XLA does not see through in a program for a GPU.

    It merges loops over as many elements into one kernel if they read an array in common that is
    neither a constant nor a scalar. What is done to each parameter, or for each block, often has
    none, and is a launch for each; multiplied by this, exactly, it has. XLA takes the arrays of all
    calls for one.
    """
    if dispatch.target().platform != "gpu":
        return 1.0
    return jax.lax.optimization_barrier(jnp.ones(2, jnp.float32))[0]
