"""Anchors, and which of them lie on the image."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.models.detection.anchors import anchors_on_image, grid_anchors


def test_anchors():
    anchors = grid_anchors((2, 3), 8, scale=4, ratios=(0.25, 1.0)).reshape(2, 3, 2, 4)
    np.testing.assert_array_equal(anchors[0, 0], [[-32, -8, 32, 8], [-16, -16, 16, 16]])
    np.testing.assert_array_equal(anchors[1, 2] - anchors[0, 0], [[16, 8, 16, 8]] * 2)
    # An image of 33 x 20 pixels counts as 64 x 32: 8 x 4 cells of 8 pixels.
    inside = anchors_on_image((10, 6), 8, 2, jnp.array([33, 20])).reshape(10, 6, 2)
    np.testing.assert_array_equal(inside.sum((0, 1)), [32, 32])
    assert inside[7, 3].all()
