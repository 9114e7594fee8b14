"""Pictures, boxes and masks that are resized, cropped and mirrored together."""

import copy

import numpy as np
import pytest

from tests.data.coco_files import SIZE, annotation, rectangle, rle, write
from vssd_jax.data.datasets.coco import CocoSource
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.detection_transforms import eval_transform, padded_shape, train_transform


def scene(tmp_path):
    """An element whose box is the extent of its mask."""
    objects = [annotation(1, segmentation=rle(rectangle(8, 10, 24, 30)))]
    return DecodedSource(CocoSource(*write(tmp_path, objects)))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_and_masks_stay_together(tmp_path, flip):
    element = scene(tmp_path)[0]
    result = train_transform(
        element, np.random.default_rng(0), short_sides=(96,), long_side=1000,
        shapes=((104, 136), (136, 104)), max_objects=3, flip=flip,
    )  # fmt: skip
    assert result["image"].shape == (104, 136, 3)
    np.testing.assert_array_equal(result["image_shape"], [96, 128])
    np.testing.assert_array_equal(result["valid"], [True, False, False])
    expected = [2 * (64 - 30), 16, 2 * (64 - 10), 48] if flip else [20, 16, 60, 48]
    np.testing.assert_allclose(result["boxes"][0], expected)
    mask = np.unpackbits(result["masks"][0], axis=-1)
    x1, y1, x2, y2 = expected
    assert mask[y1:y2, x1:x2].all()
    assert mask.sum() == (y2 - y1) * (x2 - x1)
    assert not result["image"][96:].any()
    assert result["image"][:96, :128].std() > 0.5


def test_the_long_schedule_crops_and_keeps_to_the_shape(tmp_path):
    element = scene(tmp_path)[0]
    shapes, sizes, objects = ((800, 1344), (1344, 800)), set(), 0
    for seed in range(8):
        result = train_transform(
            element, np.random.default_rng(seed), short_sides=tuple(range(480, 801, 32)),
            crop=True, shapes=shapes, max_objects=2,
        )  # fmt: skip
        assert result["image"].shape == (800, 1344, 3)
        height, width = result["image_shape"]
        assert height <= 800
        assert width <= 1333
        sizes.add((int(height), int(width)))
        objects += int(result["valid"].sum())
        for box, packed in zip(
            result["boxes"][result["valid"]], result["masks"][result["valid"]], strict=True
        ):
            ys, xs = np.nonzero(np.unpackbits(packed, axis=-1))
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(box, extent, atol=2)
    assert len(sizes) > 4
    assert objects >= 4


def test_a_panorama_is_shrunk_before_its_crop():
    """The first resize bounds the long side, too: 3000 x 300 pixels become 1333 x 133."""
    image = np.zeros((300, 3000, 3), np.uint8)
    image[:, 1500:] = 255
    element = {
        "image": image, "boxes": np.array([[1000, 0, 2000, 300]], np.float32),
        "labels": np.zeros(1, np.int32), "segmentations": [None], "replaced": False,
    }  # fmt: skip
    heights = set()
    for seed in range(20):
        result = train_transform(
            element, np.random.default_rng(seed), short_sides=(800,), crop=True, max_objects=1
        )
        height, width = result["image_shape"].tolist()
        # Uncropped it is 10 times as wide as high; a crop is of all rows and 384 to 600 columns.
        heights.add(round(width / height, 1))
    assert 10.0 in heights
    assert all(ratio == 10 or 384 / 134 < ratio < 600 / 132 for ratio in heights)
    assert len(heights) > 4


def test_equal_generators_make_equal_samples(tmp_path):
    element = scene(tmp_path)[0]
    options = {"short_sides": (64, 96), "shapes": ((96, 128),), "max_objects": 2, "crop": True}
    before = copy.deepcopy(element)
    a, b = (train_transform(element, np.random.default_rng(5), **options) for _ in range(2))
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
    portrait = ((1344, 800), (800, 1344))
    assert padded_shape((640, 480), portrait) == (1344, 800)
    assert padded_shape((480, 640), portrait) == (800, 1344)
