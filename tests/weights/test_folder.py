"""Weights folders: what is refused, and that nothing half-written is left."""

import json

import pytest

from tests.weights.classifier_nano import NANO
from vssd_jax.errors import UserError
from vssd_jax.weights.convert import convert
from vssd_jax.weights.load import load


def test_damaged_folders(tmp_path):
    convert(NANO, tmp_path / "w")
    config, arrays = tmp_path / "w/config.json", tmp_path / "w/model.safetensors"
    good_config, good_arrays = config.read_text(), arrays.read_bytes()
    fields = json.loads(good_config)
    for text in (
        "", "{", "[]", "3", "{}", json.dumps(fields | {"model": 3}),
        json.dumps(fields | {"model": "resnet"}), json.dumps(fields | {"num_classes": 11}),
        json.dumps(fields | {"num_classes": "ten"}), json.dumps(fields | {"overrides": [1]}),
        json.dumps(fields | {"overrides": {"expand": 1}}),
        json.dumps(fields | {"overrides": {"expand": "two"}}),
        json.dumps(fields | {"overrides": {"embed_dim": 1.5}}),
        json.dumps(fields | {"overrides": {"depths": [1, 2, 1, "x"]}}),
        json.dumps(fields | {"model": "vssd_micro"}),
    ):  # fmt: skip
        config.write_text(text)
        with pytest.raises(UserError) as error:
            load(tmp_path / "w")
        assert "\n" not in str(error.value)
    config.write_text(good_config)
    for cut in (0, 4, 100, len(good_arrays) // 2, len(good_arrays) - 1):
        arrays.write_bytes(good_arrays[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            load(tmp_path / "w")
    arrays.unlink()
    with pytest.raises(UserError):
        load(tmp_path / "w")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(UserError, match="No space left"):
        convert(NANO, tmp_path / "w")
    assert list(tmp_path.iterdir()) == []
