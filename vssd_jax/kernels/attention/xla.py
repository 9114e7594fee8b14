"""Self-attention in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array


def attention(qkv: Array, *, heads: int) -> Array:
    """See `vssd_jax.kernels.attention.api.attention`."""
    batch, length, width = qkv.shape
    acc = jnp.promote_types(qkv.dtype, jnp.float32)
    q, k, v = split(qkv, heads)
    scores = jnp.einsum("blhp,bmhp->bhlm", q, k, preferred_element_type=acc)
    probabilities = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhlm,bmhp->blhp", probabilities, v, preferred_element_type=acc)
    return y.astype(qkv.dtype).reshape(batch, length, width // 3)


def split(qkv: Array, heads: int) -> list[Array]:
    """(B, L, 3C) -> q, k and v, each (B, L, heads, P)."""
    batch, length, width = qkv.shape
    parts = qkv.reshape(batch, length, 3, heads, width // (3 * heads))
    return [parts[:, :, i] for i in range(3)]
