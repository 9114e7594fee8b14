"""LayerNorm over the channels, with an optional gate; on a CPU with its own gradient.

The CPU's gradient keeps the input and two numbers a token; the automatic one keeps four arrays of
the size of the input. Its sums are products with a vector: XLA's reductions want the arrays that
they multiply broadcast in memory there, and take two to three times as long. On a GPU the
automatic gradient moves fewer bytes.
"""

import functools

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    gate: jax.Array | None = None,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Normalises the last axis in two passes, in float32 at least.

    Args:
      x: (..., C).
      scale, bias: (C,).
      gate: (..., C) or None; the result is multiplied by it.
      epsilon: added to the variance.

    Returns:
      (..., C) in the dtype of `x`.
    """
    if dispatch.target().platform == "cpu":
        return _on_cpu(x, scale, bias, gate, epsilon)
    wide = x.astype(_acc(x))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return _finish(normed, scale, bias, gate, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _on_cpu(x, scale, bias, gate, epsilon):
    return _forward(x, scale, bias, gate, epsilon)[0]


def _forward(x, scale, bias, gate, epsilon):
    wide = x.astype(_acc(x))
    ones = jnp.ones_like(scale, wide.dtype)
    mean = _sum_channels(wide, ones) / x.shape[-1]
    variance = _sum_channels(jnp.square(wide - mean), ones) / x.shape[-1]
    rstd = jax.lax.rsqrt(variance + epsilon)
    y = _finish((wide - mean) * rstd, scale, bias, gate, x.dtype)
    return y, (x, mean, rstd, scale, bias, gate)


def _backward(epsilon, saved, dy):
    x, mean, rstd, scale, bias, gate = saved
    acc = _acc(x)
    normed = (x.astype(acc) - mean) * rstd
    dy = dy.astype(acc)
    dgate = None
    if gate is not None:
        dgate = (dy * _affine(normed, scale, bias)).astype(gate.dtype)
        dy = dy * gate.astype(acc)
    dscaled = dy * normed
    wide_scale = scale.astype(acc)
    mean_dy = _sum_channels(dy, wide_scale) / x.shape[-1]
    mean_dscaled = _sum_channels(dscaled, wide_scale) / x.shape[-1]
    dx = rstd * (dy * wide_scale - mean_dy - normed * mean_dscaled)
    dscale, dbias = _sum_tokens(dscaled), _sum_tokens(dy)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype), dgate


_on_cpu.defvjp(_forward, _backward)


def _acc(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _affine(normed, scale, bias):
    return normed * scale.astype(normed.dtype) + bias.astype(normed.dtype)


def _finish(normed, scale, bias, gate, dtype):
    y = _affine(normed, scale, bias).astype(dtype)
    return y if gate is None else (y * gate).astype(dtype)


def _sum_channels(x, weights):
    """The sum of x * weights over C: (..., C), (C,) -> (..., 1)."""
    y = x.reshape(-1, x.shape[-1]) @ weights[:, None]
    return y.reshape(*x.shape[:-1], 1)


def _sum_tokens(x):
    """(..., C) -> (C,)."""
    rows = x.reshape(-1, x.shape[-1])
    return jnp.ones(rows.shape[0], rows.dtype) @ rows
