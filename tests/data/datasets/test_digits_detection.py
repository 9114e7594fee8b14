"""Scenes of digits in COCO's format."""

import json

import numpy as np

from vssd_jax.data.coco_masks import rasterise
from vssd_jax.data.datasets import digits_detection
from vssd_jax.data.datasets.coco import CocoSource


def test_the_dataset_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        try:
            digits_detection.prepare(tmp_path, train=1, test=1)
        except KeyboardInterrupt:
            assert not list(tmp_path.iterdir())
        else:
            raise AssertionError
    folder = digits_detection.prepare(tmp_path, train=1, test=1)
    assert list(tmp_path.iterdir()) == [folder]
    before = (folder / "train/000000.png").stat().st_mtime_ns
    assert digits_detection.prepare(tmp_path, train=1, test=1) == folder
    assert (folder / "train/000000.png").stat().st_mtime_ns == before
    source = CocoSource(folder / "train", folder / "annotations/instances_train.json")
    assert not source.problems
    element = source[0]
    for box, code in zip(element["boxes"], element["segmentations"], strict=True):
        ys, xs = np.nonzero(rasterise(code, element["size"]))
        np.testing.assert_array_equal(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
