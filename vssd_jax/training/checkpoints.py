"""Checkpoints of a run by Orbax: the latest two and the best one are kept.

A checkpoint has two parts: "ema", the averaged weights that evaluation reads, by dotted name;
and "train", the rest of the training state.
"""

import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vssd_jax.errors import UserError
from vssd_jax.training.state import TrainState

_FOLDER = "checkpoints"


def read_ema(workdir: str | pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
    """The averaged weights of the latest checkpoint, and its step.

    Raises:
      UserError: there is no checkpoint yet.
    """
    with ocp.training.Checkpointer(pathlib.Path(workdir).absolute() / _FOLDER) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            raise UserError(f"{workdir} has no checkpoint yet")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for name, leaf in _metadata(checkpointer, latest.step)["ema"].items()
        }
        ema = checkpointer.load_checkpointables(latest.step, {"ema": abstract})["ema"]
    return {name: np.asarray(value) for name, value in ema.items()}, latest.step


def _named(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths: Orbax then need not know our classes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _parts(state: TrainState) -> dict[str, dict]:
    return {"ema": state.ema, "train": _named(state.replace(ema={}))}


def _metadata(checkpointer, step: int) -> dict[str, dict]:
    """Shape and dtype of every array of a checkpoint, by part and name."""
    return checkpointer.checkpointables_metadata(step).metadata


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: folder of the run.
      best_metric: the metric whose highest value marks the best checkpoint.
    """

    def __init__(self, workdir: str | pathlib.Path, *, best_metric: str):
        self._best_metric = best_metric
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(workdir).absolute() / _FOLDER,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(2), policies.BestN(get_metric_fn=self._score, n=1)]
            ),
            cleanup_tmp_directories=True,
        )

    def _score(self, metrics) -> float:
        return metrics.get(self._best_metric, float("-inf")) if metrics else float("-inf")

    @property
    def latest_step(self) -> int | None:
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
        """Starts to save; returns as soon as the arrays may change again."""
        self._checkpointer.save_checkpointables_async(
            int(state.step), _parts(state), metrics=metrics, force=True
        )

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, placed as the shardings of `abstract` say.

        Raises:
          UserError: the checkpoint is of another model or optimizer.
        """
        step, parts = self.latest_step, _parts(abstract)
        saved = {
            part: {name: tuple(leaf.shape) for name, leaf in leaves.items()}
            for part, leaves in _metadata(self._checkpointer, step).items()
        }
        wanted = {part: {n: x.shape for n, x in leaves.items()} for part, leaves in parts.items()}
        if saved != wanted:
            raise UserError(
                f"the checkpoint of step {step} in {self._checkpointer.directory} does not fit the "
                "config; use another --workdir, or the model and optimizer it was trained with"
            )
        parts = self._checkpointer.load_checkpointables(step, parts)
        structure = jax.tree.structure(abstract.replace(ema={}))
        names = _named(abstract.replace(ema={}))
        state = jax.tree.unflatten(structure, [parts["train"][name] for name in names])
        return state.replace(ema=parts["ema"])

    def close(self) -> None:
        """Waits for the last save."""
        self._checkpointer.close()
