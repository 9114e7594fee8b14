"""Weights from files with PyTorch's names or those of this project."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weights.classifier_nano import NANO, assert_identical, state_dict
from vssd_jax import create_model
from vssd_jax.errors import UserError
from vssd_jax.models.family import abstract, build
from vssd_jax.weights.convert import convert
from vssd_jax.weights.folder import Weights, read_arrays, read_folder, write_folder
from vssd_jax.weights.load import load, to_torch
from vssd_jax.weights.pretrained import pretrained_weights
from vssd_jax.weights.state import get_state
from vssd_jax.weights.torch_file import read_torch_file, write_torch_file


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


def test_what_a_checkpoint_without_a_head_starts(tmp_path, capsys):
    headless = {k: v for k, v in state_dict().items() if not k.startswith("head.")}
    write_torch_file(tmp_path / "a.pth", headless)

    def params(num_classes):
        model = create_model("vssd_nano", weights=tmp_path / "a.pth", num_classes=num_classes)
        return get_state(model)

    expected = load(tmp_path / "a.pth").params
    for num_classes, said in {
        0: "",
        None: "has no head: the model gives the pooled features\n",
        5: "has no head: the classifier stays fresh\n",
    }.items():
        created = params(num_classes)
        assert capsys.readouterr().out.endswith(said)
        assert created.keys() - expected.keys() == (
            {"head.kernel", "head.bias"} if num_classes else set()
        )
        for name, value in expected.items():
            np.testing.assert_array_equal(created[name], value)
    for name, said in {
        "vssd_nano": "has no head: the classifier starts fresh",
        "upernet_vssd_nano": "is a classifier: all but the backbone starts fresh",
        "mask_rcnn_vssd_nano": "is a classifier: all but the backbone starts fresh",
    }.items():
        model = abstract(lambda rngs, name=name: build(name, num_classes=5, rngs=rngs))
        assert pretrained_weights(tmp_path / "a.pth", name, model, {})
        assert said in capsys.readouterr().out


# --- Whatever comes in ---------------------------------------------------------------------------

FILE = read_torch_file(NANO)
STATE = FILE["model"]
KEYS = sorted(STATE)
ANY_KEY = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(
        ["", "module.", "head.weight.head.weight", "x" * 5000, "a\nb", "\u202e", 0, ()]
    ),
    st.text(max_size=8),
    st.none() | st.integers() | st.binary(max_size=4) | st.floats(),
)
PREFIXES = ["module.", "model.", "_orig_mod.", "net.", "encoder.", "head.", "é.", "."]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("prefix"), st.sampled_from(PREFIXES), st.none()),
        st.tuples(st.just("drop"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.just("keep"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.sampled_from(["rename", "add", "swap"]), st.sampled_from(KEYS), ANY_KEY),
        st.tuples(st.just("suffix"), st.sampled_from(KEYS), st.text(max_size=4)),
    ),
    max_size=4,
)


def changed(state, changes):
    """The state dict with other names."""
    for kind, key, other in changes:
        if kind == "prefix":
            state = {key + n if isinstance(n, str) else n: v for n, v in state.items()}
        elif kind == "keep":
            state = {n: v for n, v in state.items() if isinstance(n, str) and n[:8] == key[:8]}
        elif key not in state:
            continue
        elif kind == "swap":
            state = state | {key: state.get(other, state[key]), other: state[key]}
        elif kind == "add":
            state = state | {other: state[key]}
        else:
            value = {"drop": (), "rename": ((other, state[key]),)}.get(kind)
            entries = ((f"{key}{other}", state[key]),) if value is None else value
            state = dict([*((n, v) for n, v in state.items() if n != key), *entries])
    return state


@given(
    CHANGES,
    st.sampled_from([None, None, "vssd_nano", "vssd_tiny"]),
    st.sampled_from(["model", "state_dict", "teacher", "params", None]),
)
def test_whatever_keys_come_in_work_or_are_one_line(changes, model, entry):
    state = changed(STATE, changes)
    content = state if entry is None else {entry: state}
    loaded, message = None, ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vssd_jax.weights.load.read_torch_file", lambda _: content)
        try:
            loaded = load(NANO, model=model)
        except UserError as error:
            message = str(error)
    if loaded is None:
        assert message.isprintable()
        assert changes or model == "vssd_tiny"
    else:
        assert loaded.model == "vssd_nano"
        assert to_torch(loaded).keys() >= {name for name in KEYS if not name.startswith("head.")}
