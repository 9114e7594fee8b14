"""The first two convolutions of a downsampling by oneDNN: no ReLU is a pass of its own."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import onednn
from vssd_jax.kernels.depthwise_conv.onednn import depthwise_conv
from vssd_jax.kernels.linear.onednn import backward

supports = onednn.supports


def expand_depthwise(x: Array, w1: Array, b1: Array, kernel: Array, bias: Array) -> Array:
    """See `vssd_jax.kernels.expand_depthwise.api.expand_depthwise`."""
    hidden = _relu_linear(x.reshape(-1, x.shape[-1]), w1, b1)
    hidden = hidden.reshape(*x.shape[:-1], -1)
    return depthwise_conv(hidden, kernel, bias, stride=2, activation="relu")


@jax.custom_vjp
def _relu_linear(x: Array, kernel: Array, bias: Array) -> Array:
    return onednn.matmul(x, kernel.astype(x.dtype), bias, activation="relu")


def _forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple]:
    y = _relu_linear(x, kernel, bias)
    return y, (x, kernel, bias, y)


def _backward(saved: tuple, dy: Array) -> tuple:
    x, kernel, bias, y = saved
    return backward((x, kernel, bias), jnp.where(y > 0, dy, 0))


_relu_linear.defvjp(_forward, _backward)
