"""Weights from files with PyTorch's names or those of this project."""

import numpy as np
import pytest

from tests.weights.classifier_nano import NANO, assert_identical, state_dict
from vssd_jax.weights.convert import convert
from vssd_jax.weights.folder import read_arrays
from vssd_jax.weights.load import load, to_torch
from vssd_jax.weights.torch_file import write_torch_file


def test_batch_counters_that_differ_or_are_not_there(tmp_path):
    counted = state_dict()
    counted["patch_embed.conv1.norm.num_batches_tracked"] = np.array(7)
    bare = {name: value for name, value in counted.items() if value.dtype != np.int64}
    for i, state in enumerate((counted, bare)):
        write_torch_file(tmp_path / f"{i}.pth", state)
        convert(tmp_path / f"{i}.pth", tmp_path / f"{i}")
        assert_identical(to_torch(load(tmp_path / f"{i}")), state)


@pytest.mark.parametrize("ours", [True, False])
def test_safetensors_with_either_names(ours, tmp_path):
    from safetensors.numpy import save_file

    convert(NANO, tmp_path / "w", which="model")
    path = tmp_path / "w/model.safetensors"
    if not ours:
        path = tmp_path / "torch.safetensors"
        save_file(state_dict(), path)
    loaded = load(path)
    assert (loaded.model, loaded.num_classes) == ("vssd_nano", 10)
    assert_identical(loaded.params, read_arrays(tmp_path / "w/model.safetensors"))
