"""ImageNet's normalisation, that of every picture a model sees."""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax

# Statistics of ImageNet's pixels, in the order red, green, blue, of values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SCALE = np.float32(1 / (255 * np.array(IMAGENET_STD)))
_SHIFT = np.float32(-np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD))

Pixels = TypeVar("Pixels", np.ndarray, "jax.Array")


def normalize(images: Pixels) -> Pixels:
    """(..., 3) grey levels from 0 to 255 of any dtype to ImageNet-normalised float32.

    On the host or on the device: NumPy arrays stay NumPy arrays, JAX arrays JAX arrays.
    """
    return images.astype(np.float32) * _SCALE + _SHIFT
