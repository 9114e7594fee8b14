"""Batch normalisation in plain JAX.

The gradient is written out: it reads the input twice, once for both sums and once for the result.
The automatic gradient of the moments reads it five times.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: Array, scale: Array, bias: Array, epsilon: float, dtype: jax.typing.DTypeLike
) -> tuple[Array, Array, Array]:
    """See `vssd_jax.kernels.batch_norm.api.batch_norm`."""
    return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(
    x: Array, scale: Array, bias: Array, epsilon: float, dtype: jax.typing.DTypeLike
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    axes, wide = tuple(range(x.ndim - 1)), x.astype(scale.dtype)
    mean = wide.mean(axes)
    var = jnp.square(wide - mean).mean(axes)
    y = (wide - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias
    return (y.astype(dtype), mean, var), (x, mean, var, scale)


def _backward(
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    x, mean, var, scale = saved
    axes, dy = tuple(range(x.ndim - 1)), cotangents[0].astype(scale.dtype)
    rstd = jax.lax.rsqrt(var + epsilon)
    normed = (x.astype(scale.dtype) - mean) * rstd
    dbias, dscale = dy.sum(axes), (dy * normed).sum(axes)
    count = x.size // x.shape[-1]
    dx = scale * rstd * (dy - dbias / count - normed * (dscale / count))
    return dx.astype(x.dtype), dscale, dbias


batch_norm.defvjp(_forward, _backward)
