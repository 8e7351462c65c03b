"""How a training ends before its end: by a signal between two steps, or for want of memory; and how many threads it has."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from store.errors import GranaryError
from train.learning.learner import Group


@contextmanager
def stopping_between_steps() -> Iterator[Callable[[], str]]:
    """Inside, the first SIGINT or SIGTERM is kept for the end of the step: the function yielded names it.  A second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return
    asked: list[str] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked[0] if asked else ""
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
