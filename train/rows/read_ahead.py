"""The shards of one site in RAM: the one that is read from and, read meanwhile by a thread, the one after it."""

import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from torch import Tensor

from store.shards import Shard, shard_file
from store.sites import Point
from train.rows.reading import buffer_for, read_shard


class Reading(threading.Thread):
    """One shard on its way into a buffer; the thread ends with the shard."""

    def __init__(self, shard: Shard, points: Sequence[Point], buffer: np.ndarray, whole: bool) -> None:
        super().__init__(name=f"read {shard.path.name}", daemon=True)
        self.buffer = buffer
        self._order, self._stop_asked = (shard, points, buffer, whole), threading.Event()
        # Not `join`: Python 3.11 takes a thread whose `join` was interrupted for one that has ended (`_wait_for_tstate_lock`).
        self._ended = threading.Event()
        self._rows: dict[str, Tensor] | None = None
        self._error: BaseException | None = None
        try:
            self.start()
        except BaseException:  # interrupted: nobody will ask this thread to stop, should it have started
            self._stop_asked.set()
            raise

    def run(self) -> None:
        try:
            self._rows = read_shard(*self._order, stop=self._stop_asked)
        except BaseException as error:  # it is raised where the rows are asked for
            self._error = error
        finally:
            self._ended.set()

    def rows(self) -> dict[str, Tensor]:
        """The columns, as soon as they are there; what went wrong is raised here, as itself."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._rows is not None
        return self._rows

    def reading(self) -> bool:
        """Whether the buffer is still written to."""
        return not self._ended.is_set()

    def stop(self) -> None:
        """Give up within one block; back when the thread no longer touches the buffer."""
        self._stop_asked.set()
        self._ended.wait()


class ReadAhead:
    """Reads shards in the order in which they are asked for, each into one of at most two buffers.

    Two buffers of the greatest shard's size are held where both fit into `ahead` bytes; otherwise one, and nothing is read
    ahead.  A shard that is still held is not read again.  Each is read whole and its checksum compared, every time that
    all of its points are wanted, and otherwise the first time.
    """

    def __init__(self, shards: Sequence[Shard], points: Sequence[Point], ahead: int) -> None:
        self.shards, self.points, self.ahead = shards, points, ahead
        self._size = max(shard.pack.files[shard_file(shard.site, shard.index)]["bytes"] for shard in shards)
        self.reads_ahead = len(shards) > 1 and 2 * self._size <= ahead
        self._held: dict[int, Reading] = {}
        self._free: list[np.ndarray] = []
        self._compared: set[int] = set()

    def take(self, index: int, then: int | None = None) -> dict[str, Tensor]:
        """The columns of shard `index`, valid until another is taken; the reading of `then` begins."""
        if index not in self._held:
            self._begin(index, keep=() if then is None or not self.reads_ahead else (then,))
        try:
            rows = self._held[index].rows()
        except BaseException:
            self._drop(index)
            raise
        self._compared.add(index)
        if self.reads_ahead and then is not None and then not in self._held:
            self._begin(then, keep=(index,))
        return rows

    def stop(self) -> None:
        """End what is being read; whole shards stay."""
        for index in [index for index, reading in self._held.items() if reading.reading()]:
            self._drop(index)

    def release(self) -> None:
        """Give the memory back."""
        for index in list(self._held):
            self._drop(index)
        self._free.clear()

    def _begin(self, index: int, keep: Collection[int]) -> None:
        for other in [other for other in self._held if other not in keep]:
            self._drop(other)
        buffer = self._free.pop() if self._free else buffer_for(self._size)
        whole = index not in self._compared or set(self.points) == set(self.shards[index].pack.points)
        self._held[index] = Reading(self.shards[index], self.points, buffer, whole)

    def _drop(self, index: int) -> None:
        reading = self._held.pop(index)
        reading.stop()
        self._free.append(reading.buffer)

    def __reduce__(self) -> tuple[type["ReadAhead"], tuple[Sequence[Shard], Sequence[Point], int]]:
        return ReadAhead, (self.shards, self.points, self.ahead)  # another process reads for itself


def in_order(
    shards: Sequence[Shard], points: Sequence[Point], ahead: int = 10**9
) -> Iterator[tuple[Shard, dict[str, Tensor]]]:
    """Each shard with what `read_shard` gives of it, the next one being read meanwhile; valid until the next is asked for."""
    window = ReadAhead(shards, points, ahead)
    try:
        for index, shard in enumerate(shards):
            yield shard, window.take(index, index + 1 if index + 1 < len(shards) else None)
    finally:
        window.release()
