"""LayerNorm in plain JAX with its own gradient, for CPUs.

It keeps the input and two numbers per token; the automatic gradient keeps four arrays of the size
of the input. Its sums are products with a vector: on a CPU, XLA writes the broadcast factors of a
reduction to memory, which takes two to three times as long.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels.layer_norm.xla import scaled, scaled_and_gated, wide_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def layer_norm(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> Array:
    """See `vssd_jax.kernels.layer_norm.api.layer_norm`."""
    return forward(x, scale, bias, gate, epsilon)[0]


def forward(
    x: Array, scale: Array, bias: Array, gate: Array | None, epsilon: float
) -> tuple[Array, tuple]:
    wide = x.astype(wide_dtype(x))
    ones = jnp.ones_like(scale, wide.dtype)
    mean = _sum_channels(wide, ones) / x.shape[-1]
    variance = _sum_channels(jnp.square(wide - mean), ones) / x.shape[-1]
    rstd = jax.lax.rsqrt(variance + epsilon)
    y = scaled_and_gated((wide - mean) * rstd, scale, bias, gate, x.dtype)
    return y, (x, mean, rstd, scale, bias, gate)


def backward(
    epsilon: float, saved: tuple, dy: Array
) -> tuple[Array, Array, Array, Array | None]:
    x, mean, rstd, scale, bias, gate = saved
    acc = wide_dtype(x)
    normed = (x.astype(acc) - mean) * rstd
    dy = dy.astype(acc)
    dgate = None
    if gate is not None:
        dgate = (dy * scaled(normed, scale, bias)).astype(gate.dtype)
        dy = dy * gate.astype(acc)
    dscaled = dy * normed
    wide_scale = scale.astype(acc)
    mean_dy = _sum_channels(dy, wide_scale) / x.shape[-1]
    mean_dscaled = _sum_channels(dscaled, wide_scale) / x.shape[-1]
    dx = rstd * (dy * wide_scale - mean_dy - normed * mean_dscaled)
    dscale, dbias = _sum_tokens(dscaled), _sum_tokens(dy)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype), dgate


layer_norm.defvjp(forward, backward)


@jax.named_scope("channel_sum")
def _sum_channels(x: Array, factors: Array) -> Array:
    """The sum of x * factors over C: (..., C), (C,) -> (..., 1)."""
    y = x.reshape(-1, x.shape[-1]) @ factors[:, None]
    return y.reshape(*x.shape[:-1], 1)


def _sum_tokens(x: Array) -> Array:
    """(..., C) -> (C,)."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.ones(rows.shape[0], rows.dtype) @ rows
