"""One table of implementations for each operation, and the choice between them.

An operation is a function such as `attention`, in the folder of its name. Its `api.py` has the
public function and an `Operation`: a table from names ("xla", "pallas", ...) to `Implementation`s.
A module is imported only after its row says that the device can run it: importing Pallas takes a
second, and its Triton backend may be missing from another release of JAX.

Another implementation is a file and a line:

    from vssd_jax.kernels import attention, dispatch

    def attention(qkv, *, heads): ...          # the arguments of the public function

    attention.OPERATION.register("mine", dispatch.Implementation(__name__))
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.extend

from vssd_jax import host
from vssd_jax.errors import UserError, did_you_mean
from vssd_jax.kernels import mesh

logger = logging.getLogger(__name__)
T = TypeVar("T")


# --- Devices ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """The device a program is traced for: its platform ("cpu", "gpu", ...) and its name."""

    platform: str
    kind: str


def target() -> Target:
    """The default device, or the abstract device of an ahead-of-time compilation."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        platform, kind = abstract.platform, abstract.device_kind
    else:
        device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        platform, kind = device.platform, device.device_kind
    # Not "rocm": the kernels were never compiled for AMD's GPUs.
    return Target({"cuda": "gpu"}.get(platform, platform), kind)


def anywhere(device: Target) -> None:
    """The condition of an implementation that every device can run."""


def cpu(device: Target) -> str | None:
    """Why `device` is not a CPU, or None."""
    return None if device.platform == "cpu" else f"it is for CPUs, and this is a {device.platform}"


def onednn(device: Target) -> str | None:
    """Why oneDNN's calls cannot, or should not, be part of a program for `device`, or None."""
    reason = cpu(device)
    if reason is None and not host.has_amx():
        reason = "it was measured on CPUs with AMX alone"
    if reason is None and host.keeps_programs():
        reason = "a program with its calls cannot be kept on disk (VSSD_JAX_CACHE=0 keeps none)"
    if reason is None:
        reason = importlib.import_module("vssd_jax.kernels.onednn").missing()
    return reason


def nvidia_gpu(device: Target) -> str | None:
    """Why `device` is no NVIDIA GPU of the Ampere generation or later, or None."""
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is a {device.platform}"
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability and float(capability) < 8.0:
        return f"it needs compute capability 8.0, and {device.kind} has {capability}"
    return None


def pallas_triton(device: Target) -> str | None:
    """Why Pallas cannot compile a kernel for `device` with Triton, or None."""
    reason = nvidia_gpu(device)
    if reason is None:
        try:
            importlib.import_module("jax.experimental.pallas.triton")
        except ImportError as error:
            reason = f"JAX {jax.__version__} has no Triton backend of Pallas ({error})"
    return reason


# --- Gradients --------------------------------------------------------------------------------

_automatic = contextvars.ContextVar("automatic", default=False)


@contextlib.contextmanager
def automatic_gradients() -> Iterator[None]:
    """Within it operations are plain JAX with JAX's own gradients: slower, differentiable twice.

    Most have a gradient of their own (`jax.custom_vjp`), which `jax.jvp`, Hessians and other
    forward-mode derivatives cannot pass. What `jax.jit` has already traced outside of the context
    keeps it.
    """
    token = _automatic.set(True)
    try:
        yield
    finally:
        _automatic.reset(token)


def differentiable(function: Callable) -> Callable:
    """`function`, and in `automatic_gradients` what its `jax.custom_vjp` wraps."""
    return inspect.unwrap(function) if _automatic.get() else function


_portable = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within it `implementation=None` means "xla": for a program that is read, or run elsewhere."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


# --- Outside of a trace -----------------------------------------------------------------------

with jax.core.eval_context():
    _NO_TRACE = jax.extend.core.get_opaque_trace_state()


def in_trace() -> bool:
    """Whether JAX records operations now, for `jax.jit`, a gradient, `jax.vmap`, ..."""
    return jax.extend.core.get_opaque_trace_state() != _NO_TRACE


def unit(function: Callable[..., T], name: str = "") -> Callable[..., T]:
    """`function(*arrays, **options)`, as one program where it is called outside of every trace.

    There JAX compiles a program for each operation and shape: hundreds for the first call of a
    model, most of them smaller than what it costs to compile one. In a trace, be it that of
    `jax.jit`, of a gradient or of `jax.vmap`, `function` is called as it is. Nothing of a module is
    kept: the arrays are arguments.

    Args:
      function: of pytrees of arrays, by position; its options, by name, are hashable.
      name: of the program, in profiles; the default is the function's.
    """

    def unnamed(key: Any, options: tuple[tuple[str, Any], ...], *arrays: Any) -> T:
        return function(*arrays, **dict(options))

    unnamed.__name__ = name or function.__name__
    compiled = jax.jit(unnamed, static_argnums=(0, 1))

    @functools.wraps(function)
    def call(*arrays: Any, **options: Any) -> T:
        if in_trace():
            return function(*arrays, **options)
        return compiled(_choices(), tuple(options.items()), *arrays)

    return call


def _choices() -> Any:
    """What a traced function depends on besides its arguments and the settings of JAX."""
    tables = tuple(tuple(operation.table.items()) for operation in _OPERATIONS.values())
    return _automatic.get(), _portable.get(), tables


# --- Operations -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of an operation's table.

    Attributes:
      module: the full name of the module that has it, as a function of the operation's name that
        takes the arguments of the public function but `implementation`, all by name. It may also
        have `supports(**arguments)`, which gives the reason why the function cannot take these
        arguments, or None.
      runs_on: gives the reason why a device cannot run it, or None. Called before the module is
        imported.
      forward, backward: the directions in which it is more than plain JAX. With `backward=False`
        the dispatcher gives it the gradient of the "xla" row.
      plain: whether it is plain JAX, and thus meant by `implementation="xla"` as well.
      partitioned: whether XLA can divide it among devices. If not, the dispatcher runs it on each
        device's part of the batch. (An implementation with `forward=False` does so itself.)
      automatic: whether `implementation=None` may choose it.
      announced: whether it is logged where a GPU has to go without it.
    """

    module: str
    runs_on: Callable[[Target], str | None] = anywhere
    forward: bool = True
    backward: bool = True
    plain: bool = False
    partitioned: bool = False
    automatic: bool = True
    announced: bool = True


def plain(module: str, runs_on: Callable[[Target], str | None] = anywhere) -> Implementation:
    """The row of an implementation in plain JAX."""
    return Implementation(module, runs_on, plain=True, partitioned=True)


def by_onednn(module: str, *, backward: bool = True) -> Implementation:
    """The row of an implementation with oneDNN's calls: see `vssd_jax.kernels.onednn`."""
    return Implementation(module, onednn, backward=backward, announced=False)


class Operation:
    """An operation with its implementations.

    Attributes:
      name: of the public function.
      table: the implementations by name, the preferred ones first; the last one is "xla".
      parts: the operations that the "xla" implementation is put together from. It takes
        `implementation` as an argument and hands it on to them.
    """

    def __init__(
        self, name: str, table: dict[str, Implementation], parts: tuple["Operation", ...] = ()
    ) -> None:
        if list(table)[-1] != "xla" or not table["xla"].plain:
            raise ValueError(f"the last implementation of {name} must be 'xla', in plain JAX")
        self.name, self.table, self.parts = name, dict(table), parts
        self._run = unit(self._call, name)
        _OPERATIONS[name] = self

    def register(self, name: str, implementation: Implementation) -> None:
        """Adds a row, or replaces the one of that name; the automatic choice tries it first.

        Functions that are already compiled keep the implementation that they were compiled with.
        """
        others = {key: row for key, row in self.table.items() if key != name}
        self.table = {name: implementation, **others}

    def has(self, implementation: str | None) -> bool:
        """Whether this operation, or one that it is put together from, has such a row."""
        return implementation in self.table or any(part.has(implementation) for part in self.parts)

    def function(self, name: str) -> Callable:
        """The function of the row `name`; imports its module."""
        return getattr(self.module(name), self.name)

    def module(self, name: str) -> Any:
        return importlib.import_module(self.table[name].module)

    def _out_of_reach(self, name: str, arguments: dict[str, Any]) -> str | None:
        supports = getattr(self.module(name), "supports", None)
        return supports(**arguments) if supports else None

    def choose(self, implementation: str | None, **arguments: Any) -> str:
        """The name of the row to run.

        Args:
          implementation: None for the best one for the device and these arguments; "xla" for
            plain JAX; or the name of another row. Where the table has no such row, or it cannot
            take these arguments (which is logged once), the best of the others is chosen. So one
            name can be handed to all operations of a model.
          **arguments: those of the operation.

        Raises:
          UserError: if no operation has an implementation of that name, or the device cannot run
            this operation's.
        """
        check_name(implementation)
        if _automatic.get():
            return "xla"
        if _portable.get():
            implementation = implementation or "xla"
        device = target()
        rows = {
            name: row
            for name, row in self.table.items()
            if (row.plain if implementation == "xla" else row.automatic)
        }
        if implementation in self.table and implementation != "xla":
            reason = self.table[implementation].runs_on(device)
            if reason:
                raise UserError(
                    f"{self.name} cannot run as {implementation!r}: {reason}; "
                    "use implementation=None or 'xla'"
                )
            reason = self._out_of_reach(implementation, arguments)
            if reason is None:
                return implementation
            _log_once(
                f"{self.name} cannot run as {implementation!r} with these arguments, and takes "
                f"another implementation: {reason}"
            )
            rows.pop(implementation, None)
        elif implementation not in (None, "xla") and self.has(implementation):
            return "xla"  # its parts have such a row
        reasons: list[str] = []
        for name, row in rows.items():
            reason = row.runs_on(device) or self._out_of_reach(name, arguments)
            if reason is None:
                if name == "xla" and reasons and device.platform == "gpu":
                    _log_once(f"{self.name} falls back to XLA: {'; '.join(reasons)}")
                return name
            # A kernel for inference is a shortcut; that training takes the longer way is normal.
            if row.announced and row.backward and not row.plain:
                reasons.append(f"{name!r} cannot run, {reason}")
        raise AssertionError(f"{self.name}: 'xla' runs everywhere")

    def run(
        self,
        implementation: str | None,
        batched: dict[str, Any],
        shared: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Chooses an implementation and calls it.

        Args:
          implementation: see `choose`.
          batched: the arguments with a batch axis, which can be divided among devices.
          shared: the other arguments that are arrays.
          **options: the arguments that are no arrays.
        """
        return self._run(batched, shared or {}, implementation=implementation, **options)

    def _call(
        self,
        batched: dict[str, Any],
        shared: dict[str, Any],
        *,
        implementation: str | None,
        **options: Any,
    ) -> Any:
        name = self.choose(implementation, **batched, **shared, **options)
        row = self.table[name]
        if name == "xla":
            return self._xla(implementation, options)(**batched, **shared)
        f = functools.partial(self.function(name), **options)

        def on_device(batched: dict[str, Any], shared: dict[str, Any]) -> Any:
            return f(**batched, **shared)

        def on_mesh(batched: dict[str, Any], shared: dict[str, Any]) -> Any:
            return mesh.over_batch(on_device, batched, shared)

        kernel = on_mesh if row.forward and not row.partitioned else on_device
        if not row.backward:
            xla = self._xla(implementation, options)
            kernel = for_inference(kernel, lambda batched, shared: xla(**batched, **shared))
        return kernel(batched, shared)

    def _xla(self, implementation: str | None, options: dict[str, Any]) -> Callable:
        if self.parts:
            options = options | {"implementation": implementation}
        return functools.partial(differentiable(self.function("xla")), **options)


_OPERATIONS: dict[str, Operation] = {}


def operations() -> dict[str, Operation]:
    """All operations by name."""
    return dict(_OPERATIONS)


def check_name(implementation: str | None) -> None:
    """Raises UserError if no operation has an implementation of this name."""
    names = dict.fromkeys(["xla"] + [name for op in _OPERATIONS.values() for name in op.table])
    if implementation is not None and implementation not in names:
        raise UserError(
            f"unknown implementation {implementation!r}{did_you_mean(implementation, names)} "
            "(None stands for the best one for the device)"
        )


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def wrong_dtype(x: jax.Array, *dtypes: Any) -> str | None:
    """Why a kernel for `dtypes` cannot take `x`, or None."""
    if x.dtype in dtypes:
        return None
    return f"dtype {x.dtype} (it knows {', '.join(jax.numpy.dtype(d).name for d in dtypes)})"


def for_inference(kernel: Callable, plain: Callable) -> Callable:
    """`kernel`, and under differentiation `plain`, forward and backward.

    For kernels that have the forward pass alone: nothing is computed twice.
    """

    @jax.custom_vjp
    def f(*args: Any) -> Any:
        return kernel(*args)

    f.defvjp(lambda *args: jax.vjp(plain, *args), lambda pullback, dy: pullback(dy))
    return f
