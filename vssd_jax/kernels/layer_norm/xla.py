"""LayerNorm in plain JAX, with its automatic gradient."""

import jax
import jax.numpy as jnp
from jax import Array


def layer_norm(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> Array:
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    wide = x.astype(wide_dtype(x))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return scaled_and_gated(normed, scale, bias, gate, x.dtype)


def wide_dtype(x: Array) -> jnp.dtype:
    """The dtype of the statistics of `x`."""
    return jnp.promote_types(x.dtype, jnp.float32)


def scaled(normed: Array, scale: Array, bias: Array) -> Array:
    """`normed * scale + bias`."""
    return normed * scale.astype(normed.dtype) + bias.astype(normed.dtype)


def scaled_and_gated(
    normed: Array, scale: Array, bias: Array, gate: Array | None, dtype: jnp.dtype
) -> Array:
    """`(normed * scale + bias) * gate` in `dtype`, to which it is rounded before the gate too."""
    y = scaled(normed, scale, bias).astype(dtype)
    return y if gate is None else (y * gate).astype(dtype)
