"""Batch norm."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(x, scale, bias, epsilon, dtype):
    """Normalises with the moments of the batch, over all axes but the last.

    Args:
      x: (..., C).
      scale, bias: (C,), in the dtype of the computation.
      epsilon: added to the variance.
      dtype: of the result.

    Returns:
      (..., C); and mean and biased variance (C,), which carry no gradient.
    """
    return _batch_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _batch_norm_forward(x, scale, bias, epsilon, dtype):
    axes, wide = tuple(range(x.ndim - 1)), x.astype(scale.dtype)
    mean = wide.mean(axes)
    var = jnp.square(wide - mean).mean(axes)
    y = (wide - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias
    return (y.astype(dtype), mean, var), (x, mean, var, scale)


# Written out, it reads the input twice, for two sums together and for the result; the automatic
# gradient of the moments makes it five times.
def _batch_norm_backward(epsilon, dtype, saved, cotangents):
    x, mean, var, scale = saved
    axes, dy = tuple(range(x.ndim - 1)), cotangents[0].astype(scale.dtype)
    rstd = jax.lax.rsqrt(var + epsilon)
    normed = (x.astype(scale.dtype) - mean) * rstd
    dbias, dscale = dy.sum(axes), (dy * normed).sum(axes)
    count = x.size // x.shape[-1]
    dx = scale * rstd * (dy - dbias / count - normed * (dscale / count))
    return dx.astype(x.dtype), dscale, dbias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
