"""The time that training takes, without interruptions."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measures seconds of training; evaluation, saving and compilation run inside `paused`."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside the context does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last lap, or since the start, without the pauses."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
