"""Predictions as files: label maps that read back, and overlays."""

import numpy as np
from PIL import Image

from vssd_jax.data import drawing, segmentation_pictures
from vssd_jax.data.label_maps import read_labels


def test_saved_predictions_read_back_as_annotations(tmp_path):
    labels = np.zeros((30, 40), np.int32)
    labels[10:, 5:] = 2
    image = np.full((30, 40, 3), 128, np.uint8)
    names = ["sky", "sea", "chest of drawers", "flag"]
    segmentation_pictures.save_prediction(tmp_path, "a", image, labels, names)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["labels/a.png", "overlays/a.png"]
    np.testing.assert_array_equal(read_labels(tmp_path / "labels" / "a.png"), labels + 1)
    segmentation_pictures.save_prediction(
        tmp_path / "zero", "a", None, labels, names, reduce_zero_label=False
    )
    np.testing.assert_array_equal(read_labels(tmp_path / "zero" / "labels" / "a.png"), labels)
    assert not (tmp_path / "zero" / "overlays").exists()
    with Image.open(tmp_path / "overlays" / "a.png") as picture:
        expected = drawing.draw_segmentation(image, labels, names)
        np.testing.assert_array_equal(np.array(picture), np.array(expected))
