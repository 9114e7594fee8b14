"""Checkpoints: which are kept, and what is left by kills and full disks."""

import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.training.small_checkpoints import make_state, restored_step, save
from vssd_jax.errors import UserError
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.state import to_parts


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, range(1, 6))
    folders = {int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()}
    assert folders == {1, 4, 5}
    with Checkpoints(tmp_path, best_metric="score") as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (1, 5)
        assert checkpoints.metrics(1) == {"score": -1}


# --- Faults in the middle of a save: see faults.c ---------------------------------------------


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """Runs a function of this file in a process whose file operations faults.c sees."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = pathlib.Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def run(function, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "tests.training.test_checkpoints", function, *arguments],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()

    return run


def killed_at_every_operation(folder):
    """Saves, leaving a copy of the workdir as it is before each file operation of the last save."""
    workdir, faults = pathlib.Path(folder) / "run", ctypes.CDLL(None)
    save(workdir, (1, 2, 3))
    with Checkpoints(workdir, best_metric="score") as checkpoints:
        faults.faults_watch(str(workdir).encode(), str(folder / "copies").encode())
        checkpoints.save(4, to_parts(make_state(4)), {"score": -4})
    print(faults.faults_stop())


def failed_at_operation(folder, stride):
    """Saves twice on a disk that fails from some operation of the first on, for many of them."""
    faults = ctypes.CDLL(None)
    for code in (errno.ENOSPC, errno.EROFS, errno.EIO):
        for number in range(0, 130, int(stride)):
            workdir = folder / f"{code}-{number}"
            save(workdir, (1, 2))
            try:
                with Checkpoints(workdir, best_metric="score") as checkpoints:
                    faults.faults_fail(str(workdir).encode(), number, code)
                    for step in (3, 4):
                        checkpoints.save(step, to_parts(make_state(step)), {"score": -step})
                raise AssertionError("nothing failed")
            except UserError as error:
                message = str(error)
            faults.faults_stop()
            step = restored_step(workdir)
            assert step in (2, 3)
            assert os.strerror(code) in message
            assert message.endswith(f"the run can resume from step {step}")
            print(step)


# The everyday suite tries every tenth of a hundred operations, which take a second each.
@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_every_file_operation_of_a_save(tmp_path, preloaded, stride):
    (tmp_path / "copies").mkdir()
    (count,) = preloaded("killed_at_every_operation", tmp_path)
    assert int(count) > 50
    steps = []
    for number in range(0, int(count), stride):
        workdir = tmp_path / "copies" / str(number)
        steps.append(restored_step(workdir))
        if number % 20 == 0:  # and it goes on from there
            save(workdir, [steps[-1] + 1])
            assert restored_step(workdir) == steps[-1] + 1
    assert steps[0] == 3
    assert set(steps) <= {3, 4}
    assert steps == sorted(steps)
    assert restored_step(tmp_path / "run") == 4


@pytest.mark.parametrize("stride", [43, pytest.param(13, marks=pytest.mark.slow)])
def test_a_full_or_broken_disk_leaves_the_older_checkpoint(tmp_path, preloaded, stride):
    steps = preloaded("failed_at_operation", tmp_path, str(stride))
    assert len(steps) == 3 * len(range(0, 130, stride))
    assert set(steps) == {"2", "3"}


if __name__ == "__main__":
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:])
