"""The time of training, without what interrupts it."""

import pytest

from vssd_jax.training import clock


@pytest.fixture
def time(monkeypatch):
    """The time in seconds, in a list of one, to be moved by hand."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return now


def test_laps_leave_out_the_pauses(time):
    watch = clock.Clock()
    time[0] += 3
    with watch.paused():
        time[0] += 50
    time[0] += 4
    assert watch.lap() == 7
    time[0] += 2
    assert watch.lap() == 2
    assert watch.lap() == 0


def test_an_error_ends_a_pause(time):
    watch = clock.Clock()

    def interrupted():
        with watch.paused():
            time[0] += 50
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    time[0] += 1
    assert watch.lap() == 1
