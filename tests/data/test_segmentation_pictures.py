"""Predictions as files: label maps that read back, overlays and legends."""

import numpy as np
from PIL import Image

from vssd_jax.data import segmentation_pictures
from vssd_jax.data.datasets import ade20k


def test_saved_predictions_read_back_as_annotations(tmp_path):
    labels = np.zeros((30, 40), np.int32)
    labels[10:, 5:] = 2
    image = np.full((30, 40, 3), 128, np.uint8)
    names = ["sky", "sea", "chest of drawers", "flag"]
    segmentation_pictures.save_prediction(tmp_path, "a", image, labels, names)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["labels/a.png", "overlays/a.png"]
    np.testing.assert_array_equal(
        ade20k.read_labels(tmp_path / "labels" / "a.png", len(names)), labels
    )
    with Image.open(tmp_path / "overlays" / "a.png") as picture:
        overlay = np.array(picture).astype(int)
    colors = segmentation_pictures.class_colors(4).astype(int)
    assert np.abs(overlay[20, 20] - (0.45 * 128 + 0.55 * colors[2])).max() <= 1
    assert np.abs(overlay[0, 0] - (0.45 * 128 + 0.55 * colors[0])).max() <= 1
    legend = overlay[30:].reshape(-1, 3).tolist()
    present = [colors[i].tolist() in legend for i in range(4)]
    assert present == [True, False, True, False]


def test_colors_differ():
    assert len({tuple(color) for color in segmentation_pictures.class_colors(150)}) == 150
