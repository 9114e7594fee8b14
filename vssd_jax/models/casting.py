"""Casts of parameters, in few kernels."""

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.shared_one import shared_one
from vssd_jax.models.split import Arrays


def cast_together(arrays: Arrays, dtype: jax.typing.DTypeLike) -> Arrays:
    """The same values, which a program for a GPU casts to `dtype` with a kernel for each size.

    Each by itself would be a launch, 58 in a step of VSSD-Tiny: see `shared_one`.

    Args:
      arrays: parameters by name; matrices and convolutions are those that layers cast.
      dtype: in which the model computes.
    """
    if dispatch.target().platform != "gpu" or jnp.dtype(dtype).itemsize > 2:
        return arrays
    return {
        name: x * shared_one() if x.ndim in (2, 4) and x.dtype == jnp.float32 else x
        for name, x in arrays.items()
    }
