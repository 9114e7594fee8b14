"""Kernels on several devices: each on its own part of the batch.

XLA cannot split a kernel: left alone it would gather the whole batch on every device. The mesh is
that of `jax.set_mesh`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

LARGEST = 2**31  # elements of an array, for indices of 32 bits


def over_batch(f: Callable, batched: Any, shared: Any) -> Any:
    """`f(batched, shared)`, on each device with its own part of the batch.

    Without a mesh, or if the batch cannot be divided evenly, `f` is called as it is.

    Args:
      f: a function whose results all have a leading batch axis.
      batched: a pytree of arrays (B, ...).
      shared: a pytree of arrays that every device gets whole.
    """
    arrays = jax.tree.leaves(batched)
    axes = _batch_axes(arrays[0].shape[0]) if arrays else ()
    if not axes:
        return f(batched, shared)
    mesh, batch = jax.sharding.get_abstract_mesh(), PartitionSpec(axes)
    split = jax.shard_map(
        f, mesh=mesh, in_specs=(batch, PartitionSpec()), out_specs=batch, check_vma=False
    )
    return split(batched, shared)


def everywhere(f: Callable, *args: Any) -> Any:
    """`f(*args)` on every device of the mesh, with whole arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _batch_axes(0):
        return f(*args)
    spec = PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)


def too_large(x: jax.Array | jax.ShapeDtypeStruct, factor: int = 1) -> str | None:
    """Why a kernel with indices of 32 bits cannot take the part of `x` (B, ...) of one device.

    Args:
      x: the array; `over_batch` divides its first axis.
      factor: how many times larger than `x` the largest array of the kernel is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = x.size // math.prod(mesh.shape[name] for name in _batch_axes(x.shape[0]))
    if factor * size >= LARGEST:
        return f"{size} elements on a device (below {LARGEST // factor})"
    return None


def _batch_axes(batch: int) -> tuple[str, ...]:
    """The axes of the mesh over which a batch is divided; none if it cannot be."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    )
    devices = math.prod(mesh.shape[name] for name in axes)
    return () if devices == 1 or batch % devices else axes
