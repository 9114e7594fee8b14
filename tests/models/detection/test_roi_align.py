"""RoIAlign against a plain loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.detection.references import random_boxes, reference_roi_align
from vssd_jax.models.detection import roi_align as roi_align_module
from vssd_jax.models.detection.roi_align import pyramid_roi_align, region_levels, roi_align


@pytest.mark.parametrize("bins", [2, 7])
def test_roi_align_equals_the_loop(bins):
    count, size = 100, (10, 13)
    rng = np.random.default_rng(bins)
    features = rng.standard_normal((*size, 2)).astype(np.float32)
    boxes = random_boxes(rng, count)
    # Boxes whose bins are whole cells: the number of samples must not be rounded up.
    boxes[:5] = [[2, 2, 2 + 4 * bins * k, 2 + 4 * bins] for k in range(1, 6)]
    boxes[5] = (0, 0, 52, 40)
    result = jax.jit(roi_align, static_argnums=(2, 3))(features[None], boxes[None], bins, 0.25)
    for box, value in zip(boxes, result[0], strict=True):
        expected = reference_roi_align(features, box, bins, 0.25)
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=str(box))


def test_pyramid_in_chunks_equals_each_level_alone(monkeypatch):
    rng = np.random.default_rng(0)
    shapes, strides = ((25, 38), (13, 19), (7, 10), (4, 5)), (4, 8, 16, 32)
    maps = [rng.standard_normal((2, *shape, 3)).astype(np.float32) for shape in shapes]
    boxes = np.stack([random_boxes(rng, 40, size=150), random_boxes(rng, 40, size=150)])
    boxes[:, :4] = [[-9, 0, 900, 90], [0, 0, 150, 100], [20, 9, 140, 98], [-99, -99, 999, 999]]
    level = np.asarray(region_levels(jnp.asarray(boxes), 4))
    assert set(level.ravel()) == {0, 1, 2, 3}
    monkeypatch.setattr("vssd_jax.models.detection.roi_align._CHUNK_BYTES", 20000)
    result = jax.jit(pyramid_roi_align, static_argnums=(1, 3))(maps, strides, boxes, 3)
    for i, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        alone = jax.jit(roi_align, static_argnums=(2, 3))(x, boxes, 3, 1 / stride)
        np.testing.assert_allclose(result[level == i], alone[level == i], atol=1e-5)


def test_roi_align_gradient_is_the_transposed_map():
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.standard_normal((1, 8, 9, 2)), jnp.float32)
    boxes = jnp.asarray(random_boxes(rng, 6)[None])
    cotangent = jnp.asarray(rng.standard_normal((1, 6, 3, 3, 2)), jnp.float32)

    @jax.jit
    def value_and_gradients(features, boxes):
        align = functools.partial(roi_align, bins=3, scale=0.25)
        value, pull = jax.vjp(lambda features: align(features, boxes), features)
        return value, *pull(cotangent), jax.grad(lambda boxes: align(features, boxes).sum())(boxes)

    value, gradient, box_gradient = value_and_gradients(features, boxes)
    # The map is linear: <y, A x> = <A^T y, x>.
    np.testing.assert_allclose((value * cotangent).sum(), (gradient * features).sum(), rtol=1e-4)
    np.testing.assert_array_equal(box_gradient, 0)


def test_region_levels():
    sides = np.array([0, 10, 111, 113, 223, 225, 447, 449, 5000], np.float32)
    boxes = jnp.asarray(np.stack([0 * sides, 0 * sides, sides, sides], axis=1))
    np.testing.assert_array_equal(region_levels(boxes, 4), [0, 0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("batch", [1, 2])
def test_windows_equal_the_whole_map(batch):
    """Regions of every window's size, longer ones, some beyond the map and empty ones."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(batch, 70, 100, 3)), jnp.float32)
    sides = rng.choice([3, 12, 25, 50, 90, 130], (batch, 40, 2))
    start = rng.uniform(-10, 90, (batch, 40, 2))
    boxes = np.concatenate([start, start + sides], axis=-1).astype(np.float32)
    boxes[:, 0] = 0
    boxes[:, 1, 2:] = boxes[:, 1, :2] - 5
    corners = jnp.asarray(boxes.reshape(-1, 4))
    wy = roi_align_module.bin_weights(corners[:, 1], corners[:, 3], 7, 70)
    wx = roi_align_module.bin_weights(corners[:, 0], corners[:, 2], 7, 100)
    weights = [w.reshape(batch, 40, 7, -1) for w in (wy, wx)]
    extents = np.maximum(*(np.asarray(roi_align_module._covered(w)[1]) for w in (wy, wx)))
    classes = np.searchsorted(roi_align_module._WINDOWS, extents)
    assert set(classes) == {0, 1, 2, 3}
    results = {}
    for f in (roi_align_module._by_windows, roi_align_module._by_products):
        y, vjp = jax.vjp(lambda features, f=f: f(features, *weights), features)
        results[f.__name__] = y, vjp(jnp.cos(y))[0]
    for a, b in zip(*results.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
