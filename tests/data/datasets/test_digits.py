"""The digits as a dataset: its splits, and how they are enlarged."""

import numpy as np

from configs.digits import get_config
from vssd_jax.data import registry
from vssd_jax.data.decode import decode


def test_splits_and_transforms(tmp_path):
    config = get_config()
    config.data_dir = str(tmp_path)
    dataset = registry.find("digits", "classification")
    train, val = (dataset.open(config, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert list(val.class_names) == list(dataset.class_names) == list("0123456789")
    element = {"image": decode(val[3]["image"]), "label": val[3]["label"]}
    train_transform, eval_transform = dataset.transforms(config)
    result = eval_transform(element)
    assert result["image"].shape == (32, 32, 3)
    assert result["label"] == element["label"]
    augmented = [train_transform(element, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(augmented[0]["image"], augmented[1]["image"])
    assert (augmented[0]["image"] != augmented[2]["image"]).any()
