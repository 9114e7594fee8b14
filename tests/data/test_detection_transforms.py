"""Pictures, boxes and masks that are resized, cropped and mirrored together."""

import copy
import functools

import cv2
import numpy as np
import pytest

from tests.data.coco_files import SIZE, annotation, rectangle, rle, write
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import eval_transform, input_shape, train_transform
from vssd_jax.data.geometry import Geometry, draw_geometry


def scene(tmp_path):
    """An element whose box is the extent of its mask."""
    objects = [annotation(1, segmentation=rle(rectangle(8, 10, 24, 30)))]
    return DecodedSource(CocoSource(*write(tmp_path, objects)))


def planned(element, shape, seed=0, **options):
    """The element with a geometry, and the transform for it."""
    draw = functools.partial(draw_geometry, **options)
    size = np.array([element["image"].shape[:2]])
    geometry = draw(size, np.random.default_rng(seed)).row(0)
    return element | {"geometry": geometry, "shape": shape}, draw


def unpacked(result):
    """(M, H, W) masks in the whole image."""
    height, width = result["image"].shape[:2]
    masks = np.zeros((len(result["valid"]), height, width), np.uint8)
    for mask, start, (x1, y1, x2, y2) in zip(
        masks, result["mask_starts"], result["mask_boxes"], strict=True
    ):
        row = -(-(x2 - x1) // 8)
        rows = result["masks"][start : start + row * (y2 - y1)].reshape(y2 - y1, row)
        mask[y1:y2, x1:x2] = np.unpackbits(rows, axis=-1)[:, : x2 - x1]
    return masks


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_masks_stay_together(tmp_path, flip):
    element, draw = planned(
        scene(tmp_path)[0], (104, 136), short_sides=(96,), long_side=1000, flip=flip
    )
    result = train_transform(element, np.random.default_rng(0), draw=draw, max_objects=3)
    assert result["image"].shape == (104, 136, 3)
    assert result["image"].dtype == np.uint8
    np.testing.assert_array_equal(result["image_shape"], [96, 128])
    np.testing.assert_array_equal(result["valid"], [True, False, False])
    np.testing.assert_array_equal(result["has_mask"], [True, False, False])
    expected = [2 * (64 - 30), 16, 2 * (64 - 10), 48] if flip else [20, 16, 60, 48]
    np.testing.assert_allclose(result["boxes"][0], expected)
    mask = unpacked(result)[0]
    x1, y1, x2, y2 = expected
    assert mask[y1:y2, x1:x2].all()
    assert mask.sum() == (y2 - y1) * (x2 - x1)
    assert result["masks"].shape == (104 * 136,)
    assert result["masks_left_out"] == 0
    assert not result["image"][96:].any()
    assert result["image"][:96, :128].std() > 40


def whole_masks(masks, geometry, shape):
    """Whole masks through every step, one after the other."""
    def resize(mask, size):
        return cv2.resize(mask, tuple(map(int, size[::-1])), interpolation=cv2.INTER_NEAREST)

    top, left, height, width = geometry.window
    result = np.zeros((len(masks), *shape), np.uint8)
    for out, mask in zip(result, masks, strict=True):
        cut = resize(mask, geometry.first)[top : top + height, left : left + width]
        end = resize(cut, geometry.size)
        out[: end.shape[0], : end.shape[1]] = end[:, ::-1] if geometry.flip else end
    return result


def test_masks_are_those_that_whole_masks_would_become():
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(30):
        size = tuple(rng.integers(40, 200, 2).tolist())
        noise = cv2.GaussianBlur(rng.random((3, *size)).transpose(1, 2, 0), (0, 0), 6)
        masks = np.uint8(noise > np.quantile(noise, 0.8)).transpose(2, 0, 1)
        rects = [cv2.boundingRect(mask) for mask in masks]
        element = {
            "image": np.zeros((*size, 3), np.uint8), "replaced": 0,
            "boxes": np.array([(x, y, x + w, y + h) for x, y, w, h in rects], np.float32),
            "labels": np.arange(3), "segmentations": [rle(mask) for mask in masks],
        }  # fmt: skip
        options = {"short_sides": (90, 120, 150), "long_side": 320, "crop": True}
        element, draw = planned(element, (320, 320), seed, **options)
        result = train_transform(element, rng, draw=draw, max_objects=4)
        kept = result["labels"][result["valid"]]
        expected = whole_masks(masks[kept], element["geometry"], (320, 320))
        np.testing.assert_array_equal(unpacked(result)[: len(kept)], expected)
        for box, mask in zip(result["boxes"], expected, strict=False):
            x, y, w, h = cv2.boundingRect(mask)
            np.testing.assert_allclose(box, [x, y, x + w, y + h], atol=4)
        compared += len(kept)
    assert compared > 60


def test_masks_that_do_not_fit_are_counted():
    image = np.zeros((64, 64, 3), np.uint8)
    everything = rle(np.ones((64, 64), np.uint8))
    element = {
        "image": image, "boxes": np.array([[0, 0, 64, 64]] * 12, np.float32), "replaced": 0,
        "labels": np.zeros(12, np.int32), "segmentations": [everything] * 9 + [None] * 3,
    }  # fmt: skip
    element, draw = planned(element, (64, 64), short_sides=(64,))
    result = train_transform(element, np.random.default_rng(0), draw=draw)
    assert result["valid"].sum() == 12
    assert result["has_mask"].sum() == 8
    assert result["masks_left_out"] == 1
    assert unpacked(result)[:8].all()


def test_what_exceeds_the_shape_is_scaled_down(tmp_path):
    element, draw = planned(scene(tmp_path)[0], (136, 104), short_sides=(96,), flip=0.0)
    result = train_transform(element, np.random.default_rng(0), draw=draw, max_objects=1)
    np.testing.assert_array_equal(result["image_shape"], [78, 104])
    assert result["image"].shape == (136, 104, 3)
    np.testing.assert_allclose(result["boxes"][0], np.array([10, 8, 30, 24]) * 104 / 64, atol=0.1)


def test_a_picture_in_the_place_of_another_has_a_geometry_of_its_own(tmp_path):
    element, draw = planned(scene(tmp_path)[0], (96, 128), short_sides=(96,), flip=0.0)
    other = np.array([30, 20])
    element["geometry"] = Geometry(other, other, np.array([0, 0, 30, 20]), 3 * other, np.False_)
    result = train_transform(element, np.random.default_rng(0), draw=draw, max_objects=1)
    np.testing.assert_array_equal(result["image_shape"], [96, 128])
    np.testing.assert_allclose(result["boxes"][0], [20, 16, 60, 48])


def test_equal_generators_make_equal_samples(tmp_path):
    options = {"short_sides": (64, 96), "crop": True}
    element, draw = planned(scene(tmp_path)[0], (96, 128), **options)
    before = copy.deepcopy(element)
    a, b = (
        train_transform(element, np.random.default_rng(5), draw=draw, max_objects=2)
        for _ in range(2)
    )
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
    np.testing.assert_array_equal(element["boxes"], before["boxes"])


def test_evaluation_pads_to_a_shape_or_to_32(tmp_path):
    element = scene(tmp_path)[0]
    result = eval_transform(element)
    np.testing.assert_array_equal(result["image_shape"], [800, 1067])
    assert result["image"].shape == (800, 1344, 3)
    np.testing.assert_array_equal(result["original_shape"], SIZE)
    assert result["index"] == 0
    assert eval_transform(element, shapes=None)["image"].shape == (800, 1088, 3)
    of_a_portrait = eval_transform({**element, "like": (30, 20)})
    assert of_a_portrait["image"].shape == (1344, 800, 3)
    np.testing.assert_array_equal(of_a_portrait["image_shape"], [600, 800])
    stands_in = eval_transform({**element, "like": (30, 20)}, shapes=None)
    assert stands_in["image"].shape == (1216, 800, 3)
    options = {"short_side": 800, "long_side": 1333}
    shapes = ((1344, 800), (800, 1344), (800, 1088))
    for size, expected in (
        ((640, 480), (1344, 800)), ((480, 640), (800, 1088)), ((427, 640), (800, 1344)),
    ):  # fmt: skip
        assert input_shape(size, **options, shapes=shapes) == expected
