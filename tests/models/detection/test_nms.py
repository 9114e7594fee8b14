"""Non-maximum suppression against a plain loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.detection.references import random_boxes
from vssd_jax.models.detection.nms import nms

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
