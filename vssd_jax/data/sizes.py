"""Sizes that pictures are scaled and padded to."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Size = tuple[int, int]  # height and width


def fitted_sizes(sizes: np.ndarray, short: ArrayLike, long: ArrayLike) -> np.ndarray:
    """(..., 2) scaled so that the short side is `short`, or the long one `long` if that is less.

    `short` and `long` are numbers, or arrays of one for each size.
    """
    scale = np.minimum(short / sizes.min(-1), long / sizes.max(-1))
    return np.maximum(1, sizes * scale[..., None] + 0.5).astype(sizes.dtype)


def fitted_size(
    size: Size, short: int, long: int, *, limit: Size | None = None, multiple: int = 1
) -> Size:
    """(H, W) scaled as by `fitted_sizes`.

    Args:
      size: (H, W) of the picture.
      short, long: in pixels.
      limit: a further (H, W) that must not be exceeded.
      multiple: each side is rounded to the nearest multiple of it.
    """
    scale = min(short / min(size), long / max(size))
    if limit is not None:
        scale = min(scale, limit[0] / size[0], limit[1] / size[1])
    height, width = (
        max(multiple, multiple * int(int(side * scale + 0.5) / multiple + 0.5)) for side in size
    )
    return height, width


def common_shapes(sizes: np.ndarray, shapes: Sequence[Size]) -> np.ndarray:
    """(...) numbers, in `shapes`, of the smallest shape that holds all images of a batch.

    Where none does, of the one to which they must be scaled down least, on average.

    Args:
      sizes: (..., images, 2) height and width.
      shapes: some (H, W).
    """
    given = np.array(shapes)
    kept = np.minimum(given / sizes[..., None, :], 1).min(-1).mean(-2)  # (..., shapes)
    best = kept > kept.max(-1, keepdims=True) - 1e-9  # a mean is rounded
    return np.where(best, given.prod(-1), np.inf).argmin(-1)
