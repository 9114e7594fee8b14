"""Non-maximum suppression against a plain loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.detection.references import random_boxes
from vssd_jax.models.detection.nms import multiclass_nms, nms

CASES = 200


def reference_nms(boxes, scores, usable, threshold):
    kept = np.zeros(len(boxes), bool)
    for i in np.argsort(-scores, kind="stable"):
        if not usable[i]:
            continue
        kept[i] = True
        for j in np.flatnonzero(kept):
            if j == i:
                continue
            size = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            shared = np.prod(np.maximum(size, 0))
            union = sum(np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j)) - shared
            if union != 0 and shared / union > threshold:
                kept[i] = False
                break
    return kept


def test_nms_equals_the_greedy_loop():
    run = jax.jit(nms, static_argnums=3)
    suppressed = 0
    for case in range(CASES):
        rng = np.random.default_rng(case)
        boxes = random_boxes(rng, 30, size=rng.choice([10, 40]))
        scores = rng.choice([rng.random(30), rng.integers(0, 4, 30) / 4]).astype(np.float32)
        usable = rng.random(30) < rng.choice([0, 0.8, 1])
        expected = reference_nms(boxes, scores, usable, 0.3)
        np.testing.assert_array_equal(run(boxes, scores, usable, 0.3), expected, str(case))
        suppressed += (usable & ~expected).sum()
    assert suppressed > CASES


def test_nms_follows_a_long_chain():
    # Each box overlaps the next only: every second one stays.
    start = np.arange(64, dtype=np.float32) * 6
    boxes = np.stack([start, 0 * start, start + 10, 0 * start + 10], axis=1)
    kept = jax.jit(nms, static_argnums=3)(boxes, jnp.arange(64, 0, -1.0), jnp.ones(64, bool), 0.2)
    np.testing.assert_array_equal(kept, np.arange(64) % 2 == 0)


def reference_multiclass(boxes, scores, usable, threshold, count):
    """The kept pairs of one image, best first: boxes, scores, labels."""
    classes = scores.shape[1]
    kept = np.stack(
        [reference_nms(boxes[:, c], scores[:, c], usable[:, c], threshold) for c in range(classes)],
        axis=1,
    )
    order = np.argsort(-np.where(kept, scores, -1).ravel(), kind="stable")[:count]
    order = order[kept.ravel()[order]]
    return boxes.reshape(-1, 4)[order], scores.ravel()[order], order % classes


@pytest.mark.parametrize("candidates", [10, 40, 1000])
def test_classes_are_suppressed_apart(candidates):
    """In one matrix, and where an image has more candidates than it holds, class by class."""
    run = jax.jit(multiclass_nms, static_argnames=("threshold", "count", "candidates"))
    more = 0
    for case in range(40):
        rng = np.random.default_rng(case)
        shape = (2, 12, 5)
        boxes = random_boxes(rng, 2 * 12 * 5, size=20).reshape(*shape, 4)
        # Equal scores, too.
        scores = rng.choice([rng.random(shape), rng.integers(1, 5, shape) / 4]).astype(np.float32)
        usable = rng.random(shape) < (0, 0.2, 0.6, 1)[case % 4]
        more += int((usable.sum((1, 2)) > candidates).any())
        found = run(boxes, scores, usable, threshold=0.3, count=15, candidates=candidates)
        for box, score, label, *image in zip(*found, boxes, scores, usable, strict=True):
            expected = reference_multiclass(*image, 0.3, 15)
            valid = score >= 0
            assert not valid[len(expected[1]) :].any()
            for values, wanted in zip((box, score, label), expected, strict=True):
                np.testing.assert_array_equal(values[valid], wanted, str(case))
    assert more == 0 if candidates == 1000 else more > 5
