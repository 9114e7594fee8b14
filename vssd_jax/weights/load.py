"""Reads weights in any of the known formats, as parameters by this project's names."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vssd_jax.config import PREPROCESSING
from vssd_jax.distributed import say
from vssd_jax.errors import UserError
from vssd_jax.models import family, torch_names
from vssd_jax.weights import hub, state
from vssd_jax.weights.folder import (
    Weights,
    check_dtypes,
    check_finite,
    read_arrays,
    read_folder,
)
from vssd_jax.weights.recognise import check_equal, recognise
from vssd_jax.weights.torch_file import read_torch_file, select_state_dict, shared_prefix


def load(
    source: str | os.PathLike,
    *,
    model: str | None = None,
    which: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    backbone: bool = False,
    allow_nonfinite: bool = False,
) -> Weights:
    """Reads weights and checks that each tensor has its place.

    Args:
      source: a weights folder; a `.pth` file; a `.safetensors` file, with PyTorch's names or those
        of this project; one of these or a weights folder on the hub (`hf://owner/repo/file`,
        `hf://owner/repo`, `hf://owner/repo/folder`; `@revision` may follow the repo); or the
        workdir of a training run, whose averaged weights at the latest checkpoint are taken.
      model: the name that the weights must have; None recognises it from the tensors.
      which: "model", "ema" or another entry of a `.pth` file; None is the EMA where it has one.
        "best" of a workdir is the checkpoint with the best metric; None is the latest.
      overrides: fields of the model's config; needed for what shapes do not show, such as
        the kind of scan.
      backbone: take a classifier's weights too, if it is the backbone of `model`.
      allow_nonfinite: let NaN and infinity pass.

    Raises:
      UserError: a file that cannot be read, another model's weights, and weights with missing,
        unexpected, misshapen or non-finite tensors.
    """
    source = os.fspath(source)
    if re.match(r"https?://", source):
        raise UserError(f"{source}: download the file first, or write hf://owner/repo/file")
    if model is not None:
        family.find(model)
    on_hub = source.startswith(hub.SCHEME)
    path = hub.download(source) if on_hub else Path(source)
    overrides = dict(overrides or {})
    try:
        if path.is_dir():
            # What else of a repository was downloaded lies in the same folder of the cache.
            is_workdir = not on_hub and _is_workdir(path)
            if is_workdir:
                weights = _read_workdir(path, best=which == "best")
                which = None if which == "best" else which
            else:
                weights = read_folder(path)
            if backbone and model is not None and _starts_backbone(weights.model, model):
                model, overrides = _classifier_of(model, overrides)
            _check_agreement(weights, model, overrides)
            state.check(_shapes(weights), weights.params)
            check_dtypes(weights.params)
        else:
            if path.suffix == ".safetensors":
                arrays = read_arrays(path)
                if prefix := shared_prefix(arrays):
                    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
                    say(f"{source}: stripped {prefix!r} from every name")
                tensors, provenance = _with_torch_names(arrays), {}
            else:
                tensors, taken = select_state_dict(read_torch_file(path), which, path)
                provenance, which = {"state_dict": taken}, None
            if backbone and model is not None and not _has_backbone(tensors):
                model, overrides = _classifier_of(model, overrides)
            weights = _from_torch(tensors, model, overrides, provenance)
        if which is not None:
            raise UserError(f"there is no choice of {which!r}: only .pth files hold several models")
        if not allow_nonfinite:
            check_finite(weights.params)
    except UserError as error:
        message = str(error).replace(str(path), source) if on_hub else str(error)
        named = source if on_hub else str(path)
        raise UserError(message if named in message else f"{source}: {message}") from error
    name = source.rstrip("/")
    if not on_hub:
        name = name.rpartition("/")[2]
    return dataclasses.replace(weights, provenance={"source": name} | weights.provenance)


def to_torch(weights: Weights) -> dict[str, np.ndarray]:
    """The state dict that PyTorch's model of the same name loads strictly."""
    table = family.find(weights.model)[0].torch_table
    tensors = torch_names.to_torch(table, weights.params)
    counters = weights.provenance.get(torch_names.COUNTER, 0)
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        if leaf == "running_var" and counters is not None:
            counter = f"{module}.{torch_names.COUNTER}"
            count = counters.get(counter, 0) if isinstance(counters, dict) else counters
            tensors[counter] = np.array(count, np.int64)
    return tensors


# --- Folders ------------------------------------------------------------------------------------


def _is_workdir(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def _read_workdir(path: Path, *, best: bool = False) -> Weights:
    from vssd_jax.weights.checkpoint import read_ema  # Orbax: a second of imports

    config = json.loads((path / "config.json").read_text())

    def score(step: int) -> float:
        value = _metrics(path, step).get(config.get("best_metric", ""))
        return -math.inf if value is None else value

    params, step = read_ema(path, score if best else None)
    return Weights(
        model=config["model"],
        num_classes=config["num_classes"],
        overrides=config["model_options"],
        params=params,
        class_names=config.get("class_names"),
        preprocessing=_preprocessing(config),
        provenance={"state_dict": "ema", "step": step, "metrics": _metrics(path, step)}
        | {key: config[key] for key in ("dataset",) if key in config},
    )


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run, whose config has the fields themselves where an earlier version wrote it."""
    if "preprocessing" in config:
        return config["preprocessing"]
    fields = PREPROCESSING[family.task_of(config["model"])]
    return {field: config[field] for field in fields if field in config}


def _metrics(workdir: Path, step: int) -> dict[str, float]:
    """Of the evaluation at a step of a run; empty if there was none."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            if values.pop("step", None) == step:
                found |= {name: value for name, value in values.items() if name[:4] == "val/"}
    return found


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return _model_shapes(weights.model, weights.num_classes, weights.overrides)


def _model_shapes(
    name: str, num_classes: int, overrides: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    return state.shapes(
        family.abstract(
            lambda rngs: family.build(name, num_classes=num_classes, rngs=rngs, **overrides)
        )
    )


def _check_agreement(weights: Weights, model: str | None, overrides: Mapping[str, Any]) -> None:
    """Raises a UserError if the caller asks for another model than the folder's."""
    of_family, _ = family.find(weights.model)
    if model not in (None, weights.model):
        raise UserError(f"the weights are those of {weights.model}, not of {model}")
    fields = family.architecture(family.make_config(weights.model, **weights.overrides))
    asked = family.architecture(
        family.make_config(weights.model, **(weights.overrides | dict(overrides)))
    )
    check_equal(fields, asked, of_family)


# --- A classifier's weights for the backbone of another model ------------------------------------


def _starts_backbone(classifier: str, model: str) -> bool:
    return family.find(model)[0].backbone is family.find(classifier)[0]


def _has_backbone(tensors: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith("backbone.") for name in tensors)


def _classifier_of(model: str, overrides: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and overrides of the classifier whose architecture is that of `model`'s backbone."""
    of_family, variant = family.find(model)
    if of_family.backbone is None:
        return model, overrides
    name = of_family.backbone.prefix + variant
    fields = family.architecture(family.make_config(name))
    return name, {field: value for field, value in overrides.items() if field in fields}


# --- PyTorch's tensors ---------------------------------------------------------------------------


def _with_torch_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with PyTorch's names and layouts; they have those or this project's."""
    for candidate in family.families():
        if torch_names.covers(candidate.torch_table, arrays):
            return torch_names.to_torch(candidate.torch_table, arrays)
    return arrays


def _from_torch(
    tensors: Mapping[str, np.ndarray],
    model: str | None,
    overrides: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Weights:
    model, num_classes, overrides = recognise(tensors, model, overrides)
    table = family.find(model)[0].torch_table
    # The shapes in PyTorch's layout come from rearranging arrays that take no memory.
    zeros = {
        name: np.broadcast_to(np.int8(0), shape)
        for name, shape in _model_shapes(model, num_classes, overrides).items()
    }
    expected = {name: zero.shape for name, zero in torch_names.to_torch(table, zeros).items()}
    counters = {
        name: tensors[name]
        for name in (f"{key.rpartition('.')[0]}.{torch_names.COUNTER}" for key in expected)
        if name in tensors
    }
    others = {name: value for name, value in tensors.items() if name not in counters}
    state.check(expected, others)
    check_dtypes(others)
    params, _, _ = torch_names.from_torch(table, tensors)
    counts = {torch_names.COUNTER: _counts(counters)}
    return Weights(model, num_classes, overrides, params, provenance={**provenance, **counts})


def _counts(counters: Mapping[str, np.ndarray]) -> int | dict[str, int] | None:
    for name, value in counters.items():
        if value.dtype != np.int64 or value.shape != ():
            raise UserError(f"{name} is {value.dtype} of shape {value.shape}, not one int64")
    values = {name: int(value) for name, value in counters.items()}
    if not values:
        return None
    return values if len(set(values.values())) > 1 else next(iter(values.values()))
