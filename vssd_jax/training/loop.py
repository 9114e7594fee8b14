"""The training loop, the same for every task."""

import os
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from vssd_jax.distributed import say
from vssd_jax.tasks.protocol import Task
from vssd_jax.training import report
from vssd_jax.training.plan import make_plan
from vssd_jax.training.run import open_run
from vssd_jax.training.state import to_parts
from vssd_jax.training.step import Trainer
from vssd_jax.weights.pretrained import pretrained_weights


def train(
    task: Task,
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    commands: Sequence[tuple[str, str]] = (),
) -> dict[str, float]:
    """Trains from the latest checkpoint in `workdir`, or from the start.

    Args:
      task: what is trained; made of the same config.
      config: of the run, see `vssd_jax.config`.
      workdir: folder of the run.
      commands: for the report, how to repeat the run: what each does, and the command.

    Returns:
      The metrics of the last evaluation.

    Raises:
      UserError: a config, dataset or workdir that cannot be used.
    """
    plan = make_plan(config, task.train_size)
    trainer = Trainer(task, config, plan)
    fields = {
        **config.to_dict(),
        "num_classes": task.num_classes,
        "class_names": list(task.class_names),
        "preprocessing": task.preprocessing,
        "best_metric": task.best_metric,
    }
    checkpoint_bytes, best = report.total_bytes(trainer.abstract), task.best_metric
    with open_run(
        workdir, fields, plan, best_metric=best, checkpoint_bytes=checkpoint_bytes
    ) as run:
        say(report.describe(fields, trainer.mesh, trainer.named))
        report.check_memory(report.device_bytes(trainer.abstract), "the training state")
        if run.start:
            state = trainer.from_parts(run.checkpoints.restore(to_parts(trainer.named)))
            say(f"resumed {workdir} at step {run.start} of {plan.total}")
            report.compare_rates(run.previous_config, config, task.train_size, run.start)
        else:
            state = trainer.fresh_state(_initial_weights(task, trainer))
        results = run.results
        try:
            for step, batch in run.steps(trainer.device_batches(task.train_batches(run.start))):
                state, metrics = trainer.step(state, batch, run.clock)
                run.done(step, metrics)
                if plan.logs(step) or run.stopping:
                    rate = float(trainer.learning_rate(step - 1))
                    task.check(run.log(rate, int(state.nonfinite)))
                if plan.evaluates(step):
                    results = run.evaluate(trainer.evaluate, state.ema)
                if plan.saves(step) or run.stopping:
                    run.save(trainer.to_parts(state), results if plan.evaluates(step) else {})
        except Exception as error:
            # Data or an evaluation that fail must not cost the steps since the last checkpoint.
            if not isinstance(error, jax.errors.JaxRuntimeError):  # which leaves no state
                run.keep(lambda: trainer.to_parts(state), int(state.nonfinite))
            raise
        if not results and not run.stopping:  # it was saved without an evaluation, at its end
            results = run.evaluate(trainer.evaluate, state.ema)
        run.finish(results)
        parameters = sum(leaf.size for leaf in trainer.named.params.values())
        run.report(task, results, parameters=parameters, commands=commands)
    return results


def _initial_weights(task: Task, trainer: Trainer) -> dict[str, np.ndarray] | None:
    """The weights of `config.init_from`, or None."""
    config = task.config
    if not config.init_from:
        return None
    return pretrained_weights(
        config.init_from,
        config.model,
        trainer.model.abstract,
        config.model_options.to_dict(),
        class_names=task.class_names,
    )
