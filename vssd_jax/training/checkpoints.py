"""The checkpoints of a run: the latest two and the best one are kept.

A checkpoint has parts, which are named arrays; see `vssd_jax.weights.checkpoint` for the form on
disk.
"""

import errno
import functools
import math
import os
import pathlib
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from vssd_jax.distributed import failure, is_main
from vssd_jax.errors import UserError
from vssd_jax.weights import checkpoint

# Part -> name -> array, or its shape, dtype and sharding.
Parts = Mapping[str, Mapping[str, Any]]


class Checkpoints:
    """The checkpoints of one workdir, a context that ends when the last save is complete.

    It begins with removing what a killed run left incomplete.

    Args:
      workdir: folder of the run.
      best_metric: the metric whose highest value marks the best checkpoint.
    """

    def __init__(self, workdir: str | os.PathLike, *, best_metric: str) -> None:
        self._best_metric = best_metric
        self._root = pathlib.Path(workdir).absolute() / checkpoint.FOLDER
        if is_main():
            checkpoint.clean_up(self._root)
        multihost_utils.sync_global_devices("checkpoints are clean")
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        # If a folder cannot be made in the background, Orbax waits five minutes for it.
        context.asynchronous.create_directories_asynchronously = False
        self._checkpointer = ocp.training.Checkpointer(
            self._root,
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(2), policies.BestN(get_metric_fn=self._score, n=1)]
            ),
        )
        self._saving: threading.Thread | None = None
        self._error: Exception | None = None
        self._complete = self.latest_step

    def _score(self, metrics: Mapping[str, float] | None) -> float:
        score = metrics.get(self._best_metric) if metrics else None
        return float("-inf") if score is None or math.isnan(score) else score

    @property
    def latest_step(self) -> int | None:
        """Of the latest checkpoint, complete or being saved."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best_step(self) -> int | None:
        """Of the highest metric; the latest of equals."""
        best = max(
            self._checkpointer.checkpoints,
            key=lambda checkpoint: (self._score(checkpoint.metrics), checkpoint.step),
            default=None,
        )
        return None if best is None else best.step

    def metrics(self, step: int | None) -> dict[str, float]:
        """The metrics that were saved with the checkpoint of `step`."""
        for saved in self._checkpointer.checkpoints:
            if saved.step == step:
                return saved.metrics or {}
        return {}

    def save(self, step: int, parts: Parts, metrics: dict[str, float]) -> None:
        """Starts to save; returns as soon as the arrays may change again.

        Raises:
          UserError: this or the last checkpoint cannot be written.
        """
        self.wait()
        response = self._start(step, parts, metrics)
        self._saving = threading.Thread(target=self._finish, args=(response, step))
        self._saving.start()

    def _start(self, step: int, parts: Parts, metrics: dict[str, float]) -> Any:
        layouts = {part: checkpoint.layout_of(arrays) for part, arrays in parts.items()}
        packed = {part: checkpoint.pack(arrays, layouts[part]) for part, arrays in parts.items()}
        try:
            return self._checkpointer.save_checkpointables_async(
                step, packed, metrics=metrics, custom_metadata=layouts, force=True
            )
        except Exception as error:
            self._error = error
            self.wait()

    def _finish(self, response: Any, step: int) -> None:
        try:
            response.result()
            if is_main():
                checkpoint.write_checksums(self._root / str(step))
            self._complete = step
        except Exception as error:  # raised by `wait`, in the main thread
            self._error = error

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
          UserError: it could not be written.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._error is not None:
            if failure(self._error):
                raise self._error
            last = f"step {self._complete}" if self._complete else "the start"
            raise UserError(
                f"no checkpoint can be written to {self._root}: {_reason(self._error)}; the run "
                f"can resume from {last}"
            ) from self._error

    def restore(self, abstract: Parts) -> dict[str, dict[str, jax.Array]]:
        """The parts of the latest checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of the arrays wanted.

        Raises:
          UserError: the checkpoint has other arrays.
        """
        step = self.latest_step
        found = self._checkpointer.checkpointables_metadata(step)
        stored, layouts = found.metadata, checkpoint.layouts_of(found)
        for part, wanted in abstract.items():
            saved = {name: tuple(leaf.shape) for name, leaf in stored[part].items()}
            saved = {n: shape for n, shape in saved.items() if n not in layouts[part]}
            saved |= checkpoint.members(layouts[part])
            if saved != {name: tuple(leaf.shape) for name, leaf in wanted.items()}:
                raise UserError(
                    f"the checkpoint of step {step} in {self._checkpointer.directory} does not fit "
                    "the config; use another --workdir, or the model and optimizer it was trained "
                    "with"
                )
        packed = {
            part: {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_replicated(wanted))
                if name in layouts[part]
                else wanted[name]
                for name, leaf in stored[part].items()
            }
            for part, wanted in abstract.items()
        }
        packed = self._checkpointer.load_checkpointables(step, packed)
        return {
            part: jax.jit(
                functools.partial(checkpoint.unpack, layout=layouts[part]),
                out_shardings={name: leaf.sharding for name, leaf in wanted.items()},
            )(packed[part])
            for part, wanted in abstract.items()
        }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        elif self._saving is not None:
            self._saving.join()
        if self._error is None:  # Orbax would raise it again
            self._checkpointer.close()


def _replicated(arrays: Mapping[str, Any]) -> jax.sharding.Sharding:
    """A sharding that leaves an array of any rank whole on each device of `arrays`."""
    sharding = next(iter(arrays.values())).sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _reason(error: BaseException) -> str:
    """The cause in one line: Orbax's own messages fill a page."""
    last = error
    current: BaseException | None = error
    while current is not None:
        text = str(current)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            if os.strerror(code) in text:
                return os.strerror(code)
        last, current = current, current.__cause__ or current.__context__
    return f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else ''}"
