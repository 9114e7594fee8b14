"""Masks: the targets of the mask head, and its predictions pasted into the whole image."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vssd_jax.kernels.roi_align.sampling import bin_weights
from vssd_jax.types import Array, Bool, Float, Int, UInt8


class PackedMasks(NamedTuple):
    """The masks of an image's objects, as `vssd_jax.data.coco_masks.pack` lays them out.

    Attributes:
      bits: (S,) uint8, a bit a pixel: of each mask the part that is not all 0, in rows of whole
        bytes, as of `numpy.packbits`.
      starts: (M,) int32, the first byte of each part.
      boxes: (M, 4) int32, its x1 y1 x2 y2 in the image; x1 is a multiple of 8.
    """

    bits: UInt8[Array, " S"]
    starts: Int[Array, " M"]
    boxes: Int[Array, "M 4"]


def mask_targets(
    masks: PackedMasks,
    boxes: Float[Array, "R 4"],
    objects: Int[Array, " R"],
    image_size: tuple[int, int],
    size: int = 28,
) -> Bool[Array, "R {size} {size}"]:
    """Masks of objects, cut to boxes and resized.

    Args:
      masks: of the image's objects.
      boxes: (R, 4) in pixels.
      objects: (R,) the mask of each box.
      image_size: height and width, at least.
      size: of the result.

    Returns:
      (R, size, size) bool: RoIAlign of the mask of at least a half.
    """
    height, width = image_size
    boxes = jnp.clip(boxes, 0, jnp.array([width, height, width, height], boxes.dtype))
    wy = bin_weights(boxes[:, 1] - 0.5, boxes[:, 3] - 0.5, size, height)
    wx = bin_weights(boxes[:, 0] - 0.5, boxes[:, 2] - 0.5, size, width)

    def target(args: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        y, x, index = args
        mask = unpack_mask(masks, index, image_size).astype(y.dtype)
        rows = jnp.matmul(y, mask, precision="highest")
        return jnp.matmul(rows, x.T, precision="highest") >= 0.5

    return jax.lax.map(target, (wy, wx, objects), batch_size=8)


def unpack_mask(
    masks: PackedMasks, index: Int[Array, ""], image_size: tuple[int, int]
) -> UInt8[Array, "H W"]:
    """The mask of an object in the whole image, 0 or 1."""
    height, width = image_size
    x1, y1, x2, y2 = masks.boxes[index]
    row = jnp.arange(height)[:, None] - y1
    column = jnp.arange(-(-width // 8)) - x1 // 8  # in bytes
    row_bytes = (x2 - x1 + 7) // 8
    inside = (row >= 0) & (row < y2 - y1) & (column >= 0) & (column < row_bytes)
    bits = masks.bits[jnp.where(inside, masks.starts[index] + row * row_bytes + column, 0)]
    return jnp.unpackbits(jnp.where(inside, bits, 0), axis=-1)[:, :width]


def paste_masks(
    probabilities: Float[np.ndarray, "N rows columns"],
    boxes: Float[np.ndarray, "N 4"],
    image_shape: Sequence[int],
    threshold: float = 0.5,
) -> Bool[np.ndarray, "N H W"]:
    """Masks in the whole image.

    Args:
      probabilities: (N, 28, 28) of the box's class, 0 to 1.
      boxes: (N, 4) in pixels of the image.
      image_shape: (H, W).
      threshold: the least probability of a pixel of the mask.

    Returns:
      (N, H, W) bool. Between the centres of the 28x28 cells the probability is bilinear; outside
      it falls to 0 within half a cell.
    """
    height, width = image_shape
    result = np.zeros((len(boxes), height, width), bool)
    for mask, probability, box in zip(result, probabilities, boxes, strict=True):
        box = box.astype(np.float32)
        x1, y1 = np.maximum(np.floor(box[:2]) - 1, 0).astype(int)
        x2, y2 = np.clip(np.ceil(box[2:]) + 1, 0, (width, height)).astype(int)
        rows = _interpolation(y1, y2, box[1], box[3], probability.shape[0])
        columns = _interpolation(x1, x2, box[0], box[2], probability.shape[1])
        mask[y1:y2, x1:x2] = rows @ probability.astype(np.float32) @ columns.T >= threshold
    return result


def _interpolation(
    first: np.integer, last: np.integer, start: np.floating, end: np.floating, cells: int
) -> Float[np.ndarray, "pixels {cells}"]:
    """Weights (last - first, cells) of a mask's cells for pixels of a box from start to end."""
    pixels = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    size = end - start
    if size > 0:
        position = (pixels - start) / size * cells - np.float32(0.5)
    else:  # an empty box: all pixels take the middle of the mask
        position = np.full_like(pixels, (cells - 1) / 2)
    near = 1 - np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    return np.maximum(near, 0)
