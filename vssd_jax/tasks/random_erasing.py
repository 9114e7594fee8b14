"""The last of the image transforms, on the device: normalisation and random erasing's noise."""

import jax
import jax.numpy as jnp
import numpy as np

from vssd_jax.data.constants import IMAGENET_MEAN, IMAGENET_STD


def normalize(images: jax.Array) -> jax.Array:
    """(..., 3) grey levels from 0 to 255 of any dtype to ImageNet-normalised float32."""
    scale = 1 / (255 * np.array(IMAGENET_STD))
    shift = -np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)
    return images.astype(jnp.float32) * jnp.float32(scale) + jnp.float32(shift)


def erase(key: jax.Array, images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Fills a rectangle of each picture with standard normal noise, a value per pixel and channel.

    Args:
      key: a PRNG key.
      images: (B, H, W, C), normalised.
      boxes: (B, 4) integers top, left, height, width; a height or width of 0 erases nothing.
    """
    top, left, height, width = (boxes[:, i, None] for i in range(4))
    y = jnp.arange(images.shape[1])
    x = jnp.arange(images.shape[2])
    rows = (y >= top) & (y < top + height)  # (B, H)
    columns = (x >= left) & (x < left + width)  # (B, W)
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    return jnp.where(inside, jax.random.normal(key, images.shape, images.dtype), images)
