"""Matrix products, so written that a CPU computes those of bfloat16 in its matrix units.

XLA's CPU compiler leaves a product of bfloat16 matrices to a library, which uses AMX where there is
any, under two conditions: the result is float32, and both matrices lie in memory row by row, the
left one with the summed axis last. All other products it widens to float32 first, and they take
ten times as long. On other devices, and for other dtypes, these are plain products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch

f32 = jnp.float32


def matmul(
    a: Array,
    b: Array,
    *,
    transpose: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Array:
    """The product of matrices of one dtype, (..., M, N), accumulated in float32 at least.

    Args:
      a: (..., M, K), or (..., K, M) with `transpose="left"`.
      b: (..., K, N), or (..., N, K) with `transpose="right"`.
      transpose: which of the two is transposed, if any.
      dtype: of the result; None for float32 at least.

    Returns:
      (..., M, N). Where `narrow_on_cpu`, the gradients are products of bfloat16
      matrices too, with that of the result rounded to it.
    """
    dtype = dtype or jnp.promote_types(a.dtype, f32)
    if narrow_on_cpu(a):
        return dispatch.differentiable(_narrow)(a, b, transpose).astype(dtype)
    return jnp.einsum(_EQUATIONS[transpose], a, b, preferred_element_type=dtype)


_EQUATIONS = {
    None: "...mk,...kn->...mn",
    "left": "...km,...kn->...mn",
    "right": "...mk,...nk->...mn",
}


def narrow_on_cpu(x: Array) -> bool:
    """Whether XLA might widen the products of `x`."""
    return x.dtype == jnp.bfloat16 and dispatch.target().platform == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow(a: Array, b: Array, transpose: str | None) -> Array:
    if transpose == "left":
        if a.shape[-1] > b.shape[-1]:  # the smaller one is transposed, and the result
            # Without the barrier XLA would make that one transposition of the operands.
            y = jax.lax.optimization_barrier(_narrow(b, a, "left"))
            return jnp.swapaxes(y, -1, -2)
        a = _transposed(a)
    batch = tuple(range(a.ndim - 2))
    summed = a.ndim - 1, b.ndim - (1 if transpose == "right" else 2)
    dimensions = ((summed[:1], summed[1:]), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=f32)


def _gradients(
    transpose: str | None, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    a, b = saved
    dy = dy.astype(a.dtype)
    if transpose is None:
        da, db = _narrow(dy, b, "right"), _narrow(a, dy, "left")
    elif transpose == "left":
        da, db = _narrow(b, dy, "right"), _narrow(a, dy, None)
    else:
        da, db = _narrow(dy, b, None), _narrow(dy, a, "left")
    return da.astype(a.dtype), db.astype(b.dtype)


_narrow.defvjp(lambda a, b, transpose: (_narrow(a, b, transpose), (a, b)), _gradients)


def _transposed(x: Array) -> Array:
    """(..., K, M) -> (..., M, K), in the memory too.

    A transposition alone XLA makes a matter of layout, and looks at the product with that layout;
    that it is read through a shape with an axis more keeps it from that, the barriers keep it from
    simplifying this.
    """
    transposed = jnp.swapaxes(x, -1, -2)
    return jax.lax.optimization_barrier(
        jax.lax.optimization_barrier(transposed[None]).reshape(transposed.shape)
    )
