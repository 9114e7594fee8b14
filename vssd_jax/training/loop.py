"""The training loop, the same for every task."""

import contextlib
import os
import pathlib
import re
import signal
import sys
import time

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from vssd_jax.config import total_steps
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError
from vssd_jax.host import compiler_options
from vssd_jax.models.family import find
from vssd_jax.tasks import make_task
from vssd_jax.training import optimizer as optim
from vssd_jax.training import report
from vssd_jax.training import workdir as folders
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.evaluation import Evaluator
from vssd_jax.training.metrics import MetricWriter
from vssd_jax.training.sharding import check_batch, device_batches, make_mesh, state_shardings
from vssd_jax.training.state import Functional, init_state, make_train_step
from vssd_jax.weights.load import load
from vssd_jax.weights.state import check, shapes


class _StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once.

    Several processes agree on the step to stop at: JAX catches SIGTERM then, and SIGINT is
    passed on as one.
    """

    def __enter__(self):
        self.received = False
        self._several = jax.process_count() > 1
        signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def _note(self, number, frame):
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

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def pretrained(config: ml_collections.ConfigDict, model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights of `config.init_from` that `model` starts from.

    Left fresh are a classifier of another number of classes, and of a detector or segmentor that
    starts from a classifier all but the backbone.

    Args:
      config: of the run.
      model: whose parameters the weights are to fill; only its shapes are used.

    Raises:
      UserError: weights that cannot be read or do not fit.
    """
    source, expected = config.init_from, shapes(model)
    overrides = config.model_options.to_dict()
    loaded = load(source, model=config.model, overrides=overrides, backbone=True)
    params, fresh = loaded.params, ()
    own = find(loaded.model)[0].classifier
    if loaded.model != config.model:
        params = {
            f"backbone.{name}": value
            for name, value in params.items()
            if not name.startswith((*own, "norm."))
        }
        fresh = [name for name in expected if not name.startswith("backbone.")]
        fresh += [name for name in expected if name.startswith("backbone.out_norms.")]
        say(f"{source} is a classifier: all but the backbone starts fresh")
    elif loaded.num_classes != model.num_classes:
        fresh = [name for name in expected if name.startswith(own)]
        params = {name: value for name, value in params.items() if name not in fresh}
        say(f"{source} has {loaded.num_classes} classes: the classifier starts fresh")
    check(expected, params, fresh=fresh)
    return params


def _profiled_steps(text: str) -> range:
    """The steps of `config.profile_steps`: "10:15" are 10, 11, ... 15."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise UserError(f"config.profile_steps={text!r} must be like 10:15, the first and the last")
    return range(int(match[1]), int(match[2]) + 1)


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains from the latest checkpoint in `workdir`, or from the start.

    Returns:
      The metrics of the last evaluation.

    Raises:
      UserError: a config, dataset or workdir that cannot be used.
    """
    workdir = pathlib.Path(workdir)
    task = make_task(config)
    mesh = make_mesh(config.mesh)
    check_batch("batch_size", config.batch_size, mesh.size, config.accumulate)
    steps_per_epoch = task.train_size // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"config.batch_size={config.batch_size} is more than the {task.train_size} images "
            "for training"
        )
    functional = Functional(task.build)
    evaluate = Evaluator(task, functional, mesh)
    total = total_steps(config, steps_per_epoch)
    eval_every = config.eval_every_epochs * steps_per_epoch
    profiled = _profiled_steps(config.profile_steps)
    schedule = optim.make_schedule(config, steps_per_epoch)
    optimizer = optim.make_optimizer(config, schedule)
    described = {**config.to_dict(), "num_classes": task.num_classes}

    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda: init_state(functional, optimizer, init_key))
    shardings = state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    train_step = jax.jit(
        make_train_step(
            functional,
            optimizer,
            task.loss,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
        ),
        donate_argnums=0,
        out_shardings=(shardings, replicated),
        compiler_options=compiler_options(),
    )

    with (
        folders.opened(workdir, described, checkpoint_bytes=report.state_bytes(abstract)),
        Checkpoints(workdir, best_metric=task.best_metric) as checkpoints,
    ):
        say(report.describe(described, mesh, abstract))
        report.check_memory(report.device_bytes(abstract), "the training state")
        start = checkpoints.latest_step or 0
        if start:
            state = checkpoints.restore(abstract)
            say(f"resumed {workdir} at step {start} of {total}")
        else:
            weights = pretrained(config, functional.abstract) if config.init_from else None
            state = jax.device_put(init_state(functional, optimizer, init_key, weights), shardings)
        results = checkpoints.metrics(start) if start else {}
        writer = MetricWriter(workdir, start)
        progress = tqdm(
            total=total,
            initial=start,
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 20,
            disable=not is_main(),
        )
        # The mesh in the context tells the kernels how the batch is split.
        with (
            jax.set_mesh(mesh),
            _StopSignal() as stop,
            progress,
            contextlib.closing(writer),
        ):
            batches = device_batches(task.train_batches(start), mesh)
            programs = {}  # by the shapes of a batch, of which detection has a few
            pending, step, stopped = [], start, False
            timed_from, since = start, time.perf_counter()
            while step < total and not stopped:
                batch = next(batches)
                shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
                if (program := programs.get(shapes)) is None:
                    programs[shapes] = program = train_step.lower(state, batch, step_key).compile()
                    say(report.describe_program(program))
                    report.check_memory(report.program_bytes(program), "a training step")
                step += 1
                if step in profiled and step - 1 not in profiled:
                    jax.profiler.start_trace(workdir / "profile", create_perfetto_trace=True)
                state, metrics = program(state, batch, step_key)
                pending.append(metrics)
                progress.update()
                if step in profiled and step + 1 not in profiled:
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                if step == start + 1:  # neither the speed nor the time left counts the compilation
                    jax.block_until_ready(metrics)
                    progress.unpause()
                    timed_from, since = step, time.perf_counter()
                stopped = stop.before(step + 1)
                evaluating = step % eval_every == 0 or step == total
                if step % config.log_every_steps == 0 or step == total or stopped:
                    logged = _mean(jax.device_get(pending), "train/")
                    images = (step - timed_from) * config.batch_size
                    speed = images / (time.perf_counter() - since)
                    logged["train/learning_rate"] = float(schedule(step - 1))
                    logged["train/images_per_second"] = speed
                    _check_finite(int(state.nonfinite), config, step, logged, checkpoints)
                    writer.write(step, logged)
                    task.check(logged)
                    progress.set_postfix_str(
                        f"{speed:.0f} images/s, loss {logged['train/loss']:.3f}"
                    )
                    pending, timed_from, since = [], step, time.perf_counter()
                if evaluating or stopped or step % (config.save_every_steps or total) == 0:
                    begin = time.perf_counter()
                    if evaluating:
                        results = evaluate(state.ema)
                        writer.write(step, results)
                        writer.plot()
                    checkpoints.save(state, results if evaluating else {})
                    since += time.perf_counter() - begin  # the speed is that of training
        checkpoints.wait()
        name = task.best_metric
        if step < total:
            say(f"stopped: {workdir} is saved at step {step} of {total}; the same command resumes")
        else:
            best = checkpoints.best_step
            say(
                f"done: {workdir} has {name} {results[name]:.4f} at step {step} "
                f"(best {checkpoints.metrics(best)[name]:.4f} at step {best})"
            )
    return results


def _mean(metrics: list[dict], prefix: str) -> dict[str, float]:
    return {prefix + name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}


def _check_finite(nonfinite: int, config, step: int, logged: dict, checkpoints: Checkpoints):
    """Ends a run that skips all its steps."""
    if nonfinite >= config.max_nonfinite:
        raise UserError(
            f"the loss or gradient was not finite in the last {nonfinite} steps, at step {step} "
            f"with learning rate {logged['train/learning_rate']:.3g}; the last good checkpoint is "
            f"that of step {checkpoints.latest_step}"
        )
