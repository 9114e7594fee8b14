"""Which box is an example of which object."""

import functools

import jax
import numpy as np

from vssd_jax.models.detection.assigner import IGNORED, NEGATIVE, assign


def test_assignment():
    objects = np.array([[0, 0, 10, 10], [0, 0, 10, 12], [40, 40, 44, 44], [0, 0, 9, 9]], np.float32)
    valid = np.array([True, True, True, False])
    boxes = np.array(
        [
            [0, 0, 10, 11],   # overlaps 0 and 1 by 0.91: the best of 0 and 1, the last one wins
            [0, 0, 10, 5],    # 0.5 of object 0: between the thresholds
            [0, 0, 2, 2],     # negative
            [42, 40, 46, 44], # best of object 2 by 0.33: a low-quality match
            [0, 0, 10, 11],   # as the first, but padding
        ],
        np.float32,
    )  # fmt: skip
    usable = np.array([True] * 4 + [False])
    thresholds = {"positive_iou": 0.7, "negative_iou": 0.3, "min_positive_iou": 0.3}
    run = jax.jit(functools.partial(assign, **thresholds))
    result = run(boxes, usable, objects, valid)
    np.testing.assert_array_equal(result, [1, IGNORED, NEGATIVE, 2, IGNORED])
    nothing = run(boxes, usable, objects, np.zeros(4, bool))
    np.testing.assert_array_equal(nothing, [NEGATIVE] * 4 + [IGNORED])
