"""Checkpoints on disk: packed arrays, and what is left by flipped bytes and cut files."""

import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.training.small_checkpoints import restored_step, save
from vssd_jax.errors import UserError
from vssd_jax.weights import checkpoint
from vssd_jax.weights.checkpoint import layout_of, members, pack, read_ema, unpack


def test_a_checkpoint_from_before_arrays_were_packed(tmp_path, monkeypatch):
    save_now = ocp.training.Checkpointer.save_checkpointables_async

    def without_metadata(*args, custom_metadata, **options):
        assert not any(custom_metadata.values())
        return save_now(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "layout_of", lambda arrays: {})
        patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", without_metadata)
        save(tmp_path, [1, 2])
    assert restored_step(tmp_path) == 2
    np.testing.assert_array_equal(read_ema(tmp_path)[0]["layer0.kernel"], np.full((8, 3), 2.0))


def test_a_flipped_bit_in_any_file_is_found(tmp_path, capsys):
    save(tmp_path / "whole", (1, 2, 3))
    files = sorted(p for p in (tmp_path / "whole/checkpoints/3").rglob("*") if p.is_file())
    assert len(files) > 10
    rng = np.random.default_rng(0)
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", workdir)
        victim = workdir / file.relative_to(tmp_path / "whole")
        data = bytearray(victim.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        victim.write_bytes(data)
        ema, step = read_ema(workdir)
        assert step == 2
        assert all((value == 2).all() for value in ema.values())
        assert f"{workdir}/checkpoints/3" in capsys.readouterr().err
        assert restored_step(workdir) == 2
        assert f"{workdir}/checkpoints/3" in capsys.readouterr().err
        assert (workdir / "damaged/3").is_dir()


def test_a_truncated_or_missing_file_is_found(tmp_path):
    save(tmp_path / "whole", (1, 2))
    files = sorted(p for p in (tmp_path / "whole/checkpoints/2").rglob("*") if p.is_file())
    for number, file in enumerate(files):
        for change in (pathlib.Path.unlink, lambda path: os.truncate(path, 1)):
            workdir = tmp_path / "changed"
            shutil.copytree(tmp_path / "whole", workdir)
            change(workdir / file.relative_to(tmp_path / "whole"))
            assert restored_step(workdir) == 1, (number, file)
            shutil.rmtree(workdir)


def test_arrays_are_packed_by_dtype_and_come_back():
    arrays = {
        "kernel": jnp.arange(6.0).reshape(2, 3),
        "step": jnp.int32(7),
        "empty": jnp.zeros((0, 4)),
        "bias": jnp.ones(2),
    }
    layout = layout_of(arrays)
    packed = pack(arrays, layout)
    assert {name: value.shape for name, value in packed.items()} == {
        "packed_float32": (8,), "packed_int32": (1,),
    }  # fmt: skip
    assert members(layout) == {name: value.shape for name, value in arrays.items()}
    back = unpack(packed, layout)
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)


def test_a_workdir_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no checkpoint yet"):
        read_ema(tmp_path)
