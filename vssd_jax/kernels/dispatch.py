"""Which implementation runs where, and how a kernel stays on its own part of the batch."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from vssd_jax.errors import UserError

IMPLEMENTATIONS = ("xla", "pallas", "triton")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is being traced for: "cpu", "gpu", ... and the name of the device."""

    platform: str
    kind: str

    def lacks_triton(self) -> str | None:
        """Why Triton kernels cannot run here, or None."""
        if self.platform != "gpu":
            return f"it needs an NVIDIA GPU, and this is a {self.platform}"
        capability = getattr(jax.devices()[0], "compute_capability", None)
        if capability and float(capability) < 8.0:
            return f"it needs compute capability 8.0, and {self.kind} has {capability}"
        return None


def target() -> Target:
    """The default device, or the abstract device of an ahead-of-time compilation."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        platform, kind = abstract.platform, abstract.device_kind
    else:
        device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        platform, kind = device.platform, device.device_kind
    # ROCm's devices are GPUs as well, but these kernels were never compiled for one.
    return Target({"cuda": "gpu"}.get(platform, platform), kind)


def check_name(implementation: str | None) -> None:
    """Raises UserError for an implementation that does not exist."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown implementation {implementation!r}; choose from "
            f"{', '.join(IMPLEMENTATIONS)}, or None for the best one of the device"
        )


def of_other_kernels(implementation: str | None) -> str | None:
    """What an `implementation` that is meant for one operation means for those beside it.

    "pallas" and "triton" force kernels that the others may not have, or not for every size.
    """
    return "xla" if implementation == "xla" else None


def choose(
    operation: str,
    implementation: str | None,
    reasons: dict[str, Callable[[Target], str | None]],
    automatic: str,
) -> str:
    """The implementation to run: the one that is forced, or `automatic` where it can run.

    Args:
      operation: its name, for messages.
      implementation: what the caller forces, or None.
      reasons: for each implementation but "xla", a function that says why it cannot run.
      automatic: the one to try where nothing is forced.

    Raises:
      UserError: if the forced implementation is unknown or cannot run.
    """
    check_name(implementation)
    if implementation == "xla":
        return "xla"
    here = target()
    if implementation is not None:
        reason = reasons[implementation](here)
        if reason:
            raise UserError(
                f"{operation} cannot run as {implementation!r}: {reason}; "
                "use implementation=None or 'xla'"
            )
        return implementation
    reason = reasons[automatic](here)
    if reason is None:
        return automatic
    if here.platform == "gpu":  # elsewhere XLA is the best there is, and no news
        _say_once(f"{operation} falls back to XLA: {automatic!r} cannot run, {reason}")
    return "xla"


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def for_inference(kernel: Callable, plain: Callable) -> Callable:
    """`kernel`, and in place of its gradient all of `plain`, forward and backward.

    For kernels that are written for the forward pass alone: nothing is computed twice.
    """

    @jax.custom_vjp
    def f(*args):
        return kernel(*args)

    f.defvjp(lambda *args: jax.vjp(plain, *args), lambda pullback, dy: pullback(dy))
    return f


def size_on_device(x: jax.Array) -> int:
    """The number of elements of `x` that `over_batch` gives to a device."""
    mesh = jax.sharding.get_abstract_mesh()
    return x.size // math.prod(mesh.shape[name] for name in _batch_axes(len(x)))


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


def over_batch(f: Callable, sharded: tuple, replicated: tuple) -> jax.Array:
    """`f(*sharded, *replicated)` with each device on its own part of the first axis of `sharded`.

    XLA cannot split a kernel: without this it would gather the whole batch on every device. The
    mesh is that of `jax.set_mesh`; without a mesh, or if the batch cannot be divided, `f` is
    called as it is.
    """
    axes = _batch_axes(len(sharded[0]))
    if not axes:
        return f(*sharded, *replicated)
    mesh = jax.sharding.get_abstract_mesh()
    batch = PartitionSpec(axes)
    specs = (batch,) * len(sharded) + (PartitionSpec(),) * len(replicated)
    split = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    return split(*sharded, *replicated)
