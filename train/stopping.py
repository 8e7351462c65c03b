"""How a training ends before its end: by a signal between two steps, or for want of memory; and how many threads it has."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from store.errors import GranaryError
from train.learning.learner import Group


@contextmanager
def stopping_between_steps(grace: float = 0.0) -> Iterator[Callable[[], int]]:
    """Inside, the first SIGINT or SIGTERM is kept for the end of the step: the function yielded gives its number, 0 before.

    A second one acts at once.  `grace`: seconds in which it is taken for the first again, because torchrun hands on what the
    terminal has sent to all already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked: list[int] = []
    since = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not asked:
            since = time.monotonic()
            asked.append(number)
        elif time.monotonic() - since >= grace:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def explained_memory(group: Group) -> Iterator[None]:
    """Memory that did not suffice after all, as a message of ours."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise GranaryError(
            f"the memory of {group.course.device} did not suffice for {len(group.models)} models of {group.site}: use --together "
            f"{max(1, len(group.models) // 2)} or a smaller --batch; the same command goes on from the last checkpoint"
        ) from None


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads inside; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
