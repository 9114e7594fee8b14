"""LayerNorm, and linear layers by oneDNN."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from vssd_jax.kernels import dispatch, onednn
from vssd_jax.kernels.layer_norm import layer_norm
from vssd_jax.kernels.norm_linear.xla import kernel_parts

Dtypes = tuple[jax.typing.DTypeLike, ...]


def supports(x: Array, dtypes: Dtypes, **_: object) -> str | None:
    wide = [dtype for dtype in dtypes if jnp.dtype(dtype) not in map(jnp.dtype, onednn.DTYPES)]
    return f"a result in {wide[0]}" if wide else dispatch.wrong_dtype(x, *onednn.DTYPES)


def norm_linear(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    *,
    widths: tuple[int, ...],
    dtypes: Dtypes,
    epsilon: float,
) -> tuple[Array, ...]:
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`."""
    rows = layer_norm(x.reshape(-1, x.shape[-1]), scale, bias, epsilon=epsilon)
    results = _products(rows, kernel, widths, dtypes)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _products(
    x: Array, kernel: Array, widths: tuple[int, ...], dtypes: Dtypes
) -> tuple[Array, ...]:
    parts = kernel_parts(kernel.astype(x.dtype), widths)
    return tuple(
        onednn.matmul(x, part, dtype=dtype) for part, dtype in zip(parts, dtypes, strict=True)
    )


def _backward(
    widths: tuple[int, ...], dtypes: Dtypes, x_kernel: tuple[Array, Array], dys: tuple[Array, ...]
) -> tuple[Array | None, Array]:
    x, kernel = x_kernel
    dx, dparts = None, []
    parts = kernel_parts(kernel.astype(x.dtype), widths)
    for part, dy in zip(parts, dys, strict=True):
        dy = dy.astype(x.dtype)
        dx = onednn.matmul(dy, part, None, dx, transpose="right")
        dparts.append(onednn.kernel_gradient(x, dy))
    return dx, jnp.concatenate(dparts, 1).astype(kernel.dtype)


_products.defvjp(lambda *arguments: (_products(*arguments), arguments[:2]), _backward)
