"""From masks of images to those of boxes and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.detection.references import reference_roi_align
from vssd_jax.data.coco_masks import pack, part_of
from vssd_jax.models.detection.masks import PackedMasks, mask_targets, paste_masks, unpack_mask


def packed_masks(packed):
    return PackedMasks(*(jnp.asarray(packed[f]) for f in ("masks", "mask_starts", "mask_boxes")))


def test_mask_targets_and_pasting_are_inverse():
    masks = np.zeros((2, 40, 48), bool)
    masks[0, 5:25, 10:30] = True
    y, x = np.mgrid[:40, :48]
    masks[1] = (y - 20) ** 2 + (x - 24) ** 2 < 200
    rows, columns = np.arange(40), np.arange(48)
    parts = [part_of(np.uint8(mask), rows, columns) for mask in masks]
    packed = packed_masks(pack(parts, 8 * 40 * 48 // 8, 3))
    boxes = np.array([[10, 5, 30, 25], [8, 4, 40, 36], [0, 0, 48, 40]], np.float32)
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(unpack_mask(packed, jnp.int32(i), (40, 48)), mask)
    cut = functools.partial(mask_targets, image_size=(40, 48))
    targets = np.asarray(jax.jit(cut)(packed, boxes, np.array([0, 1, 1])))
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
