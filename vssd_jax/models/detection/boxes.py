"""Boxes x1 y1 x2 y2 in pixels: overlaps, and the deltas that networks predict."""

import math

import jax.numpy as jnp
import numpy as np

from vssd_jax.types import Array, Float, Num

# The largest change of a box's width or height that a delta can ask for: a factor of 62.5.
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def areas(boxes: Float[Array, "*shape 4"]) -> Float[Array, "*shape"]:
    """(..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersections(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Areas that each pair of boxes (N, 4) and (M, 4) shares: (N, M)."""
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    size = jnp.maximum(high - low, 0)
    return size[..., 0] * size[..., 1]


def iou(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Intersection over union of each pair of boxes (N, 4) and (M, 4): (N, M)."""
    shared = intersections(a, b)
    union = areas(a)[:, None] + areas(b)[None] - shared
    return shared / jnp.maximum(union, 1e-6)


def encode(
    boxes: Float[Array, "*shape 4"],
    targets: Float[Array, "*shape 4"],
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "*shape 4"]:
    """Deltas (dx, dy, dlog w, dlog h) / stds that move `boxes` onto `targets`, both (..., 4)."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    goal, goal_size = (targets[..., :2] + targets[..., 2:]) / 2, targets[..., 2:] - targets[..., :2]
    deltas = jnp.concatenate([(goal - centre) / size, jnp.log(goal_size / size)], axis=-1)
    return deltas / jnp.asarray(stds, deltas.dtype)


def decode(
    boxes: Float[Array, "... 4"],
    deltas: Float[Array, "... 4"],
    image_shape: Num[Array | np.ndarray, "2"] | None = None,
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "... 4"]:
    """The inverse of `encode`.

    Args:
      boxes, deltas: (..., 4), of shapes that broadcast.
      image_shape: (2,) height and width to which the result is clipped.
      stds: the deviations by which the deltas were divided.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    deltas = deltas * jnp.asarray(stds, deltas.dtype)
    centre = centre + size * deltas[..., :2]
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)) / 2
    result = jnp.concatenate([centre - half, centre + half], axis=-1)
    return result if image_shape is None else clip(result, image_shape)


def clip(
    boxes: Float[Array, "*shape 4"], image_shape: Num[Array | np.ndarray, "2"]
) -> Float[Array, "*shape 4"]:
    """Boxes (..., 4) cut to an image of `image_shape` (height, width)."""
    height, width = image_shape[0], image_shape[1]
    limit = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limit)
