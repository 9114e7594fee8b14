"""Exact GELU in plain JAX."""

import math

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """See `vssd_jax.kernels.gelu.api.gelu`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    # `jax.nn.gelu` uses erfc, which is more precise far from zero and twice the work on a CPU.
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _backward(x: Array, dy: Array) -> tuple[Array]:
    # The barrier makes the compiler compute erf again, instead of keeping it beside `x`.
    x = jax.lax.optimization_barrier(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (((_normal_cdf(wide) + wide * density) * dy).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _backward)
