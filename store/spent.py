"""Seconds that threads spend, by what on: so that whoever waits for them can say for what."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spent:
    """Seconds by name, added up over all threads."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to `name`."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """What was spent so far, by name."""
        with self._lock:
            return dict(self._seconds)
