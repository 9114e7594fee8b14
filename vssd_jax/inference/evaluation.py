"""Evaluation of given weights: size, speed and the metrics of a config's task."""

import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vssd_jax import strict_json
from vssd_jax.distributed import is_main, say
from vssd_jax.errors import UserError, describe_difference
from vssd_jax.host import compiler_options
from vssd_jax.known_classes import readable
from vssd_jax.models.count import count_multiply_adds, count_parameters
from vssd_jax.models.split import Arrays, SplitModel
from vssd_jax.tasks import make_task
from vssd_jax.tasks.protocol import Task
from vssd_jax.training import html_report
from vssd_jax.training.evaluator import Evaluator
from vssd_jax.training.sharding import make_mesh
from vssd_jax.weights.load import load
from vssd_jax.weights.state import get_state, set_state


def evaluate_weights(
    config: ml_collections.ConfigDict,
    weights: str | os.PathLike,
    *,
    throughput: bool = False,
    allow_nonfinite: bool = False,
    tta: bool = False,
    save_predictions: str | os.PathLike | None = None,
    report: str | os.PathLike | None = None,
    commands: Sequence[tuple[str, str]] = (),
) -> dict[str, float]:
    """Evaluates weights on the config's dataset and prints the numbers, in the last line as JSON.

    Predictions and the report are written once they are printed.

    Args:
      config: as of `train.py`.
      weights: anything that `vssd_jax.weights.load.load` reads.
      allow_nonfinite: whether weights with NaN or infinity are evaluated.
      throughput: whether the images per second of the forward pass are measured too.
      tta: whether predictions are averaged over scaled and mirrored images (segmentation).
      save_predictions: a folder for predictions and pictures of them (detection, segmentation).
      report: a file for a report, see `vssd_jax.training.html_report`.
      commands: for the report, how to repeat it: what each does, and the command.

    Returns:
      Parameters, multiply-adds and metrics.

    Raises:
      UserError: weights, config, data or a file that cannot be used.
    """
    if report is not None:
        _check_writable(report)  # better now than after the evaluation
    loaded = load(
        weights,
        model=config.model,
        overrides=config.model_options.to_dict(),
        allow_nonfinite=allow_nonfinite,
    )
    if not loaded.num_classes:
        raise UserError(f"{weights} has no head: there is nothing to evaluate")
    config = config.copy_and_resolve_references()
    config.num_classes = loaded.num_classes
    task = make_task(config, tta=tta, save_predictions=save_predictions)
    model = SplitModel(task.build)
    size = task.image_shape
    results: dict[str, float] = {
        "parameters": count_parameters(model.abstract),
        "multiply_adds": count_multiply_adds(model.abstract, size),
    }
    say(
        f"{config.model}: {results['parameters']:,} parameters, "
        f"{results['multiply_adds'] / 1e9:.3f} G multiply-adds at {size[0]}x{size[1]}"
    )
    if loaded.class_names is not None:
        task.align_classes(loaded.class_names)
    if task.dataset_classes != loaded.num_classes:
        raise UserError(
            f"{weights} has {loaded.num_classes} classes, and the {config.dataset} in "
            f"{config.data_dir} {task.dataset_classes}"
        )
    if loaded.class_names is not None and readable(loaded.class_names) != readable(
        task.class_names
    ):
        difference = describe_difference(loaded.class_names, task.class_names)
        raise UserError(
            f"the classes of {weights} are not those of the {config.dataset} in {config.data_dir}: "
            f"{difference}. If the names alone differ, correct class_names in its config.json"
        )
    mesh = make_mesh(config.mesh)
    set_state(model.abstract, loaded.params)
    arrays = jax.device_put(get_state(model.abstract), NamedSharding(mesh, PartitionSpec()))
    if throughput:
        results["images_per_second"] = measure_throughput(task, model, arrays, mesh)
        say(
            f"{results['images_per_second']:.1f} images/s at batch {config.eval_batch_size} "
            f"on {mesh.size} {jax.devices()[0].device_kind}"
        )
    metrics = Evaluator(task, model, mesh)(arrays)
    if task.table is not None:
        say(task.table)
    for name, value in metrics.items():
        say(f"{name} {value:.6g}")
    results |= metrics
    say(strict_json.dumps(results))
    task.write_predictions()
    if report is not None and is_main():
        try:
            page = html_report.render(_report(task, weights, results, metrics, commands))
            html_report.write(report, page)
        except OSError as error:
            raise UserError(f"{report} cannot be written: {error.strerror or error}") from error
    return results


def _check_writable(path: str | os.PathLike) -> None:
    """Raises a UserError if a file cannot be written there."""
    if not is_main():
        return
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"--report {path} is a folder; give a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"--report {path} is no ordinary file; give another name")
    if not path.parent.is_dir():
        raise UserError(f"--report {path}: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--report {path} cannot be written: {error.strerror or error}") from error


def _report(
    task: Task,
    weights: str | os.PathLike,
    results: Mapping[str, float],
    metrics: Mapping[str, float],
    commands: Sequence[tuple[str, str]],
) -> html_report.Report:
    config, (height, width) = task.config, task.image_shape
    facts = [
        ("task", config.task),
        ("model", f"{config.model}, {results['parameters']:,} parameters"),
        ("multiply-adds", f"{results['multiply_adds'] / 1e9:.3f} G at {height}x{width}"),
        ("weights", os.fspath(weights)),
    ]
    if "images_per_second" in results:
        facts.append(("speed", f"{results['images_per_second']:,.1f} pictures/s"))
    return html_report.of_task(
        task, title=": evaluation", facts=facts, results=metrics, commands=commands
    )


def measure_throughput(task: Task, model: SplitModel, arrays: Arrays, mesh: Mesh) -> float:
    """Images per second of the forward pass, without data loading: the median of ten calls."""
    config = task.config
    shape = (config.eval_batch_size, *task.image_shape, 3)
    images = jax.device_put(
        np.random.default_rng(0).standard_normal(shape, np.float32),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
    )
    forward = jax.jit(
        lambda arrays, images: model.merge(arrays, training=False)(images),
        compiler_options=compiler_options(),
    )
    seconds = []
    with jax.set_mesh(mesh):
        jax.block_until_ready(forward(arrays, images))
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(forward(arrays, images))
            seconds.append(time.perf_counter() - start)
    return shape[0] / float(np.median(seconds))
