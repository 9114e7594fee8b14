"""The report at the start of a run: versions, devices, parameters, memory."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vssd_jax import strict_json
from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.training.optimizer import make_schedule
from vssd_jax.training.state import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def total_bytes(tree: Any) -> int:
    """Bytes of all arrays (or their shapes) of a tree: for the state, the size of a checkpoint."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes on each device of a tree of sharded arrays (or their shapes)."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def environment() -> list[tuple[str, str]]:
    """Versions and devices, each with its name."""
    versions = [f"python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    devices = jax.devices()
    return [
        ("versions", ", ".join(versions)),
        ("devices", f"{len(devices)} {devices[0].device_kind}, {jax.process_count()} processes"),
    ]


def describe(config: Mapping[str, Any], mesh: jax.sharding.Mesh, state: TrainState) -> str:
    """Versions, devices, mesh, parameters, memory of the state and config.

    Args:
      config: of the run.
      mesh: the devices.
      state: abstract, with shardings.
    """
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return "\n".join(
        (
            *(f"{name}: {value}" for name, value in environment()),
            f"mesh: {axes}",
            _parameter_table(state.params),
            f"config: {strict_json.dumps(config, indent=2)}",
            f"memory per device: state {_size(device_bytes(state))}",
        )
    )


def _parameter_table(params: Mapping[str, jax.Array]) -> str:
    """A line for each parameter: name, shape, number of values; and the total."""
    rows = [(name, str(leaf.shape), f"{leaf.size:,}") for name, leaf in params.items()]
    rows.append(("parameters", "", f"{sum(leaf.size for leaf in params.values()):,}"))
    name, shape, size = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{n:<{name}}  {s:<{shape}}  {c:>{size}}" for n, s, c in rows)


def check_memory(needed: int, what: str) -> None:
    """Raises a UserError if a device has less than `needed` bytes.

    Some devices, such as CPUs, do not report how much they have: no error.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is not None and needed > limit:
        raise UserError(
            f"{what} takes {_size(needed)} of memory per device, and there are {_size(limit)}; use "
            "a smaller config.batch_size, config.accumulate, config.remat or an fsdp axis in "
            "config.mesh"
        )


def program_bytes(program: jax.stages.Compiled) -> int:
    """Memory per device while a compiled program runs, its arguments included."""
    memory: Any = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def announce(program: jax.stages.Compiled) -> None:
    """Says how much memory a training step takes; a UserError if a device has less."""
    needed = program_bytes(program)
    say(f"memory per device: training step {_size(needed)}")
    check_memory(needed, "a training step")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def compare_rates(
    previous: Mapping[str, Any] | None,
    config: ml_collections.ConfigDict,
    train_size: int,
    step: int,
) -> None:
    """Says how the learning rate of the next step changes where a run resumes.

    Args:
      previous: the config of the run so far; None if it is not known.
      config: of the run from now on.
      train_size: number of training images.
      step: number of steps done.
    """
    if previous is None:
        return
    before = ml_collections.ConfigDict({**config.to_dict(), **previous})
    old, new = (
        float(make_schedule(fields, max(train_size // fields.batch_size, 1))(step))
        for fields in (before, config)
    )
    if not math.isclose(old, new, rel_tol=1e-6):
        say(f"the learning rate at step {step} changes from {old:.4g} to {new:.4g}")
