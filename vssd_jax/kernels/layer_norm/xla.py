"""LayerNorm in plain JAX, with its automatic gradient."""

import jax
import jax.numpy as jnp


def layer_norm(x, scale, bias, gate, epsilon):
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    wide = x.astype(widened(x))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return finish(normed, scale, bias, gate, x.dtype)


def widened(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def affine(normed, scale, bias):
    return normed * scale.astype(normed.dtype) + bias.astype(normed.dtype)


def finish(normed, scale, bias, gate, dtype):
    y = affine(normed, scale, bias).astype(dtype)
    return y if gate is None else (y * gate).astype(dtype)
