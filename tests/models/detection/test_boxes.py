"""Boxes as deltas of others and back."""

import jax.numpy as jnp
import numpy as np

from vssd_jax.models.detection import boxes as box_ops


def test_deltas_round_trip_and_clip():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (2, 20, 2))
    sizes = rng.uniform(5, 40, (2, 20, 2))
    a, b = jnp.asarray(np.concatenate([corners, corners + sizes], axis=-1), jnp.float32)
    stds = (0.1, 0.1, 0.2, 0.2)
    deltas = box_ops.encode(a, b, stds)
    np.testing.assert_allclose(box_ops.decode(a, deltas, stds=stds), b, atol=1e-4)
    clipped = box_ops.decode(a, deltas, jnp.array([20, 30]), stds)
    np.testing.assert_allclose(clipped, np.clip(b, 0, [30, 20, 30, 20]), atol=1e-4)
    # A width or height changes by no more than a factor of 1000 / 16.
    wide = box_ops.decode(jnp.array([0, 0, 1, 1.0]), jnp.array([0, 0, 9, -9.0]))
    np.testing.assert_allclose(wide[2:] - wide[:2], [62.5, 0.016], rtol=1e-4)


def test_overlaps():
    a = jnp.array([[0, 0, 4, 2], [1, 1, 1, 1.0]])
    b = jnp.array([[2, 0, 6, 2], [0, 0, 4, 2], [9, 9, 10, 10.0]])
    np.testing.assert_array_equal(box_ops.areas(b), [8, 8, 1])
    np.testing.assert_array_equal(box_ops.intersections(a, b), [[4, 8, 0], [0, 0, 0]])
    np.testing.assert_allclose(box_ops.iou(a, b), [[1 / 3, 1, 0], [0, 0, 0]], rtol=1e-6)
