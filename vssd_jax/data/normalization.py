"""ImageNet's normalisation, that of every picture a model sees."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax

# Statistics of ImageNet's pixels, in the order red, green, blue, of values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pixels = TypeVar("Pixels", np.ndarray, "jax.Array")


def normalize(
    images: Pixels,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Pixels:
    """(..., 3) grey levels from 0 to 255 of any dtype to normalised float32.

    Mean and standard deviation are of values in [0, 1].

    On the host or on the device: NumPy arrays stay NumPy arrays, JAX arrays JAX arrays.
    """
    scale = np.float32(1 / (255 * np.array(std)))
    return images.astype(np.float32) * scale + np.float32(-np.array(mean) / np.array(std))
