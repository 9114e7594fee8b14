"""A linear layer by oneDNN: product and bias, and the products of the gradient, are a call each."""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import onednn

supports = onednn.supports


@jax.custom_vjp
def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """See `vssd_jax.kernels.linear.api.linear`."""
    y = onednn.matmul(_rows(x), kernel.astype(x.dtype), bias)
    return y.reshape(*x.shape[:-1], -1)


def backward(
    saved: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    """The gradients of `linear`, whose arguments are `saved`."""
    x, kernel, bias = saved
    rows, dy = _rows(x), _rows(dy)
    dx = onednn.matmul(dy, kernel.astype(x.dtype), transpose="right").reshape(x.shape)
    dkernel = onednn.kernel_gradient(rows, dy).astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    return dx, dkernel, dy.astype(jnp.float32).sum(0).astype(bias.dtype)


linear.defvjp(lambda *args: (linear(*args), args), backward)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
