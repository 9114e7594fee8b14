"""Where RoIAlign samples the maps of a pyramid, and the weights that cells get by that."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vssd_jax.types import Array, Float, Int


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


def on_levels(
    boxes: Float[Array, "N 4"], strides: Sequence[int]
) -> tuple[Int[Array, " N"], Float[Array, "N 4"]]:
    """The level of each box, and its corners in cells of that level's map.

    A cell's centre has an integer coordinate. The boxes get no gradient.
    """
    boxes = jax.lax.stop_gradient(boxes)
    level = region_levels(boxes, len(strides))
    return level, boxes * (1 / jnp.asarray(strides, boxes.dtype))[level][:, None] - 0.5


def bin_samples(
    start: Float[Array, " R"], end: Float[Array, " R"], bins: int
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """The size of a bin in cells, and how many samples it has: ceil(size), at least 0."""
    size = (end - start) / bins
    # ceil(size), from exact products: XLA may divide by way of an inexact reciprocal, and 21 cells
    # in 7 bins would take 4 samples.
    samples = jnp.ceil(size)
    samples = jnp.where(samples * bins < end - start, samples + 1, samples)
    samples = jnp.where((samples - 1) * bins >= end - start, samples - 1, samples)
    return size, jnp.maximum(samples, 0)


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
    size, samples = bin_samples(start, end, bins)
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
