"""What every task's test of an exact resume shares."""

import os
import signal

import numpy as np

from vssd_jax.training.checkpoints import read_ema, read_part
from vssd_jax.training.loop import train
from vssd_jax.training.metrics import read_metrics


def train_with_stops(monkeypatch, task, config, workdir, stops):
    """Trains to the end, but stopped by SIGTERM when each of the batches `stops` is read.

    `task` is the class whose batches these are. Returns the result of the last part.
    """
    real, left, reached = task.train_batches, sorted(stops), [0]

    def stopping(self, start_step):
        for index, batch in enumerate(real(self, start_step), start_step):
            if left and index == left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
                del left[0]
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(task, "train_batches", stopping)
        for _ in stops:
            train(config, workdir)
            reached.append(read_ema(workdir)[1])
        assert not left
        results = train(config, workdir)
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
