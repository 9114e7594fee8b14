"""The mesh of devices, and how batches are laid over it."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vssd_jax.errors import UserError

_PREFETCH = 2  # batches on the devices ahead of the step
_MIN_SHARDED = 2**12  # values; smaller arrays are cheaper to keep everywhere


def make_mesh(axes: dict[str, int]) -> Mesh:
    """A mesh over all devices.

    Args:
      axes: name and size of each axis; one size may be -1, for all devices that are left.

    Raises:
      UserError: sizes whose product is not the number of devices.
    """
    sizes, devices = dict(axes), jax.device_count()
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = devices // known
    if int(np.prod(list(sizes.values()))) != devices:
        raise UserError(f"config.mesh {dict(axes)} does not fit {devices} devices")
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def check_batch(name: str, size: int, devices: int, parts: int = 1) -> None:
    """Raises a UserError unless a batch divides over devices and micro-batches."""
    if size <= 0 or size % (devices * parts):
        accumulation = f" times {parts} micro-batches" if parts > 1 else ""
        raise UserError(
            f"config.{name}={size} does not divide over {devices} devices{accumulation}; "
            f"use a multiple of {devices * parts}"
        )


def check_groups(images: int | None, batch_size: int, parts: int) -> None:
    """Raises a UserError unless micro-batches have whole groups of images for BatchNorm."""
    if images is not None and batch_size // parts % images:
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        raise UserError(
            f"config.batch_norm_images={images} does not divide config.batch_size={batch_size}"
            f"{micro}"
        )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a tree: large ones are split over the mesh's axis "fsdp".

    An array is split along its longest axis that divides; XLA gathers it where it is used.

    Args:
      state: arrays or their shapes.
      mesh: the devices.

    Returns:
      The tree with a `NamedSharding` in place of each array.
    """
    parts = mesh.shape.get("fsdp", 1)

    def sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        if parts > 1 and leaf.size >= _MIN_SHARDED:
            axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % parts == 0]
            if axes:
                spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` with these shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def device_batches(batches: Iterator[dict], mesh: Mesh) -> Iterator[dict]:
    """Puts batches on the devices, split along the first axis, a few ahead."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ahead: collections.deque[dict] = collections.deque()
    for batch in batches:
        ahead.append(
            jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
        )
        if len(ahead) > _PREFETCH:
            yield ahead.popleft()
    yield from ahead
