"""How the training state is laid over a mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vssd_jax.training.sharding import state_shardings


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((512, 2048), (None, "fsdp")),  # the longest axis
        ((3, 3, 64, 64), (None, None, "fsdp", None)),
        ((2048, 6), ("fsdp", None)),
        ((6, 1022), (None, None)),  # nothing divides by 4
        ((64,), (None,)),  # small
        ((), ()),
    ],
)
def test_large_arrays_are_split_over_fsdp(shape, split):
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = state_shardings({"x": array}, mesh)["x"]
    assert sharding.spec == PartitionSpec(*split)
    parts = 4 if "fsdp" in split else 1
    assert jnp.prod(jnp.array(sharding.shard_shape(shape))) * parts == array.size


def test_without_fsdp_every_device_has_all():
    mesh = AbstractMesh((8,), ("data",))
    sharding = state_shardings(jax.ShapeDtypeStruct((512, 2048), jnp.float32), mesh)
    assert sharding.spec == PartitionSpec(None, None)
