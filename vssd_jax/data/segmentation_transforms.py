"""Resizing, cropping, mirroring, colours and padding of pictures with label maps.

Semantics are mmsegmentation's. Labels of 255 are ignored.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from vssd_jax.data.sizes import fitted_size

IGNORE = 255
# Label maps are padded to multiples of it for evaluation.
LABEL_MULTIPLE = 128


def resize(
    array: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """An image or label map of `size` (H, W); without antialiasing, as the recipe's."""
    return cv2.resize(array, size[::-1], interpolation=interpolation)


def random_crop_window(
    label: np.ndarray, size: tuple[int, int], max_ratio: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Two slices of at most `size`, in which no class has `max_ratio` of the labels or more.

    As in mmsegmentation up to ten windows are looked at, and the eleventh is taken as it comes;
    with a ratio of 1 the first is.
    """

    def draw() -> tuple[slice, slice]:
        top, left = (
            rng.integers(max(length - crop, 0) + 1)
            for length, crop in zip(label.shape, size, strict=True)
        )
        return slice(top, top + size[0]), slice(left, left + size[1])

    window = draw()
    for _ in range(10 if max_ratio < 1 else 0):
        histogram = cv2.calcHist([label[window]], [0], None, [IGNORE + 1], [0, IGNORE + 1])
        counts = histogram.ravel()[:IGNORE].astype(np.float64)
        if np.count_nonzero(counts) > 1 and counts.max() < max_ratio * counts.sum():
            break
        window = draw()
    return window


_LEVELS = np.arange(256, dtype=np.uint8)


def _clip(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels, 0, 255).astype(np.uint8)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast, saturation and hue, each with probability one half.

    Brightness moves by up to 32, hue by up to 18 of 180 steps; contrast and saturation scale
    by 0.5 to 1.5. Contrast comes before or after the colours, with equal probability.
    """

    # All but the change of colour space is the same for pixels of a level: a table of 256.
    def contrast(levels: np.ndarray) -> np.ndarray:
        return _clip(levels * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else levels

    levels = _LEVELS
    if rng.integers(2):
        levels = _clip(levels + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.integers(2)
    if contrast_first:
        levels = contrast(levels)
    image = _looked_up(image, levels)
    saturate, turn = rng.integers(2, size=2)
    if saturate or turn:
        hsv = np.stack([_LEVELS] * 3, -1)
        if saturate:
            hsv[:, 1] = _clip(_LEVELS * np.float32(rng.uniform(0.5, 1.5)))
        if turn:
            hsv[:, 0] = (_LEVELS.astype(np.int32) + rng.integers(-18, 18)) % 180
        image = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), hsv[None])
        image = cv2.cvtColor(image, cv2.COLOR_HSV2RGB)
    return image if contrast_first else _looked_up(image, contrast(_LEVELS))


def _looked_up(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return image if levels is _LEVELS else cv2.LUT(image, levels)


def _padded(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """With `value` at the bottom and the right, up to `size` (H, W)."""
    padded = np.full((*size, *array.shape[2:]), value, array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def train_transform(
    element: dict,
    rng: np.random.Generator,
    *,
    crop: int = 512,
    short: int = 512,
    long: int = 2048,
    scales: tuple[float, float] = (0.5, 2.0),
    max_ratio: float = 0.75,
    flip: float = 0.5,
) -> dict[str, Any]:
    """The recipe: random resize, crop, flip and colours; padded. The device normalises.

    Args:
      element: of a `SegmentationSource`, decoded.
      rng: the source of everything random.
      crop: side of the result.
      short, long: the image fits into them, times a factor drawn from `scales`.
      max_ratio: greatest share of a class in a crop.
      flip: probability of a horizontal flip.

    Returns:
      `image` (crop, crop, 3) uint8, padded at the bottom and the right; `image_shape` (2,) int32,
      its height and width without the padding; `label` (crop, crop) uint8, 255 where ignored or
      padded; `replaced` as of `DecodedSource`.
    """
    image, label = element["image"], element["label"]
    factor = rng.uniform(*scales)
    size = fitted_size(label.shape, int(short * factor), int(long * factor))
    label = resize(label, size, cv2.INTER_NEAREST)
    # Only the crop is worth the work of the rest.
    window = random_crop_window(label, (crop, crop), max_ratio, rng)
    image, label = resize(image, size)[window], label[window]
    if rng.random() < flip:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    return {
        "image": _padded(photometric_distortion(image, rng), (crop, crop), 0),
        "image_shape": np.array(label.shape, np.int32),
        "label": _padded(label, (crop, crop), IGNORE),
        "replaced": element["replaced"],
    }


def eval_shapes(
    size: tuple[int, int],
    short: int = 512,
    long: int = 2048,
    ratios: Sequence[float] = (1.0,),
    multiple: int = 1,
    label_multiple: int = LABEL_MULTIPLE,
) -> tuple[tuple[int, int], ...]:
    """(H, W) of each image that `eval_transform` makes of a picture, and last of its label map.

    Pictures for which they are equal can be batched. Arguments as of `eval_transform`.
    """
    images = (fitted_size(size, int(short * r), int(long * r), multiple=multiple) for r in ratios)
    height, width = (-(-side // label_multiple) * label_multiple for side in size)
    return (*images, (height, width))


def eval_transform(
    element: dict,
    *,
    short: int = 512,
    long: int = 2048,
    ratios: Sequence[float] = (1.0,),
    multiple: int = 1,
    label_multiple: int = LABEL_MULTIPLE,
) -> dict[str, Any]:
    """The whole image once for each of `ratios`, and its labels at their original size.

    An image is never padded: the padding would take part in pyramid pooling, attention and the
    NC-SSD state, which see every token, and change the prediction. To bound the number of
    compiled shapes, `multiple` rounds the sides of the resized image instead. Label maps are
    padded with ignored pixels, which changes nothing.

    Args:
      element: of a `SegmentationSource`, decoded. If it is `like` another, that one's size (H, W)
        decides the shapes.
      short, long: the image fits into them, times each of `ratios`.
      multiple: the resized sides are multiples of it. 1 is the paper's protocol; 32 changes the
        aspect ratio by at most 16/`short` for each side and leaves `long`/32 shapes a ratio.
      label_multiple: the same for the sides of the padded labels.

    Returns:
      `images`: a dict `{"0": (h, w, 3) uint8, "1": ...}` in the order of `ratios`; `label`
      (H, W) uint8; `size` (2,) int32, the label's height and width before padding; `index`, int32;
      `replaced` as of `DecodedSource`.
    """
    image, label = element["image"], element["label"]
    like = element.get("like", label.shape)
    *sizes, padded = eval_shapes(like, short, long, ratios, multiple, label_multiple)
    if element["replaced"]:  # it does not count, and may have any size
        label = np.full(like, IGNORE, np.uint8)
    return {
        "images": {str(index): resize(image, size) for index, size in enumerate(sizes)},
        "label": _padded(label, padded, IGNORE),
        "size": np.array(label.shape, np.int32),
        "index": np.int32(element["index"]),
        "replaced": element["replaced"],
    }
