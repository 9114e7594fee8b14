"""The whole way from a folder of pictures to batches."""

import numpy as np
import pytest
from absl import flags

from tests.data.pictures import jpeg
from vssd_jax.data.decode import DecodedSource
from vssd_jax.data.imagenet import open_imagenet
from vssd_jax.data.pipeline import eval_batches, train_batches
from vssd_jax.data.transforms import EvalTransform, TrainTransform


@pytest.fixture(autouse=True)
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tests"])  # Grain's workers read absl flags


def write(root, split, per_class):
    for label in range(3):
        folder = root / split / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            (folder / f"{i}.JPEG").write_bytes(jpeg(10 * label + i, 30 + i, 40))
    (root / split / "n00000001" / "0.JPEG").write_bytes(jpeg(99)[:-100])  # truncated


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(batches, expected):
    for batch, reference in zip(batches, expected, strict=True):
        assert set(batch) == set(reference)
        for key in reference:
            np.testing.assert_array_equal(batch[key], reference[key])


def test_training_batches(tmp_path):
    write(tmp_path, "train", 4)
    source = DecodedSource(open_imagenet(tmp_path, "train"))
    transform = TrainTransform(image_size=24)
    settings = {"batch_size": 4, "seed": 3}
    expected = take(train_batches(source, transform, **settings), 6)
    for batch in expected:
        assert batch["image"].shape == (4, 24, 24, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["erase"].shape == (4, 4)
        assert batch["label"].dtype == batch["replaced"].dtype == np.int32
    # Two epochs: the truncated picture came up twice, and is counted.
    assert sum(batch["replaced"].sum() for batch in expected) == 2
    # The same batches with workers, and after a resume.
    assert_equal(take(train_batches(source, transform, **settings, num_workers=2), 4), expected[:4])
    assert_equal(take(train_batches(source, transform, **settings, start_step=4), 2), expected[4:])
    other = next(train_batches(source, transform, batch_size=4, seed=4))
    assert not np.array_equal(other["image"], expected[0]["image"])


def test_evaluation_batches(tmp_path):
    write(tmp_path, "val", 3)
    source = DecodedSource(open_imagenet(tmp_path, "val"))
    batches = list(eval_batches(source, EvalTransform(image_size=16), batch_size=4))
    assert [b["image"].shape for b in batches] == [(4, 16, 16, 3)] * 3
    valid = np.concatenate([b["valid"] for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    replaced = np.concatenate([b["replaced"] for b in batches])
    np.testing.assert_array_equal(valid, [True] * 9 + [False] * 3)
    np.testing.assert_array_equal(labels[valid], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(replaced[valid], [0, 0, 0, 1, 0, 0, 0, 0, 0])
