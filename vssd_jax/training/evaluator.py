"""Evaluation of a task's model."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vssd_jax.host import compiler_options
from vssd_jax.models.casting import cast_together
from vssd_jax.models.split import Arrays, SplitModel
from vssd_jax.tasks.protocol import Task
from vssd_jax.training.sharding import check_batch, device_batches


def make_eval_step(task: Task, model: SplitModel) -> Callable[[Arrays, dict], dict[str, Any]]:
    """`(arrays, batch) -> outputs`, to be compiled by the caller; see `Task.eval_step`."""

    def eval_step(arrays: Arrays, batch: dict) -> dict[str, Any]:
        arrays = cast_together(arrays, task.config.dtype)
        return task.eval_step(model.merge(arrays, training=False), batch)

    return eval_step


class Evaluator:
    """Evaluates the weights of a task's model; compiled once for each shape of batch.

    Args:
      task: gives the batches and the metrics.
      model: of the task.
      mesh: the devices.

    Raises:
      UserError: an evaluation batch that does not divide over the devices.
    """

    def __init__(self, task: Task, model: SplitModel, mesh: Mesh) -> None:
        check_batch("eval_batch_size", task.config.eval_batch_size, mesh.size)
        self._task, self._mesh = task, mesh
        self._step = jax.jit(
            make_eval_step(task, model),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
            compiler_options=compiler_options(),
        )

    def __call__(self, arrays: Arrays) -> dict[str, float]:
        """The metrics of the whole evaluation set."""
        # Kernels read from the mesh in the context how the batch is sharded.
        with jax.set_mesh(self._mesh):
            return self._task.summarize(self._outputs(arrays))

    def _outputs(self, arrays: Arrays) -> Iterator[dict[str, Any]]:
        """The results of `eval_step` as NumPy arrays, while the device computes the next batch."""
        ahead = None
        for batch in device_batches(self._task.eval_batches(), self._mesh):
            done, ahead = ahead, self._step(arrays, batch)
            if done is not None:
                yield jax.device_get(done)
        if ahead is not None:
            yield jax.device_get(ahead)
