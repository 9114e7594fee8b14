"""What every task's test of an exact resume shares."""

import os
import signal

import numpy as np

from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics
from vssd_jax.weights.checkpoint import read_ema, read_part


def train_with_stops(make_task, config, workdir, stops):
    """Trains to the end, but stopped by SIGTERM when each of the batches `stops` is read.

    `make_task` is the class of the task. Returns the result of the last part.
    """
    left, reached = sorted(stops), [0]

    class Stopping(make_task):
        def train_batches(self, start_step):
            for index, batch in enumerate(super().train_batches(start_step), start_step):
                if left and index == left[0]:
                    os.kill(os.getpid(), signal.SIGTERM)
                    del left[0]
                yield batch

    for _ in stops:
        train(Stopping(config), config, workdir)
        reached.append(read_ema(workdir)[1])
    assert not left
    results = train(Stopping(config), config, workdir)
    assert (np.diff([*reached, read_ema(workdir)[1]]) > 0).all()
    return results


def assert_same_run(workdir, other):
    """Both runs wrote the same metrics and ended in the same state, bit for bit."""
    for line, expected in zip(read_metrics(workdir), read_metrics(other), strict=True):
        for lines in (line, expected):
            lines.pop("train/images_per_second", None)
        assert line == expected
    step = read_ema(other)[1]
    for part in ("ema", "train"):
        found, expected = (
            read_part(folder / f"checkpoints/{step}", part) for folder in (workdir, other)
        )
        assert len(expected) > 50
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
