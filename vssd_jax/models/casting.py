"""Casts of parameters, in few kernels."""

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch
from vssd_jax.models.split import Arrays


def cast_together(arrays: Arrays, dtype: jax.typing.DTypeLike) -> Arrays:
    """The same values, which a program for a GPU casts to `dtype` with a kernel for each size.

    XLA merges loops over as many elements if they read an array in common, and casts of parameters
    have none: each would be a launch, 58 in a step of VSSD-Tiny. The common array is a one that XLA
    does not see through.

    Args:
      arrays: parameters by name; matrices and convolutions are those that layers cast.
      dtype: in which the model computes.
    """
    if dispatch.target().platform != "gpu" or jnp.dtype(dtype).itemsize > 2:
        return arrays
    one = jax.lax.optimization_barrier(jnp.ones(2, jnp.float32))
    return {
        name: x * one[0] if x.ndim in (2, 4) and x.dtype == one.dtype else x
        for name, x in arrays.items()
    }
