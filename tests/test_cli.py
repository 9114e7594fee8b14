"""What a user can get wrong: one clear line on standard error and exit status 2."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT, flags_for
from vssd_jax import cli


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "--config is missing"),
        (["train.py", "--config", "configs/nope.py"], "there is no config file configs/nope.py"),
        (["train.py", "--config", "Makefile"], "not a Python file"),
        (["train.py", "--config", "configs/tiny.py:mega"], "unknown argument 'mega'"),
        (["train.py", "--cnfig", "x"], "Did you mean: config"),
        (["train.py", "--config", "configs/digits.py", "now"], "unexpected argument 'now'"),
        (
            ["train.py", "--config", "configs/digits.py", "--config.bach_size=3"],
            "no field 'bach_size'; did you mean 'batch_size'?",
        ),
        (["train.py", "--config", "configs/digits.py", "--config.batch_size=many"], "many"),
        (
            ["train.py", "--config", "configs/tiny.py", "--config.data_dir=/nowhere"],
            "/nowhere",
        ),
        (
            ["train.py", "--config", "configs/mask_rcnn.py:tiny,1x", "--config.data_dir=/nowhere"],
            "there is no folder /nowhere",
        ),
        (["train.py", "--config", "configs/digits.py", "--config.steps=0"], "steps=0 must be"),
        (
            ["train.py", "--config", "configs/digits.py", "--config.batch_size=None"],
            "config.batch_size cannot be None",
        ),
        (
            ["train.py", "--config", "configs/upernet.py", "--config.steps=None",
             "--config.epochs=0"],
            "config.epochs=0 must be",
        ),
        (["eval.py", "--config", "configs/digits.py"], "--weights is missing"),
        (["eval.py", "--config", "configs/digits.py", "--weights", "nowhere"], "nowhere"),
        (
            ["eval.py", "--config", "configs/digits.py", "--weights", "x", "--report", "nowhere/x"],
            "--report nowhere/x: there is no folder nowhere",
        ),
        (["export.py", "--weights", "nowhere"], "--weights and --output are needed"),
        (["export.py", "--weights", "nowhere", "--output", "x", "--dtype=int8"], "int8"),
    ],
)
def test_one_clear_line_and_status_2(arguments, message):
    done = command(*arguments)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert done.stdout == ""


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = command(
        "train.py", "--config", "configs/digits.py", f"--workdir={tmp_path}/file/run",
        f"--config.data_dir={tmp_path}/data",
    )  # fmt: skip
    assert "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2


def test_a_batch_that_does_not_divide(tmp_path):
    done = command(
        "train.py", "--config", "configs/digits.py", f"--workdir={tmp_path}/run",
        f"--config.data_dir={tmp_path}/data", "--config.batch_size=10",
        env={**os.environ, "XLA_FLAGS": flags_for(4)},
    )  # fmt: skip
    assert "config.batch_size=10 does not divide over 4 devices" in done.stderr
    assert "multiple of 4" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_importing_and_creating_needs_only_jax_flax_and_numpy():
    code = (
        "import sys; blocked = ['grain', 'clu', 'tensorflow_datasets', 'ml_collections', 'cv2', "
        "'PIL', 'orbax', 'torch', 'safetensors', 'matplotlib', 'tensorboardX']\n"
        "for name in blocked:\n"
        "    sys.modules.setdefault(name, None)\n"
        "import vssd_jax\n"
        "print(vssd_jax.create_model('vssd_nano', num_classes=3).num_classes)"
    )
    done = command("-c", code)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    ("argv", "this", "other"),
    [
        (
            "train.py --config configs/a.py:x,y --workdir a --config.class_names 'a b' -v",
            "python train.py --config configs/a.py:x,y --workdir a --config.class_names 'a b' -v",
            "python eval.py --config configs/a.py:x,y --config.class_names 'a b' --report 'my x'",
        ),
        (
            "/usr/bin/vssd-train --config=digits --config.remat --config.steps=3 --distributed",
            "vssd-train --config=digits --config.remat --config.steps=3 --distributed",
            "vssd-eval --config=digits --config.remat --config.steps=3 --report 'my x'",
        ),
    ],
)
def test_commands_as_they_are_typed(argv, this, other, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(argv))
    assert cli.command_line() == this
    assert cli.other_command("eval", "--report", "my x") == other
    assert cli.other_command("predict", config=False) in ("python predict.py", "vssd-predict")
