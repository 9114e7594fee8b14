"""A run: its folder, checkpoints, metrics, progress bar, clock, and the signals that stop it."""

import contextlib
import math
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError
from vssd_jax.tasks.protocol import Task
from vssd_jax.training import html_report, run_report
from vssd_jax.training.checkpoints import Checkpoints, Parts
from vssd_jax.training.clock import Clock
from vssd_jax.training.evaluator import Evaluator
from vssd_jax.training.metrics import MetricWriter, read_metrics
from vssd_jax.training.plan import Plan
from vssd_jax.training.trackers import check_installed, open_tracker
from vssd_jax.training.workdir import claim


class StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once.

    Several processes agree on the step to stop at: JAX catches SIGTERM then, and SIGINT is
    passed on as one.
    """

    def __enter__(self) -> "StopSignal":
        self.received = False
        self._several = jax.process_count() > 1
        signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, step: int) -> bool:
        """Whether to stop before `step`; to be asked once for each."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Run:
    """The folder, clock and progress of a run, and its steps; made by `open_run`.

    Attributes:
      start: the step of the checkpoint that the run resumes from, 0 without one.
      stopping: whether a signal asked for the end.
      ended: whether the metric has not improved for as long as the plan allows.
      clock: of training; evaluation, saving and compilation pause it.
      checkpoints: of the run's folder.
      previous_config: what the folder's config was before, if it is known.
    """

    previous_config: dict[str, Any] | None = None

    def __init__(
        self,
        workdir: pathlib.Path,
        plan: Plan,
        config: Mapping[str, Any],
        best_metric: str,
        checkpoints: Checkpoints,
        resources: contextlib.ExitStack,
    ) -> None:
        self._workdir, self._plan, self._best_metric = workdir, plan, best_metric
        self._config, self._max_nonfinite = config, config["max_nonfinite"]
        self.checkpoints, self.start = checkpoints, checkpoints.latest_step or 0
        self.stopping, self._tracing, self.clock = False, False, Clock()
        self._step = self._logged_step = self.start
        self.ended = False
        self._evaluated: int | None = None  # the step of this process's last evaluation
        self._since_log: list[dict[str, jax.Array]] = []
        self._resources = resources

    @property
    def results(self) -> dict[str, float]:
        """The metrics that the run's latest checkpoint was saved with."""
        return self.checkpoints.metrics(self.start)

    def steps(self, batches: Iterator[dict]) -> Iterator[tuple[int, dict]]:
        """The number and the batch of each step to do, until the end or a signal."""
        use = self._resources.enter_context
        tracker = open_tracker(self._workdir, self._config)
        self._writer = use(contextlib.closing(MetricWriter(self._workdir, self.start, tracker)))
        self._stop_signal = use(StopSignal())
        self._progress = use(
            tqdm(
                total=self._plan.total,
                initial=self.start,
                unit="step",
                mininterval=1 if sys.stderr.isatty() else 20,
                disable=not is_main(),
            )
        )
        self.clock.lap()  # neither restoring nor initialising the state is training
        self.ended = self._lost_patience()
        while self._step < self._plan.total and not self.stopping and not self.ended:
            # The first batch waits for the pipeline to start, which does not count as training.
            with self.clock.paused() if self._step == self.start else contextlib.nullcontext():
                batch = next(batches)
            if self._step + 1 in self._plan.profiled and not self._tracing:
                jax.profiler.start_trace(self._workdir / "profile", create_perfetto_trace=True)
                self._tracing = True
            yield self._step + 1, batch

    def done(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes note of a step that was done, and checks for a signal."""
        if self._step == self.start:
            self._progress.unpause()  # the time left does not count the compilation
        self._step = step
        self._since_log.append(metrics)
        self._progress.update()
        self.stopping = self._stop_signal.before(step + 1)
        last = step == self._plan.total or self.stopping
        if self._tracing and (last or step + 1 not in self._plan.profiled):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._tracing = False

    def log(self, learning_rate: float, nonfinite: int) -> dict[str, float]:
        """Writes the means of the metrics since the last log, learning rate and speed.

        Raises:
          UserError: as many steps in a row as the config allows were skipped, for a loss or
            gradient that is not finite.
        """
        logged = _means(jax.device_get(self._since_log))
        images = (self._step - self._logged_step) * self._plan.batch_size
        speed = images / self.clock.lap()
        logged |= {"train/learning_rate": learning_rate, "train/images_per_second": speed}
        if nonfinite >= self._max_nonfinite:
            saved = self.checkpoints.latest_step
            good = "there is no" if saved is None else f"that of step {saved} is the last good"
            raise UserError(
                f"the loss or gradient was not finite in the last {nonfinite} steps, at step "
                f"{self._step} with learning rate {learning_rate:.3g}; {good} checkpoint"
            )
        self._writer.write(self._step, logged)
        self._progress.set_postfix_str(f"{speed:.0f} images/s, loss {logged['train/loss']:.3f}")
        self._since_log, self._logged_step = [], self._step
        return logged

    def evaluate(self, evaluator: Evaluator, arrays: dict[str, jax.Array]) -> dict[str, float]:
        """The metrics of the weights `arrays`, written and plotted."""
        with self.clock.paused():
            results = evaluator(arrays)
            self._evaluated = self._step
            self._writer.write(self._step, results)
            self._writer.plot()
            self.ended = self._lost_patience()
        return results

    def _lost_patience(self) -> bool:
        """Whether the last evaluations, as many as the plan allows, were no better than before."""
        if not self._plan.patience:
            return False
        since = 0
        if is_main():
            lines = [line for line in read_metrics(self._workdir) if self._best_metric in line]
            # null where it was not finite
            scores = [-math.inf if s is None else s for s in (x[self._best_metric] for x in lines)]
            since = len(scores) - 1 - int(np.argmax(scores)) if scores else 0
        if jax.process_count() > 1:
            since = int(multihost_utils.broadcast_one_to_all(np.int32(since)))
        return since >= self._plan.patience

    def save(self, parts: Parts, metrics: dict[str, float]) -> None:
        """Starts to save a checkpoint, see `Checkpoints.save`."""
        with self.clock.paused():
            self.checkpoints.save(self._step, parts, metrics)

    def keep(self, parts: Callable[[], Parts], nonfinite: int) -> None:
        """Saves the last step done before an error ends the run, if it is worth it.

        It is not where a checkpoint has it, or its loss or gradient was not finite. A process that
        is one of several cannot save alone.
        """
        saved = self._step in (0, self.checkpoints.latest_step)
        if saved or nonfinite or jax.process_count() > 1:
            return
        self.save(parts(), {})
        self.checkpoints.wait()
        self._progress.close()
        say(f"{self._workdir} is saved at step {self._step}")

    def finish(self, results: Mapping[str, float]) -> None:
        """Waits for the last checkpoint and says how the run ended."""
        self.checkpoints.wait()
        self._progress.close()  # the message begins a line of its own
        if self._step < self._plan.total and not self.ended:
            say(
                f"stopped: {self._workdir} is saved at step {self._step} of {self._plan.total}; "
                "the same command resumes"
            )
            return
        name, best = self._best_metric, self.checkpoints.best_step
        if self._step > self._plan.total:
            say(f"nothing was trained: the run was to end at step {self._plan.total}")
        if self.ended:
            say(
                f"{name} has not improved in {self._plan.patience} evaluations (config.patience): "
                f"the run ends at step {self._step} of {self._plan.total}"
            )
        score = self.checkpoints.metrics(best).get(name, results[name])
        say(
            f"done: {self._workdir} has {name} {results[name]:.4f} at step {self._step} "
            f"(best {score:.4f} at step {best})"
        )

    def report(
        self,
        task: Task,
        results: Mapping[str, float],
        *,
        parameters: int,
        commands: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Writes `report.html`, see `run_report.make`; what keeps it from that is only said.

        Without an evaluation by this process the report of an earlier one stays.
        """
        path = self._workdir / "report.html"
        if not is_main() or (self._evaluated is None and path.exists()):
            return
        step = self.checkpoints.best_step
        score = self.checkpoints.metrics(step).get(self._best_metric)
        best = None if step is None or score is None else (step, score)
        try:
            made = run_report.make(
                task, self._plan, self._workdir, step=self._step, results=results,
                evaluated=self._evaluated, best=best,
                parameters=parameters, ended=self.ended, commands=commands,
            )  # fmt: skip
            html_report.write(path, html_report.render(made))
        except Exception as error:  # a finished run is worth more than its report
            say(f"warning: {path} is not written: {type(error).__name__}: {error}")
            return
        say(f"report: {path}")


@contextlib.contextmanager
def open_run(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    plan: Plan,
    *,
    best_metric: str,
    checkpoint_bytes: int,
) -> Iterator[Run]:
    """Locks the folder of a run and opens its checkpoints.

    Args:
      workdir: the folder.
      config: of the run; it is written into the folder.
      plan: of the run.
      best_metric: the metric whose highest value marks the best checkpoint.
      checkpoint_bytes: size of a checkpoint.

    Raises:
      UserError: a folder that cannot be used, see `vssd_jax.training.workdir.claim`, or a
        tracker whose package is missing.
    """
    check_installed(config["tracker"])
    workdir = pathlib.Path(workdir)
    with (
        claim(workdir, config, checkpoint_bytes=checkpoint_bytes) as previous,
        Checkpoints(workdir, best_metric=best_metric) as checkpoints,
        contextlib.ExitStack() as resources,
    ):
        run = Run(workdir, plan, config, best_metric, checkpoints, resources)
        run.previous_config = previous
        yield run


def _means(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps in which a metric was finite; `<name>_steps` is how many, if not all."""
    means = {}
    for name in metrics[0]:
        values = np.array([step[name] for step in metrics], np.float64)
        finite = values[np.isfinite(values)]
        means[f"train/{name}"] = float(finite.mean()) if len(finite) else float("nan")
        if len(finite) < len(values):
            means[f"train/{name}_steps"] = float(len(finite))
    return means
