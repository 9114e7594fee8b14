"""From a PyTorch checkpoint to a weights folder and back, in this process and by the command."""

import os
import random
import shutil
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

import vssd_jax
from tests.conftest import GOLDEN, ROOT
from tests.weights.classifier_nano import NANO, assert_identical, state_dict
from torch_reference import create_model as torch_model
from vssd_jax.errors import UserError
from vssd_jax.models import torch_names
from vssd_jax.models.family import find
from vssd_jax.weights.convert import convert
from vssd_jax.weights.folder import Weights, read_arrays, read_folder, write_folder
from vssd_jax.weights.state import get_state
from vssd_jax.weights.torch_file import read_torch_file, select_state_dict, write_torch_file


def command(*args, **environment):
    return subprocess.run(
        [sys.executable, "convert_torch_weights.py", *map(str, args)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# There and back


def test_command_there_and_back(tmp_path):
    folder, back = tmp_path / "made" / "nano", tmp_path / "back.pth"
    done = command("--input", NANO, "--output", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "vssd_nano with 10 classes" in done.stdout
    assert "its EMA, 158 tensors with 452,957 parameters and statistics" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["nano"]

    done = command("--reverse", "--input", folder, "--output", back)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = torch.load(back, weights_only=True)
    torch_model("vssd_nano").load_state_dict(loaded, strict=True)
    expected, _ = select_state_dict(read_torch_file(NANO), "ema")
    assert_identical({name: tensor.numpy() for name, tensor in loaded.items()}, expected)


@pytest.mark.parametrize("model", ["mask_rcnn_nano", "upernet_nano"])
def test_detectors_and_segmentors_convert(model, tmp_path):
    family, _, variant = model.rpartition("_")
    tensors = state_dict(model)
    source = GOLDEN / f"checkpoints/{model}.pth"
    if not source.exists():
        source = tmp_path / "segmentor.pth"
        write_torch_file(source, tensors)
    name, output = f"{family}_vssd_{variant}", tmp_path / "weights"
    convert(source, output, model=name)
    params, _, unknown = torch_names.from_torch(find(name)[0].torch_table, tensors)
    assert not unknown
    filled = get_state(vssd_jax.create_model(name, weights=output))
    assert filled.keys() == params.keys()
    for key, value in params.items():
        np.testing.assert_array_equal(filled[key], value)


def test_command_ends_user_errors_with_one_line(tmp_path):
    for args, message in (
        (["--output", tmp_path / "w"], "--input and --output are needed"),
        (["--input", GOLDEN / "checkpoints/hostile.pth", "--output", tmp_path / "w"], "refused"),
        (["--input", NANO, "--output", tmp_path / "w", "--modle=vssd_nano"], "model"),
    ):
        done = command(*args)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    state = {
        name: value if value.dtype == np.int64 else value.astype(dtype)
        for name, value in state_dict().items()
    }
    write_torch_file(tmp_path / "a.pth", state)
    convert(tmp_path / "a.pth", tmp_path / "w")
    assert read_folder(tmp_path / "w").params["head.kernel"].dtype == dtype
    convert(tmp_path / "w", tmp_path / "b.pth", reverse=True)
    assert_identical(select_state_dict(read_torch_file(tmp_path / "b.pth"))[0], state)
    model = vssd_jax.create_model("vssd_nano", weights=tmp_path / "w")
    assert model.head.kernel.dtype == np.float32
    np.testing.assert_array_equal(model.head.kernel[...], state["head.weight"].T.astype(np.float32))


def test_fewer_bytes_and_what_they_cost(tmp_path):
    done = command("--input", NANO, "--output", tmp_path / "w", "--dtype=bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    taken, measured = done.stdout.splitlines()
    assert "158 tensors" in taken
    assert measured.startswith("bfloat16: 1.8 -> 0.9 MB; on 32 random pictures of 224x224")
    assert "the same class is first for" in measured
    convert(NANO, tmp_path / "whole")
    narrow, whole = (read_folder(tmp_path / name).params for name in ("w", "whole"))
    for name, value in whole.items():
        dtype = ml_dtypes.bfloat16 if value.ndim > 1 else np.float32
        assert narrow[name].dtype == dtype
        np.testing.assert_array_equal(narrow[name], value.astype(dtype))


def test_weights_made_here_go_to_pytorch(tmp_path):
    model = vssd_jax.create_model("vssd_nano", num_classes=3, seed=5)
    write_folder(tmp_path / "w", Weights("vssd_nano", 3, {}, get_state(model)))
    convert(tmp_path / "w", tmp_path / "w.pth", reverse=True)
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    torch_model("vssd_nano", num_classes=3).load_state_dict(loaded, strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vssd_tiny"}, "those of vssd_nano, not of vssd_tiny"),
        ({"model": "vssd_tini"}, "did you mean 'vssd_tiny'"),
        ({"overrides": {"expand": 1}}, "contradict expand=1: theirs is 2"),
        ({"overrides": {"mixers": ["ncssd"] * 4}}, "contradict mixers="),
        ({"overrides": {"expends": 1}}, "did you mean 'expand'"),
        ({"overrides": {"d_state": 8, "ngroups": 1}}, "contradict d_state=8"),
        ({"which": "both"}, "choose 'model' or 'ema' or 'model_ema'"),
    ],
)
def test_contradictions(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert(NANO, tmp_path / "w", **options)
    assert list(tmp_path.iterdir()) == []


# What does not fit


def change(state, kind, rng):
    name = rng.choice([name for name, value in state.items() if value.ndim])
    value = state[name]
    if kind == "removed":
        del state[name]
    elif kind == "renamed":
        state[name + "_"] = state.pop(name)
    elif kind == "added":
        state[f"extra.{name}"] = value
    elif kind == "grown":
        state[name] = np.concatenate([value, value])
    elif kind == "cut":
        state[name] = value[:-1]
    elif kind == "flat":
        state[name] = value.reshape(-1, 1)
    elif kind == "integer":
        state[name] = np.zeros(value.shape, np.int32)
    return name


@pytest.mark.parametrize("kind", ["removed", "renamed", "added", "grown", "cut", "flat", "integer"])
def test_state_dicts_that_do_not_fit_are_refused_by_name(kind, tmp_path):
    rng = random.Random(kind)
    for _ in range(12):
        state = state_dict()
        name = change(state, kind, rng)
        write_torch_file(tmp_path / "bad.pth", state)
        with pytest.raises(UserError) as error:
            convert(tmp_path / "bad.pth", tmp_path / "w")
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 1500
        # A changed size of the stem or the classifier is taken for another model's.
        leaf = name.rpartition(".")[2]
        assert (
            leaf in message
            or "those of a vssd" in message
            or "contradict" in message
            or ("missing" in message or "another shape" in message)
        )
        assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def converted_or_message(source, output) -> str | None:
    try:
        convert(source, output)
    except UserError as error:
        return str(error)


def test_damaged_files_end_in_one_line(tmp_path):
    write_torch_file(tmp_path / "good.pth", state_dict())
    convert(tmp_path / "good.pth", tmp_path / "good")
    expected = read_arrays(tmp_path / "good/model.safetensors")
    data, bad = (tmp_path / "good.pth").read_bytes(), tmp_path / "bad.pth"
    rng = random.Random(0)
    refused = 0
    for i in range(120):
        damaged = bytearray(data)
        if i % 3 == 0:
            del damaged[rng.randrange(len(data)) :]
        else:  # half of the flips among the names and sizes
            pickled = data.index(b"data.pkl")
            low, high = (0, len(data)) if i % 3 == 1 else (pickled, pickled + 20000)
            for _ in range(rng.choice((1, 4))):
                damaged[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        bad.write_bytes(damaged)
        message = converted_or_message(bad, tmp_path / "w")
        if message is None:  # the damaged bit carries nothing, such as a date
            assert_identical(read_arrays(tmp_path / "w/model.safetensors"), expected)
            shutil.rmtree(tmp_path / "w")
        else:
            refused += 1
            assert "\n" not in message
        assert {path.name for path in tmp_path.iterdir()} == {"good.pth", "good", "bad.pth"}
    assert refused > 100


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(NANO, tmp_path / "w")
    assert (tmp_path / "w/mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        convert(NANO, tmp_path / "file/w")


def test_entries_of_the_archive_removed(tmp_path):
    write_torch_file(tmp_path / "good.pth", state_dict())
    with zipfile.ZipFile(tmp_path / "good.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for name in random.Random(0).sample(sorted(records), 12):
        with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
            for other, data in records.items():
                if other != name:
                    archive.writestr(other, data)
        if name.endswith(("version", "byteorder")):
            continue
        with pytest.raises(UserError):
            convert(tmp_path / "bad.pth", tmp_path / "w")
        assert not (tmp_path / "w").exists()
