"""The pixels of a batch as models take them."""

from collections.abc import Sequence

import jax.numpy as jnp

from vssd_jax.data.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize
from vssd_jax.types import Array, Float, Int, UInt8


def normalized(
    images: UInt8[Array, "B H W 3"],
    shapes: Int[Array, "B 2"] | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Array, "B H W 3"]:
    """Normalised float32 images, on the device: a pixel has 3 bytes on its way there, not 12.

    Args:
      images: grey levels from 0 to 255.
      shapes: height and width of each image without its padding, at the bottom and the right,
        which becomes 0. None: there is no padding.
      mean, std: of values in [0, 1].
    """
    pixels = normalize(images, mean, std)
    if shapes is None:
        return pixels
    rows, columns = (jnp.arange(length) for length in images.shape[1:3])
    inside = (rows[:, None] < shapes[:, 0, None, None]) & (columns < shapes[:, 1, None, None])
    return jnp.where(inside[..., None], pixels, 0)
