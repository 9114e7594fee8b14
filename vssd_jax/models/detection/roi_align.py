"""RoIAlign, exactly as mmcv's (half-pixel aligned, as many samples as a region needs).

The value of a bin is the mean of bilinear samples on a regular grid. Its weights are therefore a
product of one row of weights for the height and one for the width, and the features of a region
are `Wy @ map @ Wx^T`: two matrix products, any number of samples, fixed shapes.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Regions whose intermediate result (bins, W, C) is in memory at a time, in bytes.
_CHUNK_BYTES = 1 << 27


def bin_weights(start, end, bins: int, length: int):
    """Weights of the cells of one axis in the mean of each bin.

    Args:
      start, end: (R,) in cells; a cell's centre has an integer coordinate.
      bins: number of bins in the region.
      length: number of cells.

    Returns:
      (R, bins, length). A region of no or negative size has weights 0. Samples more than a cell
      outside count as 0, others outside take the value of the edge.
    """
    start, end = jax.lax.stop_gradient((start, end))
    size = (end - start) / bins
    samples = jnp.maximum(jnp.ceil(size), 0)
    first = start[:, None] + jnp.arange(bins, dtype=start.dtype) * size[:, None]
    cells = jnp.arange(length, dtype=start.dtype)

    def add(i, weights):
        offset = (i + 0.5) * size / jnp.maximum(samples, 1)
        position = first + offset[:, None]
        counts = (position >= -1) & (position <= length) & (i < samples)[:, None]
        position = jnp.clip(position, 0, length - 1)
        # Bilinear: the two neighbours of the position, by their nearness.
        near = jnp.maximum(1 - jnp.abs(position[..., None] - cells), 0)
        return weights + jnp.where(counts[..., None], near, 0)

    most = jnp.max(samples, initial=0).astype(jnp.int32)
    weights = jnp.zeros((len(start), bins, length), start.dtype)
    weights = jax.lax.fori_loop(0, most, add, weights)
    return weights / jnp.maximum(samples, 1)[:, None, None]


def roi_align(features, boxes, bins: int, scale: float = 1.0, use=None):
    """Features of regions of one or more images.

    Args:
      features: (B, H, W, C).
      boxes: (B, R, 4) in pixels.
      bins: of each axis.
      scale: cells per pixel.
      use: (B, R) bool; the features of other regions are 0.

    Returns:
      (B, R, bins, bins, C) in the dtype of the features.
    """
    batch, height, width, channels = features.shape
    regions = boxes.shape[1]
    corners = boxes.reshape(-1, 4) * scale - 0.5
    wy = bin_weights(corners[:, 1], corners[:, 3], bins, height)
    wx = bin_weights(corners[:, 0], corners[:, 2], bins, width)
    if use is not None:
        wy = jnp.where(use.reshape(-1, 1, 1), wy, 0)
    # The regions are on the first axis, which a scan takes one chunk at a time; the images are
    # vectorised, so that they stay where they are when the batch is sharded.
    wy, wx = (
        jnp.moveaxis(w.astype(features.dtype).reshape(batch, regions, bins, -1), 1, 0)
        for w in (wy, wx)
    )

    def align(weights):
        y, x = weights
        rows = jnp.einsum(
            "bph,bhwc->bpwc", y, features, precision="highest",
            preferred_element_type=features.dtype,
        )  # fmt: skip
        return jnp.einsum("bqw,bpwc->bpqc", x, rows, precision="highest")

    one = batch * bins * width * channels * np.dtype(features.dtype).itemsize
    chunk = max(1, min(regions, _CHUNK_BYTES // one))
    return jnp.moveaxis(jax.lax.map(align, (wy, wx), batch_size=chunk), 0, 1)


def region_levels(boxes, levels: int, finest: float = 56.0):
    """The level of the pyramid that serves a box (FPN, equation 1): (..., 4) -> (...) int32.

    Boxes of a side of `finest` to twice that, and smaller ones, go to level 0.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    side = jnp.sqrt(jnp.maximum(size[..., 0] * size[..., 1], 0))
    level = jnp.floor(jnp.log2(side / finest + 1e-6))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def pyramid_roi_align(maps, strides, boxes, bins: int):
    """RoIAlign of each region on the level that fits its size.

    Args:
      maps: (B, H/s, W/s, C) for each stride s.
      strides: of the maps.
      boxes: (B, R, 4) in pixels of the image.
      bins: of each axis.

    Returns:
      (B, R, bins, bins, C).
    """
    boxes = jax.lax.stop_gradient(boxes)
    level = region_levels(boxes, len(maps))
    return sum(
        roi_align(x, boxes, bins, 1 / stride, use=level == i)
        for i, (x, stride) in enumerate(zip(maps, strides, strict=True))
    )
