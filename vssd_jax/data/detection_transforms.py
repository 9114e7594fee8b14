"""Resizing, cropping, mirroring and padding of pictures, boxes and masks; semantics are mmdet's.

Boxes are x1 y1 x2 y2 in pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from vssd_jax.data.coco_masks import pack, part_of, rasterise
from vssd_jax.data.geometry import Geometry
from vssd_jax.data.sizes import Size, common_shapes, fitted_size


def input_shape(
    size: Size, *, short_side: int, long_side: int, shapes: Sequence[Size] | None
) -> Size:
    """The padded (H, W) of an image of `size` in `eval_transform`, whose arguments these are."""
    fitted = fitted_size(size, short_side, long_side)
    if shapes is not None:
        return shapes[int(common_shapes(np.array([fitted]), shapes))]
    return -(-fitted[0] // 32) * 32, -(-fitted[1] // 32) * 32


def train_transform(
    element: dict,
    rng: np.random.Generator,
    *,
    draw: Callable[[np.ndarray, np.random.Generator], Geometry],
    max_objects: int = 100,
) -> dict[str, Any]:
    """An element of a `DetectionSource` as arrays of fixed shape.

    Args:
      element: of a `DetectionSource`, decoded, with its `geometry` and the `shape` (H, W) to pad it
        to. A picture that exceeds the shape is scaled down to it.
      rng: for another geometry, where an unreadable picture was replaced by one of another size.
      draw: `draw_geometry` with its options.
      max_objects: M; of more objects the first count.

    Returns:
      image: (H, W, 3) uint8, padded with zeros at the bottom and the right.
      image_shape: (2,) int32 height and width without the padding.
      boxes: (M, 4) float32, labels (M,) int32, valid (M,) bool.
      masks, mask_starts, mask_boxes, has_mask, masks_left_out: as of `coco_masks.pack`, with H * W
        bytes, room for masks that cover the image eight times.
      replaced: as of `DecodedSource`.
    """
    image, shape, geometry = element["image"], element["shape"], element["geometry"]
    original = image.shape[:2]
    if tuple(geometry.original) != original:
        geometry = draw(np.array([original]), rng).row(0)
    first, window, size = (
        tuple(field.tolist()) for field in (geometry.first, geometry.window, geometry.size)
    )
    corner, part = window[:2], window[2:]
    if size[0] > shape[0] or size[1] > shape[1]:
        size = fitted_size(part, min(size), max(size), limit=shape)

    boxes = _resize_boxes(element["boxes"][:max_objects], original, first)
    boxes = _resize_boxes(boxes - np.array(corner[::-1] * 2, np.float32), part, size)
    rows, columns = (
        _nearest(original[axis], first[axis])[corner[axis] + _nearest(part[axis], size[axis])]
        for axis in range(2)
    )
    if geometry.flip:
        boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        columns = columns[::-1]
    left = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    segmentations = [element["segmentations"][i] for i in left]
    parts = [
        None if s is None else part_of(rasterise(s, original), rows, columns) for s in segmentations
    ]

    image = _resize(image, first)[corner[0] :, corner[1] :][: part[0], : part[1]]
    image = _resize(image, size)
    return {
        "image": _padded(cv2.flip(image, 1) if geometry.flip else image, shape),
        "image_shape": np.array(size, np.int32),
        "boxes": _filled(boxes[left], (max_objects, 4), np.float32),
        "labels": _filled(element["labels"][left], (max_objects,), np.int32),
        "valid": np.arange(max_objects) < len(left),
        "replaced": element["replaced"],
        **pack(parts, shape[0] * shape[1], max_objects),
    }


def eval_transform(
    element: dict,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    shapes: Sequence[Size] | None = ((800, 1344), (1344, 800)),
) -> dict[str, Any]:
    """An element of a `DetectionSource`, decoded, for inference.

    Args:
      element: the element. If it is `like` another, that one's size (H, W) decides the shape.
      short_side, long_side: the image fits into them.
      shapes: the padded sizes (H, W), of which the smallest that holds the image is taken. None
        pads to multiples of 32 only, as the authors' evaluation does (batch size 1, a compilation
        for each shape): VSSD's global mixers see the padding, so that its amount changes the scores
        a little.

    Returns:
      image, image_shape, replaced as in `train_transform`, and original_shape (2,) and index
      (int32), the element's place in the source.
    """
    image = element["image"]
    original = image.shape[:2]
    shape = input_shape(
        element.get("like", original), short_side=short_side, long_side=long_side, shapes=shapes
    )
    # What stands in for an unreadable picture may be of another shape.
    size = fitted_size(original, short_side, long_side, limit=shape)
    return {
        "image": _padded(_resize(image, size), shape),
        "image_shape": np.array(size, np.int32),
        "index": np.int32(element["index"]),
        "original_shape": np.array(original, np.int32),
        "replaced": element["replaced"],
    }


def _resize(image: np.ndarray, size: Size) -> np.ndarray:
    if size == image.shape[:2]:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def _resize_boxes(boxes: np.ndarray, before: Size, after: Size) -> np.ndarray:
    """Clipped to the image."""
    scale = np.array([after[1] / before[1], after[0] / before[0]] * 2, np.float32)
    return np.clip(boxes * scale, 0, np.array(after[::-1] * 2, np.float32))


def _nearest(before: int, after: int) -> np.ndarray:
    """(after,) the pixel that each takes when a row of `before` pixels is resized, as OpenCV's."""
    row = np.arange(before, dtype=np.float32)[None]
    return cv2.resize(row, (after, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.int32)


def _padded(image: np.ndarray, shape: Size) -> np.ndarray:
    padded = np.zeros((*shape, 3), image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _filled(values: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    filled: np.ndarray = np.zeros(shape, dtype)
    filled[: len(values)] = values
    return filled
