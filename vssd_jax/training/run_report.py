"""The report of a training run."""

import pathlib
from collections.abc import Mapping, Sequence

import ml_collections

from vssd_jax.tasks.protocol import Task
from vssd_jax.training import html_report
from vssd_jax.training.html_report import duration, training_seconds
from vssd_jax.training.metrics import read_metrics
from vssd_jax.training.plan import Plan


def make(
    task: Task,
    plan: Plan,
    workdir: pathlib.Path,
    *,
    step: int,
    results: Mapping[str, float],
    evaluated: int | None,
    best: tuple[int, float] | None,
    parameters: int,
    ended: bool,
    commands: Sequence[tuple[str, str]],
) -> html_report.Report:
    """The report of a run.

    Args:
      task: what was trained.
      plan: of the run.
      workdir: its folder.
      step: the last one that was done.
      results: the metrics of the last evaluation.
      evaluated: the step of an evaluation by this process, of which the task knows more than
        `results`; or None.
      best: step and best metric of the best checkpoint, if there is one with metrics.
      parameters: of the model.
      ended: whether the run ended before its last step as no evaluation was better.
      commands: what each does and the command, for those who want to repeat it.
    """
    config, lines = task.config, read_metrics(workdir)
    epochs = step / plan.steps_per_epoch
    facts = [
        ("task", config.task),
        ("model", f"{config.model}, {parameters:,} parameters"),
        ("start", f"weights of {config.init_from}" if config.init_from else "random weights"),
        (
            "trained",
            f"{step:,} of {max(step, plan.total):,} steps with {plan.batch_size:,} pictures each: "
            f"{step * plan.batch_size:,} pictures, {epochs:.3g} epochs",
        ),
    ]
    seconds = training_seconds(lines, plan.batch_size)
    if seconds:
        facts.append(
            (
                "time",
                f"{duration(seconds)} of training, {step * plan.batch_size / seconds:,.0f} "
                "pictures/s; evaluations, saving and compilation come on top",
            )
        )
    if evaluated is not None:
        average = "the averaged weights" if config.ema_decay else "the weights"
        facts.append(("evaluation", f"of {average} at step {evaluated:,}"))
    if best is not None:
        facts.append(("best", f"{task.best_metric} {best[1]:.4f} at step {best[0]:,}"))
    facts.append(("folder", str(workdir)))
    return html_report.of_task(
        task,
        facts=facts,
        results=results,
        lines=lines,
        commands=commands or _in_python(config, workdir),
        notes=_notes(plan, step, evaluated, ended),
    )


def _notes(plan: Plan, step: int, evaluated: int | None, ended: bool) -> list[str]:
    notes = []
    if ended:
        notes.append(
            f"The run ended at step {step:,} of {plan.total:,}: {plan.patience} evaluations in a "
            "row were not better (config.patience)."
        )
    elif step < plan.total:
        notes.append(f"The run was stopped at step {step:,} of {plan.total:,}; it can go on.")
    if evaluated is None:
        notes.append(
            "There was no evaluation since the run last started: no classes and no pictures."
        )
    elif evaluated < step:
        notes.append(f"The evaluation is that of step {evaluated:,}.")
    return notes


def _in_python(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[tuple[str, str]]:
    program = (
        "from vssd_jax.tasks import make_task\n"
        "from vssd_jax.training.loop import train\n\n"
        f"train(make_task(config), config, {str(workdir)!r})"
    )
    return [(f"Train, with this config for {config.task}, in Python", program)]
