"""RoIAlign against a plain loop in NumPy, and its implementations against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels import rows
from tests.models.detection.references import random_boxes, reference_roi_align
from vssd_jax.errors import UserError
from vssd_jax.kernels.roi_align import OPERATION, roi_align, sampling, xla

STRIDES = (4, 8, 16, 32)
SHAPES = ((25, 38), (13, 19), (7, 10), (4, 5))  # of a picture of 152 x 100
REGIONS = {
    "the whole picture": (0, 0, 152, 100),
    "half beyond the picture": (-99, -80, 170, 130),
    "more than the picture": (-99, -99, 999, 999),
    "whole cells": (8, 16, 64, 72),
    "between the cells": (20.3, 9.7, 71.2, 98.4),
    "within a cell": (51.5, 40.5, 52.5, 41.25),
    "1 to 20": (3, 40, 143, 47),
    "20 to 1": (101, 1, 105.5, 91),
    "beyond the edge": (-9, -7, 30, 20),
    "beyond the far edge": (120, 60, 190, 130),
    "outside": (300, 20, 380, 90),
    "no height": (20, 30, 60, 30),
    "a point": (77, 33, 77, 33),
    "inside out": (60, 50, 40, 20),
}


# --- In plain JAX -----------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [2, 7])
def test_roi_align_equals_the_loop(bins):
    count, size = 100, (10, 13)
    rng = np.random.default_rng(bins)
    features = rng.standard_normal((*size, 2)).astype(np.float32)
    boxes = random_boxes(rng, count)
    # Boxes whose bins are whole cells: the number of samples must not be rounded up.
    boxes[:5] = [[2, 2, 2 + 4 * bins * k, 2 + 4 * bins] for k in range(1, 6)]
    boxes[5] = (0, 0, 52, 40)
    maps = (jnp.asarray(features)[None],)
    result = roi_align(maps, jnp.asarray(boxes)[None], strides=(4,), bins=bins)
    for box, value in zip(boxes, result[0], strict=True):
        expected = reference_roi_align(features, box, bins, 0.25)
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=str(box))


def test_pyramid_in_chunks_equals_each_level_alone(monkeypatch):
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((2, *shape, 3)).astype(np.float32) for shape in SHAPES]
    boxes = np.stack([random_boxes(rng, 40, size=150), random_boxes(rng, 40, size=150)])
    boxes[:, :4] = [[-9, 0, 900, 90], [0, 0, 150, 100], [20, 9, 140, 98], [-99, -99, 999, 999]]
    level = np.asarray(sampling.region_levels(jnp.asarray(boxes), 4))
    assert set(level.ravel()) == {0, 1, 2, 3}
    monkeypatch.setattr(xla, "_CHUNK_BYTES", 20000)
    jitted = jax.jit(xla.roi_align, static_argnames=("strides", "bins"))
    result = jitted(maps, boxes, strides=STRIDES, bins=3)
    for i, (x, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        alone = jitted((x,), boxes, strides=(stride,), bins=3)
        np.testing.assert_allclose(result[level == i], alone[level == i], atol=1e-5)


def test_the_gradient_is_the_transposed_map():
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.standard_normal((1, 8, 9, 2)), jnp.float32)
    boxes = jnp.asarray(random_boxes(rng, 6)[None])
    cotangent = jnp.asarray(rng.standard_normal((1, 6, 3, 3, 2)), jnp.float32)

    @jax.jit
    def value_and_gradients(features, boxes):
        def align(features, boxes):
            return roi_align((features,), boxes, strides=(4,), bins=3)

        value, pull = jax.vjp(lambda features: align(features, boxes), features)
        return value, *pull(cotangent), jax.grad(lambda boxes: align(features, boxes).sum())(boxes)

    value, gradient, box_gradient = value_and_gradients(features, boxes)
    # The map is linear: <y, A x> = <A^T y, x>.
    np.testing.assert_allclose((value * cotangent).sum(), (gradient * features).sum(), rtol=1e-4)
    np.testing.assert_array_equal(box_gradient, 0)


def test_region_levels():
    sides = np.array([0, 10, 111, 113, 223, 225, 447, 449, 5000], np.float32)
    boxes = jnp.asarray(np.stack([0 * sides, 0 * sides, sides, sides], axis=1))
    np.testing.assert_array_equal(sampling.region_levels(boxes, 4), [0, 0, 0, 1, 1, 2, 2, 3, 3])


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
    wy = sampling.bin_weights(corners[:, 1], corners[:, 3], 7, 70)
    wx = sampling.bin_weights(corners[:, 0], corners[:, 2], 7, 100)
    weights = [w.reshape(batch, 40, 7, -1) for w in (wy, wx)]
    extents = np.maximum(*(np.asarray(xla.covered(w)[1]) for w in (wy, wx)))
    classes = np.searchsorted(xla._WINDOWS, extents)
    assert set(classes) == {0, 1, 2, 3}
    results = {}
    for f in (xla._by_windows, xla._by_products):
        y, vjp = jax.vjp(lambda features, f=f: f(features, *weights), features)
        results[f.__name__] = y, vjp(jnp.cos(y))[0]
    for a, b in zip(*results.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# --- The kernels for GPUs -----------------------------------------------------------------------


def arguments(dtype, *, channels=20, levels=4):
    """Maps, boxes of two images and their strides."""
    rng = np.random.default_rng(0)
    maps = tuple(
        jnp.asarray(rng.standard_normal((2, *shape, channels)), dtype) for shape in SHAPES[:levels]
    )
    other = random_boxes(rng, len(REGIONS), size=150)
    boxes = jnp.asarray([list(REGIONS.values()), other], jnp.float32)
    return maps, boxes, STRIDES[:levels]


def value_and_gradients(f, maps, boxes, strides, bins):
    """The result and the gradients of the maps."""

    @jax.jit
    def run(maps, boxes):
        y, vjp = jax.vjp(lambda maps: f(maps, boxes, strides=strides, bins=bins), maps)
        # Numbers that bfloat16 has, so that each dtype gets the same.
        dy = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(jnp.bfloat16).astype(y.dtype)
        return y, *vjp(dy)[0]

    return run(maps, boxes)


def in_float64(maps, boxes, strides, bins):
    with jax.enable_x64(True):
        maps, boxes = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (maps, boxes))
        found = value_and_gradients(xla.roi_align, maps, boxes, strides, bins)
        return [np.asarray(x) for x in found]


def interpreted(*args, **options):
    return rows.pallas(OPERATION).roi_align(*args, **options)


def test_the_examples_are_on_every_level():
    _, boxes, _ = arguments(jnp.float32)
    assert set(np.asarray(sampling.region_levels(boxes, 4)).ravel()) == {0, 1, 2, 3}


# Positions of up to 38 cells are rounded by 2e-6 each time: measured up to 1.5e-6.
@pytest.mark.parametrize(("bins", "levels"), [(7, 4), (14, 2)])
def test_pallas_float32(bins, levels, poisoned_tails):
    args = *arguments(jnp.float32, levels=levels), bins
    found, again = (value_and_gradients(interpreted, *args) for _ in range(2))
    for a, b, expected in zip(found, again, in_float64(*args), strict=True):
        assert np.linalg.norm(a - expected) < 3e-6 * np.linalg.norm(expected)
        np.testing.assert_allclose(a, expected, atol=5e-5)  # of each region
        np.testing.assert_array_equal(a, b)  # bit for bit


def test_pallas_bfloat16_rounds_once(poisoned_tails):
    """All that differs from float64 is the rounding of the result, half a unit of eight bits."""
    args = *arguments(jnp.bfloat16, levels=2), 7
    found = value_and_gradients(interpreted, *args)
    for a, expected in zip(found, in_float64(*args), strict=True):
        assert a.dtype == jnp.bfloat16
        difference = np.abs(np.asarray(a, np.float64) - expected)
        assert (difference <= 2**-8 * np.abs(expected) + 5e-5).all()


def test_pallas_in_several_parts(poisoned_tails, monkeypatch):
    """Regions and channels of more than one step."""
    module = rows.pallas(OPERATION)
    monkeypatch.setattr(module, "REGIONS", 4)
    monkeypatch.setattr(module, "CHANNELS", 16)
    args = *arguments(jnp.float32, levels=2), 3
    found = value_and_gradients(interpreted, *args)
    for a, expected in zip(found, in_float64(*args), strict=True):
        np.testing.assert_allclose(a, expected, atol=5e-5)


def test_a_box_of_nan_has_no_features():
    maps, boxes, strides = arguments(jnp.float32, levels=2)
    boxes = boxes.at[0, 2, 1].set(jnp.nan)
    features = interpreted(maps, boxes, strides=strides, bins=2)
    nan = np.isnan(features).all((2, 3, 4))
    assert nan[0, 2]
    assert np.isnan(features).sum() == features[0, 2].size


def test_what_the_kernel_cannot_do():
    supports = rows.pallas(OPERATION).supports
    maps, boxes, strides = arguments(jnp.float32)
    reason = functools.partial(supports, strides=strides)
    assert reason(maps, boxes, bins=7) is None
    assert "17 bins" in reason(maps, boxes, bins=17)
    assert "int8" in reason([x.astype(jnp.int8) for x in maps], boxes, bins=7)
    many = jax.ShapeDtypeStruct((2, 2**17, 4), jnp.float32)
    wide = [jax.ShapeDtypeStruct((*x.shape[:3], 256), jnp.bfloat16) for x in maps]
    assert "elements" in reason(wide, many, bins=14)


def test_unknown_implementation():
    maps, boxes, strides = arguments(jnp.float32)
    with pytest.raises(UserError, match="unknown implementation 'palas'"):
        roi_align(maps, boxes, strides=strides, bins=7, implementation="palas")


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize(("bins", "channels"), [(7, 256), (14, 256), (7, 20), (16, 96)])
def test_gpu(bins, channels, implementation):
    args = *arguments(jnp.float32, channels=channels), bins
    f = functools.partial(roi_align, implementation=implementation)
    found, again = (value_and_gradients(f, *args) for _ in range(2))
    for a, b, expected in zip(found, again, in_float64(*args), strict=True):
        np.testing.assert_allclose(a, expected, atol=5e-5)
        np.testing.assert_array_equal(a, b)
