"""Weights from files with PyTorch's names or those of this project."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weights.classifier_nano import NANO, assert_identical, state_dict
from vssd_jax.errors import UserError
from vssd_jax.weights.convert import convert
from vssd_jax.weights.folder import Weights, read_arrays, read_folder, write_folder
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


def test_safetensors_without_the_wrappers_prefix(tmp_path, capsys):
    from safetensors.numpy import save_file

    save_file({f"module.{k}": v for k, v in state_dict().items()}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").model == "vssd_nano"
    assert "stripped 'module.' from every name" in capsys.readouterr().out


def test_a_checkpoint_without_a_head(tmp_path):
    headless = {k: v for k, v in state_dict().items() if not k.startswith("head.")}
    write_torch_file(tmp_path / "a.pth", headless)
    line = convert(tmp_path / "a.pth", tmp_path / "w")
    assert "vssd_nano without a head from" in line
    loaded = load(tmp_path / "w")
    assert (loaded.model, loaded.num_classes) == ("vssd_nano", 0)
    assert_identical(to_torch(loaded), headless)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite(value, tmp_path):
    state = {name: np.array(tensor) for name, tensor in state_dict().items()}
    state["head.bias"][3] = value
    write_torch_file(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=r"1 of 10 values of the tensor head.bias are not finite; "):
        load(tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "w", allow_nonfinite=True)
    with pytest.raises(UserError, match=r"tensor head.bias .* --allow-nonfinite"):
        load(tmp_path / "w")
    params = load(tmp_path / "w", allow_nonfinite=True).params
    np.testing.assert_equal(params["head.bias"][3], np.float32(value))


def test_class_names_belong_to_the_weights(tmp_path):
    loaded = load(NANO)
    names = [str(i) for i in range(10)]
    weights = Weights("vssd_nano", 10, {}, loaded.params, names)
    write_folder(tmp_path / "w", weights)
    assert load(tmp_path / "w").class_names == read_folder(tmp_path / "w").class_names == names
    config = (tmp_path / "w/config.json").read_text()
    (tmp_path / "w/config.json").write_text(config.replace('"9"', "9"))
    with pytest.raises(UserError, match="class_names are not 10 names"):
        load(tmp_path / "w")


# --- Whatever comes in ---------------------------------------------------------------------------

STATE = state_dict()
KEYS = sorted(STATE)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["prefix", "drop", "rename", "add", "suffix", "swap", "keep"]),
        st.sampled_from(KEYS),
        st.one_of(
            st.sampled_from(["module.", "model.", "_orig_mod.", "net.", "encoder.", "head.", ""]),
            st.sampled_from(KEYS),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        ),
    ),
    min_size=1,
    max_size=4,
)


@given(CHANGES, st.sampled_from([None, "vssd_nano", "vssd_tiny"]))
def test_whatever_keys_come_in_work_or_are_one_line(folder, changes, model):
    state = dict(STATE)
    for kind, key, text in changes:
        if kind == "prefix":
            state = {text + name: value for name, value in state.items()}
        elif kind == "drop":
            state = {k: v for k, v in state.items() if not text or not k.startswith(text)}
            state.pop(key, None)
        elif kind == "keep":
            state = {k: v for k, v in state.items() if k.startswith(key[:8])}
        elif key in state:
            if kind == "rename":
                state[text] = state.pop(key)
            elif kind == "suffix":
                state[key + text] = state.pop(key)
            elif kind == "swap" and text in state:
                state[key], state[text] = state[text], state[key]
            elif kind == "add":
                state[text] = state[key]
    message = ""
    write_torch_file(folder / "a.pth", state)
    try:
        loaded = load(folder / "a.pth", model=model)
        assert loaded.model == "vssd_nano"
        assert len(loaded.params) >= len(KEYS) // 2
    except UserError as error:
        message = str(error)
    assert "\n" not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")
