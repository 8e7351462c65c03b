"""Who does the tasks: threads of this process here, processes of a cluster in `cluster.py`."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from store.errors import Interrupted

Progress = Callable[[int], object]


class Hands(Protocol):
    """Does one task after another, or several at once in as many threads."""

    def do(self, task: Any) -> Any:
        """What the task made."""


class Crew(ABC):
    """Does tasks, in any order and several at once."""

    def __enter__(self) -> "Crew":
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Let nobody work on."""

    @abstractmethod
    def do(self, tasks: Sequence[Any], lanes: int) -> Iterator[Any]:
        """What each task made, as they come; the first failure ends all."""

    @abstractmethod
    def peaks(self) -> list[int]:
        """The greatest memory that each process held, bytes."""


class ThreadCrew(Crew):
    """The threads of this process."""

    def __init__(self, hands: Callable[[Progress], Hands], progress: Progress) -> None:
        self._progress, self._lock, self._stop = progress, threading.Lock(), threading.Event()
        self._hands = hands(self._advance)

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _advance(self, count: int) -> None:
        if self._stop.is_set():
            raise Interrupted("another thread failed, or the command was interrupted")
        with self._lock:
            self._progress(count)

    def do(self, tasks: Sequence[Any], lanes: int) -> Iterator[Any]:
        with ThreadPoolExecutor(lanes) as pool:
            try:
                for done in as_completed([pool.submit(self._hands.do, task) for task in tasks]):
                    yield done.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def peaks(self) -> list[int]:
        return [peak_memory()]


def peak_memory() -> int:
    """The greatest resident memory of this process so far, bytes."""
    try:  # what getrusage says includes, after a spawn, the memory of the parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
