"""Batch normalisation in plain JAX.

The gradient is written out: it reads the input twice, once for both sums and once for the result.
The automatic gradient of the moments reads it five times.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    images: int | None = None,
) -> tuple[Array, Array, Array]:
    """See `vssd_jax.kernels.batch_norm.api.batch_norm`."""
    return _forward(x, scale, bias, epsilon, dtype, images)[0]


def _sums(x: Array, images: int | None) -> Array:
    """(B, ..., C) -> (C,), or (groups, C) of `images` each."""
    if images is None:
        return x.sum(tuple(range(x.ndim - 1)))
    # Those of an image first: however the devices share out the groups, they exchange no more than
    # (B, C) numbers.
    own = x.sum(tuple(range(1, x.ndim - 1)))
    return own.reshape(-1, images, own.shape[-1]).sum(1)


def _spread(values: Array, x: Array) -> Array:
    """What `_sums` gives, with which `x` can be combined."""
    if values.ndim == 1:
        return values
    of_images = jnp.repeat(values, x.shape[0] // values.shape[0], 0)
    return of_images.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)


def _forward(
    x: Array,
    scale: Array,
    bias: Array,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    images: int | None,
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    wide = x.astype(scale.dtype)
    mean = _sums(wide, images)
    count = x.size // mean.size
    mean /= count
    centred = wide - _spread(mean, x)
    var = _sums(jnp.square(centred), images) / count
    y = centred * _spread(scale * jax.lax.rsqrt(var + epsilon), x) + bias
    of_batch = [moment.reshape(-1, x.shape[-1]).mean(0) for moment in (mean, var)]
    return (y.astype(dtype), of_batch[0], of_batch[1]), (x, mean, var, scale)


def _backward(
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    images: int | None,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    x, mean, var, scale = saved
    dy, count = cotangents[0].astype(scale.dtype), x.size // mean.size
    rstd = jax.lax.rsqrt(var + epsilon)
    normed = (x.astype(scale.dtype) - _spread(mean, x)) * _spread(rstd, x)
    dbias, dscale = _sums(dy, images), _sums(dy * normed, images)
    dx = _spread(scale * rstd, x) * (
        dy - _spread(dbias / count, x) - normed * _spread(dscale / count, x)
    )
    dscale, dbias = (d.reshape(-1, x.shape[-1]).sum(0) for d in (dscale, dbias))
    return dx.astype(x.dtype), dscale, dbias


batch_norm.defvjp(_forward, _backward)
