"""A convolution over all channels by oneDNN; its gradient is that of plain JAX."""

import functools

import jax
from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.conv import xla

supports = onednn.supports


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv(x: Array, kernel: Array, bias: Array | None, stride: int, padding: int) -> Array:
    return onednn.convolution(x, kernel.astype(x.dtype), bias, stride=stride, padding=padding)


def _backward(stride: int, padding: int, saved: tuple, dy: Array) -> tuple:
    plain = functools.partial(xla.conv, stride=stride, padding=padding)
    return jax.vjp(plain, *saved)[1](dy)  # what it computes forward is not used


_conv.defvjp(lambda *args: (_conv(*args), args[:3]), _backward)


def conv(
    x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> Array:
    """See `vssd_jax.kernels.conv.api.conv`."""
    return _conv(x, kernel, bias, stride, padding)
