"""The training loop, the same for every task."""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from vssd_jax.errors import UserError
from vssd_jax.models.registry import find
from vssd_jax.tasks import make_task
from vssd_jax.training import optimizer as optim
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.evaluation import Evaluator
from vssd_jax.training.metrics import MetricWriter
from vssd_jax.training.sharding import check_batch, device_batches, make_mesh
from vssd_jax.training.state import Functional, init_state, make_train_step
from vssd_jax.weights.load import load


class _StopSignal:
    """Notes SIGTERM and SIGINT; a second one ends the process at once."""

    def __enter__(self):
        self.received = False
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.received:
            os._exit(128 + number)
        self.received = True

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def pretrained(config: ml_collections.ConfigDict, num_classes: int) -> dict[str, np.ndarray]:
    """The weights of `config.init_from`, without a classifier of another number of classes."""
    loaded = load(config.init_from, model=config.model, overrides=config.model_options.to_dict())
    if loaded.num_classes == num_classes:
        return loaded.params
    print(f"{config.init_from} has {loaded.num_classes} classes: the classifier starts fresh")
    classifier = find(config.model)[0].classifier
    return {n: value for n, value in loaded.params.items() if not n.startswith(classifier)}


def _prepare_workdir(workdir: pathlib.Path, config: dict) -> None:
    """Makes the folder and notes the config; a changed config is told, not refused."""
    path = workdir / "config.json"
    text = json.dumps(config, indent=2)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old, new = json.loads(path.read_text()), json.loads(text)
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if changed:
                print(f"the config differs from this workdir's in {', '.join(changed)}")
        part = path.with_suffix(".part")
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error.strerror}") from error


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
    total = optim.total_steps(config, steps_per_epoch)
    eval_every = config.eval_every_epochs * steps_per_epoch
    schedule = optim.make_schedule(config, steps_per_epoch)
    optimizer = optim.make_optimizer(config, schedule)
    _prepare_workdir(workdir, {**config.to_dict(), "num_classes": task.num_classes})

    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda: init_state(functional, optimizer, init_key))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract
    )
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    checkpoints = Checkpoints(workdir, best_metric=task.best_metric)
    start = checkpoints.latest_step or 0
    if start:
        state = checkpoints.restore(abstract)
        print(f"resumed {workdir} at step {start} of {total}")
    else:
        weights = pretrained(config, task.num_classes) if config.init_from else None
        state = jax.device_put(init_state(functional, optimizer, init_key, weights), shardings)
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
    )

    results = checkpoints.metrics(start) if start else {}
    writer = MetricWriter(workdir, start)
    batches = device_batches(task.train_batches(start), mesh)
    progress = tqdm(
        total=total, initial=start, unit="step", mininterval=1 if sys.stderr.isatty() else 20
    )
    pending, step = [], start
    timed_from, since = start, time.perf_counter()
    # The mesh in the context tells the kernels how the batch is split.
    with jax.set_mesh(mesh), _StopSignal() as stop, progress:
        while step < total and not stop.received:
            state, metrics = train_step(state, next(batches), step_key)
            step += 1
            pending.append(metrics)
            progress.update()
            if step == start + 1:  # neither the speed nor the time left counts the compilation
                jax.block_until_ready(metrics)
                progress.unpause()
                timed_from, since = step, time.perf_counter()
            evaluating = step % eval_every == 0 or step == total
            if step % config.log_every_steps == 0 or step == total or stop.received:
                logged = _mean(jax.device_get(pending), "train/")
                images = (step - timed_from) * config.batch_size
                speed = images / (time.perf_counter() - since)
                logged["train/learning_rate"] = float(schedule(step - 1))
                logged["train/images_per_second"] = speed
                _check_finite(int(state.nonfinite), config, step, logged, checkpoints)
                writer.write(step, logged)
                task.check(logged)
                progress.set_postfix_str(f"{speed:.0f} images/s, loss {logged['train/loss']:.3f}")
                pending, timed_from, since = [], step, time.perf_counter()
            if evaluating or stop.received:
                begin = time.perf_counter()
                if evaluating:
                    results = evaluate(state.ema)
                    writer.write(step, results)
                    writer.plot()
                checkpoints.save(state, results if evaluating else {})
                since += time.perf_counter() - begin  # the speed is that of training
    checkpoints.close()
    writer.close()
    name = task.best_metric
    if step < total:
        print(f"stopped: {workdir} is saved at step {step} of {total}; the same command resumes")
    else:
        best = checkpoints.best_step
        print(
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
