"""From a PyTorch checkpoint to a weights folder, and back."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vssd_jax import known_classes
from vssd_jax.config import preprocessing_of
from vssd_jax.errors import UserError
from vssd_jax.models import family
from vssd_jax.weights.folder import Weights, write_folder
from vssd_jax.weights.load import load, to_torch
from vssd_jax.weights.narrow import cost, narrow, num_bytes
from vssd_jax.weights.torch_file import write_torch_file


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    model: str | None = None,
    which: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    class_names: Sequence[str] | None = None,
    reverse: bool = False,
    dtype: str | None = None,
) -> str:
    """Writes the weights of `source` to `output`, whole or not at all.

    Args:
      source, model, which, overrides, allow_nonfinite: see `vssd_jax.weights.load.load`.
      class_names: of the classifier; None takes those of `source`. Where it has none and as many
        classes as the authors' models, the names of ImageNet, COCO or ADE20K are assumed.
      output: the folder, or with `reverse` the `.pth` file; it must not exist.
      reverse: write a bare state dict with PyTorch's names.
      dtype: "float32", "bfloat16" or "float16" of matrices and kernels, see `narrow`; None keeps
        each tensor's own.

    Returns:
      A line that says what was taken, and with `dtype` another that says what it costs.

    Raises:
      UserError: what `load` raises, values too large for `dtype`, and an output that exists or
        cannot be written.
    """
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; choose another name or remove it")
    weights = load(
        source, model=model, which=which, overrides=overrides, allow_nonfinite=allow_nonfinite
    )
    count, size = len(weights.params), sum(array.size for array in weights.params.values())
    weights, note = with_names(weights, class_names)
    if dtype is not None:
        narrowed = narrow(weights.params, dtype)
        sizes = [num_bytes(params) / 1e6 for params in (weights.params, narrowed)]
        note += f"\n{dtype}: {sizes[0]:,.1f} -> {sizes[1]:,.1f} MB; {cost(weights, narrowed)}"
        weights = dataclasses.replace(weights, params=narrowed)
    if reverse:
        write_torch_file(output, to_torch(weights))
    else:
        write_folder(output, weights)
    part = weights.provenance.get("state_dict", "")
    taken = {"ema": "its EMA, ", "model": "its model, "}.get(part, "")
    head = f"with {weights.num_classes} classes" if weights.num_classes else "without a head"
    return (
        f"{weights.model} {head} from {os.fspath(source)}: "
        f"{taken}{count} tensors with {size:,} parameters and statistics -> {output}"
        f"{note}"
    )


def with_names(
    weights: Weights, class_names: Sequence[str] | None = None
) -> tuple[Weights, str]:
    """The weights with names of their classes and their preprocessing, and a note on the names."""
    task, note = family.task_of(weights.model), ""
    preprocessing = preprocessing_of(task, weights.preprocessing)
    names = class_names or weights.class_names
    if names is None:
        names = assumed_names(task, weights.num_classes)
        if names is not None:
            note = f"; the names of the classes are assumed to be those of {ASSUMED[task]}"
    if names is not None and len(names) != weights.num_classes:
        raise UserError(f"{len(names)} names for the {weights.num_classes} classes of the weights")
    names = None if names is None else list(names)
    return dataclasses.replace(weights, class_names=names, preprocessing=preprocessing), note


ASSUMED = {"classification": "imagenet", "detection": "coco", "segmentation": "ade20k"}


def assumed_names(task: str, num_classes: int) -> tuple[str, ...] | None:
    """The names of the dataset of the authors' models for a task, if it has as many classes."""
    names = known_classes.read(ASSUMED[task])
    return names if len(names) == num_classes else None
