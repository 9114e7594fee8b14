"""Loads, stores and products that the Pallas kernels for NVIDIA GPUs (Triton backend) share.

Sizes inside a kernel are powers of two, and masks cover the elements beyond the arrays. Pallas
itself does not mask the end of a block: each kernel gets whole arrays and masks its loads and
stores.

Import this module, and those that use it, only where `dispatch.pallas_triton` allows it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from vssd_jax.kernels import dispatch

Span = tuple[Array, Array]  # indices along an axis, and the mask of the valid ones

f32 = jnp.float32
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
PROGRAMS = 1024  # that each write a row of sums, at most: several for each processor of a GPU
SUMMED = 4096  # values that a step of `sum_parts` adds


def padded(size: int) -> int:
    """The power of two that holds `size` elements; matrix units want 16 at least."""
    return max(16, pl.next_power_of_2(size))


def span(start: int | Array, size: int, end: int | Array) -> Span:
    """`size` indices from `start` on, and the mask of those below `end`."""
    index = start + jnp.arange(size)
    return index, index < end


def load(ref: Any, *axes: int | Array | Span) -> Array:
    """The elements at the cross product of `axes`, an index or a span each; zero where masked."""
    index, mask = _grid(axes)
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


def store(ref: Any, value: Array, *axes: int | Array | Span) -> None:
    """Writes `value` to the elements that `load` would read."""
    index, mask = _grid(axes)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _grid(axes: tuple[int | Array | Span, ...]) -> tuple[tuple, Array]:
    # One index tuple of arrays: chained `.at`s break masked stores in interpret mode.
    spans = [axis for axis in axes if isinstance(axis, tuple)]
    index: list[Any] = []
    masks: list[Array] = []
    for axis in axes:
        if not isinstance(axis, tuple):
            index.append(axis)
            continue
        shape = [1] * len(spans)
        shape[len(masks)] = -1
        positions, valid = (part.reshape(shape) for part in axis)
        index.append(positions)
        masks.append(valid)
    mask = functools.reduce(operator.and_, masks)
    return tuple(index), jnp.broadcast_to(mask, tuple(axis[0].size for axis in spans))


def fold_columns(
    f: Callable[[Any, Span, int, Any], Any], carry: Any, refs: tuple[Any, ...], tile: int
) -> Any:
    """`carry = f(ref, columns, start, carry)` for each tile of the columns of arrays side by side.

    `start` is the number of columns in the arrays before `ref`.
    """
    start = 0
    for ref in refs:
        width = ref.shape[-1]
        size = min(tile, padded(width))

        def body(
            i: Array,
            carry: Any,
            ref: Any = ref,
            start: int = start,
            size: int = size,
            width: int = width,
        ) -> Any:
            return f(ref, span(i * size, size, width), start, carry)

        carry = jax.lax.fori_loop(0, pl.cdiv(width, size), body, carry)
        start += width
    return carry


def dot(a: Array, b: Array) -> Array:
    """a @ b in float32; products of float32 inputs are full float32, not TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == f32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=f32)


def mixed_dot(a: Array, b: Array) -> Array:
    """a @ b in float32, of arrays of which one may be float32 and the other one of 16 bits.

    As in XLA such a product is TF32: float32's range, and no fewer bits than the narrow array has.
    """
    if a.dtype == b.dtype:
        return dot(a, b)
    return jax.lax.dot(a.astype(f32), b.astype(f32), preferred_element_type=f32)


def standardised(
    x: Array, columns: Span, channels: int, epsilon: float
) -> tuple[Array, Array, Array]:
    """`(x - mean) / std` of the rows of `x` in two passes, their mean and 1 / std; in float32.

    `columns` are the columns of `x`, `channels` of them valid.
    """
    wide = x.astype(f32)
    mean = jnp.sum(wide, axis=1) / channels
    centred = jnp.where(columns[1][None, :], wide - mean[:, None], 0.0)
    variance = jnp.sum(centred * centred, axis=1) / channels
    rstd = jax.lax.rsqrt(variance + epsilon)
    return centred * rstd[:, None], mean, rstd


def layer_norm(x: Array, scale_ref: Any, bias_ref: Any, columns: Span, epsilon: float) -> Array:
    """LayerNorm of the rows of `x`, in two passes and in its dtype; `columns` are its columns."""
    normed, *_ = standardised(x, columns, scale_ref.shape[0], epsilon)
    scale, bias = (load(ref, columns)[None, :] for ref in (scale_ref, bias_ref))
    return (normed * scale + bias).astype(x.dtype)


def layer_norm_gradient(dnormed: Array, normed: Array, rstd: Array, channels: int) -> Array:
    """From the gradient of `normed`, see `standardised`, the gradient of its `x`."""
    mean_d = jnp.sum(dnormed, axis=1) / channels
    mean_dn = jnp.sum(dnormed * normed, axis=1) / channels
    return rstd[:, None] * (dnormed - mean_d[:, None] - normed * mean_dn[:, None])


def steps(blocks: int) -> int:
    """How many of `blocks` a program takes, so that its sums are not one of too many rows."""
    return pl.cdiv(blocks, PROGRAMS)


def sum_parts(*parts: Array) -> list[Array]:
    """The sums over the first axis of arrays in float32, of any other shapes: one kernel for all.

    XLA has a kernel for each array, and two for one of many rows.
    """
    arrays = [part.reshape(len(part), -1) for part in parts]
    sizes = [_sum_sizes(*array.shape) for array in arrays]
    counts = [pl.cdiv(array.shape[1], tile) for array, (_, tile) in zip(arrays, sizes, strict=True)]
    sums = call(
        functools.partial(_sum_kernel, sizes=tuple(sizes), counts=tuple(counts)),
        "sum_parts",
        (sum(counts),),
        tuple(jax.ShapeDtypeStruct(array.shape[1:], f32) for array in arrays),
        tuple(arrays),
        num_warps=4,
    )
    return [total.reshape(part.shape[1:]) for total, part in zip(sums, parts, strict=True)]


def _sum_sizes(rows: int, columns: int) -> tuple[int, int]:
    """Of a program's block: as many rows as there are, of a sector of the memory's at least."""
    rows, columns = pl.next_power_of_2(rows), pl.next_power_of_2(columns)
    block = min(rows, SUMMED // min(columns, 8))
    return block, min(columns, SUMMED // block)


def _sum_kernel(
    *refs: Any, sizes: tuple[tuple[int, int], ...], counts: tuple[int, ...]
) -> None:
    program, first, half = pl.program_id(0), 0, len(sizes)
    arrays = zip(refs[:half], refs[half:], sizes, counts, strict=True)
    for part_ref, sum_ref, (block, tile), count in arrays:

        @pl.when((program >= first) & (program < first + count))
        def _(
            part_ref: Any = part_ref,
            sum_ref: Any = sum_ref,
            block: int = block,
            tile: int = tile,
            first: int = first,
        ) -> None:
            rows, width = part_ref.shape
            columns = span((program - first) * tile, tile, width)

            def body(step: Array, acc: Array) -> Array:
                return acc + load(part_ref, span(step * block, block, rows), columns)

            acc = jax.lax.fori_loop(0, pl.cdiv(rows, block), body, jnp.zeros((block, tile), f32))
            store(sum_ref, jnp.sum(acc, axis=0), columns)

        first += count


def call(
    kernel: Callable,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    args: tuple[Array, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Runs `kernel` on whole arrays; on a CPU, for tests, in the interpreter.

    `aliases` has the number of the result that is written over an argument, by the argument's.
    """
    interpret = dispatch.target().platform == "cpu"
    # Always name Triton's parameters: without them some versions of JAX choose another backend.
    params = plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=None if interpret else params,
        interpret=interpret,
        input_output_aliases=aliases or {},
        name=name,
    )(*args)
