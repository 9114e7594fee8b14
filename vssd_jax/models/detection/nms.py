"""Non-maximum suppression."""

import jax
import jax.numpy as jnp

from vssd_jax.models.detection.boxes import areas, intersections
from vssd_jax.types import Array, Bool, Float


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    usable: Bool[Array, " N"],
    threshold: float,
) -> Bool[Array, " N"]:
    """Greedy non-maximum suppression, exactly, without a loop over the boxes.

    In the order of the scores (equal ones: of the indices), a box is kept if no kept box before
    it overlaps it by more than `threshold`. Each round decides on all boxes at once from the
    decisions of the round before, until nothing changes: after k rounds the decision is final for
    every box with less than k boxes in the longest chain of overlaps that leads to it.

    Args:
      boxes: (N, 4).
      scores: (N,).
      usable: (N,) bool; other boxes are not kept and suppress no others.
      threshold: intersection over union.

    Returns:
      (N,) bool, True for the boxes that are kept.
    """
    area = areas(boxes)
    shared = intersections(boxes, boxes)
    # 0 / 0, two empty boxes, is not greater than any threshold.
    overlap = shared / (area[:, None] + area[None] - shared) > threshold
    rank = jnp.arange(len(scores))
    before = (scores[:, None] > scores[None]) | (
        (scores[:, None] == scores[None]) & (rank[:, None] < rank[None])
    )
    suppresses = overlap & before & usable[:, None]

    def decide(kept: Bool[Array, " N"]) -> Bool[Array, " N"]:
        return usable & ~(suppresses & kept[:, None]).any(0)

    def changed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] != state[1]).any()

    # The loop carries the decisions of the last two rounds.
    start = (usable, decide(usable))
    return jax.lax.while_loop(changed, lambda state: (state[1], decide(state[1])), start)[1]
