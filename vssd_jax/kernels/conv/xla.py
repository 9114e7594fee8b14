"""A convolution over all channels in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array


def conv(
    x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> Array:
    """See `vssd_jax.kernels.conv.api.conv`."""
    y = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if bias is not None:
        # Add the bias in float32: rounded to bfloat16 it would shift every pixel the same way.
        y = (y.astype(jnp.promote_types(y.dtype, jnp.float32)) + bias).astype(x.dtype)
    return y
