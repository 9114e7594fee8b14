"""Checkpoints: what is left by kills, full disks and flipped bytes."""

import ctypes
import errno
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from tests.conftest import ROOT
from vssd_jax.errors import UserError
from vssd_jax.training.checkpoints import Checkpoints
from vssd_jax.training.state import TrainState, from_parts, to_parts
from vssd_jax.weights import checkpoint
from vssd_jax.weights.checkpoint import read_ema


def make_state(step):
    """A small state whose values all tell its step."""
    params = {f"layer{i}.kernel": jnp.full((8, 3), float(step)) for i in range(3)}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        opt_state=optax.adamw(1e-3).init(params),
        ema=jax.tree.map(jnp.copy, params),
        nonfinite=jnp.int32(0),
    )


def save(workdir, steps):
    with Checkpoints(workdir, best_metric="score") as checkpoints:
        for step in steps:
            checkpoints.save(step, to_parts(make_state(step)), {"score": -step})


def restored_step(workdir):
    """The step that a new run starts from, once its values have been checked; 0: the start."""
    with Checkpoints(workdir, best_metric="score") as checkpoints:
        if not checkpoints.latest_step:
            return 0
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
        )
        state = from_parts(checkpoints.restore(to_parts(abstract)), abstract)
    expected = make_state(checkpoints.latest_step)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    return int(state.step)


def test_a_checkpoint_from_before_arrays_were_packed(tmp_path, monkeypatch):
    save_now = ocp.training.Checkpointer.save_checkpointables_async

    def without_metadata(*args, custom_metadata, **options):
        assert not any(custom_metadata.values())
        return save_now(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "layout_of", lambda arrays: {})
        patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", without_metadata)
        save(tmp_path, [1, 2])
    assert restored_step(tmp_path) == 2
    np.testing.assert_array_equal(read_ema(tmp_path)[0]["layer0.kernel"], np.full((8, 3), 2.0))


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    save(tmp_path, range(1, 6))
    folders = {int(folder.name) for folder in (tmp_path / "checkpoints").iterdir()}
    assert folders == {1, 4, 5}
    with Checkpoints(tmp_path, best_metric="score") as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (1, 5)
        assert checkpoints.metrics(1) == {"score": -1}


def test_a_flipped_bit_in_any_file_is_found(tmp_path, capsys):
    save(tmp_path / "whole", (1, 2, 3))
    files = sorted(p for p in (tmp_path / "whole/checkpoints/3").rglob("*") if p.is_file())
    assert len(files) > 10
    rng = np.random.default_rng(0)
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", workdir)
        victim = workdir / file.relative_to(tmp_path / "whole")
        data = bytearray(victim.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        victim.write_bytes(data)
        ema, step = read_ema(workdir)
        assert step == 2
        assert all((value == 2).all() for value in ema.values())
        assert f"{workdir}/checkpoints/3" in capsys.readouterr().err
        assert restored_step(workdir) == 2
        assert f"{workdir}/checkpoints/3" in capsys.readouterr().err
        assert (workdir / "damaged/3").is_dir()


def test_a_truncated_or_missing_file_is_found(tmp_path):
    save(tmp_path / "whole", (1, 2))
    files = sorted(p for p in (tmp_path / "whole/checkpoints/2").rglob("*") if p.is_file())
    for number, file in enumerate(files):
        for change in (pathlib.Path.unlink, lambda path: os.truncate(path, 1)):
            workdir = tmp_path / "changed"
            shutil.copytree(tmp_path / "whole", workdir)
            change(workdir / file.relative_to(tmp_path / "whole"))
            assert restored_step(workdir) == 1, (number, file)
            shutil.rmtree(workdir)


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


def failed_at_operation(folder):
    """Saves twice on a disk that fails from some operation of the first on, for many of them."""
    faults = ctypes.CDLL(None)
    for code in (errno.ENOSPC, errno.EROFS, errno.EIO):
        for number in range(0, 130, 13):
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


def test_a_kill_at_every_file_operation_of_a_save(tmp_path, preloaded):
    (tmp_path / "copies").mkdir()
    (count,) = preloaded("killed_at_every_operation", tmp_path)
    assert int(count) > 50
    steps = []
    for number in range(int(count)):
        workdir = tmp_path / "copies" / str(number)
        steps.append(restored_step(workdir))
        if number % 20 == 0:  # and it goes on from there
            save(workdir, [steps[-1] + 1])
            assert restored_step(workdir) == steps[-1] + 1
    assert steps[0] == 3
    assert set(steps) <= {3, 4}
    assert steps == sorted(steps)
    assert restored_step(tmp_path / "run") == 4


def test_a_full_or_broken_disk_leaves_the_older_checkpoint(tmp_path, preloaded):
    steps = preloaded("failed_at_operation", tmp_path)
    assert len(steps) == 30
    assert set(steps) == {"2", "3"}


if __name__ == "__main__":
    globals()[sys.argv[1]](pathlib.Path(sys.argv[2]))
