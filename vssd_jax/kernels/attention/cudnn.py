"""Self-attention over many tokens as cuDNN's kernels."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch
from vssd_jax.kernels.attention.api import FEW_TOKENS
from vssd_jax.kernels.attention.xla import split


def supports(qkv: Array, heads: int) -> str | None:
    """Why these arguments are out of reach, or None."""
    _, length, width = qkv.shape
    head_dim = width // (3 * heads)
    if length <= FEW_TOKENS:
        return f"{length} tokens (more than {FEW_TOKENS})"
    if head_dim % 8:
        return f"heads of {head_dim} (a multiple of 8)"
    return dispatch.wrong_dtype(qkv, jnp.bfloat16, jnp.float16)


def attention(qkv: Array, *, heads: int) -> Array:
    """See `vssd_jax.kernels.attention.api.attention`."""
    q, k, v = split(qkv, heads)
    y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return y.reshape(*qkv.shape[:2], -1)
