import math

import pytest

from tests.golden.inventories import INVENTORIES, load_inventory

TENSORS_AND_ELEMENTS = {
    "backbone_micro": (383, 13_130_612),
    "backbone_nano": (170, 451_899),
    "classification_base": (730, 88_827_095),
    "classification_micro": (379, 13_514_940),
    "classification_nano": (166, 452_965),
    "classification_small": (730, 40_078_282),
    "classification_tiny": (421, 24_273_356),
    "mask_rcnn_micro": (425, 33_220_196),
    "mask_rcnn_nano": (212, 655_783),
    "mask_rcnn_small": (776, 59_717_202),
    "mask_rcnn_tiny": (467, 43_912_276),
    "nano_all_attention": (142, 430_538),
    "nano_all_ssd": (172, 494_141),
    "nano_bidirectional": (166, 459_012),
    "nano_causal": (166, 452_965),
    "nano_expand1": (166, 432_037),
    "nano_groups": (166, 459_012),
    "nano_negative_da": (166, 452_965),
    "nano_simple": (123, 403_846),
    "upernet_micro": (465, 42_394_285),
    "upernet_nano": (252, 621_486),
    "upernet_small": (816, 69_886_619),
    "upernet_tiny": (507, 54_081_693),
}


def test_all_are_recorded() -> None:
    assert sorted(INVENTORIES) == sorted(TENSORS_AND_ELEMENTS)


@pytest.mark.parametrize("name", TENSORS_AND_ELEMENTS)
def test_contents(name: str) -> None:
    tensors = load_inventory(name)
    elements = sum(math.prod(shape) for shape, _ in tensors.values())
    assert (len(tensors), elements) == TENSORS_AND_ELEMENTS[name]
    for tensor, (_, dtype) in tensors.items():
        assert dtype == ("int64" if tensor.endswith(".num_batches_tracked") else "float32")
