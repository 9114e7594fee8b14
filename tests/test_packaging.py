"""The wheel and the sdist: what they hold, and the wheel with its own dependencies alone."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.weights.classifier_nano import NANO

pytest.importorskip("setuptools", "77")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built in a copy of the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    ignored = shutil.ignore_patterns("__pycache__", "golden", "earlier_versions")
    for name in ("vssd_jax", "configs", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    program = (
        "import sys; from setuptools import build_meta as b; out = sys.argv[1];"
        "b.build_wheel(out); b.build_sdist(out)"
    )
    subprocess.run(
        [sys.executable, "-c", program, out], cwd=source, check=True, capture_output=True
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_both_hold_licence_configs_and_type_marker_and_no_tests(built):
    wheel, sdist = built
    in_wheel = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        in_sdist = [name.partition("/")[2] for name in archive.getnames()]
    for names, configs in ((in_wheel, "vssd_jax/configs/"), (in_sdist, "configs/")):
        assert f"{configs}digits.py" in names
        assert "vssd_jax/py.typed" in names
        assert "vssd_jax/known_classes/imagenet.txt" in names
        assert any(name.endswith("LICENSE") for name in names)
        assert not [name for name in names if re.match(r"(tests|benchmarks|docs)/", name)]
    python = {name for name in in_wheel if name.endswith(".py")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "vssd_jax").rglob("*.py")}
    assert here <= python


def closure(requirements):
    """The installed distributions that requirements need, without extras."""
    from packaging.requirements import Requirement

    found, waiting = {}, [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key in found:
            continue
        found[key] = importlib.metadata.distribution(requirement.name)
        waiting += [Requirement(text) for text in found[key].requires or ()]
    return found


@pytest.fixture(scope="module")
def core(built, tmp_path_factory):
    """A fresh environment with the wheel and what its metadata ask for, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        lines = wheel.read(metadata).decode().splitlines()
    requires = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")]
    distributions = closure(requires)
    for distribution in distributions.values():
        for file in distribution.files or ():
            top = pathlib.Path(file).parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python", distributions


def run(core, code, *args, **options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [core[0], "-c", code, *map(str, args)], text=True, capture_output=True,
        env=environment | {"JAX_PLATFORMS": "cpu"}, **options,
    )  # fmt: skip


def test_the_core_needs_no_packages_of_training(core):
    names = set(core[1])
    assert {"jax", "flax", "safetensors", "huggingface-hub", "pillow"} <= names
    for name in ("grain", "ml-collections", "tensorflow-datasets", "scikit-learn", "matplotlib"):
        assert name not in names


def test_convert_and_predict_with_the_core_alone(core, tmp_path):
    convert = "from vssd_jax.commands.convert import run; run()"
    done = run(core, convert, "--input", NANO, "--output", tmp_path / "w", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predict = "from vssd_jax.commands.predict import run; run()"
    given = ("--weights", tmp_path / "w", "--input", tmp_path / "a.png", "--output", tmp_path / "o")
    done = run(core, predict, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "o/predictions.jsonl").read_text())
    assert len(line["predictions"]) == 5
    assert (tmp_path / "o/contact_sheet.png").is_file()


def test_a_missing_extra_is_named(core, tmp_path):
    for command in ("train", "eval"):
        code = f"from vssd_jax.commands.{command} import run; run()"
        failed = run(core, code, "--config=digits", cwd=tmp_path)
        assert failed.returncode == 2, failed.stderr
        assert failed.stderr.strip().endswith("pip install 'vssd_jax[train]'")
        assert len(failed.stderr.strip().splitlines()) == 1
    code = "import vssd_jax; vssd_jax.create_model('vssd_nano', weights='run')"
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    assert "UserError" in run(core, code, cwd=tmp_path).stderr


def test_an_installed_package_finds_its_configs(core, tmp_path):
    code = (
        "import vssd_jax.cli as cli; from pathlib import Path;"
        "path = Path(cli._find_config('tiny:mesa').partition(':')[0]);"
        "print(path.is_file(), path.parent.name, path.parent.parent.name)"
    )
    done = run(core, code, cwd=tmp_path)
    assert done.stdout.split() == ["True", "configs", "vssd_jax"], done.stderr


def test_the_scripts_of_the_repository_are_the_commands():
    with open(ROOT / "pyproject.toml", "rb") as file:
        import tomllib

        scripts = tomllib.load(file)["project"]["scripts"]
    for target in scripts.values():
        module = target.partition(":")[0]
        line = f"from {module} import run"
        assert len([path for path in ROOT.glob("*.py") if line in path.read_text()]) == 1, module
