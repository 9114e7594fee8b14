"""Metrics on disk."""

import contextlib
import json

from vssd_jax.training.metrics import MetricWriter, read_metrics


def write(workdir, start_step, *steps):
    with contextlib.closing(MetricWriter(workdir, start_step)) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step})


def test_what_is_written_is_read(tmp_path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, 0, 1, 2)
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5},
    ]  # fmt: skip
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob("*.part"))


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path):
    write(tmp_path, 0, 1, 2)
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 3, "train/loss": 0.25})
    for length in range(1, len(line)):
        with path.open("a") as file:
            file.write(line[:length])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
        write(tmp_path, 2)
    write(tmp_path, 2, 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_later_steps_are_dropped_as_they_run_again(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_curves_of_metrics_with_different_steps(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, 0)) as writer:
        writer.plot()  # nothing yet
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": step})
        writer.write(3, {"val/top1": 0.5})
        writer.plot()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))


def test_what_is_not_finite_is_null_and_left_out_of_the_curves(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, 0)) as writer:
        for step, loss in enumerate((1.0, float("nan"), float("inf")), 1):
            writer.write(step, {"train/loss": loss})
        writer.plot()
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [1.0, None, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
