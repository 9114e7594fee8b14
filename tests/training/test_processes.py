"""Several processes train as one, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT, UNOPTIMIZED
from vssd_jax.training.metrics import read_metrics

CONFIG = """
from tests.training.test_loop import small_config

def get_config(arg=None):
    config = small_config({data_dir!r})
    config.update(steps={steps}, eval_batch_size=120, dtype="float64", mesa=0.0)
    config.eval_every_epochs = 1
    return config
"""
STEPS = 13  # an epoch has 11


def start(folder, workdir, processes, devices=1):
    """The processes of a run, whose config and data are in `folder`."""
    config = folder / "config.py"
    config.write_text(CONFIG.format(data_dir=str(folder / "data"), steps=STEPS))
    # Not FAST_COMPILATION: see test_eight_devices_train_as_one.
    flags = f"--xla_force_host_platform_device_count={devices} {UNOPTIMIZED}"
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            [*command, *([f"--process_id={index}"] if processes > 1 else [])],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]


def numbers(workdir):
    """Losses by step, and what the evaluations found."""
    lines = read_metrics(workdir)
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    return losses, [(x["step"], x["val/loss"], x["val/top1"]) for x in lines if "val/loss" in x]


def wait_for(ready, processes):
    """Waits until `ready()`; fails when one of the processes has ended before."""
    while not ready():
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


def has_logged(workdir, step):
    return any(line["step"] >= step for line in read_metrics(workdir))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_and_end_together(tmp_path, count):
    one = start(tmp_path, tmp_path / "one", 1, devices=count)
    finish(one)
    several = start(tmp_path, tmp_path / "several", count)
    wait_for((tmp_path / "several/checkpoints/11/checksums.json").exists, several)
    several[-1].send_signal(signal.SIGKILL)
    several[-1].communicate()
    killed = time.monotonic()
    for process in several[:-1]:
        _, errors = process.communicate(timeout=100)
        assert process.returncode not in (0, 2)
        assert "another" in errors.splitlines()[-1], errors[-3000:]
    assert time.monotonic() - killed < 60
    several = start(tmp_path, tmp_path / "several", count)
    finish(several)
    (losses, evaluations), (expected, expected_evaluations) = (
        numbers(tmp_path / name) for name in ("several", "one")
    )
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-9)
    np.testing.assert_allclose(evaluations, expected_evaluations, rtol=1e-9)


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_one_step(tmp_path):
    several = start(tmp_path, tmp_path / "run", 2)
    wait_for(lambda: has_logged(tmp_path / "run", 3), several)
    several[1].send_signal(signal.SIGTERM)
    finish(several)
    stopped = read_metrics(tmp_path / "run")[-1]["step"]
    assert 3 <= stopped < STEPS
    assert (tmp_path / f"run/checkpoints/{stopped}/checksums.json").exists()
