"""The gradients of the depthwise convolution as one Pallas kernel for NVIDIA GPUs (Triton backend).

XLA reads both arrays again for every two taps of the kernel's gradient. Here a program takes a
block of channels of some pixels of one image and sums all nine in its registers, and computes the
gradient of the input from the same values. Programs share nothing but their inputs; a second kernel
adds up their sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.depthwise_conv import xla
from vssd_jax.kernels.tiles import f32

PIXELS = 512  # of one program, about: enough programs for the GPU, few sums
BLOCK, CHANNELS, WARPS = 16, 64, 8  # of one step; four values a thread, ten sums of each


def supports(x: Array, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    return dispatch.wrong_dtype(x, *tiles.DTYPES) or mesh.too_large(x)


def _kernel(
    x_ref: Any,
    dy_ref: Any,
    kernel_ref: Any,
    dx_ref: Any,
    sums_ref: Any,
    *,
    picture: tuple[int, ...],
    out_picture: tuple[int, ...],
    stride: int,
    relu_input: bool,
    steps: int,
) -> None:
    column, part, batch = (pl.program_id(axis) for axis in range(3))
    channels = tiles.span(column * CHANNELS, CHANNELS, dx_ref.shape[-1])
    (height, width), (out_height, out_width) = picture, out_picture

    def body(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        token, inside = tiles.span((part * steps + step) * BLOCK, BLOCK, height * width)
        row, col = jax.lax.div(token, width), jax.lax.rem(token, width)
        x = tiles.load(x_ref, batch, (token, inside), channels).astype(f32)
        if relu_input:
            x = jnp.maximum(x, 0.0)
        dx, updated = jnp.zeros_like(x), []
        for i in range(3):
            for j in range(3):
                # Tap (i, j) multiplied this pixel for the output pixel (y / stride, z / stride).
                y, z = row + (1 - i), col + (1 - j)
                valid = inside & (y >= 0) & (z >= 0)
                if stride == 2:
                    valid &= ((y | z) & 1) == 0
                    y, z = y >> 1, z >> 1
                valid &= (y < out_height) & (z < out_width)
                dy = tiles.load(dy_ref, batch, (y * out_width + z, valid), channels).astype(f32)
                dx += dy * tiles.load(kernel_ref, i, j, channels)[None, :]
                updated.append(sums[3 * i + j] + x * dy)
                if i == j == 1:  # the middle tap uses every output pixel once
                    updated_bias = sums[9] + dy
        if relu_input:
            dx = jnp.where(x > 0, dx, 0.0)
        tiles.store(dx_ref, dx, batch, (token, inside), channels)
        return *updated, updated_bias

    zero = jnp.zeros((BLOCK, CHANNELS), f32)
    sums = jax.lax.fori_loop(0, steps, body, (zero,) * 10)
    for place, values in enumerate(sums):
        tiles.store(sums_ref, jnp.sum(values, axis=0), batch, part, place, channels)


def _on_device(
    batched: tuple[Array, Array], shared: Array, *, stride: int, relu_input: bool
) -> tuple[Array, Array]:
    """The gradient of x, and those of kernel and bias (1, 10, C)."""
    (x, dy), kernel = batched, shared
    batch, height, width, channels = x.shape
    parts = pl.cdiv(height * width, PIXELS)
    steps = pl.cdiv(pl.cdiv(height * width, BLOCK), parts)
    dx, sums = tiles.call(
        functools.partial(
            _kernel,
            picture=(height, width),
            out_picture=dy.shape[1:3],
            stride=stride,
            relu_input=relu_input,
            steps=steps,
        ),
        "depthwise_conv_gradient",
        (pl.cdiv(channels, CHANNELS), parts, batch),
        (
            jax.ShapeDtypeStruct((batch, height * width, channels), x.dtype),
            jax.ShapeDtypeStruct((batch, parts, 10, channels), f32),
        ),
        (x.reshape(batch, -1, channels), dy.reshape(batch, -1, channels), kernel.astype(f32)),
        num_warps=WARPS,
    )
    (total,) = tiles.sum_parts(sums.reshape(-1, 10, channels))
    return dx.reshape(x.shape), total[None]


def gradients(
    x: Array, dy: Array, kernel: Array, stride: int, relu_input: bool
) -> tuple[Array, Array, Array]:
    """See `vssd_jax.kernels.depthwise_conv.xla.gradients`."""
    f = functools.partial(_on_device, stride=stride, relu_input=relu_input)
    dx, sums = mesh.over_batch(f, (x, dy), kernel)
    sums = sums.sum(0)
    return dx, sums[:9].reshape(kernel.shape), sums[9]


depthwise_conv = functools.partial(xla.depthwise_conv, gradients=gradients)
