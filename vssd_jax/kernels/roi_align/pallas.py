"""RoIAlign and its gradient as Pallas kernels for NVIDIA GPUs (Triton backend).

A bin is the mean of samples on a regular grid, each interpolated between the two nearest rows and
the two nearest columns. So a row of bins needs the rows of its samples alone: their mean, by its
columns, is multiplied with the weights of the columns. Nothing is read but cells that the region
covers, from the map of its level as it is.

Forward: a program has one row of the bins of a region. Backward: a program has some neighbouring
cells of one row of a map, finds the regions over them, and adds up their gradients in the order of
the regions. Programs share nothing but their inputs, so that results repeat bit for bit. All is
computed in float32, and rounded once to the dtype of the maps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from vssd_jax.kernels import dispatch, mesh, tiles
from vssd_jax.kernels.roi_align.sampling import bin_samples, on_levels
from vssd_jax.kernels.tiles import Span, f32

MAX_BINS = 16
CELLS = 16  # neighbours in a row, at a time: the least that matrix units take
CHANNELS = 256  # of a program
REGIONS = 1024  # that a program of the gradient looks at at a time
WARPS, GRADIENT_WARPS = 8, 4  # with the other number each spills registers
NEAR = 1e-3  # cells: more than positions are rounded by

Sizes = tuple[tuple[int, int], ...]  # height and width of each map


def supports(maps: Sequence[Array], boxes: Array, bins: int, **_: Any) -> str | None:
    """Why these arguments are out of reach, or None."""
    if bins > MAX_BINS:
        return f"{bins} bins (at most {MAX_BINS})"
    shape = *boxes.shape[:2], bins, bins, maps[0].shape[-1]
    result = jax.ShapeDtypeStruct(shape, maps[0].dtype)
    return (
        dispatch.wrong_dtype(maps[0], *tiles.DTYPES)
        or mesh.too_large(maps[0])
        or mesh.too_large(result)
    )


# --- Where regions are ------------------------------------------------------------------------


class Axis(NamedTuple):
    """The samples of a region along one axis, in cells."""

    start: Any  # of the first bin
    size: Any  # of a bin
    step: Any  # from one sample to the next
    samples: Any  # of a bin
    first: Any  # cell that a sample may touch
    last: Any

    def position(self, place: Array, sample: Array, length: int) -> tuple[Array, Array]:
        """Of a sample of the bin at `place`, moved into the map, and whether it counts."""
        position = self.start + place.astype(f32) * self.size + (sample + 0.5) * self.step
        return jnp.clip(position, 0.0, length - 1.0), (position >= -1) & (position <= length)

    def weights(self, places: Array, cells: Array, length: int) -> Array:
        """Of cells in the sums of bins at `places`, whose shapes broadcast."""

        def add(sample: Array, weights: Array) -> Array:
            position, counts = self.position(places, sample, length)
            near = jnp.maximum(1 - jnp.abs(position - cells.astype(f32)), 0.0)
            return weights + jnp.where(counts, near, 0.0)

        zeros = jnp.zeros(jnp.broadcast_shapes(places.shape, cells.shape), f32)
        return jax.lax.fori_loop(0, _int(self.samples), add, zeros)


class Region(NamedTuple):
    level: Any
    share: Any  # of a sample in its bin
    y: Axis
    x: Axis


FIELDS = 2 + 2 * len(Axis._fields)


def _regions(boxes: Array, strides: tuple[int, ...], sizes: Sizes, bins: int) -> Array:
    """(FIELDS, B * R) in float32, in which numbers of cells and samples are exact."""
    level, corners = on_levels(boxes.reshape(-1, 4).astype(f32), strides)
    lengths = jnp.asarray(sizes, f32)[level]

    def axis(start: Array, end: Array, length: Array) -> Axis:
        size, samples = bin_samples(start, end, bins)
        step = size / jnp.maximum(samples, 1)
        ends = start + 0.5 * step, start + bins * size - 0.5 * step
        first, last = (jnp.floor(jnp.clip(x, 0, length - 1)) for x in ends)
        last = jnp.minimum(last + 1, length - 1)
        # A region without samples covers no cell.
        return Axis(start, size, step, samples, first, jnp.where(samples > 0, last, first - 1))

    y = axis(corners[:, 1], corners[:, 3], lengths[:, 0])
    x = axis(corners[:, 0], corners[:, 2], lengths[:, 1])
    # NaN for a box of NaN, which takes no sample: so are its features then.
    share = 1 / (jnp.maximum(y.samples, 1) * jnp.maximum(x.samples, 1))
    return jnp.stack([level.astype(f32), share, *y, *x])


def _region(field: Callable[[int], Array]) -> Region:
    """From a function that loads a row of the array of `_regions`."""
    level, share, *axes = (field(row) for row in range(FIELDS))
    half = len(Axis._fields)
    return Region(level, share, Axis(*axes[:half]), Axis(*axes[half:]))


def _int(x: Array) -> Array:
    return x.astype(jnp.int32)


def _divided(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder."""
    divisor = jnp.asarray(by, x.dtype)
    return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


# --- Inside the kernels -----------------------------------------------------------------------


def _forward_kernel(*refs: Any, regions: int, bins: int, tile: int) -> None:
    *map_refs, regions_ref, y_ref = refs
    rest, row = _divided(pl.program_id(0), bins)
    number, part = _divided(rest, pl.cdiv(y_ref.shape[-1], tile))
    channels = tiles.span(part * tile, tile, y_ref.shape[-1])
    region = _region(lambda field: regions_ref[field, number])
    for level, map_ref in enumerate(map_refs):

        @pl.when(region.level == level)
        def _(map_ref: Any = map_ref) -> None:
            image, _ = _divided(number, regions)
            sums = _row_of_bins(map_ref, image, region, row, channels)
            bins_of_row = tiles.span(0, MAX_BINS, bins)
            tiles.store(y_ref, sums * region.share, number, row, bins_of_row, channels)


def _row_of_bins(
    map_ref: Any, image: Array, region: Region, row: Array, channels: Span
) -> Array:
    """Sums of the samples of a row of bins: (MAX_BINS, channels)."""
    _, height, width, _ = map_ref.shape
    first, end = _int(region.x.first), _int(region.x.last) + 1

    def add_cells(step: Array, sums: Array) -> Array:
        cells = tiles.span(first + step * CELLS, CELLS, end)

        def add_sample(sample: Array, total: Array) -> Array:
            position, counts = region.y.position(row, sample, height)
            above = jnp.floor(position)
            below = jnp.minimum(above + 1, height - 1)
            for y, near in ((above, 1 - (position - above)), (below, position - above)):
                values = tiles.load(map_ref, image, _int(y), cells, channels)
                total += jnp.where(counts, near, 0.0) * values.astype(f32)
            return total

        zeros = jnp.zeros((CELLS, channels[0].size), f32)
        total = jax.lax.fori_loop(0, _int(region.y.samples), add_sample, zeros)
        places = jnp.arange(MAX_BINS)[:, None]
        return sums + tiles.dot(region.x.weights(places, cells[0][None, :], width), total)

    steps, _ = _divided(end - first + CELLS - 1, CELLS)
    return jax.lax.fori_loop(0, steps, add_cells, jnp.zeros((MAX_BINS, channels[0].size), f32))


def _gradient_kernel(*refs: Any, regions: int, bins: int, tile: int) -> None:
    dy_ref, regions_ref, *map_refs = refs
    parts = pl.cdiv(dy_ref.shape[-1], tile)
    program, start = pl.program_id(0), 0
    # The coarsest first: its cells have most regions over them.
    for level, map_ref in reversed(list(enumerate(map_refs))):
        images, height, width, _ = map_ref.shape
        blocks = pl.cdiv(width, CELLS)
        count = images * parts * height * blocks

        @pl.when((program >= start) & (program < start + count))
        def _(
            map_ref: Any = map_ref, level: int = level, start: int = start, blocks: int = blocks
        ) -> None:
            _, height, width, _ = map_ref.shape
            rest, block = _divided(program - start, blocks)
            rest, row = _divided(rest, height)
            image, part = _divided(rest, parts)
            channels = tiles.span(part * tile, tile, dy_ref.shape[-1])
            cells = tiles.span(block * CELLS, CELLS, width)
            place = Cells(level, (height, width), row, block * CELLS, cells)
            sums = _sum_of_regions(dy_ref, regions_ref, image * regions, regions, place, channels)
            tiles.store(map_ref, sums, image, row, cells, channels)

        start += count


class Cells(NamedTuple):
    """Neighbouring cells of a row of a map."""

    level: int
    size: tuple[int, int]  # of the map
    row: Array
    start: Array
    columns: Span

    def below(self, region: Region) -> Array:
        """Whether a region may take samples of these cells."""
        y, x = region.y, region.x
        return (
            (region.level == self.level)
            & (y.first <= self.row)
            & (y.last >= self.row)
            & (x.first < self.start + CELLS)
            & (x.last >= self.start)
        )


def _sum_of_regions(
    dy_ref: Any, regions_ref: Any, start: Array, regions: int, cells: Cells, channels: Span
) -> Array:
    """The gradient of `cells`, (CELLS, channels), from the regions of an image from `start` on."""
    chunk = min(REGIONS, tiles.padded(regions))
    zeros = jnp.zeros((CELLS, channels[0].size), f32)

    def add_chunk(step: Array, sums: Array) -> Array:
        numbers, valid = tiles.span(step * chunk, chunk, regions)
        over = valid & cells.below(
            _region(lambda field: tiles.load(regions_ref, field, (start + numbers, valid)))
        )

        def add_next(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, latest = carry
            latest = jnp.min(jnp.where(over & (numbers > latest), numbers, regions))
            number = start + latest
            region = _region(lambda field: regions_ref[field, number])
            return sums + _gradient_of_region(dy_ref, number, region, cells, channels), latest

        count = jnp.sum(over.astype(jnp.int32))
        return jax.lax.fori_loop(0, count, add_next, (sums, jnp.int32(-1)))[0]

    return jax.lax.fori_loop(0, pl.cdiv(regions, chunk), add_chunk, zeros)


def _gradient_of_region(
    dy_ref: Any, number: Array, region: Region, cells: Cells, channels: Span
) -> Array:
    """What the gradient of a region gives to cells."""
    bins, (height, width) = dy_ref.shape[1], cells.size
    columns = tiles.span(0, MAX_BINS, bins)

    def add_row(row: Array, total: Array) -> Array:
        weight = region.share * region.y.weights(row, cells.row, height)
        return total + weight * tiles.load(dy_ref, number, row, columns, channels).astype(f32)

    def nearest(offset: float) -> Array:
        """The row of bins at a place, but for rounding."""
        row = jnp.floor((cells.row.astype(f32) + offset - region.y.start) / region.y.size)
        return _int(jnp.clip(row, 0.0, bins - 1.0))

    # Samples of a cell are less than a cell away from it.
    rows = nearest(-1 - NEAR), nearest(1 + NEAR) + 1
    total = jax.lax.fori_loop(*rows, add_row, jnp.zeros((MAX_BINS, channels[0].size), f32))
    weights = region.x.weights(columns[0][None, :], cells.columns[0][:, None], width)
    return tiles.dot(weights, total)


# --- Their calls ------------------------------------------------------------------------------


def _tile(channels: int) -> int:
    return min(CHANNELS, tiles.padded(channels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _roi_align(
    maps: tuple[Array, ...], boxes: Array, strides: tuple[int, ...], sizes: Sizes, bins: int
) -> Array:
    (batch, count), channels = boxes.shape[:2], maps[0].shape[-1]
    tile = _tile(channels)
    y = tiles.call(
        functools.partial(_forward_kernel, regions=count, bins=bins, tile=tile),
        "roi_align",
        # Rows of the same region share cells.
        (batch * count * pl.cdiv(channels, tile) * bins,),
        jax.ShapeDtypeStruct((batch * count, bins, bins, channels), maps[0].dtype),
        (*maps, _regions(boxes, strides, sizes, bins)),
        num_warps=WARPS,
    )
    return y.reshape(batch, count, *y.shape[1:])


def _forward(
    maps: tuple[Array, ...], boxes: Array, strides: tuple[int, ...], sizes: Sizes, bins: int
) -> tuple[Array, Array]:
    return _roi_align(maps, boxes, strides, sizes, bins), boxes


def _backward(
    strides: tuple[int, ...], sizes: Sizes, bins: int, boxes: Array, dy: Array
) -> tuple[tuple[Array, ...], Array]:
    batch, count, *_, channels = dy.shape
    tile = _tile(channels)
    programs = sum(height * pl.cdiv(width, CELLS) for height, width in sizes)
    dmaps = tiles.call(
        functools.partial(_gradient_kernel, regions=count, bins=bins, tile=tile),
        "roi_align_gradient",
        (batch * pl.cdiv(channels, tile) * programs,),
        tuple(jax.ShapeDtypeStruct((batch, *size, channels), dy.dtype) for size in sizes),
        (dy.reshape(-1, *dy.shape[2:]), _regions(boxes, strides, sizes, bins)),
        num_warps=GRADIENT_WARPS,
    )
    return tuple(dmaps), jnp.zeros_like(boxes)


_roi_align.defvjp(_forward, _backward)


def roi_align(
    maps: Sequence[Array], boxes: Array, *, strides: tuple[int, ...], bins: int
) -> Array:
    """See `vssd_jax.kernels.roi_align.api.roi_align`."""
    sizes = tuple(x.shape[1:3] for x in maps)
    return _roi_align(tuple(maps), boxes, strides, sizes, bins)
