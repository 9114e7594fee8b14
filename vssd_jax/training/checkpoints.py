"""Checkpoints of a run by Orbax: the latest two and the best one are kept.

A checkpoint has two parts: "ema", the averaged weights that evaluation reads, by dotted name;
and "train", the rest of the training state. It is complete once it holds the checksums of its
files: Orbax reads a flipped byte of an array without complaint.

For every array Orbax runs a millisecond of Python, which a training step would have to wait for.
What each device has whole is therefore saved as one vector for each dtype, and the checkpoint's
metadata tell the layout.
"""

import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from vssd_jax.distributed import failure, is_main
from vssd_jax.errors import UserError
from vssd_jax.training.state import TrainState

_FOLDER = "checkpoints"
_CHECKSUMS = "checksums.json"


def read_ema(workdir: str | os.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """The averaged weights of the latest complete checkpoint, and its step.

    Raises:
      UserError: there is no checkpoint yet.
    """
    root = pathlib.Path(workdir).absolute() / _FOLDER
    for step in reversed(_steps(root)):
        folder = root / str(step)
        problem = _problem(folder)
        if problem == "damaged":
            print(f"warning: {folder} is damaged and passed over", file=sys.stderr)
        if problem is None:
            break
    else:
        raise UserError(f"{workdir} has no checkpoint yet")
    return read_part(folder, "ema"), step


def read_part(folder: pathlib.Path, part: str) -> dict[str, np.ndarray]:
    """The arrays of one part of a checkpoint, "ema" or "train", by name."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = ocp.checkpointables_metadata(folder)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in found.metadata[part].items()
    }
    arrays = ocp.load_checkpointables(folder, {part: abstract})[part]
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    return _unpack(arrays, _layouts(found)[part])


def _steps(root: pathlib.Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdigit())


# --- Whole or not -----------------------------------------------------------------------------


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file by its path."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(_CHECKSUMS):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[path.relative_to(folder).as_posix()] = digest
    return sums


def _write_checksums(folder: pathlib.Path) -> None:
    part = folder / f"{_CHECKSUMS}.part"
    with part.open("w") as file:
        json.dump(_checksums(folder), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / _CHECKSUMS)


def _problem(folder: pathlib.Path) -> str | None:
    """"incomplete", "damaged" or None."""
    path = folder / _CHECKSUMS
    if not folder.name.isdigit() or not path.exists():
        return "incomplete"
    try:
        expected = json.loads(path.read_bytes())
    except ValueError:
        return "damaged"
    found = _checksums(folder)
    if expected.keys() - found.keys():
        return "incomplete"  # killed while removing it
    return None if found == expected else "damaged"


def _clean_up(root: pathlib.Path) -> None:
    """Removes what a killed process left, and moves damaged checkpoints out of the way."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        problem = _problem(folder)
        if problem == "incomplete":
            print(f"warning: the checkpoint {folder} is incomplete: removed", file=sys.stderr)
            shutil.rmtree(folder)
        elif problem == "damaged":
            place = root.parent / "damaged" / folder.name
            while place.exists():
                place = place.with_name(place.name + "_")
            place.parent.mkdir(exist_ok=True)
            os.rename(folder, place)
            print(f"warning: the checkpoint {folder} is damaged: now {place}", file=sys.stderr)


# --- Saving and restoring ---------------------------------------------------------------------


def _named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths: Orbax then need not know our classes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _parts(state: TrainState) -> dict[str, dict]:
    return {"ema": state.ema, "train": _named(state.replace(ema={}))}


def _layout(leaves: dict[str, Any]) -> dict[str, list]:
    """Names and shapes of the arrays that each vector is made of."""
    layout = {}
    for name, leaf in leaves.items():
        if leaf.sharding.is_fully_replicated:
            layout.setdefault(f"packed_{leaf.dtype}", []).append((name, leaf.shape))
    return layout


def _layouts(found) -> dict[str, dict]:
    """The layout of each part in a checkpoint's metadata; the first checkpoints had none."""
    return found.custom_metadata or {part: {} for part in found.metadata}


def _members(layout: dict[str, list]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for members in layout.values() for name, shape in members}


@jax.jit
def _concatenate(groups: dict[str, list]) -> dict[str, jax.Array]:
    return {
        vector: jnp.concatenate([leaf.ravel() for leaf in leaves])
        for vector, leaves in groups.items()
    }


def _pack(leaves: dict[str, Any], layout: dict[str, list]) -> dict[str, Any]:
    packed = _members(layout)
    groups = {vector: [leaves[n] for n, _ in members] for vector, members in layout.items()}
    return _concatenate(groups) | {n: leaf for n, leaf in leaves.items() if n not in packed}


def _unpack(arrays: dict[str, Any], layout: dict[str, list]) -> dict[str, Any]:
    leaves = {name: array for name, array in arrays.items() if name not in layout}
    for vector, members in layout.items():
        start = 0
        for name, shape in members:
            end = start + math.prod(shape)
            leaves[name] = arrays[vector][start:end].reshape(shape)
            start = end
    return leaves


def _everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """An array of any rank, whole on each device of `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


class Checkpoints:
    """The checkpoints of one workdir, a context that ends when the last save is complete.

    The first thing done is to clean up after a killed run.

    Args:
      workdir: folder of the run.
      best_metric: the metric whose highest value marks the best checkpoint.
    """

    def __init__(self, workdir: str | os.PathLike, *, best_metric: str):
        self._best_metric = best_metric
        self._root = pathlib.Path(workdir).absolute() / _FOLDER
        if is_main():
            _clean_up(self._root)
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

    def _score(self, metrics) -> float:
        return metrics.get(self._best_metric, float("-inf")) if metrics else float("-inf")

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

    def metrics(self, step: int) -> dict[str, float]:
        """That were saved with the checkpoint of `step`."""
        for checkpoint in self._checkpointer.checkpoints:
            if checkpoint.step == step:
                return checkpoint.metrics or {}
        return {}

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts to save; returns as soon as the arrays may change again.

        Raises:
          UserError: this or the last checkpoint cannot be written.
        """
        self.wait()
        self._saving = threading.Thread(target=self._finish, args=self._start(state, metrics))
        self._saving.start()

    def _start(self, state: TrainState, metrics: dict[str, float]) -> tuple:
        step, parts = int(state.step), _parts(state)
        layouts = {part: _layout(leaves) for part, leaves in parts.items()}
        packed = {part: _pack(leaves, layouts[part]) for part, leaves in parts.items()}
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, packed, metrics=metrics, custom_metadata=layouts, force=True
            )
        except Exception as error:
            self._error = error
            self.wait()
        return response, step

    def _finish(self, response, step: int) -> None:
        try:
            response.result()
            if is_main():
                _write_checksums(self._root / str(step))
            self._complete = step
        except Exception as error:  # told by `wait`, in the main thread
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

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, placed as the shardings of `abstract` say.

        Raises:
          UserError: the checkpoint is of another model or optimizer.
        """
        step, parts = self.latest_step, _parts(abstract)
        found = self._checkpointer.checkpointables_metadata(step)
        stored, layouts = found.metadata, _layouts(found)
        for part, wanted in parts.items():
            saved = {name: tuple(leaf.shape) for name, leaf in stored[part].items()}
            saved = {n: shape for n, shape in saved.items() if n not in layouts[part]}
            if saved | _members(layouts[part]) != {n: leaf.shape for n, leaf in wanted.items()}:
                raise UserError(
                    f"the checkpoint of step {step} in {self._checkpointer.directory} does not fit "
                    "the config; use another --workdir, or the model and optimizer it was trained "
                    "with"
                )
        whole = _everywhere(abstract.step.sharding)
        packed = {
            part: {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
                if name in layouts[part]
                else parts[part][name]
                for name, leaf in stored[part].items()
            }
            for part in parts
        }
        packed = self._checkpointer.load_checkpointables(step, packed)
        leaves = {
            part: jax.jit(
                functools.partial(_unpack, layout=layouts[part]),
                out_shardings={name: leaf.sharding for name, leaf in wanted.items()},
            )(packed[part])
            for part, wanted in parts.items()
        }
        structure = jax.tree.structure(abstract.replace(ema={}))
        names = _named(abstract.replace(ema={}))
        state = jax.tree.unflatten(structure, [leaves["train"][name] for name in names])
        return state.replace(ema=leaves["ema"])

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if kind is None:
            self.wait()
        elif self._saving is not None:
            self._saving.join()
        if self._error is None:  # Orbax would raise it again
            self._checkpointer.close()


def _reason(error: Exception) -> str:
    """The system's own word in an error of Orbax, whose messages fill a page."""
    while error is not None:
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            if os.strerror(code) in text:
                return os.strerror(code)
        error, last = error.__cause__ or error.__context__, error
    return f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else ''}"
