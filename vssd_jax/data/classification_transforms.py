"""What happens to a decoded picture before it reaches the model, in timm's semantics.

On the host, pictures stay uint8: a quarter of the bytes to pass between processes and to copy to a
device. Normalisation and the noise of random erasing follow on the device, see
`vssd_jax.tasks.classification`; the host only draws the erased rectangle.

Every transform depends on its arguments and the generator alone.
"""

import dataclasses
import functools
import math

import cv2
import numpy as np
import scipy.sparse
from PIL import Image

from vssd_jax.data.randaugment import rand_augment, to_uint8


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=2048)
def _resize_matrix(size_in: int, size_out: int) -> scipy.sparse.csr_array:
    """The (size_out, size_in) weights of antialiased bicubic resizing, as Pillow's."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # a wider kernel when shrinking: the antialiasing
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int32), 0)
    end = np.minimum((centre + 2 * stretch + 0.5).astype(np.int32), size_in)
    taps = int((end - first).max())
    columns = first[:, None] + np.arange(taps, dtype=np.int32)
    weights = _cubic((columns + 0.5 - centre[:, None]) / stretch)
    weights[columns >= end[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    starts = np.arange(0, size_out * taps + 1, taps, dtype=np.int32)
    columns = np.minimum(columns, size_in - 1)
    return scipy.sparse.csr_array(
        (weights.astype(np.float32).ravel(), columns.ravel(), starts), shape=(size_out, size_in)
    )


def _resize_columns(image: np.ndarray, height: int) -> np.ndarray:
    rows, width, channels = image.shape
    pixels = image.reshape(rows, width * channels).astype(np.float32)
    resized = _resize_matrix(rows, height) @ pixels
    return to_uint8(resized).reshape(height, width, channels)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (H, W, 3) uint8, bicubic and antialiased: Pillow's result to one grey level.

    Horizontally first, with 8 bits in between: clipping there shows. (From version 13 on, Pillow
    begins with the height of tall pictures.) The sparse products take about 0.6 of Pillow's time.
    """
    if image.shape[1] != width:
        image = cv2.transpose(_resize_columns(cv2.transpose(image), width))
    if image.shape[0] != height:
        image = _resize_columns(image, height)
    return np.ascontiguousarray(image)


def sample_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a crop (top, left, height, width) of an area uniform in `area` (as a fraction of the
    picture) and a ratio width / height log-uniform in `aspect`.

    After ten rectangles that do not fit, the largest central one within `aspect`.
    """
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        crop_width = round(math.sqrt(target * ratio))
        crop_height = round(math.sqrt(target / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height, endpoint=True))
            left = int(rng.integers(width - crop_width, endpoint=True))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, aspect[0]), aspect[1])
    crop_width = max(1, min(width, round(height * ratio)))
    crop_height = max(1, min(height, round(width / ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def sample_erasing(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> tuple[int, int, int, int]:
    """Draws the rectangle (top, left, height, width) that random erasing (arXiv 1708.04896) fills
    with noise, or zeros for none.

    Its area is uniform in `area` (as a fraction of the picture), its ratio height / width
    log-uniform in `aspect`; after ten rectangles that do not fit, there is none.
    """
    if rng.random() < probability:
        for _ in range(10):
            target = rng.uniform(*area) * height * width
            ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            box_height = round(math.sqrt(target * ratio))
            box_width = round(math.sqrt(target / ratio))
            if box_height < height and box_width < width:
                top = int(rng.integers(height - box_height, endpoint=True))
                left = int(rng.integers(width - box_width, endpoint=True))
                return top, left, box_height, box_width
    return 0, 0, 0, 0


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment, and the draw for random erasing.

    For `grain.MapDataset.random_map`: called with a decoded example (`image` (H, W, 3) uint8 and
    anything else) and a generator. `image` becomes (image_size, image_size, 3) uint8 and `erase`
    is added, int32 (top, left, height, width); the rest stays.
    """

    image_size: int = 224
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    randaugment_num_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_magnitude_std: float = 0.5
    erase_probability: float = 0.25
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        image = example["image"]
        size = self.image_size
        top, left, height, width = sample_crop(
            image.shape[0], image.shape[1], rng, area=self.crop_area, aspect=self.crop_aspect
        )
        image = resize(image[top : top + height, left : left + width], size, size)
        if rng.random() < self.flip_probability:
            image = cv2.flip(image, 1)
        image = rand_augment(
            image,
            rng,
            num_ops=self.randaugment_num_ops,
            magnitude=self.randaugment_magnitude,
            magnitude_std=self.randaugment_magnitude_std,
        )
        erase = sample_erasing(
            size,
            size,
            rng,
            probability=self.erase_probability,
            area=self.erase_area,
            aspect=self.erase_aspect,
        )
        return {**example, "image": image, "erase": np.array(erase, np.int32)}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Shorter side to image_size / crop (256 for 224), then the central square.

    `image` (H, W, 3) uint8 becomes (image_size, image_size, 3) uint8; the rest stays. Roundings
    are torchvision's.
    """

    image_size: int = 224
    crop: float = 0.875

    def __call__(self, example: dict) -> dict:
        size = self.image_size
        image = resize_shorter_side(example["image"], math.floor(size / self.crop))
        top = round((image.shape[0] - size) / 2)
        left = round((image.shape[1] - size) / 2)
        image = image[top : top + size, left : left + size]
        return {**example, "image": np.ascontiguousarray(image)}


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes by Pillow, bicubic, so that the shorter side is `size` pixels; cuts off fractions
    of the longer one."""
    height, width = image.shape[:2]
    if height < width:
        target = (int(size * width / height), size)
    else:
        target = (size, int(size * height / width))
    return np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
