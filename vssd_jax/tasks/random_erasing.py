"""Random erasing's noise (arXiv 1708.04896), on the device; the host draws the rectangles."""

import jax
import jax.numpy as jnp


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
