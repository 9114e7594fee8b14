"""The MLP branch, its operations one by one: reference, fallback, and the way of training."""

import math

import jax
import jax.numpy as jnp

from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.linear import linear
from vssd_jax.kernels.residual import add_branch


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, in the dtype of `x`; computed in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x):
    # By erf; `jax.nn.gelu` takes erfc, twice the work on a CPU, for far tails.
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, dy):
    # Computed again: the barrier keeps the compiler from saving erf besides `x`.
    x = jax.lax.optimization_barrier(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((_normal_cdf(wide) + wide * density) * dy).astype(x.dtype),


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def mlp(x, branch_weights, scale, bias, w1, b1, w2, b2, *, epsilon, implementation=None):
    """See `vssd_jax.kernels.mlp.api.mlp`; `implementation` is LayerNorm's."""
    normed = layer_norm(x, scale, bias, epsilon=epsilon, implementation=implementation)
    hidden = gelu(linear(normed, w1, b1))
    return add_branch(x, linear(hidden, w2, b2), branch_weights)
