"""The MLP branch, its operations one by one: reference, fallback, and the way of training."""

import math

import jax
import jax.numpy as jnp

from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.residual import add_branch


def gelu(x):
    """Exact GELU by erf; `jax.nn.gelu` takes erfc, twice the work on a CPU, for far tails."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def mlp(x, branch_weights, scale, bias, w1, b1, w2, b2, *, epsilon, implementation=None):
    """See `vssd_jax.kernels.mlp.api.mlp`; `implementation` is LayerNorm's."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    normed = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    hidden = linear(normed, w1, b1)
    hidden = gelu(hidden.astype(acc)).astype(x.dtype)
    return add_branch(x, linear(hidden, w2, b2), branch_weights)
