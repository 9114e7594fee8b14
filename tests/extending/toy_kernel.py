"""A second implementation of an operation, in one file: NC-SSD by way of all pairs of tokens.

python train.py --config tests/extending/toy_kernel.py

`y = (C B^T) (m * x)`, quadratic in the number of tokens, as attention without a softmax.
"""

import jax.numpy as jnp
import ml_collections

from vssd_jax.config import classification_config
from vssd_jax.kernels import nc_ssd as operation
from vssd_jax.kernels.dispatch import Implementation
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.silu import silu as silu_of

CALLS = []  # the traced ones


def supports(*, groups, **arguments):
    return None if groups == 1 else f"{groups} groups (it has one)"


def nc_ssd(*, xbc, token_weights, d, inner, groups):
    CALLS.append(xbc.shape)
    head_dim = inner // token_weights.shape[-1]
    x, b, c = jnp.split(xbc, (inner, (inner + xbc.shape[-1]) // 2), axis=-1)
    pairs = jnp.einsum("bln,bmn->blm", c, b)
    y = pairs @ (x * jnp.repeat(token_weights, head_dim, axis=-1))
    return (y + jnp.repeat(d, head_dim) * x).astype(xbc.dtype)
