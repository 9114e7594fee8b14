"""Datasets by name, those of the package and others."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys

import pytest

import vssd_jax.data
from vssd_jax.data import datasets, registry
from vssd_jax.errors import UserError

NAMES = [module.name for module in pkgutil.iter_modules(datasets.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_every_module_is_a_dataset_of_its_name(name):
    dataset = importlib.import_module(f"vssd_jax.data.datasets.{name}").DATASET
    assert dataset.name == name
    assert registry.find(name, dataset.task) is dataset


def test_a_dataset_from_elsewhere(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    toy = registry.Dataset("toy", "classification", open=lambda config, split: [])
    registry.register(toy)
    assert registry.find("toy", "classification") is toy
    again = dataclasses.replace(toy, class_names=("a", "b"))
    registry.register(again)  # the config's file is run a second time
    assert registry.find("toy", "classification") is again
    with pytest.raises(UserError, match="'toys'; did you mean 'toy'"):
        registry.find("toys", "classification")
    with pytest.raises(UserError, match="vssd_jax has a dataset 'digits'; choose another name"):
        registry.register(dataclasses.replace(toy, name="digits"))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("digit", "classification", "unknown dataset 'digit'; did you mean 'digits'"),
        ("pictures", "detection", "unknown dataset 'pictures'; choose from ade20k, coco, "),
        ("digits", "detection", "'digits' is for classification, and the config's task is detect"),
    ],
)
def test_wrong_names(name, task, message):
    with pytest.raises(UserError, match=message):
        registry.find(name, task)


def test_a_dataset_imports_nothing_of_the_others():
    code = (
        "import sys\n"
        "from vssd_jax.data import registry\n"
        "registry.find('ade20k', 'segmentation')\n"
        "assert not {'tensorflow_datasets', 'sklearn', 'pycocotools'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_modules_import_no_jax():
    modules = [
        module.name
        for module in pkgutil.walk_packages(vssd_jax.data.__path__, "vssd_jax.data.")
        if module.name != "vssd_jax.data.pipeline"  # Grain imports jax
    ]
    assert len(modules) > 20
    code = (
        "import sys, importlib\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
