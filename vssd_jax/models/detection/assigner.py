"""The assignment of anchors and proposals to objects."""

import jax.numpy as jnp

from vssd_jax.models.detection.boxes import iou
from vssd_jax.types import Array, Bool, Float, Int

NEGATIVE, IGNORED = -1, -2


def assign(
    boxes: Float[Array, "N 4"],
    usable: Bool[Array, " N"],
    objects: Float[Array, "M 4"],
    valid: Bool[Array, " M"],
    *,
    positive_iou: float,
    negative_iou: float,
    min_positive_iou: float,
) -> Int[Array, " N"]:
    """Assigns boxes to objects by their overlap (mmdet's MaxIoUAssigner).

    A box gets the object it overlaps most, if their overlap is at least `positive_iou`; it is
    negative if it overlaps all objects by less than `negative_iou`. Then each object gets the boxes
    that overlap it more than all others do, if by at least `min_positive_iou`; of several objects
    that would get the same box, the last one does.

    Args:
      boxes: (N, 4) anchors or proposals.
      usable: (N,) bool, False for padding.
      objects: (M, 4) ground truth.
      valid: (M,) bool, False for padding.

    Returns:
      (N,) int32: the index of the object, `NEGATIVE` or `IGNORED`.
    """
    overlaps = iou(objects, boxes)
    overlaps = jnp.where(valid[:, None] & usable[None], overlaps, -1)
    best = jnp.maximum(overlaps.max(0), 0)
    result = jnp.where(best < negative_iou, NEGATIVE, IGNORED)
    result = jnp.where(best >= positive_iou, overlaps.argmax(0), result)
    highest = overlaps.max(1, keepdims=True)
    taken = (overlaps == highest) & (highest >= min_positive_iou)
    last = jnp.where(taken, jnp.arange(len(objects))[:, None], -1).max(0)
    result = jnp.where(last >= 0, last, result)
    return jnp.where(usable, result, IGNORED).astype(jnp.int32)
