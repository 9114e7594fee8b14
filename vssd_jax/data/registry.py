"""Datasets by name.

A dataset of this package is a module of `vssd_jax.data.datasets` that has the dataset's name and
defines `DATASET`. A dataset from elsewhere is a file of the same kind that calls
`register(DATASET)`; the config's file imports it.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence

import ml_collections

from vssd_jax.data import datasets
from vssd_jax.data.source import LabelledSource
from vssd_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset for one of the tasks.

    Attributes:
      name: what `config.dataset` calls it.
      task: the name of the task that it is for.
      open: config and split, "train" or "val", to a `LabelledSource`, for detection a
        `DetectionSource`, for segmentation a `SegmentationSource`. It raises a UserError where the
        files in `config.data_dir` are not what they should be.
      class_names: of the labels, where they are known without reading files; otherwise the sources
        have them.
      transforms: config to the transforms for training and for evaluation, of the form of
        `TrainTransform` and `EvalTransform` in `classification_transforms`; None takes these. Only
        for classification: detection and segmentation have transforms of their own.
      fields: of the config, among `vssd_jax.config.DATASET_FIELDS`, that `open` reads.
    """

    name: str
    task: str
    open: Callable[[ml_collections.ConfigDict, str], LabelledSource]
    class_names: Sequence[str] | None = None
    transforms: Callable[[ml_collections.ConfigDict], tuple[Callable, Callable]] | None = None
    fields: Sequence[str] = ()


_BUILT_IN = tuple(module.name for module in pkgutil.iter_modules(datasets.__path__))
_registered: dict[str, Dataset] = {}


def register(dataset: Dataset) -> None:
    """Makes a dataset from outside the package known by its name.

    A second dataset of the same name replaces the first: a config's file may be run twice.

    Raises:
      UserError: a dataset of the package has this name.
    """
    if dataset.name in _BUILT_IN:
        raise UserError(f"vssd_jax has a dataset {dataset.name!r}; choose another name")
    _registered[dataset.name] = dataset


def find(name: str, task: str) -> Dataset:
    """The dataset of this name. Only its own module is imported: some need slow packages.

    Raises:
      UserError: there is none, or it is for another task.
    """
    if name in _registered:
        dataset = _registered[name]
    elif name in _BUILT_IN:
        dataset = importlib.import_module(f"{datasets.__name__}.{name}").DATASET
    else:
        near = did_you_mean(name, sorted({*_BUILT_IN, *_registered}))
        raise UserError(f"unknown dataset {name!r}{near}")
    if dataset.task != task:
        raise UserError(
            f"the dataset {name!r} is for {dataset.task}, and the config's task is {task}"
        )
    return dataset
