"""RoIAlign, exactly as mmcv's (half-pixel aligned, as many samples as a region needs).

The value of a bin is the mean of bilinear samples on a regular grid. Its weights are therefore a
product of one row of weights for the height and one for the width, and the features of a region
are `Wy @ map @ Wx^T`: two matrix products, any number of samples, fixed shapes. On a CPU, where
each product with the whole map would take its time, only the cells are read that a region covers.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels import mesh
from vssd_jax.kernels.dispatch import differentiable
from vssd_jax.types import Array, Float, Int

# Sides in cells of the parts of a map that regions are cut from, on a CPU: of its level of the
# pyramid a region covers 14 to 28 cells, and more only if it is very long or very large.
_WINDOWS = (16, 32, 64)
# Bytes of intermediate results (bins, W, C) in memory at a time; more regions than fit take turns.
_CHUNK_BYTES = 1 << 27


def bin_weights(
    start: Float[Array, " R"],
    end: Float[Array, " R"],
    bins: int,
    length: int | Int[Array, " R"],
    *,
    origin: int | Int[Array, " R"] = 0,
    total: int | None = None,
) -> Float[Array, "R {bins} cells"]:
    """Weights of the cells of one axis in the mean of each bin.

    Args:
      start, end: (R,) in cells; a cell's centre has an integer coordinate.
      bins: number of bins in the region.
      length: number of cells, of all or of each (R,).
      origin: where these cells begin in a longer axis, of all or of each (R,).
      total: length of that axis.

    Returns:
      (R, bins, total). A region of no or negative size has weights 0. Samples more than a cell
      outside count as 0, others outside take the value of the edge.
    """
    start, end = jax.lax.stop_gradient((start, end))
    size = (end - start) / bins
    # ceil(size), from exact products: XLA may divide by way of an inexact reciprocal, and 21 cells
    # in 7 bins would take 4 samples.
    samples = jnp.ceil(size)
    samples = jnp.where(samples * bins < end - start, samples + 1, samples)
    samples = jnp.where((samples - 1) * bins >= end - start, samples - 1, samples)
    samples = jnp.maximum(samples, 0)
    first = start[:, None] + jnp.arange(bins, dtype=start.dtype) * size[:, None]
    if total is None:
        assert isinstance(length, int)
        total = length
    cells = jnp.arange(total, dtype=start.dtype)
    lengths, origins = (
        jnp.broadcast_to(jnp.asarray(x, start.dtype), start.shape)[:, None]
        for x in (length, origin)
    )

    def add(i: jax.Array, weights: jax.Array) -> jax.Array:
        offset = (i + 0.5) * size / jnp.maximum(samples, 1)
        position = first + offset[:, None]
        counts = (position >= -1) & (position <= lengths) & (i < samples)[:, None]
        position = origins + jnp.clip(position, 0, lengths - 1)
        # Bilinear: the two neighbours of the position, by their nearness.
        near = jnp.maximum(1 - jnp.abs(position[..., None] - cells), 0)
        return weights + jnp.where(counts[..., None], near, 0)

    most = jnp.max(samples, initial=0).astype(jnp.int32)
    weights = jnp.zeros((start.shape[0], bins, len(cells)), start.dtype)
    weights = jax.lax.fori_loop(0, most, add, weights)
    return weights / jnp.maximum(samples, 1)[:, None, None]


def roi_align(
    features: Float[Array, "B H W C"],
    boxes: Float[Array, "B R 4"],
    bins: int,
    scale: float = 1.0,
) -> Float[Array, "B R {bins} {bins} C"]:
    """Features of regions of one or more images.

    Args:
      features: (B, H, W, C).
      boxes: (B, R, 4) in pixels.
      bins: of each axis.
      scale: cells per pixel.

    Returns:
      (B, R, bins, bins, C) in the dtype of the features.
    """
    corners = boxes.reshape(-1, 4) * scale - 0.5
    wy = bin_weights(corners[:, 1], corners[:, 3], bins, features.shape[1])
    wx = bin_weights(corners[:, 0], corners[:, 2], bins, features.shape[2])
    return _weigh(features, wy, wx)


def _weigh(
    features: Float[Array, "B H W C"],
    wy: Float[Array, "N bins H"],
    wx: Float[Array, "N bins W"],
) -> Float[Array, "B R bins bins C"]:
    """Features of regions, from their weights wy (B * R, bins, H) and wx (B * R, bins, W)."""
    batch = features.shape[0]
    wy, wx = (
        w.astype(features.dtype).reshape(batch, -1, *w.shape[1:]) for w in (wy, wx)
    )
    with jax.named_scope("interpolation"):  # `models.count` does not count such products
        return jax.lax.platform_dependent(
            features, wy, wx, cpu=differentiable(_by_windows), default=_by_products
        )


def _by_products(features: jax.Array, wy: jax.Array, wx: jax.Array) -> jax.Array:
    """Two products with the whole map for each region: (B, R, bins, H), (B, R, bins, W)."""
    batch, _, width, channels = features.shape
    bins = wy.shape[2]
    # The regions are on the first axis, which a scan takes one chunk at a time; the images are
    # vectorised, so that they stay where they are when the batch is sharded.
    wy, wx = (jnp.moveaxis(w, 1, 0) for w in (wy, wx))

    def align(weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, x = weights
        rows = jnp.einsum("bph,bhwc->bpwc", y, features, precision="highest")
        return jnp.einsum("bqw,bpwc->bpqc", x, rows, precision="highest")

    # A program for any batch takes as many at a time as it would for a single image.
    images = batch if isinstance(batch, int) else 1
    one = images * bins * width * channels * np.dtype(features.dtype).itemsize
    chunk = max(1, min(len(wy), _CHUNK_BYTES // one))
    return jnp.moveaxis(jax.lax.map(align, (wy, wx), batch_size=chunk), 0, 1)


@jax.custom_vjp
def _by_windows(features: jax.Array, wy: jax.Array, wx: jax.Array) -> jax.Array:
    """The same, region by region from the cells that it covers; its gradient is the products'."""
    return mesh.over_batch(lambda arrays, _: _region_by_region(*arrays), (features, wy, wx), ())


def _region_by_region(features: jax.Array, wy: jax.Array, wx: jax.Array) -> jax.Array:
    batch, *size, channels = features.shape
    regions, bins = wy.shape[1:3]
    image = jnp.repeat(jnp.arange(batch), regions)
    weights = [w.reshape(batch * regions, bins, -1) for w in (wy, wx)]
    firsts, extents = zip(*map(_covered, weights), strict=True)

    def one(region: tuple[jax.Array, ...]) -> jax.Array:
        image, y, x, first_y, first_x, extent = region

        def window(side: int) -> Callable[[], jax.Array]:
            height, width = (min(side, length) for length in size)

            def align() -> jax.Array:
                # XLA moves a window that would stick out of the map.
                cells = jax.lax.dynamic_slice(
                    features, (image, first_y, first_x, 0), (1, height, width, channels)
                )
                y_part = jax.lax.dynamic_slice(y, (0, first_y), (bins, height))
                x_part = jax.lax.dynamic_slice(x, (0, first_x), (bins, width))
                rows = jnp.einsum("ph,hwc->pwc", y_part, cells[0], precision="highest")
                return jnp.einsum("qw,pwc->pqc", x_part, rows, precision="highest")

            return align

        sides = [side for side in _WINDOWS if side < max(size)]
        larger = sum((extent > side).astype(jnp.int32) for side in sides)
        return jax.lax.switch(larger, [window(side) for side in (*sides, max(size))])

    result = jax.lax.map(one, (image, *weights, *firsts, jnp.maximum(*extents)))
    return result.reshape(batch, regions, *result.shape[1:])


def _covered(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first cell with a weight, and how many there are from it to the last: (N, bins, L)."""
    used = (weights != 0).any(1)
    first, behind = (jnp.argmax(x, axis=1) for x in (used, used[:, ::-1]))
    return first, jnp.where(used.any(1), weights.shape[-1] - behind - first, 0)


def _gradients(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(_by_products, *saved)[1](dy)


_by_windows.defvjp(lambda *arrays: (_by_windows(*arrays), arrays), _gradients)


def region_levels(
    boxes: Float[Array, "*shape 4"], levels: int, finest: float = 56.0
) -> Int[Array, "*shape"]:
    """The level of the pyramid for each box (FPN, equation 1): (..., 4) -> (...) int32.

    Boxes of a side of `finest` to twice that, and smaller ones, go to level 0.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    side = jnp.sqrt(jnp.maximum(size[..., 0] * size[..., 1], 0))
    level = jnp.floor(jnp.log2(side / finest + 1e-6))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def pyramid_roi_align(
    maps: Sequence[Float[Array, "B _ _ C"]],
    strides: Sequence[int],
    boxes: Float[Array, "B R 4"],
    bins: int,
) -> Float[Array, "B R {bins} {bins} C"]:
    """RoIAlign of each region on the level that fits its size.

    The maps are laid out on one canvas, the finest above and the others side by side below it, so
    that one pair of matrix products serves all of them.

    Args:
      maps: (B, H/s, W/s, C) for each stride s, from fine to coarse.
      strides: of the maps.
      boxes: (B, R, 4) in pixels of the image.
      bins: of each axis.

    Returns:
      (B, R, bins, bins, C).
    """
    boxes = jax.lax.stop_gradient(boxes).reshape(-1, 4)
    sizes = np.array([x.shape[1:3] for x in maps])
    width = int(max(sizes[0, 1], sizes[1:, 1].sum()))
    below = int(sizes[1:, 0].max(initial=0))
    row = jnp.concatenate([_pad(x, below, x.shape[2]) for x in maps[1:]], axis=2)
    canvas = jnp.concatenate([_pad(x, x.shape[1], width) for x in (maps[0], row)], axis=1)
    x_origins = np.concatenate([[0], np.cumsum(sizes[1:, 1]) - sizes[1:, 1]])
    y_origins = np.where(np.arange(len(maps)) == 0, 0, sizes[0, 0])

    level = region_levels(boxes, len(maps))
    corners = boxes * (1 / jnp.asarray(strides, boxes.dtype))[level][:, None] - 0.5
    of_level = [jnp.asarray(x)[level] for x in (sizes, x_origins, y_origins)]
    wy = bin_weights(
        corners[:, 1], corners[:, 3], bins, of_level[0][:, 0],
        origin=of_level[2], total=canvas.shape[1],
    )  # fmt: skip
    wx = bin_weights(
        corners[:, 0], corners[:, 2], bins, of_level[0][:, 1],
        origin=of_level[1], total=width,
    )  # fmt: skip
    return _weigh(canvas, wy, wx)


def _pad(
    x: Float[Array, "B _ _ C"], height: int, width: int
) -> Float[Array, "B {height} {width} C"]:
    return jnp.pad(x, [(0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)])
