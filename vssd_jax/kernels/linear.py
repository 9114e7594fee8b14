"""A linear layer whose bias is added before the result is rounded.

XLA makes one kernel of the product and what follows only in the accumulator's dtype; a bias that
is added after the rounding costs another trip through the memory. The gradient is written out so
that its products stay in the narrow dtype.
"""

import jax
import jax.numpy as jnp

from vssd_jax.kernels import dispatch


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x kernel + bias`.

    Args:
      x: (..., C).
      kernel: (C, D); rounded to the dtype of `x`.
      bias: (D,) or None.

    Returns:
      (..., D) in the dtype of `x`; accumulated in float32 at least.
    """
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.matmul(_rows(x), kernel.astype(x.dtype), preferred_element_type=acc)
    if bias is not None:
        y = y + bias.astype(acc)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _forward(x, kernel, bias):
    return linear(x, kernel, bias), (x, kernel, bias)


def _backward(saved, dy):
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


def _rows(x):
    # One matrix: the gradient of the kernel contracts all leading axes, and over more than one of
    # them XLA's CPU compiler transposes an activation, at the cost of the product itself.
    return x.reshape(-1, x.shape[-1])


# On a CPU, XLA's products are slow in some forms: by a quarter with a transposed wide matrix on the
# right, by half with the wider of two matrices transposed on the left. Another form costs a
# transposition of the weights, which pays for many rows. The barrier keeps XLA from undoing it.
MANY_ROWS = 4096


def _input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """`dy kernel.T`: (R, D), (C, D) -> (R, C)."""
    kernel = kernel.T
    if dispatch.target().platform == "cpu" and len(dy) >= MANY_ROWS:
        kernel = jax.lax.optimization_barrier(kernel)
    return jnp.matmul(dy, kernel)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """`x.T dy`: (R, C), (R, D) -> (C, D), in float32 at least."""
    if dispatch.target().platform == "cpu" and len(x) >= MANY_ROWS and x.shape[1] > dy.shape[1]:
        return jax.lax.optimization_barrier(_kernel_gradient(dy, x)).T
    acc = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.T, dy, preferred_element_type=acc)
