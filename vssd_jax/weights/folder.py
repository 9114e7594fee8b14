"""Weights folders: `model.safetensors` has the arrays, `config.json` the model's name."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vssd_jax import strict_json
from vssd_jax.errors import UserError
from vssd_jax.models import family

ARRAYS, CONFIG = "model.safetensors", "config.json"
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a model and how to make the model that they fit.

    Attributes:
      model: its name, see `vssd_jax.list_models`.
      num_classes: size of its classifier.
      overrides: fields of its config that differ from the name's.
      params: arrays by this project's names of the parameters, in the dtype of their file.
      class_names: of the labels that they were trained with; None if that is not known.
      preprocessing: how a picture becomes the model's input, by the fields of the task's config
        (`vssd_jax.config.PREPROCESSING`), with mean and deviation; empty if it is not known.
      provenance: where they come from: `source`, the file's name or its address on the hub;
        `dataset` and `metrics` of a run; `state_dict`, "model" or
        "ema"; `num_batches_tracked`, PyTorch's counters of BatchNorm batches, kept only for the
        way back to PyTorch: one number, numbers by name where they differ, or None if there are no
        counters.
    """

    model: str
    num_classes: int
    overrides: dict[str, Any]
    params: Mapping[str, np.ndarray]
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to fill. It is renamed to `path` at the end, and removed on an error.

    Raises:
      UserError: `path` exists or cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; choose another folder or remove it")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        os.rename(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """The name of a temporary file to write, renamed to `path` at the end; see `new_folder`.

    Raises:
      UserError: `path` exists or cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; choose another name or remove it")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()  # what cannot be written is said at once, not after minutes of work
        yield beside
        os.rename(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_folder(path: str | os.PathLike, weights: Weights) -> None:
    """Writes a weights folder; a UserError if `path` exists or cannot be written."""
    with new_folder(path) as folder:
        write_arrays(folder / ARRAYS, weights.params)
        config = {
            "model": weights.model,
            "task": family.task_of(weights.model),
            "num_classes": weights.num_classes,
            "overrides": weights.overrides,
            "class_names": weights.class_names,
            "preprocessing": weights.preprocessing,
            **weights.provenance,
        }
        (folder / CONFIG).write_text(strict_json.dumps(config, indent=2) + "\n")


def read_folder(path: str | os.PathLike) -> Weights:
    """Reads a weights folder; a UserError if it is not one."""
    path = Path(path)
    try:
        config = json.loads((path / CONFIG).read_text())
        model, num_classes = config.pop("model"), config.pop("num_classes")
        overrides, class_names = config.pop("overrides"), config.pop("class_names", None)
        preprocessing = config.pop("preprocessing", {})
        config.pop("task", None)  # it follows from the model
    except OSError as error:
        raise UserError(f"{path} is no weights folder: no {CONFIG} can be read") from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path / CONFIG} is no description of a model ({error})") from error
    if type(model) is not str or type(num_classes) is not int or type(overrides) is not dict:
        raise UserError(f"{path / CONFIG} is no description of a model")
    if class_names is not None and not (
        isinstance(class_names, list)
        and len(class_names) == num_classes
        and all(isinstance(name, str) for name in class_names)
    ):
        raise UserError(f"{path / CONFIG}: class_names are not {num_classes} names")
    if type(preprocessing) is not dict:
        raise UserError(f"{path / CONFIG}: preprocessing is no object")
    arrays = read_arrays(path / ARRAYS)
    return Weights(model, num_classes, overrides, arrays, class_names, preprocessing, config)


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    from safetensors.numpy import save_file

    # safetensors writes the memory of an array whatever its strides are.
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file; a UserError if it is not one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    except (AttributeError, KeyError, TypeError) as error:  # a dtype that NumPy does not know
        raise UserError(f"{path} holds tensors of a dtype that is not supported") from error


def check_dtypes(params: Mapping[str, np.ndarray]) -> None:
    """A UserError if there are parameters that are not floating-point."""
    for name, array in params.items():
        if array.dtype not in _DTYPES:
            raise UserError(f"tensor {name} is {array.dtype}, not floating-point")


def check_finite(params: Mapping[str, np.ndarray]) -> None:
    """A UserError if there are parameters with NaN or infinity."""
    bad = [name for name, array in params.items() if not np.isfinite(array).all()]
    if bad:
        count = int((~np.isfinite(params[bad[0]])).sum())
        more = f", and so are values of {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise UserError(
            f"{count} of {params[bad[0]].size} values of the tensor {bad[0]} are not finite{more}; "
            "--allow-nonfinite of eval.py and the converter lets them pass (allow_nonfinite=True)"
        )
