"""The gradients of LayerNorm and linear layers as two Pallas kernels for NVIDIA GPUs (Triton).

The first has some rows of tokens and goes over all columns: the gradient of the normalised tokens,
and from it that of the tokens, stays in the registers. The second has some columns of the linear
layers' kernel and goes over a chunk of the rows, which it normalises again, with the mean and the
deviation that the first one wrote. A third adds up the sums of programs over rows, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import tiles
from vssd_jax.kernels.tiles import f32


def _input_kernel(
    x_ref: Any, *refs: Any, block: int, steps: int, tile: int, epsilon: float
) -> None:
    """The gradient of x; of scale and bias the sums over the program's rows; mean and 1 / std."""
    *d_refs, scale_ref, kernel_ref, dx_ref, sums_ref, moments_ref = refs
    length, channels = x_ref.shape
    program = pl.program_id(0)
    inputs = tiles.span(0, tiles.padded(channels), channels)

    def body(step: int | Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = tiles.span((program * steps + step) * block, block, length)

        def add(d_ref: Any, columns: tiles.Span, start: int, dy: Array) -> Array:
            part = tiles.load(kernel_ref, (start + columns[0], columns[1]), inputs)
            return dy + tiles.mixed_dot(tiles.load(d_ref, rows, columns), part)

        zero = jnp.zeros((block, inputs[0].size), f32)
        dy = tiles.fold_columns(add, zero, tuple(d_refs), tile)
        dscale, dbias = sums
        dbias += jnp.sum(dy, axis=0)
        x = tiles.load(x_ref, rows, inputs)
        normed, mean, rstd = tiles.standardised(x, inputs, channels, epsilon)
        tiles.store(moments_ref, mean, 0, rows)
        tiles.store(moments_ref, rstd, 1, rows)
        sums = dscale + jnp.sum(dy * normed, axis=0), dbias
        dnormed = dy * tiles.load(scale_ref, inputs)[None, :]
        dx = tiles.layer_norm_gradient(dnormed, normed, rstd, channels)
        tiles.store(dx_ref, dx, rows, inputs)
        return sums

    zero = jnp.zeros(inputs[0].size, f32)
    # A loop takes registers, be it of a single step.
    sums = body(0, (zero, zero)) if steps == 1 else jax.lax.fori_loop(0, steps, body, (zero, zero))
    for place, values in enumerate(sums):
        tiles.store(sums_ref, values, program, place, inputs)


def _weight_kernel(x_ref: Any, *refs: Any, block: int, tile: int, steps: int) -> None:
    """A tile of the kernel's columns: the sum over a chunk of rows."""
    *d_refs, scale_ref, bias_ref, moments_ref, out_ref = refs
    length, channels = x_ref.shape
    inputs = tiles.span(0, tiles.padded(channels), channels)
    scale, bias = (tiles.load(ref, inputs)[None, :] for ref in (scale_ref, bias_ref))
    program, chunk = pl.program_id(0), pl.program_id(1)

    def accumulate(d_ref: Any, columns: tiles.Span, start: int) -> None:
        def body(step: Array, acc: Array) -> Array:
            rows = tiles.span((chunk * steps + step) * block, block, length)
            x = tiles.load(x_ref, rows, inputs)
            mean, rstd = (tiles.load(moments_ref, i, rows)[:, None] for i in range(2))
            # In the order of the forward pass, and rounded as there.
            normed = ((x.astype(f32) - mean) * rstd * scale + bias).astype(x.dtype)
            return acc + tiles.mixed_dot(normed.T, tiles.load(d_ref, rows, columns))

        zero = jnp.zeros((inputs[0].size, columns[0].size), f32)
        acc = jax.lax.fori_loop(0, steps, body, zero)
        tiles.store(out_ref, acc, chunk, inputs, (start + columns[0], columns[1]))

    first = start = 0
    for d_ref in d_refs:
        width = d_ref.shape[-1]
        size = min(tile, tiles.padded(width))
        count = pl.cdiv(width, size)

        @pl.when((program >= first) & (program < first + count))
        def _(
            d_ref: Any = d_ref,
            first: int = first,
            start: int = start,
            width: int = width,
            size: int = size,
        ) -> None:
            accumulate(d_ref, tiles.span((program - first) * size, size, width), start)

        first += count
        start += width


def gradients(
    x: Array, scale: Array, bias: Array, kernel: Array, dparts: tuple[Array, ...], epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """Of x, scale, bias and kernel, from the gradients of the parts of the result."""
    rows = x.reshape(-1, x.shape[-1])
    d = tuple(part.reshape(-1, part.shape[-1]) for part in dparts)
    dx, norm_parts, moments = _input_gradient(rows, scale, kernel, d, epsilon)
    kernel_parts = _weight_gradient(rows, scale, bias, moments, d)
    (dscale, dbias), dkernel = tiles.sum_parts(norm_parts, kernel_parts)
    return (
        dx.reshape(x.shape),
        dscale.astype(scale.dtype),
        dbias.astype(bias.dtype),
        dkernel.astype(kernel.dtype),
    )


def _input_gradient(
    x: Array, scale: Array, kernel: Array, d: tuple[Array, ...], epsilon: float
) -> tuple[Array, Array, Array]:
    """Gradients of x, of scale and bias in parts (programs, 2, C); mean and 1 / std (2, R)."""
    length, channels = x.shape
    # Each program reads the whole kernel, which is a reason for many rows; but twice as many spill
    # registers, from 128 channels on, and with more than 128 so does a loop.
    block = 64
    steps = tiles.steps(pl.cdiv(length, block)) if channels <= 128 else 1
    programs = pl.cdiv(length, block * steps)
    return tiles.call(
        functools.partial(_input_kernel, block=block, steps=steps, tile=64, epsilon=epsilon),
        "norm_linear_input_gradient",
        (programs,),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, 2, channels), f32),
            jax.ShapeDtypeStruct((2, length), f32),
        ),
        # Transposed: its rows are aligned then, those of z|x|B|C|dt are not.
        (x, *d, scale, kernel.T.astype(x.dtype)),
        num_warps=4 if channels <= 64 else 8,
        num_stages=3,
    )


def _weight_gradient(
    x: Array, scale: Array, bias: Array, moments: Array, d: tuple[Array, ...]
) -> Array:
    """The gradient of the kernel in parts (chunks, C, columns)."""
    length, channels = x.shape
    columns = sum(part.shape[-1] for part in d)
    block, tile = 64 if channels <= 128 else 32, 128  # with more, registers spill
    count = sum(pl.cdiv(part.shape[-1], min(tile, tiles.padded(part.shape[-1]))) for part in d)
    # Some hundred programs, but the sums of chunks are a quarter of what is read at most.
    chunks = max(1, min(384 // count, length // (8 * channels)))
    steps = pl.cdiv(pl.cdiv(length, block), chunks)
    chunks = pl.cdiv(length, block * steps)
    return tiles.call(
        functools.partial(_weight_kernel, block=block, tile=tile, steps=steps),
        "norm_linear_weight_gradient",
        (count, chunks),
        jax.ShapeDtypeStruct((chunks, channels, columns), f32),
        (x, *d, scale, bias, moments),
        num_warps=8,
        num_stages=3,
    )
