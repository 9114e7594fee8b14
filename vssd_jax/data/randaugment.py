"""RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1` defines it.

Pictures are (H, W, 3) uint8 arrays. Every operation gives Pillow's result to one grey level; most
are a lookup table or a filter in OpenCV, which is several times faster than Pillow. Magnitudes go
from 0 (weak) to 10; the "increasing" variants of timm grow stronger with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image

from vssd_jax.data.normalization import IMAGENET_MEAN

MAX_MAGNITUDE = 10.0
# What a shear, shift or rotation uncovers gets the mean colour.
FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)

_LEVELS = np.arange(256)
# ITU-R 601 luma in the 16-bit fixed point of Pillow's convert("L"); OpenCV's own differs by one.
_LUMA = np.array([[19595, 38470, 7471]], np.float32) / 65536
# Pillow cuts off fractions where OpenCV rounds to the nearest: almost a half less makes them agree,
# and leaves a whole number what it is in spite of rounding errors.
_CUT_OFF = -0.498


def to_uint8(values: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Rounds a 2-D float32 array, plus `shift`, to the nearest grey level; overwrites it."""
    cv2.threshold(values, 0, 0, cv2.THRESH_TOZERO, dst=values)
    return cv2.convertScaleAbs(values, beta=shift)


def _lookup(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps grey levels by a (256,) table, or a (256, 3) one with a column per channel."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


def _histograms(image: np.ndarray) -> list[np.ndarray]:
    # Flattened, because the shape depends on OpenCV's version.
    return [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(int) for c in range(3)]


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to the full range."""
    tables = []
    for histogram in _histograms(image):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        scale = 255 / (high - low) if high > low else 1.0
        tables.append(_LEVELS if high <= low else np.trunc(_LEVELS * scale - low * scale))
    return _lookup(image, np.stack(tables, axis=1))


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens each channel's histogram."""
    tables = []
    for histogram in _histograms(image):
        occupied = histogram[histogram > 0]
        step = (occupied.sum() - occupied[-1]) // 255
        if step == 0:
            tables.append(_LEVELS)
        else:
            below = np.cumsum(histogram) - histogram
            tables.append((step // 2 + below) // step)
    return _lookup(image, np.stack(tables, axis=1))


def invert(image: np.ndarray) -> np.ndarray:
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` bits of every value; 0 gives black."""
    return _lookup(image, _LEVELS & (0xFF00 >> bits))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values from `threshold` on."""
    return _lookup(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds `amount` to the values below 128."""
    return _lookup(image, np.where(_LEVELS < 128, _LEVELS + amount, _LEVELS))


def _blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, degenerate, 1 - factor, _CUT_OFF)


def _blend_levels(degenerate: int, factor: float) -> np.ndarray:
    """The table of a blend with one grey level, in float32 as Pillow computes it."""
    return np.trunc(degenerate + np.float32(factor) * np.float32(_LEVELS - degenerate))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: 0 is grey, 1 the picture itself."""
    return _blend(cv2.cvtColor(cv2.transform(image, _LUMA), cv2.COLOR_GRAY2RGB), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast around the mean luma: 0 is flat grey, 1 the picture itself."""
    mean = int(cv2.mean(cv2.transform(image, _LUMA))[0] + 0.5)
    return _lookup(image, _blend_levels(mean, factor))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Brightness: 0 is black, 1 the picture itself."""
    return _lookup(image, _blend_levels(0, factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Sharpness: 0 is smoothed, 1 the picture itself, more is sharper."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = image.copy()  # Pillow's filter leaves the border as it is
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counter-clockwise about the centre."""
    picture = Image.fromarray(image)
    return np.array(picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL))


def _shift_rows(image: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Row y at column x takes the colour at column x + shifts[y], by cubic convolution.

    Pillow's affine transform uses Keys' kernel with a = -1, repeats the edge, and cuts off
    fractions; it spends most of its time on the other dimension, which a shear leaves alone.
    """
    height, width, _ = image.shape
    base = np.floor(shifts).astype(int)
    d = (shifts - base).astype(np.float32)
    weights = np.stack(
        (((2 - d) * d - 1) * d, (d - 2) * d * d + 1, ((1 - d) * d + 1) * d, (d - 1) * d * d), axis=1
    )
    columns = base.astype(np.float32)[:, None] + np.arange(-1, width + 2, dtype=np.float32)
    rows = np.repeat(np.arange(height, dtype=np.float32)[:, None], width + 3, axis=1)
    np.clip(columns, 0, width - 1, out=columns)
    taps = cv2.remap(image, columns, rows, cv2.INTER_NEAREST).astype(np.float32)
    # windows[y, k] is row y from its tap k on: overlapping views, no copies.
    windows = np.lib.stride_tricks.as_strided(taps, (height, 4, 3 * width), taps.strides)
    result = to_uint8(np.einsum("hk,hkj->hj", weights, windows), _CUT_OFF).reshape(height, width, 3)
    column = np.arange(width, dtype=np.int16)
    first = np.ceil(-0.5 - shifts).astype(np.int16)[:, None]
    inside = (column >= first) & (column < first + np.int16(width))
    return cv2.copyTo(result, inside.view(np.uint8), _mean_picture(height, width).copy())


@functools.lru_cache(maxsize=8)
def _mean_picture(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), FILL, np.uint8)


def _shift_columns(image: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    return cv2.transpose(_shift_rows(cv2.transpose(image), shifts))


def shear_x(image: np.ndarray, factor: float) -> np.ndarray:
    """Shears along x: row y takes the colours from factor * (y + 0.5) pixels further right."""
    return _shift_rows(image, factor * (np.arange(image.shape[0]) + 0.5))


def shear_y(image: np.ndarray, factor: float) -> np.ndarray:
    """Shears along y: column x takes the colours from factor * (x + 0.5) pixels further down."""
    return _shift_columns(image, factor * (np.arange(image.shape[1]) + 0.5))


def translate_x(image: np.ndarray, fraction: float) -> np.ndarray:
    """Moves the picture left by a fraction of its width."""
    return _shift_rows(image, np.full(image.shape[0], fraction * image.shape[1]))


def translate_y(image: np.ndarray, fraction: float) -> np.ndarray:
    """Moves the picture up by a fraction of its height."""
    return _shift_columns(image, np.full(image.shape[1], fraction * image.shape[0]))


def _sign(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _signed(maximum: float) -> Callable[[float, np.random.Generator], tuple[float]]:
    return lambda magnitude, rng: (_sign(rng) * maximum * magnitude / MAX_MAGNITUDE,)


def _enhancement(magnitude: float, rng: np.random.Generator) -> tuple[float]:
    # 1 is "no change": magnitude moves away from it to either side, at most to 0.1 or 1.9.
    return (max(0.1, 1 + _sign(rng) * 0.9 * magnitude / MAX_MAGNITUDE),)


def _none(magnitude: float, rng: np.random.Generator) -> tuple:
    return ()


# name -> (operation, (magnitude, rng) -> its arguments), in timm's order.
OPERATIONS: dict[str, tuple[Callable, Callable[[float, np.random.Generator], tuple]]] = {
    "AutoContrast": (auto_contrast, _none),
    "Equalize": (equalize, _none),
    "Invert": (invert, _none),
    "Rotate": (rotate, _signed(30.0)),
    "PosterizeIncreasing": (posterize, lambda m, _: (4 - int(m / MAX_MAGNITUDE * 4),)),
    "SolarizeIncreasing": (solarize, lambda m, _: (256 - int(m / MAX_MAGNITUDE * 256),)),
    "SolarizeAdd": (solarize_add, lambda m, _: (int(m / MAX_MAGNITUDE * 110),)),
    "ColorIncreasing": (color, _enhancement),
    "ContrastIncreasing": (contrast, _enhancement),
    "BrightnessIncreasing": (brightness, _enhancement),
    "SharpnessIncreasing": (sharpness, _enhancement),
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateXRel": (translate_x, _signed(0.45)),
    "TranslateYRel": (translate_y, _signed(0.45)),
}
_NAMES = tuple(OPERATIONS)


def sample_operations(
    rng: np.random.Generator,
    *,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
) -> list[tuple[str, tuple]]:
    """Draws what to do to one picture: (name, arguments) pairs, at most `num_ops` of them.

    Each of `num_ops` draws takes any operation, with replacement, and keeps it with `probability`;
    its magnitude is normally distributed and clipped to [0, 10].
    """
    chosen = []
    for index in rng.integers(len(_NAMES), size=num_ops):
        if rng.random() >= probability:
            continue
        level = min(max(rng.normal(magnitude, magnitude_std), 0.0), MAX_MAGNITUDE)
        name = _NAMES[index]
        chosen.append((name, OPERATIONS[name][1](level, rng)))
    return chosen


def rand_augment(image: np.ndarray, rng: np.random.Generator, **settings: Any) -> np.ndarray:
    """Applies randomly drawn operations; `settings` are those of `sample_operations`."""
    for name, arguments in sample_operations(rng, **settings):
        image = OPERATIONS[name][0](image, *arguments)
    return image
