"""The training transform of segmentation against the same steps, each in plain OpenCV."""

import numpy as np

from benchmarks import segmentation_pipeline
from vssd_jax.data.segmentation_transforms import photometric_distortion


def test_pixels_and_labels_are_those_of_the_plain_pipeline(tmp_path):
    segmentation_pipeline.write_pictures(tmp_path, 12)
    functions = segmentation_pipeline.pipelines(tmp_path)
    segmentation_pipeline.check_agreement(functions, 12)


def test_colours_are_those_of_the_plain_pipeline():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for seed in range(200):
        one, other = (
            distortion(image, np.random.default_rng(seed))
            for distortion in (segmentation_pipeline.plain_distortion, photometric_distortion)
        )
        np.testing.assert_array_equal(one, other)
