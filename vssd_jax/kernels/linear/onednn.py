"""A linear layer by oneDNN: product and bias, and the products of the gradient, are a call each."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch, onednn


def supports(x: Array, kernel: Array, bias: Array | None) -> str | None:
    return dispatch.wrong_dtype(x, *onednn.DTYPES)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """See `vssd_jax.kernels.linear.api.linear`."""
    return project(x, kernel, bias, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x: Array, kernel: Array, bias: Array | None, dtype: jax.typing.DTypeLike) -> Array:
    """`linear`, with the dtype of the result."""
    y = onednn.matmul(_rows(x), kernel.astype(x.dtype), bias, dtype=dtype)
    return y.reshape(*x.shape[:-1], -1)


def _backward(
    dtype: jax.typing.DTypeLike, saved: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    rows, dy = _rows(x), _rows(dy.astype(x.dtype))
    dx = onednn.matmul(dy, kernel.astype(x.dtype), transpose="right").reshape(x.shape)
    dkernel = onednn.matmul(rows, dy, transpose="left", dtype=jnp.float32).astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = jax.lax.optimization_barrier(dy).astype(jnp.float32).sum(0).astype(bias.dtype)
    return dx, dkernel, dbias


project.defvjp(lambda *args: (project(*args), args[:3]), _backward)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
