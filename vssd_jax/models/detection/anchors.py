"""Anchors of the region proposal network."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.types import Array, Bool, Float, Int


def grid_anchors(
    shape: tuple[int, int], stride: int, *, scale: float, ratios: tuple[float, ...]
) -> Float[np.ndarray, "A 4"]:
    """Anchors centred on the cells' top left corners.

    Args:
      shape: (H, W) of the feature map.
      stride: pixels of the image per cell.
      scale: side of a square anchor in cells.
      ratios: height over width, an anchor per cell for each; the area stays.

    Returns:
      (H * W * ratios, 4) float32, row by row.
    """
    root = np.sqrt(np.asarray(ratios, np.float32))
    half = np.float32(stride * scale / 2)
    base = np.stack([-half / root, -half * root, half / root, half * root], axis=-1)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) * stride
    corners = np.stack([x, y, x, y], axis=-1)
    return (corners[:, :, None] + base).reshape(-1, 4).astype(np.float32)


def anchors_on_image(
    shape: tuple[int, int],
    stride: int,
    anchors_per_cell: int,
    image_shape: Int[Array | np.ndarray, "2"],
) -> Bool[Array, " A"]:
    """Marks the anchors on the image, as opposed to those on the padding of the batch.

    The image counts with the padding that it would have alone: to multiples of 32 pixels.

    Args:
      shape, stride: as in `grid_anchors`.
      anchors_per_cell: the number of ratios.
      image_shape: (2,) height and width of the unpadded image.

    Returns:
      (H * W * anchors_per_cell,) bool.
    """
    padded = -(-image_shape // 32) * 32
    cells = -(-padded // stride)
    inside = (jnp.arange(shape[0]) < cells[0])[:, None] & (jnp.arange(shape[1]) < cells[1])
    return jnp.repeat(inside.reshape(-1), anchors_per_cell)
