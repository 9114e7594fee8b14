"""A run that is killed again and again ends where an undisturbed one ends."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from vssd_jax.training.metrics import read_metrics
from vssd_jax.weights.checkpoint import read_part

CONFIG = """
from tests.training.test_loop import small_config

def get_config(arg=None):
    return small_config({data_dir!r}, epochs={epochs})
"""
EPOCHS, EPOCH, KILLS = 40, 11, 20


def start(folder, name):
    config = folder / "config.py"
    config.write_text(CONFIG.format(data_dir=str(folder / "data"), epochs=EPOCHS))
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "train.py", f"--config={config}", f"--workdir={folder / name}"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                # The same programs each time.
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=log,
            stderr=log,
        )


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    assert start(tmp_path, "whole").wait() == 0
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = start(tmp_path, "killed")
        before = last_step(tmp_path / "killed")
        if rng.random() < 0.8:  # otherwise while it starts
            while last_step(tmp_path / "killed") == before and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 4))
        else:
            time.sleep(rng.uniform(0, 8))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    if process.poll() != 0:
        process = start(tmp_path, "killed")
    assert process.wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]
    print(f"{kills} kills")
    assert kills >= KILLS // 2
    assert "Traceback" not in (tmp_path / "killed.log").read_text()
    for part in ("ema", "train"):
        whole, killed = (
            read_part(tmp_path / f"{name}/checkpoints/{EPOCHS * EPOCH}", part)
            for name in ("whole", "killed")
        )
        for name, value in whole.items():
            np.testing.assert_array_equal(killed[name], value, err_msg=name)
    whole, killed = (
        [(x["step"], x["train/loss"]) for x in read_metrics(tmp_path / name) if "train/loss" in x]
        for name in ("whole", "killed")
    )
    assert whole == killed


def last_step(workdir):
    return max((line["step"] for line in read_metrics(workdir)), default=0)
