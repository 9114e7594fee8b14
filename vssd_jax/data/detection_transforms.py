"""Resizing, cropping, mirroring and padding of pictures, boxes and masks; semantics are mmdet's.

Boxes are x1 y1 x2 y2 in pixels.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize
from vssd_jax.data.sizes import fitted_size

Size = tuple[int, int]  # height and width

LANDSCAPE, PORTRAIT = (800, 1344), (1344, 800)


def padded_shape(size: Size, shapes: Sequence[Size]) -> Size:
    """The shape, of a few, for images of this orientation: the landscape one, or the portrait."""
    height, width = size
    return max(shapes, key=lambda shape: (height > width) == (shape[0] > shape[1]))


def input_shape(
    size: Size, *, short_side: int, long_side: int, shapes: Sequence[Size] | None
) -> Size:
    """The padded (H, W) of an image of `size` in `eval_transform`, whose arguments these are."""
    if shapes is not None:
        return padded_shape(size, shapes)
    height, width = fitted_size(size, short_side, long_side)
    return -(-height // 32) * 32, -(-width // 32) * 32


def train_transform(
    element: dict,
    rng: np.random.Generator,
    *,
    short_sides: Sequence[int] = (800,),
    long_side: int = 1333,
    crop: bool = False,
    shapes: Sequence[Size] = (LANDSCAPE, PORTRAIT),
    max_objects: int = 100,
    flip: float = 0.5,
) -> dict[str, Any]:
    """An element of a `DetectionSource` as arrays of fixed shape.

    The paper's 1x schedule takes the defaults, 3x `short_sides=range(480, 801, 32), crop=True`.

    Args:
      element: of a `DetectionSource`, decoded. If it is `like` another, that one's size (H, W)
        decides the shape.
      rng: the source of everything random.
      short_sides, long_side: one of the short sides is taken at random; the long side is bounded.
      crop: half of the time first resize to a short side of 400, 500 or 600 (the long side bounded
        as later) and cut out a random rectangle with sides of 384 to 600.
      shapes: the padded sizes (H, W), one or a landscape and a portrait one. The image's
        orientation decides; a crop of the other orientation is resized to fit.
      max_objects: M; of more objects the first count. The masks take M * H * W / 8 bytes.
      flip: probability of a horizontal flip.

    Returns:
      image: (H, W, 3) float32, normalised, padded with zeros at the bottom and the right.
      image_shape: (2,) int32 height and width without the padding.
      boxes: (M, 4) float32, labels (M,) int32, valid (M,) bool.
      masks: (M, H, W / 8) uint8, a bit a pixel along the width.
      has_mask: (M,) bool, False where an object has a box alone.
      replaced: as of `DecodedSource`.
    """
    image = element["image"]
    shape = padded_shape(element.get("like", image.shape[:2]), shapes)
    boxes, labels = element["boxes"].copy(), element["labels"]
    segmentations = element["segmentations"][:max_objects]
    masks = [
        np.zeros(image.shape[:2], np.uint8) if s is None else rasterise(s, image.shape[:2])
        for s in segmentations
    ]
    boxes, labels = boxes[:max_objects], labels[:max_objects]
    if rng.random() < flip:
        image, masks = image[:, ::-1], [mask[:, ::-1] for mask in masks]
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
    if crop and rng.random() < 0.5:
        size = fitted_size(image.shape[:2], int(rng.choice((400, 500, 600))), long_side)
        image, boxes, masks = _resize(image, boxes, masks, size)
        image, boxes, masks = _crop(image, boxes, masks, rng)
    short_side = int(rng.choice(short_sides))
    size = fitted_size(image.shape[:2], short_side, long_side, limit=shape)
    image, boxes, masks = _resize(image, boxes, masks, size)
    left = (boxes[:, 2:] > boxes[:, :2]).all(1)
    count = int(left.sum())
    result = {
        "image": _padded(normalize(image), shape),
        "image_shape": np.array(size, np.int32),
        "boxes": np.zeros((max_objects, 4), np.float32),
        "labels": np.zeros((max_objects,), np.int32),
        "valid": np.arange(max_objects) < count,
        "masks": np.zeros((max_objects, shape[0], -(-shape[1] // 8)), np.uint8),
        "has_mask": np.zeros((max_objects,), bool),
        "replaced": element["replaced"],
    }
    result["has_mask"][:count] = [segmentations[i] is not None for i in np.flatnonzero(left)]
    result["boxes"][:count], result["labels"][:count] = boxes[left], labels[left]
    for packed, i in zip(result["masks"], np.flatnonzero(left), strict=False):
        bits = np.packbits(masks[i], axis=-1)
        packed[: bits.shape[0], : bits.shape[1]] = bits
    return result


def eval_transform(
    element: dict,
    *,
    short_side: int = 800,
    long_side: int = 1333,
    shapes: Sequence[Size] | None = (LANDSCAPE, PORTRAIT),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> dict[str, Any]:
    """An element of a `DetectionSource`, decoded, for inference.

    `shapes` and `like` are as in `train_transform`; None pads to multiples of 32 only, as the
    authors' evaluation does (batch size 1, a compilation for each shape): VSSD's global mixers see
    the padding, so that its amount changes the scores a little.

    Returns:
      image, image_shape, replaced as in `train_transform`, and original_shape (2,) and index
      (int32), the element's place in the source.
    """
    image = element["image"]
    original = image.shape[:2]
    shape = input_shape(
        element.get("like", original), short_side=short_side, long_side=long_side, shapes=shapes
    )
    size = fitted_size(original, short_side, long_side, limit=None if shapes is None else shape)
    image, _, _ = _resize(image, np.zeros((0, 4), np.float32), [], size)
    return {
        "image": _padded(normalize(image, mean, std), shape),
        "image_shape": np.array(size, np.int32),
        "index": np.int32(element["index"]),
        "original_shape": np.array(original, np.int32),
        "replaced": element["replaced"],
    }


def _resize(
    image: np.ndarray, boxes: np.ndarray, masks: list[np.ndarray], size: Size
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Everything to `size` (H, W); boxes are clipped to it."""
    if size != image.shape[:2]:
        scale = np.array([size[1] / image.shape[1], size[0] / image.shape[0]] * 2, np.float32)
        boxes = boxes * scale
        cv_size = (size[1], size[0])
        image = cv2.resize(np.ascontiguousarray(image), cv_size, interpolation=cv2.INTER_LINEAR)
        masks = [
            cv2.resize(np.ascontiguousarray(mask), cv_size, interpolation=cv2.INTER_NEAREST)
            for mask in masks
        ]
    limit = np.array([size[1], size[0]] * 2, np.float32)
    return image, np.clip(boxes, 0, limit), masks


def _crop(
    image: np.ndarray, boxes: np.ndarray, masks: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """A random rectangle with sides of 384 to 600 pixels, or the image's if that is smaller."""
    sides = [int(rng.integers(min(side, 384), min(side, 600) + 1)) for side in image.shape[:2]]
    y, x = (int(rng.integers(0, f - s + 1)) for f, s in zip(image.shape[:2], sides, strict=True))
    window = (slice(y, y + sides[0]), slice(x, x + sides[1]))
    limit = np.array([sides[1], sides[0]] * 2, np.float32)
    boxes = np.clip(boxes - np.array([x, y, x, y], np.float32), 0, limit)
    return image[window], boxes, [mask[window] for mask in masks]


def _padded(image: np.ndarray, shape: Size) -> np.ndarray:
    padded = np.zeros((*shape, 3), image.dtype)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded
