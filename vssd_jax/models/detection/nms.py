"""Non-maximum suppression."""

import jax
import jax.numpy as jnp

from vssd_jax.models.detection.boxes import areas, intersections
from vssd_jax.types import Array, Bool, Float, Int

# Pairs of a region and a class above the score threshold that one matrix of overlaps holds. A
# trained detector has some hundreds in a picture of COCO.
CANDIDATES = 2048


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    usable: Bool[Array, " N"],
    threshold: float,
    labels: Int[Array, " N"] | None = None,
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
      labels: (N,) or None; boxes of different labels do not suppress each other.

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
    if labels is not None:
        suppresses &= labels[:, None] == labels[None]

    def decide(kept: Bool[Array, " N"]) -> Bool[Array, " N"]:
        return usable & ~(suppresses & kept[:, None]).any(0)

    def changed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (state[0] != state[1]).any()

    # The loop carries the decisions of the last two rounds.
    start = (usable, decide(usable))
    return jax.lax.while_loop(changed, lambda state: (state[1], decide(state[1])), start)[1]


def multiclass_nms(
    boxes: Float[Array, "B R K 4"],
    scores: Float[Array, "B R K"],
    usable: Bool[Array, "B R K"],
    threshold: float,
    count: int,
    *,
    candidates: int = CANDIDATES,
) -> tuple[Float[Array, "B M 4"], Float[Array, "B M"], Int[Array, "B M"]]:
    """The best boxes of each image after suppression within each class.

    Only the usable pairs of a region and a class are compared, in one matrix for an image instead
    of one for each class. An image with more of them than that matrix holds sends its batch through
    all classes, with the same result.

    Args:
      boxes: (B, R, K, 4), of R regions for K classes.
      scores: (B, R, K), at least 0.
      usable: (B, R, K) bool; other pairs are not kept and suppress none.
      threshold: intersection over union.
      count: of the best boxes; M is `min(count, R K)`.
      candidates: side of the matrix.

    Returns:
      (B, M, 4) boxes, (B, M) scores in falling order, -1 where there are no more, (B, M) labels.
    """
    classes = scores.shape[-1]
    pairs = scores.shape[1] * classes
    count = min(count, pairs)
    size = min(max(candidates, count), pairs)

    def best(
        boxes: jax.Array, scores: jax.Array, index: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of pairs (N, 4), (N,) that are numbered by `index`."""
        scores, order = jax.lax.top_k(scores, count)
        label = (order if index is None else index[order]) % classes
        return boxes[order], scores, label

    def among_candidates(
        boxes: jax.Array, scores: jax.Array, usable: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Of equal scores the first comes first, here as in `nms`.
        score, index = jax.lax.top_k(jnp.where(usable, scores, -1).reshape(-1), size)
        box = boxes.reshape(-1, 4)[index]
        keep = nms(box, score, score >= 0, threshold, index % classes)
        return best(box, jnp.where(keep, score, -1), index)

    def among_all(
        boxes: jax.Array, scores: jax.Array, usable: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        in_class = jax.vmap(nms, in_axes=(1, 1, 1, None), out_axes=1)
        keep = in_class(boxes, scores, usable, threshold)
        return best(boxes.reshape(-1, 4), jnp.where(keep, scores, -1).reshape(-1))

    images = (boxes, scores, usable)
    if size == pairs:
        return jax.vmap(among_candidates)(*images)
    return jax.lax.cond(
        (usable.sum((1, 2)) <= size).all(),
        lambda images: jax.vmap(among_candidates)(*images),
        # One image after the other: the matrices of all classes are large.
        lambda images: jax.lax.map(lambda image: among_all(*image), images),
        images,
    )
