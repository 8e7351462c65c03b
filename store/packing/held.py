"""What a worker of a cluster holds for the job that it works at: made for its first task, given back when the job has ended."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Job = TypeVar("Job", bound=Hashable)
Hands = TypeVar("Hands")


class Held(Generic[Job, Hands]):
    """The hands of one job at most, and with them its memory; `make` makes them, `close` is told when they are given back."""

    def __init__(self, make: Callable[[Job], Hands], close: Callable[[Hands], object] = lambda _hands: None) -> None:
        self.make, self.close = make, close
        self._one_at_a_time = threading.Lock()
        self._held: dict[Job, Hands] = {}
        self._ended: set[Job] = set()

    def __len__(self) -> int:
        """How many jobs hands are held for: 0 or 1."""
        return len(self._held)

    def of(self, job: Job) -> Hands | None:
        """The hands of a job where they are held."""
        return self._held.get(job)

    @contextmanager
    def hands(self, job: Job) -> Iterator[Hands]:
        """The hands of a job, for one task; another task waits for its end."""
        with self._one_at_a_time:
            try:
                if job not in self._held:
                    for other in list(self._held):
                        self.close(self._held.pop(other))
                    self._held[job] = self.make(job)
                yield self._held[job]
            finally:
                self._forget_ended()

    def end(self, job: Job) -> None:
        """Give back what is held for a job: at once, or when the task that is being done has ended."""
        self._ended.add(job)
        if self._one_at_a_time.acquire(blocking=False):  # the worker's event loop, which asks, must not wait
            try:
                self._forget_ended()
            finally:
                self._one_at_a_time.release()

    def _forget_ended(self) -> None:
        while self._ended:
            job = self._ended.pop()
            if job in self._held:
                self.close(self._held.pop(job))
