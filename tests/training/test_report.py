"""What a run says of itself before its first step."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from vssd_jax.config import classification_config
from vssd_jax.errors import UserError
from vssd_jax.training import report
from vssd_jax.training.state import TrainState


def array(shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("data", "fsdp"))


def test_description(mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "head.kernel": array((512, 1000), whole), "head.bias": array((1000,), whole),
    }  # fmt: skip
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(number, params, {}, (params, params), params, number)
    text = report.describe({"batch_size": 8, "model": "vssd_tiny"}, mesh, state)
    lines = text.splitlines()
    assert lines[0].startswith("versions: python 3.")
    assert f"jax {jax.__version__}, " in lines[0]
    assert lines[1].endswith("1 processes")
    assert lines[2] == "mesh: data 1, fsdp 1"
    assert lines[3:6] == [
        "head.kernel  (512, 1000)  512,000",
        "head.bias    (1000,)        1,000",
        "parameters                513,000",
    ]
    assert '  "batch_size": 8,' in lines
    assert lines[-1] == "memory per device: state 7.8 MiB"  # 4 times 513,000 of 4 bytes


def test_bytes_of_sharded_arrays():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    tree = {
        "split": array((64, 32), NamedSharding(mesh, PartitionSpec(None, "fsdp"))),
        "whole": array((10,), NamedSharding(mesh, PartitionSpec())),
    }
    assert report.total_bytes(tree) == 4 * (64 * 32 + 10)
    assert report.device_bytes(tree) == 4 * (64 * 32 // 4 + 10)


@pytest.mark.parametrize("stats", [None, {}, {"bytes_limit": 3 * 2**30}])
def test_a_state_too_large_for_a_device(stats, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    report.check_memory(3 * 2**30, "the training state")
    if not stats:  # a CPU does not say what it has
        return report.check_memory(2**60, "the training state")
    with pytest.raises(UserError, match=r"state takes 3.50 GiB .*there are 3.00 GiB; use a smal"):
        report.check_memory(7 * 2**29, "the training state")


def test_a_programs_memory(capsys):
    memory = types.SimpleNamespace(
        argument_size_in_bytes=2**21, output_size_in_bytes=2**20, alias_size_in_bytes=2**19,
        temp_size_in_bytes=2**22,
    )  # fmt: skip
    program = types.SimpleNamespace(memory_analysis=lambda: memory)
    assert report.program_bytes(program) == 2**21 + 2**20 - 2**19 + 2**22
    report.announce(program)
    assert capsys.readouterr().out == "memory per device: training step 6.5 MiB\n"


def test_a_learning_rate_that_changes_is_said(capsys):
    config = classification_config()
    config.update(steps=100, batch_size=8, learning_rate=1e-3, learning_rate_batch=8)
    before = json.loads(json.dumps(config.to_dict()))
    report.compare_rates(None, config, 80, 50)
    report.compare_rates(before, config, 80, 50)
    assert capsys.readouterr().out == ""
    config.batch_size = 16
    report.compare_rates(before, config, 80, 50)
    assert capsys.readouterr().out == (
        "the learning rate at step 50 changes from 0.0005 to 0.001\n"
    )
