"""Which object, if any, each anchor or proposal stands for."""

import jax.numpy as jnp

from vssd_jax.models.detection.boxes import iou

NEGATIVE, IGNORED = -1, -2


def assign(
    boxes,
    usable,
    objects,
    valid,
    *,
    positive_iou: float,
    negative_iou: float,
    min_positive_iou: float,
):
    """Assigns boxes to objects by their overlap (mmdet's MaxIoUAssigner).

    A box takes the object it overlaps most, if by `positive_iou`; it is negative if it overlaps
    all by less than `negative_iou`. Then each object, the last one wins, takes the boxes that
    overlap it most of all, if by `min_positive_iou`.

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
