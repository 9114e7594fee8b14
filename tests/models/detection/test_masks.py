"""From masks of images to those of boxes and back."""

import jax
import numpy as np

from tests.models.detection.references import reference_roi_align
from vssd_jax.models.detection.masks import mask_targets, paste_masks


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
