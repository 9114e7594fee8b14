"""A linear layer in plain JAX that adds the bias before it rounds the result.

XLA fuses the product with what follows only in the accumulator's dtype; a bias that is added after
the rounding costs another trip through the memory. The gradient is written out so that its
products stay in the narrow dtype.
"""

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch, products


@jax.custom_vjp
def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """See `vssd_jax.kernels.linear.api.linear`."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = products.matmul(_rows(x), kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(acc)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return linear(x, kernel, bias), (x, kernel, bias)


def _backward(
    saved: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    acc, dy = jnp.promote_types(x.dtype, jnp.float32), _rows(dy)
    dx = _input_gradient(dy, kernel.astype(x.dtype)).reshape(x.shape)
    dkernel = _kernel_gradient(_rows(x), dy).astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    # The barrier keeps XLA from writing dy a second time, in float32, for the sum.
    dbias = jax.lax.optimization_barrier(dy).astype(acc).sum(0).astype(bias.dtype)
    return dx, dkernel, dbias


linear.defvjp(_forward, _backward)


def _rows(x: Array) -> Array:
    """(..., C) -> (R, C).

    The gradient of the kernel sums over all leading axes. For more than one of them XLA's CPU
    compiler transposes an activation, which takes as long as the product itself.
    """
    return x.reshape(-1, x.shape[-1])


# On a CPU, XLA's products are a quarter slower if the matrix on the right is wide and transposed,
# and half slower if the wider of the two is transposed on the left. To avoid it costs a
# transposition of the kernel, which is worth it for many rows. The barriers keep XLA from undoing
# it.
MANY_ROWS = 4096


def _many_rows_on_cpu(x: Array) -> bool:
    on_cpu = dispatch.target().platform == "cpu" and not products.narrow_on_cpu(x)
    return on_cpu and len(x) >= MANY_ROWS


def _input_gradient(dy: Array, kernel: Array) -> Array:
    """`dy kernel.T`: (R, D), (C, D) -> (R, C)."""
    if _many_rows_on_cpu(dy):
        return jnp.matmul(dy, jax.lax.optimization_barrier(kernel.T))
    return products.matmul(dy, kernel, transpose="right", dtype=dy.dtype)


def _kernel_gradient(x: Array, dy: Array) -> Array:
    """`x.T dy`: (R, C), (R, D) -> (C, D), in float32 at least."""
    if _many_rows_on_cpu(x) and x.shape[1] > dy.shape[1]:
        return jax.lax.optimization_barrier(_kernel_gradient(dy, x)).T
    return products.matmul(x, dy, transpose="left")
