"""The first two convolutions of a downsampling as Pallas kernels for NVIDIA GPUs (Triton backend).

The hidden layer, eight times as wide as the tokens, is never written to memory: the forward pass
and two kernels of the backward pass compute it from the tokens, some hidden units at a time.

An output pixel stands for the four pixels of the picture at (2y, 2z), (2y, 2z + 1), (2y + 1, 2z)
and (2y + 1, 2z + 1). Columns of output pixels, those of all images side by side, are divided into
blocks, and a program goes down the rows of some of them. Hidden units are the rows of its matrices:
of taps and biases a thread then has two values each.

Programs share nothing but their inputs, so that results repeat bit for bit. XLA adds up the sums
of the programs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.expand_depthwise import xla
from vssd_jax.kernels.tiles import Span, f32

MAX_CHANNELS = 256  # with more, the products fill the registers
# With more, the gradients of the weights fill them, and computing the hidden layer in both kernels
# takes longer than reading it; under differentiation it is then "xla", forward and backward.
MAX_GRADIENT_CHANNELS = 128
WARPS = 2048  # for the gradients of the weights: a GPU is occupied, and partial sums are few
FORWARD_PROGRAMS = 512  # at least, where a picture has so many rows


def supports(x: Array, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if x.shape[-1] > MAX_CHANNELS:
        return f"{x.shape[-1]} channels (at most {MAX_CHANNELS})"
    # The result of a single pixel is eight times as large as `x`.
    return dispatch.wrong_dtype(x, jnp.bfloat16, jnp.float16) or mesh.too_large(x, factor=8)


# --- Inside the kernels -----------------------------------------------------------------------


class Picture(NamedTuple):
    """Sizes of the input and of the output, which is half as high and wide."""

    images: int
    height: int
    width: int
    out_height: int
    out_width: int


class Columns(NamedTuple):
    """Columns of output pixels: their image, their place in it, and the mask of the valid ones."""

    image: Array
    z: Array
    valid: Array

    def pixels(self, y: Array, z: Array, height: int, width: int) -> Span:
        """Pixels (y, z) of pictures of this size, as rows of a matrix; beyond the edge masked."""
        inside = self.valid & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        return (self.image * height + y) * width + z, inside

    def inputs(self, y: Array, right: int, picture: Picture) -> Span:
        """The pixels of row `y` of the input, `right` of 2z."""
        return self.pixels(y, 2 * self.z + right, picture.height, picture.width)

    def outputs(self, y: Array, right: int, picture: Picture) -> Span:
        """The pixels of row `y` of the output, `right` of z."""
        return self.pixels(y, self.z + right, picture.out_height, picture.out_width)


def _columns(start: Array, block: int, picture: Picture) -> Columns:
    column, valid = tiles.span(start, block, picture.images * picture.out_width)
    width = jnp.asarray(picture.out_width, column.dtype)
    return Columns(jax.lax.div(column, width), jax.lax.rem(column, width), valid)


class Units(NamedTuple):
    """Some hidden units."""

    part: Span
    w1t: Array  # (units, C)
    b1: Array  # (units, 1)
    taps: list[list[Array]]  # (units, 1) each


def _units(start: Array, tile: int, w1t_ref: Any, b1_ref: Any, kernel_ref: Any) -> Units:
    hidden, channels = w1t_ref.shape
    part = tiles.span(start, tile, hidden)
    w1t = tiles.load(w1t_ref, part, tiles.span(0, tiles.padded(channels), channels))
    taps = [[tiles.load(kernel_ref, i, j, part)[:, None] for j in range(3)] for i in range(3)]
    return Units(part, w1t, tiles.load(b1_ref, part)[:, None], taps)


def _hidden(x: Array, units: Units) -> Array:
    """The hidden layer (units, pixels) in float32, rounded as if it were written."""
    h = jnp.maximum(tiles.dot(units.w1t, x.T) + units.b1, 0.0)
    return h.astype(x.dtype).astype(f32)


def _forward_kernel(
    x_ref: Any,
    w1t_ref: Any,
    b1_ref: Any,
    kernel_ref: Any,
    bias_ref: Any,
    y_ref: Any,
    *,
    picture: Picture,
    block: int,
    rows: int,
    tile: int,
) -> None:
    columns = _columns(pl.program_id(1) * block, block, picture)
    units = _units(pl.program_id(0) * tile, tile, w1t_ref, b1_ref, kernel_ref)
    bias = tiles.load(bias_ref, units.part)[:, None]
    channels = x_ref.shape[-1]
    inputs = tiles.span(0, tiles.padded(channels), channels)
    start = pl.program_id(2) * rows

    def row(y: Array, places: tuple[int, ...], sums: tuple[Array, ...]) -> list[Array]:
        """To each sum, the products of row `y` of the input with that row of the taps."""
        found = list(sums)
        for j in range(3):
            pixels = columns.inputs(y, j - 1, picture)
            h = _hidden(tiles.load(x_ref, pixels, inputs), units)
            if j == 0 or picture.width % 2 or picture.height % 2:  # others are all in the picture
                h = jnp.where(pixels[1][None, :], h, 0.0)
            for place, i in enumerate(places):
                found[place] += h * units.taps[i][j]
        return found

    def body(step: Array, above: Array) -> Array:
        y = start + step
        (total,) = row(2 * y, (1,), (above,))
        total, below = row(2 * y + 1, (2, 0), (total, jnp.zeros_like(total)))
        total = jnp.maximum(total + bias, 0.0)
        tiles.store(y_ref, total.T, columns.outputs(y, 0, picture), units.part)
        return below

    # The row above the first one: of the picture, or of zeros.
    (above,) = row(2 * start - 1, (0,), (jnp.zeros((tile, block), f32),))
    above = jnp.where(start > 0, above, 0.0)
    jax.lax.fori_loop(0, rows, body, above)


# Rows and columns of the taps by which a pixel's parity, even or odd, came to the output pixels:
# (tap, offset of the output pixel).
PARITIES = (((1, 0),), ((2, 0), (0, 1)))
FOUR = [(down, right) for down in range(2) for right in range(2)]


def _hidden_gradient(
    x: Array, units: Units, d: list[list[Array]], down: int, right: int, inside: Array | None
) -> tuple[Array, list[tuple[int, Array]]]:
    """Of the pixels at (2y + down, 2z + right): the gradient before the ReLU, in float32.

    Args:
      x: (pixels, C).
      units: the hidden units.
      d: gradients of the output pixels (units, pixels), by their offset.
      down, right: the parities.
      inside: the mask of the pixels in the picture; None if all are.

    Returns:
      (units, pixels), and with the number of each tap that was used (units,), its gradient.
    """
    h = _hidden(x, units)
    if inside is not None:
        h = jnp.where(inside[None, :], h, 0.0)
    dh, dtaps = jnp.zeros_like(h), []
    for i, below in PARITIES[down]:
        for j, beside in PARITIES[right]:
            dy = d[below][beside].astype(f32)
            dh += dy * units.taps[i][j]
            dtaps.append((3 * i + j, jnp.sum(h * dy, axis=1)))
    return jnp.where(h > 0, dh, 0.0), dtaps


def _outside(picture: Picture, down: int, right: int) -> bool:
    """Whether some of the pixels at (2y + down, 2z + right) are beyond the edge."""
    return bool((down and picture.height % 2) or (right and picture.width % 2))


def _weight_gradient_kernel(
    x_ref: Any,
    dy_ref: Any,
    w1t_ref: Any,
    b1_ref: Any,
    kernel_ref: Any,
    sums_ref: Any,
    *,
    picture: Picture,
    block: int,
    rows: int,
    steps: int,
    tile: int,
) -> None:
    """Sums (C + 11, units) of a program: gradients of w1, of nine taps, of bias and of b1."""
    group, part = pl.program_id(1), pl.program_id(2)
    units = _units(pl.program_id(0) * tile, tile, w1t_ref, b1_ref, kernel_ref)
    channels = x_ref.shape[-1]
    inputs = tiles.span(0, tiles.padded(channels), channels)

    def over_columns(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = _columns((group * steps + step) * block, block, picture)

        def gradients_of_row(y: Array) -> list[Array]:
            return [
                tiles.load(dy_ref, columns.outputs(y, right, picture), units.part).T
                for right in range(2)
            ]

        def over_rows(
            row: Array, carry: tuple[list[Array], tuple[Array, ...]]
        ) -> tuple[list[Array], tuple[Array, ...]]:
            y = part * rows + row
            above, (dw1t, *vectors) = carry
            d = [above, gradients_of_row(y + 1)]
            for down, right in FOUR:
                pixels = columns.inputs(2 * y + down, right, picture)
                x = tiles.load(x_ref, pixels, inputs)
                inside = pixels[1] if _outside(picture, down, right) else None
                dh, dtaps = _hidden_gradient(x, units, d, down, right, inside)
                dw1t += tiles.dot(dh.astype(x.dtype), x)
                for place, dtap in dtaps:
                    vectors[place] += dtap
                vectors[10] += jnp.sum(dh, axis=1)
            vectors[9] += jnp.sum(above[0].astype(f32), axis=1)
            return d[1], (dw1t, *vectors)

        return jax.lax.fori_loop(0, rows, over_rows, (gradients_of_row(part * rows), sums))[1]

    zeros = jnp.zeros((tile, inputs[0].size), f32), *[jnp.zeros(tile, f32)] * 11
    dw1t, *vectors = jax.lax.fori_loop(0, steps, over_columns, zeros)
    place = part * pl.num_programs(1) + group
    tiles.store(sums_ref, dw1t.T, place, inputs, units.part)
    for number, vector in enumerate(vectors):
        tiles.store(sums_ref, vector, place, channels + number, units.part)


def _input_gradient_kernel(
    x_ref: Any,
    dy_ref: Any,
    w1t_ref: Any,
    b1_ref: Any,
    kernel_ref: Any,
    dx_ref: Any,
    *,
    picture: Picture,
    block: int,
    tile: int,
) -> None:
    columns, y = _columns(pl.program_id(0) * block, block, picture), pl.program_id(1)
    hidden, channels = w1t_ref.shape
    inputs = tiles.span(0, tiles.padded(channels), channels)
    places = [columns.inputs(2 * y + down, right, picture) for down, right in FOUR]
    xs = [tiles.load(x_ref, pixels, inputs) for pixels in places]

    def body(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        units = _units(i * tile, tile, w1t_ref, b1_ref, kernel_ref)
        d = [
            [
                tiles.load(dy_ref, columns.outputs(y + below, beside, picture), units.part).T
                for beside in range(2)
            ]
            for below in range(2)
        ]
        found = []
        for x, pixels, (down, right), dxt in zip(xs, places, FOUR, sums, strict=True):
            inside = pixels[1] if _outside(picture, down, right) else None
            dh, _ = _hidden_gradient(x, units, d, down, right, inside)
            found.append(dxt + tiles.dot(units.w1t.T, dh.astype(x.dtype)))
        return tuple(found)

    zeros = (jnp.zeros((inputs[0].size, block), f32),) * 4
    sums = jax.lax.fori_loop(0, pl.cdiv(hidden, tile), body, zeros)
    for pixels, dxt in zip(places, sums, strict=True):
        tiles.store(dx_ref, dxt.T, pixels, inputs)


# --- Their calls ------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Output pixels and hidden units at a time, and how Triton compiles the kernel."""

    block: int
    tile: int
    warps: int
    stages: int


# The largest sizes whose registers do not spill, and whose arrays fit into the shared memory, on
# any of the GPUs of the tests.
def _forward_sizes(channels: int) -> Sizes:
    if channels > 128:
        return Sizes(16, 64, 4, 2)
    return Sizes(32 if channels == 64 else 16, 128, 8, 2)  # without a mask fewer registers


def _weight_sizes(channels: int) -> Sizes:
    if channels <= 64:
        return Sizes(16, 64, 8, 2)
    # With a mask of the channels 32 units spill one register.
    return Sizes(16, 32, 8, 3) if channels == 128 else Sizes(16, 16, 4, 3)


def _input_sizes(channels: int) -> Sizes:
    return Sizes(16, 64, 4 if channels <= 64 else 8, 2)


def _picture(x: Array) -> Picture:
    images, height, width, _ = x.shape
    return Picture(images, height, width, pl.cdiv(height, 2), pl.cdiv(width, 2))


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _parts(picture: Picture, parts: int) -> tuple[int, int]:
    """About so many parts of the rows of the output, and the rows of each."""
    parts = max(1, min(picture.out_height, parts))
    rows = pl.cdiv(picture.out_height, parts)
    return pl.cdiv(picture.out_height, rows), rows


def _on_device(x: Array, w1: Array, b1: Array, kernel: Array, bias: Array) -> Array:
    picture, (channels, hidden) = _picture(x), w1.shape
    block, tile, warps, stages = _forward_sizes(channels)
    chunks, blocks = pl.cdiv(hidden, tile), pl.cdiv(picture.images * picture.out_width, block)
    parts, rows = _parts(picture, FORWARD_PROGRAMS // (chunks * blocks))
    out = picture.images, picture.out_height, picture.out_width, hidden
    y = tiles.call(
        functools.partial(_forward_kernel, picture=picture, block=block, rows=rows, tile=tile),
        "expand_depthwise",
        (chunks, blocks, parts),  # neighbours share the tokens that they read
        jax.ShapeDtypeStruct((out[0] * out[1] * out[2], hidden), x.dtype),
        (_rows(x), w1.T.astype(x.dtype), b1, kernel, bias),
        num_warps=warps,
        num_stages=stages,
    )
    return y.reshape(out)


def _weight_gradient(x: Array, dy: Array, w1t: Array, b1: Array, kernel: Array) -> Array:
    """(C + 11, D): gradients of w1, of the nine taps, of bias and of b1."""
    picture, (hidden, channels) = _picture(x), w1t.shape
    block, tile, warps, stages = _weight_sizes(channels)
    chunks, blocks = pl.cdiv(hidden, tile), pl.cdiv(picture.images * picture.out_width, block)
    programs = WARPS // warps
    steps = pl.cdiv(blocks, max(1, programs // chunks))
    groups = pl.cdiv(blocks, steps)
    parts, rows = _parts(picture, programs // (chunks * groups))
    sums = tiles.call(
        functools.partial(
            _weight_gradient_kernel,
            picture=picture,
            block=block,
            rows=rows,
            steps=steps,
            tile=tile,
        ),
        "expand_depthwise_weight_gradient",
        (chunks, groups, parts),
        jax.ShapeDtypeStruct((parts * groups, channels + 11, hidden), f32),
        (_rows(x), _rows(dy), w1t, b1, kernel),
        num_warps=warps,
        num_stages=stages,
    )
    return sums.sum(0)


def _input_gradient(x: Array, dy: Array, w1t: Array, b1: Array, kernel: Array) -> Array:
    picture, (_, channels) = _picture(x), w1t.shape
    block, tile, warps, stages = _input_sizes(channels)
    dx = tiles.call(
        functools.partial(_input_gradient_kernel, picture=picture, block=block, tile=tile),
        "expand_depthwise_input_gradient",
        (pl.cdiv(picture.images * picture.out_width, block), picture.out_height),
        jax.ShapeDtypeStruct(_rows(x).shape, x.dtype),
        (_rows(x), _rows(dy), w1t, b1, kernel),
        num_warps=warps,
        num_stages=stages,
    )
    return dx.reshape(x.shape)


_expand_depthwise = jax.custom_vjp(_on_device)


def _forward(
    x: Array, w1: Array, b1: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
    y = _expand_depthwise(x, w1, b1, kernel, bias)
    return y, (x, w1, b1, kernel, bias, y)


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, w1, b1, kernel, bias, y = saved
    args = x, jnp.where(y > 0, dy, 0), w1.T.astype(x.dtype), b1, kernel
    dx, sums = _input_gradient(*args), _weight_gradient(*args)
    channels = x.shape[-1]
    dw1, dkernel = sums[:channels], sums[channels : channels + 9].reshape(kernel.shape)
    found = dw1, sums[-1], dkernel, sums[-2]
    parameters = w1, b1, kernel, bias
    return dx, *(d.astype(p.dtype) for d, p in zip(found, parameters, strict=True))


_expand_depthwise.defvjp(_forward, _backward)


def expand_depthwise(x: Array, w1: Array, b1: Array, kernel: Array, bias: Array) -> Array:
    """See `vssd_jax.kernels.expand_depthwise.api.expand_depthwise`."""
    if x.shape[-1] <= MAX_GRADIENT_CHANNELS:
        return _expand_depthwise(x, w1, b1, kernel, bias)
    return dispatch.for_inference(_on_device, xla.expand_depthwise)(x, w1, b1, kernel, bias)
