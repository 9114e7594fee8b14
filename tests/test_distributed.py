"""What a process says of the others of its run; runs of several: see training/test_processes.py."""

import faulthandler

import jax
import pytest

from vssd_jax import distributed
from vssd_jax.errors import UserError


def be_process(monkeypatch, index, count):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def test_only_the_main_process_prints(monkeypatch, capsys):
    for index in range(2):
        be_process(monkeypatch, index, 2)
        assert distributed.is_main() == (index == 0)
        distributed.say(f"process {index}")
    assert capsys.readouterr().out == "process 0\n"


def test_the_main_process_ends_last(monkeypatch):
    slept = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    be_process(monkeypatch, 1, 2)
    distributed.outlive_others()
    assert slept == []
    be_process(monkeypatch, 0, 2)
    distributed.outlive_others()
    assert len(slept) == 1


def test_the_end_of_another_process_is_one_line(monkeypatch):
    lost = RuntimeError("Gloo: connection closed by peer\nand a page of stacks")
    assert distributed.failure(lost) is None  # alone
    be_process(monkeypatch, 1, 4)
    line = distributed.failure(lost)
    assert line.startswith("process 1 of 4 cannot go on")
    assert "connection closed by peer)" in line
    assert "\n" not in line
    assert distributed.failure(jax.errors.JaxRuntimeError("lost")) is not None
    assert distributed.failure(ValueError("a mistake of its own")) is None
    assert distributed.failure(ValueError()) is None


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_processes_that_cannot_be_joined(monkeypatch, error):
    def fail(*_, **__):
        raise error("no coordinator\nat all")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(faulthandler, "disable", lambda: None)
    with pytest.raises(UserError, match=r"cannot be joined: no coordinator; .*--coordinator="):
        distributed.initialize()
