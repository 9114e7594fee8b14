"""Timing alone, without JAX: PyTorch's processes must not have what it sets."""

import statistics
import time


def measure(calls: dict, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each function, a value for each round.

    The functions take turns within a round, so that a change in the machine's load meets all of
    them. Each must return only when its work is done.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compilation
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(seconds / once))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.2)  # idle threads of the one before spin for a while
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster `fast` is than `slow`: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
