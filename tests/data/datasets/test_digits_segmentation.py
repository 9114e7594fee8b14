"""Scenes of digits in ADE20K's layout."""

import numpy as np
import pytest

from vssd_jax.data.datasets import digits_segmentation
from vssd_jax.data.label_maps import open_folders
from vssd_jax.errors import UserError


def test_digit_scenes(tmp_path):
    sizes = {"training": 3, "validation": 2}
    digits_segmentation.write(tmp_path / "a", sizes=sizes)
    digits_segmentation.write(tmp_path / "b", sizes=sizes)
    with pytest.raises(UserError, match="exists"):
        digits_segmentation.write(tmp_path / "a", sizes=sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    present = set()
    for split, count in sizes.items():
        a, b = (
            open_folders(
                tmp_path / name / "images" / split,
                tmp_path / name / "annotations" / split,
                class_names=digits_segmentation.CLASSES,
                reduce_zero_label=True,
            )
            for name in "ab"
        )
        assert len(a) == count
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x["image"], y["image"])
            np.testing.assert_array_equal(x["label"], y["label"])
            present |= set(np.unique(x["label"]).tolist())
    assert 0 in present
    assert max(present) < len(digits_segmentation.CLASSES)
    assert len(present) > 3


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits_segmentation.Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        digits_segmentation.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []
