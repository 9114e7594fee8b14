"""LayerNorm and linear layers as one Pallas kernel for NVIDIA GPUs (Triton backend).

A program reads a block of tokens once and writes all its products; the normalised tokens stay in
the registers. The gradients keep nothing but the arguments, see `pallas_gradient.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.norm_linear import pallas_gradient

TILE = 64  # columns of the result at a time
MAX_CHANNELS = 256


def supports(x: Array, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    # The results are up to four times as wide as `x`.
    return dispatch.wrong_dtype(x, jnp.bfloat16, jnp.float16) or mesh.too_large(x, factor=4)


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    bias_ref: Any,
    kernel_ref: Any,
    *out_refs: Any,
    block: int,
    epsilon: float,
) -> None:
    length, channels = x_ref.shape
    rows = tiles.span(pl.program_id(0) * block, block, length)
    inputs = tiles.span(0, tiles.padded(channels), channels)
    x = tiles.load(x_ref, rows, inputs)
    normed = tiles.layer_norm(x, scale_ref, bias_ref, inputs, epsilon)

    def write(out_ref: Any, columns: tiles.Span, start: int, _: None) -> None:
        part = tiles.load(kernel_ref, inputs, (start + columns[0], columns[1]))
        tiles.store(out_ref, tiles.dot(normed, part), rows, columns)

    tiles.fold_columns(write, None, out_refs, TILE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def norm_linear(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float,
) -> tuple[Array, ...]:
    """See `vssd_jax.kernels.norm_linear.api.norm_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    block = 128 if x.shape[-1] <= 128 else 64
    outputs = tiles.call(
        functools.partial(_kernel, block=block, epsilon=epsilon),
        "norm_linear",
        (pl.cdiv(rows.shape[0], block),),
        tuple(
            jax.ShapeDtypeStruct((rows.shape[0], width), dtype)
            for width, dtype in zip(widths, dtypes, strict=True)
        ),
        (rows, scale, bias, kernel.astype(x.dtype)),
        num_warps=8,
    )
    return tuple(y.reshape(*x.shape[:-1], -1) for y in outputs)


def _forward(
    x: Array,
    scale: Array,
    bias: Array,
    kernel: Array,
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    args = (x, scale, bias, kernel)
    return norm_linear(*args, widths, dtypes, epsilon), args


def _backward(
    widths: tuple[int, ...],
    dtypes: tuple[jax.typing.DTypeLike, ...],
    epsilon: float,
    saved: tuple[Array, ...],
    dparts: tuple[Array, ...],
) -> tuple[Array, ...]:
    x, scale, bias, kernel = saved
    return pallas_gradient.gradients(x, scale, bias, kernel, dparts, epsilon)


norm_linear.defvjp(_forward, _backward)
