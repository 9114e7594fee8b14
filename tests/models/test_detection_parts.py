"""The parts of the detector against plain loops in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssd_jax.models.detection import boxes as box_ops
from vssd_jax.models.detection.anchors import anchors_on_image, grid_anchors
from vssd_jax.models.detection.assigner import IGNORED, NEGATIVE, assign
from vssd_jax.models.detection.masks import mask_targets, paste_masks
from vssd_jax.models.detection.nms import nms
from vssd_jax.models.detection.roi_align import pyramid_roi_align, region_levels, roi_align
from vssd_jax.models.detection.sampler import sample

CASES = 200


def random_boxes(rng, count, size=40.0):
    """Boxes of all kinds: usual, empty, one pixel, outside, slivers, and copies of others."""
    centre, half = rng.uniform(-5, size + 5, (count, 2)), rng.uniform(0, size / 3, (count, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1)
    kind = rng.integers(0, 10, count)
    boxes[kind == 0, 2:] = boxes[kind == 0, :2]
    boxes[kind == 1, :2] = np.floor(boxes[kind == 1, :2])
    boxes[kind == 1, 2:] = boxes[kind == 1, :2] + 1
    boxes[kind == 2] += 3 * size
    boxes[kind == 3, 2] = boxes[kind == 3, 0] + 0.01
    boxes[kind == 4] = np.round(boxes[kind == 4])
    boxes[kind == 5, 2:] = boxes[kind == 5, :2] - 1  # inside out
    for i in np.flatnonzero(kind == 6):
        boxes[i] = boxes[rng.integers(count)]
    return boxes.astype(np.float32)


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


def reference_roi_align(features, box, bins, scale):
    """mmcv's definition, sample by sample, in float32 coordinates."""
    height, width, channels = features.shape
    f = np.float32
    x1, y1, x2, y2 = (f(v) * f(scale) - f(0.5) for v in box)
    bin_h, bin_w = (y2 - y1) / f(bins), (x2 - x1) / f(bins)
    count_y, count_x = max(math.ceil(bin_h), 0), max(math.ceil(bin_w), 0)
    result = np.zeros((bins, bins, channels))
    for p in range(bins):
        for q in range(bins):
            for i in range(count_y):
                y = y1 + f(p) * bin_h + f(i + 0.5) * bin_h / f(count_y)
                for j in range(count_x):
                    x = x1 + f(q) * bin_w + f(j + 0.5) * bin_w / f(count_x)
                    if y < -1 or y > height or x < -1 or x > width:
                        continue
                    yc, xc = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    y0, x0 = int(yc), int(xc)
                    ya, xa = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    ly, lx = yc - y0, xc - x0
                    result[p, q] += (1 - ly) * (
                        (1 - lx) * features[y0, x0] + lx * features[y0, xa]
                    ) + ly * ((1 - lx) * features[ya, x0] + lx * features[ya, xa])
    return result / max(count_y * count_x, 1)


@pytest.mark.parametrize("bins", [2, 7])
def test_roi_align_equals_the_loop(bins):
    count, size = CASES // 2, (10, 13)
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
    level = np.asarray(region_levels(boxes, 4))
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
    align = functools.partial(roi_align, boxes=boxes, bins=3, scale=0.25)
    value, pull = jax.vjp(align, features)
    (gradient,) = pull(cotangent)
    # The map is linear: <y, A x> = <A^T y, x>.
    np.testing.assert_allclose((value * cotangent).sum(), (gradient * features).sum(), rtol=1e-4)
    box_gradient = jax.grad(lambda b: roi_align(features, b, 3, 0.25).sum())(boxes)
    np.testing.assert_array_equal(box_gradient, 0)


def test_region_levels():
    sides = np.array([0, 10, 111, 113, 223, 225, 447, 449, 5000], np.float32)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    np.testing.assert_array_equal(region_levels(boxes, 4), [0, 0, 0, 1, 1, 2, 2, 3, 3])


def test_deltas_round_trip_and_clip():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (2, 20, 2))
    sizes = rng.uniform(5, 40, (2, 20, 2))
    a, b = np.concatenate([corners, corners + sizes], axis=-1).astype(np.float32)
    stds = (0.1, 0.1, 0.2, 0.2)
    deltas = box_ops.encode(a, b, stds)
    np.testing.assert_allclose(box_ops.decode(a, deltas, stds=stds), b, atol=1e-4)
    clipped = box_ops.decode(a, deltas, jnp.array([20, 30]), stds)
    np.testing.assert_allclose(clipped, np.clip(b, 0, [30, 20, 30, 20]), atol=1e-4)
    # A width or height changes by no more than a factor of 1000 / 16.
    wide = box_ops.decode(jnp.array([0, 0, 1, 1.0]), jnp.array([0, 0, 9, -9.0]))
    np.testing.assert_allclose(wide[2:] - wide[:2], [62.5, 0.016], rtol=1e-4)


def test_anchors():
    anchors = grid_anchors((2, 3), 8, scale=4, ratios=(0.25, 1.0)).reshape(2, 3, 2, 4)
    np.testing.assert_array_equal(anchors[0, 0], [[-32, -8, 32, 8], [-16, -16, 16, 16]])
    np.testing.assert_array_equal(anchors[1, 2] - anchors[0, 0], [[16, 8, 16, 8]] * 2)
    # An image of 33 x 20 pixels counts as 64 x 32: 8 x 4 cells of 8 pixels.
    inside = anchors_on_image((10, 6), 8, 2, jnp.array([33, 20])).reshape(10, 6, 2)
    np.testing.assert_array_equal(inside.sum((0, 1)), [32, 32])
    assert inside[7, 3].all()


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


def test_sampling():
    assigned = np.array([3] * 10 + [NEGATIVE] * 50 + [IGNORED] * 40)
    run = jax.jit(sample, static_argnums=(2, 3))
    seen = set()
    for seed in range(20):
        index, used = (np.asarray(x) for x in run(jax.random.key(seed), assigned, 16, 0.25))
        chosen = assigned[index]
        assert used.all()
        assert len(set(index)) == 16
        np.testing.assert_array_equal(chosen, [3] * 4 + [NEGATIVE] * 12)
        seen |= set(index.tolist())
    assert seen >= set(range(10))
    # Too few positives are filled up; too few boxes leave places unused.
    index, used = run(jax.random.key(0), assigned[8:], 16, 0.25)
    np.testing.assert_array_equal(assigned[8:][index], [3] * 2 + [NEGATIVE] * 14)
    index, used = run(jax.random.key(0), assigned[57:], 16, 0.25)
    np.testing.assert_array_equal(used, [True] * 3 + [False] * 13)


def test_mask_targets_and_pasting_are_inverse():
    masks = np.zeros((2, 40, 48), bool)
    masks[0, 5:25, 10:30] = True
    y, x = np.mgrid[:40, :48]
    masks[1] = (y - 20) ** 2 + (x - 24) ** 2 < 200
    packed = np.packbits(masks, axis=-1)
    boxes = np.array([[10, 5, 30, 25], [8, 4, 40, 36], [0, 0, 48, 40]], np.float32)
    targets = np.asarray(jax.jit(mask_targets)(packed, boxes, np.array([0, 1, 1])))
    assert targets[0].all()
    pasted = paste_masks(targets.astype(np.float32), boxes, (40, 48))
    for found, mask in zip(pasted, masks[[0, 1, 1]], strict=True):
        assert (found & mask).sum() / (found | mask).sum() > 0.93
    for value, box, mask in zip(targets, boxes, masks[[0, 1, 1]], strict=True):
        expected = reference_roi_align(np.float32(mask)[..., None], box, 28, 1.0)[..., 0]
        np.testing.assert_array_equal(value, expected >= 0.5)


def test_pasting_boxes_that_are_empty_or_outside():
    boxes = np.array([[5, 5, 5, 9], [-20, -20, -5, -5], [30, 30, 60, 60]], np.float32)
    masks = paste_masks(np.ones((3, 28, 28)), boxes, (20, 24))
    assert masks.shape == (3, 20, 24)
    assert not masks[1:].any()
    assert paste_masks(np.ones((0, 28, 28)), boxes[:0], (20, 24)).shape == (0, 20, 24)
