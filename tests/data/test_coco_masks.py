"""Run lengths against pycocotools."""

import numpy as np

from tests.data.coco_files import rle
from vssd_jax.data.coco_json import read_segmentation
from vssd_jax.data.coco_masks import rasterise


def test_run_lengths_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = tuple(rng.integers(1, 80, 2))
        mask = rng.random(shape) < rng.choice([0, 0.01, 0.5, 1])
        read_segmentation(rle(mask), shape)
        read_segmentation(rle(mask, compressed=False), shape)
        np.testing.assert_array_equal(rasterise(rle(mask), shape), mask)
