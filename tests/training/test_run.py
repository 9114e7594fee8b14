"""What surrounds the steps of training, around steps that compute nothing."""

import dataclasses
import itertools
import os
import signal
import types

import pytest

from vssd_jax.config import classification_config
from vssd_jax.errors import UserError
from vssd_jax.tasks.protocol import Table
from vssd_jax.training.metrics import read_metrics
from vssd_jax.training.plan import Plan
from vssd_jax.training.run import StopSignal, open_run

PLAN = Plan(
    steps_per_epoch=3, total=4, batch_size=2, log_every=2, eval_every=3, save_every=None,
    profiled=range(0),
)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.before(1)
        os.kill(os.getpid(), number)
        assert stop.before(2)
        assert stop.before(3)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def opened(workdir, max_nonfinite=3):
    config = {"max_nonfinite": max_nonfinite, "tracker": ""}
    return open_run(workdir, config, PLAN, best_metric="val/score", checkpoint_bytes=0)


def test_steps_to_the_end_with_the_means_since_the_last_log(tmp_path, capsys):
    with opened(tmp_path) as run:
        assert (run.start, run.results) == (0, {})
        seen = []
        for step, batch in run.steps(itertools.count(10)):
            seen.append((step, batch))
            run.done(step, {"loss": float(step)})
            if PLAN.logs(step):
                run.log(0.1, 0)
        assert seen == [(1, 10), (2, 11), (3, 12), (4, 13)]
        run.evaluate(lambda arrays: arrays, {"val/score": 0.5})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert [line["train/loss"] for line in lines[:2]] == [1.5, 3.5]
    assert all(line["train/images_per_second"] > 0 for line in lines[:2])
    assert lines[2]["val/score"] == 0.5


def test_a_signal_ends_the_steps(tmp_path, capsys):
    with opened(tmp_path) as run:
        for step, _ in run.steps(itertools.count()):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            run.done(step, {"loss": 0.0})
        assert run.stopping
        assert step == 2
        run.finish({})
    assert "is saved at step 2 of 4; the same command resumes" in capsys.readouterr().out


def reported(run, parts):
    """Takes two steps, evaluates and writes the report."""
    config = classification_config()
    task = types.SimpleNamespace(config=config, best_metric="val/score", report=parts)
    for step, _ in run.steps(itertools.count()):
        run.done(step, {"loss": 0.5})
        if step == 2:
            run.log(0.1, 0)
            run.evaluate(lambda arrays: arrays, {"val/score": 0.25})
            break
    run.report(task, {"val/score": 0.25}, parameters=12345)


def test_a_report_says_how_far_the_run_came(tmp_path, capsys):
    with opened(tmp_path) as run:
        reported(run, lambda: [Table("Data", ("", ""), [("pictures", 77)])])
    page = (tmp_path / "report.html").read_text()
    for said in (
        "The run was stopped at step 2 of 4; it can go on.", "12,345 parameters", "<b>0.25</b>",
        "2 of 4 steps with 2 pictures each: 4 pictures, 0.667 epochs", ">77</td>",
        "of the averaged weights at step 2", "train(make_task(config), config,",
    ):  # fmt: skip
        assert said in page
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_a_report_that_cannot_be_made_ends_no_run(tmp_path, capsys):
    def fail():
        raise RuntimeError("no report of this")

    with opened(tmp_path) as run:
        reported(run, fail)
    assert "report.html is not written: RuntimeError: no report of this" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_steps_that_are_not_finite_end_the_run(tmp_path):
    with opened(tmp_path) as run:
        steps = run.steps(itertools.count())
        for nonfinite in (1, 2, 3):
            step, _ = next(steps)
            run.done(step, {"loss": float("nan")})
            if nonfinite < 3:
                run.log(0.1, nonfinite)
        message = r"not finite in the last 3 steps, at step 3 with .*; there is no checkpoint"
        with pytest.raises(UserError, match=message):
            run.log(0.1, 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_means_are_over_the_finite_steps_with_their_number(tmp_path):
    with opened(tmp_path) as run:
        for step, _ in run.steps(itertools.count()):
            run.done(step, {"loss": float("nan") if step == 2 else float(step), "norm": 1.0})
        run.log(0.1, 0)
    (line,) = read_metrics(tmp_path)
    assert line["train/loss"] == pytest.approx((1 + 3 + 4) / 3)
    assert line["train/loss_steps"] == 3
    assert line["train/norm"] == 1
    assert "train/norm_steps" not in line


def test_a_metric_that_does_not_improve_ends_the_run(tmp_path, capsys):
    scores = [0.5, 0.7, 0.7, float("nan"), 0.9]
    plan = dataclasses.replace(PLAN, patience=2, eval_every=1, total=9)
    config = {"max_nonfinite": 3, "tracker": ""}

    def go_on():
        options = {"best_metric": "val/score", "checkpoint_bytes": 0}
        with open_run(tmp_path, config, plan, **options) as run:
            # No checkpoint is saved here: the lines of the run before stay all the same.
            run.start = len(read_metrics(tmp_path))
            done = []
            for step, _ in run.steps(itertools.count()):
                run.done(step, {"loss": 1.0})
                run.evaluate(lambda arrays: arrays, {"val/score": scores[step - 1]})
                done.append(step)
            run.finish({"val/score": 0.7})
        return done

    assert go_on() == [1, 2, 3, 4]  # neither an equal nor no number is better
    said = capsys.readouterr().out
    assert "val/score has not improved in 2 evaluations (config.patience)" in said
    assert "resumes" not in said
    assert go_on() == []
