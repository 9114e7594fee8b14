"""Self-attention in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import products


def attention(qkv: Array, *, heads: int) -> Array:
    """See `vssd_jax.kernels.attention.api.attention`."""
    batch, length, width = qkv.shape
    q, k, v = (jnp.swapaxes(part, 1, 2) for part in split(qkv, heads))  # (B, heads, L, P)
    scores = products.matmul(q, k, transpose="right")
    probabilities = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    y = jnp.swapaxes(products.matmul(probabilities, v), 1, 2)
    return y.astype(qkv.dtype).reshape(batch, length, width // 3)


def split(qkv: Array, heads: int) -> list[Array]:
    """(B, L, 3C) -> q, k and v, each (B, L, heads, P)."""
    batch, length, width = qkv.shape
    parts = qkv.reshape(batch, length, 3, heads, width // (3 * heads))
    return [parts[:, :, i] for i in range(3)]
