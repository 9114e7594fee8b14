"""Loss, predictions and mIoU against plain NumPy and PyTorch."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.conftest import flags_for
from vssd_jax import UserError
from vssd_jax.tasks import segmentation_metrics as metrics

CLASSES = 7


def plain_confusion(predictions, labels, num_classes=CLASSES):
    matrix = np.zeros((num_classes, num_classes + 1), np.int64)
    for row, column in zip(labels.ravel(), predictions.ravel(), strict=True):
        if row != 255:
            matrix[row, column] += 1
    return matrix


def random_labels(shape, seed=0, ignored=0.2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, shape)  # the last class is never labelled
    labels = np.where(rng.random(shape) < ignored, 255, labels).astype(np.uint8)
    predictions = np.where(rng.random(shape) < 0.5, labels, rng.integers(0, CLASSES, shape))
    predictions = np.where(predictions == 255, 0, predictions)
    return predictions, labels


def test_metrics_of_padded_batches_match_numpy():
    predictions, labels = random_labels((5, 13, 17))
    expected = plain_confusion(predictions, labels)
    pad = ((0, 1), (0, 3), (0, 15))  # a whole picture, rows and columns
    predictions = np.pad(predictions, pad, constant_values=3)
    labels = np.pad(labels, pad, constant_values=255)
    count = jax.jit(metrics.confusion_matrix, static_argnums=2)
    total = sum(
        np.asarray(count(predictions[i : i + 2], labels[i : i + 2], CLASSES), np.int64)
        for i in range(0, 6, 2)
    )
    np.testing.assert_array_equal(total, expected)

    hits = np.diag(expected)
    iou, accuracy = [], []
    for k in range(CLASSES):
        union = expected[k].sum() + expected[:, k].sum() - hits[k]
        iou.append(hits[k] / union)
        if expected[k].sum():
            accuracy.append(hits[k] / expected[k].sum())
    assert len(accuracy) == CLASSES - 1
    got = metrics.summarize_confusion(total)
    assert got["miou"] == pytest.approx(np.mean(iou), rel=1e-12)
    assert got["mean_accuracy"] == pytest.approx(np.mean(accuracy), rel=1e-12)
    assert got["pixel_accuracy"] == pytest.approx(hits.sum() / expected.sum(), rel=1e-12)


def test_a_class_neither_labelled_nor_predicted_is_left_out():
    matrix = np.zeros((3, 3), np.int64)
    matrix[0] = [6, 2, 0]
    matrix[1] = [0, 4, 0]
    assert metrics.summarize_confusion(matrix)["miou"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    table = metrics.format_per_class(matrix, ["cat", "dog", "bird"]).splitlines()
    assert table[1].split() == ["cat", "75.00", "75.00", "66.67"]
    assert table[3].split() == ["bird", "-", "-", "0.00"]
    with pytest.raises(UserError, match="ignored"):
        metrics.summarize_confusion(np.zeros((3, 3)))


def test_confusion_over_eight_devices():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    env = {**os.environ, "XLA_FLAGS": flags_for(8)}
    env["JAX_PLATFORMS"] = "cpu"
    result = subprocess.run(
        [sys.executable, "-m", "tests.tasks.test_segmentation_metrics"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def _eight_devices():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    predictions, labels = random_labels((16, 11, 9))
    labels[13:] = 255  # padding
    count = jax.jit(lambda a, b: metrics.confusion_matrix(a, b, CLASSES), out_shardings=whole)
    got = count(jax.device_put(predictions, split), jax.device_put(labels, split))
    np.testing.assert_array_equal(got, plain_confusion(predictions, labels))


def test_equal_scores_and_such_that_are_not_finite_are_no_class():
    logits = np.zeros((2, 2, 3, CLASSES), np.float32)  # equal in most places
    logits[0, 0, 0, 2] = 1
    logits[0, 0, 2, [1, 3]] = 1
    logits[1, 1, 1] = np.nan
    logits[1, :, :, 2] = 1
    views, sizes = [(jnp.asarray(logits), (2, 3))], jnp.array([[2, 3], [2, 3]])
    predicted = np.asarray(metrics.predict_labels(views, sizes, (2, 3)))
    assert predicted[0].tolist() == [[2, 255, 255], [255, 255, 255]]
    assert predicted[1, 1, 1] == 255
    labels = np.full((1, 2, 3), 2)
    confusion = np.asarray(metrics.confusion_matrix(predicted[:1], labels, CLASSES))
    assert confusion[2, 2] == 1
    assert confusion[2, -1] == 5
    for number in ("pixel_accuracy", "miou"):
        assert metrics.summarize_confusion(confusion)[number] == pytest.approx(1 / 6)


def test_loss_is_mmsegmentations():
    rng = np.random.default_rng(0)
    logits = [
        rng.standard_normal((2, *size, CLASSES)).astype(np.float32) for size in ((8, 10), (2, 3))
    ]
    labels = random_labels((2, 31, 37))[1]
    parts = []
    for x in logits:
        x = torch.nn.functional.interpolate(
            torch.tensor(x).permute(0, 3, 1, 2), size=(31, 37), mode="bilinear"
        )
        target = torch.tensor(labels.astype(np.int64))
        losses = torch.nn.functional.cross_entropy(x, target, ignore_index=255, reduction="none")
        parts.append(float(losses.mean()))
    loss, got = metrics.segmentation_loss(tuple(map(jnp.asarray, logits)), jnp.asarray(labels))
    assert float(loss) == pytest.approx(parts[0] + 0.4 * parts[1], rel=1e-5)
    assert float(got["decode"]) == pytest.approx(parts[0], rel=1e-5)
    assert float(got["auxiliary"]) == pytest.approx(parts[1], rel=1e-5)


def test_weights_of_classes_are_torchs():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 9, 7, CLASSES)).astype(np.float32)
    weights = rng.uniform(0.2, 5, CLASSES).astype(np.float32)
    labels = random_labels((2, 9, 7))[1]
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).permute(0, 3, 1, 2),
        torch.tensor(labels.astype(np.int64)),
        weight=torch.tensor(weights), ignore_index=255, reduction="none",
    ).mean()  # fmt: skip
    got = metrics.pixel_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), weights)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_multi_scale_is_the_mean_of_separate_softmax_maps():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, CLASSES)).astype(np.float32)

    def model(x):
        """Logits at stride 4 as UperNet's, and like them not symmetric to mirroring."""
        return jnp.asarray(x)[:, ::4, ::4] @ weights, None

    inputs = [(48, 64), (64, 85), (80, 107)]
    images = {
        str(i): rng.standard_normal((2, *s, 3)).astype(np.float32) for i, s in enumerate(inputs)
    }
    sizes, shape = np.array([[60, 83], [71, 96]], np.int32), (80, 96)

    views = metrics.model_views(model, images, flip=True)
    got = np.asarray(metrics.probabilities(views, sizes, shape))
    labels = np.asarray(metrics.predict_labels(views, sizes, shape))
    for b, (height, width) in enumerate(sizes):
        total = 0
        for x in images.values():
            for mirror in (False, True):
                x_in = x[b : b + 1, :, ::-1] if mirror else x[b : b + 1]
                logits = torch.tensor(np.asarray(model(x_in)[0])).permute(0, 3, 1, 2)
                for size in (x.shape[1:3], (int(height), int(width))):
                    logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear")
                if mirror:
                    logits = logits.flip(-1)
                total = total + logits.softmax(1)
        expected = (total / 6)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(got[b, :height, :width], expected, atol=2e-4)
        agree = labels[b, :height, :width] == expected.argmax(-1)
        margin = np.sort(expected, -1)[..., -1] - np.sort(expected, -1)[..., -2]
        assert agree[margin > 1e-3].all()


if __name__ == "__main__":
    _eight_devices()
