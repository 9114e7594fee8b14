"""LayerNorm with its own gradient, for CPUs.

It keeps the input and two numbers a token; the automatic gradient keeps four arrays of the size of
the input. Its sums are products with a vector: XLA's reductions want the arrays that they multiply
broadcast in memory on a CPU, and take two to three times as long.
"""

import functools

import jax
import jax.numpy as jnp

from vssd_jax.kernels.layer_norm.xla import affine, finish, widened


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer_norm(x, scale, bias, gate, epsilon):
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    return _forward(x, scale, bias, gate, epsilon)[0]


def _forward(x, scale, bias, gate, epsilon):
    wide = x.astype(widened(x))
    ones = jnp.ones_like(scale, wide.dtype)
    mean = _sum_channels(wide, ones) / x.shape[-1]
    variance = _sum_channels(jnp.square(wide - mean), ones) / x.shape[-1]
    rstd = jax.lax.rsqrt(variance + epsilon)
    y = finish((wide - mean) * rstd, scale, bias, gate, x.dtype)
    return y, (x, mean, rstd, scale, bias, gate)


def _backward(epsilon, saved, dy):
    x, mean, rstd, scale, bias, gate = saved
    acc = widened(x)
    normed = (x.astype(acc) - mean) * rstd
    dy = dy.astype(acc)
    dgate = None
    if gate is not None:
        dgate = (dy * affine(normed, scale, bias)).astype(gate.dtype)
        dy = dy * gate.astype(acc)
    dscaled = dy * normed
    wide_scale = scale.astype(acc)
    mean_dy = _sum_channels(dy, wide_scale) / x.shape[-1]
    mean_dscaled = _sum_channels(dscaled, wide_scale) / x.shape[-1]
    dx = rstd * (dy * wide_scale - mean_dy - normed * mean_dscaled)
    dscale, dbias = _sum_tokens(dscaled), _sum_tokens(dy)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype), dgate


layer_norm.defvjp(_forward, _backward)


@jax.named_scope("channel_sum")
def _sum_channels(x, weights):
    """The sum of x * weights over C: (..., C), (C,) -> (..., 1)."""
    y = x.reshape(-1, x.shape[-1]) @ weights[:, None]
    return y.reshape(*x.shape[:-1], 1)


def _sum_tokens(x):
    """(..., C) -> (C,)."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.ones(rows.shape[0], rows.dtype) @ rows
