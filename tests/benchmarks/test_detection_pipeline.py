"""The training transform of detection against the same steps, each in plain OpenCV."""

import numpy as np
import pytest

from benchmarks import detection_pipeline, padding


def test_pixels_and_masks_are_those_of_the_plain_pipeline(tmp_path):
    detection_pipeline.write_dataset(tmp_path, 8)
    functions = detection_pipeline.pipelines(tmp_path)
    detection_pipeline.check_agreement(functions, 8)
    for name in ("vssd_jax", "vssd_jax, 3x"):
        example = functions[name](0, np.random.default_rng(0))
        assert sum(array.nbytes for array in example.values()) <= 5_000_000


@pytest.mark.parametrize(("schedule", "most"), [("1x", 0.15), ("3x", 0.27)])
def test_padding_of_the_recipes(schedule, most):
    config = padding.config_of(f"mask_rcnn:tiny,{schedule}")
    sizes = padding.coco_sizes(20_000)
    result = padding.of_a_config(config, config.padded_shapes, sizes)
    assert result["shapes"] <= 6
    assert result["padding"] < most
    assert result["scaled_down"] < 0.002
