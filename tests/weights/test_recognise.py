"""Which model the tensors of a PyTorch checkpoint belong to."""

import numpy as np
import pytest

from tests.golden.inventories import load_inventory
from tests.weights.classifier_nano import state_dict
from vssd_jax.weights.load import load
from vssd_jax.weights.recognise import recognise
from vssd_jax.weights.torch_file import write_torch_file


@pytest.mark.parametrize("name", ["nano", "micro", "tiny", "small", "base"])
def test_classifiers_are_recognised(name):
    tensors = {
        key: np.broadcast_to(np.float32(0), shape)
        for key, (shape, _) in load_inventory(f"classification_{name}").items()
    }
    assert recognise(tensors, None, {}) == (f"vssd_{name}", 10 if name == "nano" else 1000, {})


@pytest.mark.parametrize(
    ("name", "given", "overrides"),
    [
        ("simple", {}, {"stem": "patch", "downsample": "patch"}),
        ("expand1", {}, {"expand": 1}),
        ("groups", {}, {"ngroups": 2, "num_heads": (2, 4, 4, 8)}),
        ("groups", {"ngroups": 1}, {"d_state": 32, "num_heads": (2, 4, 4, 8), "ngroups": 1}),
        ("all_ssd", {}, {"mixers": ("ncssd",) * 4}),
        ("all_attention", {}, {"mixers": ("attention",) * 4}),
        ("causal", {}, {}),
        (
            "bidirectional",
            {"mixers": ("bissd", "bissd", "bissd", "attention"), "ngroups": 2,
             "num_heads": (2, 4, 4, 8)},
            {"mixers": ("bissd", "bissd", "bissd", "attention"), "ngroups": 2,
             "num_heads": (2, 4, 4, 8)},
        ),
    ],
)  # fmt: skip
def test_ablations_are_recognised(name, given, overrides, tmp_path):
    write_torch_file(tmp_path / "a.pth", state_dict(f"nano_{name}"))
    loaded = load(tmp_path / "a.pth", overrides=given)
    assert (loaded.model, loaded.num_classes) == ("vssd_nano", 10)
    assert loaded.overrides == overrides
