"""Tasks by name: what is trained and evaluated, and on batches of what.

The training loop and the evaluation know a task by its protocol, `vssd_jax.tasks.protocol.Task`. A
task from elsewhere, most easily a subclass of `vssd_jax.tasks.base.BaseTask`, calls `register` in a
file that the config's file imports.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vssd_jax.config import add_missing, check
from vssd_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import ml_collections

    from vssd_jax.tasks.protocol import Task

# The module of the same name has the class.
_BUILT_IN = {
    "classification": "Classification",
    "detection": "Detection",
    "segmentation": "Segmentation",
}
_registered: dict[str, "Callable[..., Task]"] = {}


def register(name: str, make: "Callable[..., Task]") -> None:
    """Makes a task from outside the package known by its name.

    A second task of the same name replaces the first: a config's file may be run twice.

    Args:
      name: for `config.task`.
      make: config to `Task`; may have the options of `make_task`.

    Raises:
      UserError: a task of the package has this name.
    """
    if name in _BUILT_IN:
        raise UserError(f"vssd_jax has a task {name!r}; choose another name")
    _registered[name] = make


def make_task(
    config: "ml_collections.ConfigDict",
    *,
    tta: bool = False,
    save_predictions: str | os.PathLike | None = None,
) -> "Task":
    """The task that `config.task` names.

    Args:
      config: of the run; fields that it lacks get their defaults.
      tta: average predictions over scaled and mirrored images; segmentation only.
      save_predictions: a folder for predictions and pictures; detection and segmentation only.

    Raises:
      UserError: there is no such task, it does not have these options, `config` does not fit it,
        or a field of `config` has a value that cannot be used.
    """
    add_missing(config)
    check(config)
    name, make = config.task, _registered.get(config.task)
    if make is None:
        if name not in _BUILT_IN:
            near = did_you_mean(name, (*_BUILT_IN, *_registered))
            raise UserError(f"unknown task {name!r}{near}")
        make = getattr(importlib.import_module(f"{__name__}.{name}"), _BUILT_IN[name])
    options: dict[str, Any] = {}
    if tta:
        options["tta"] = True
    if save_predictions is not None:
        options["save_predictions"] = save_predictions
    for option in options:
        if option not in inspect.signature(make).parameters:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} is not for {name}, the config's task")
    return make(config, **options)
