"""The tensors of the golden nano classifier, and a comparison that allows no difference."""

import numpy as np

from tests.conftest import GOLDEN
from tests.golden import synthetic
from tests.golden.inventories import load_inventory

NANO = GOLDEN / "checkpoints/classification_nano.pth"


def state_dict(name: str = "classification_nano") -> dict[str, np.ndarray]:
    return synthetic.synthetic_state_dict(load_inventory(name))


def assert_identical(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes(), name
