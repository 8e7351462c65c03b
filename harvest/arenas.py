"""Memory for the arrays of one part after the other, used again as soon as nobody holds an array of it.

Memory that a process has never touched costs a fault a page, which on machines that lend each other memory is dearer than all that
is done with the page.  Parts are of one size, and two of them are alive at a time: one that is drawn, one that is written.
"""

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

ALIGNED = 64
"""bytes: each array begins with a cache line"""


class Arenas:
    """Blocks of memory that come back when the last array in them is gone."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def arrays(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
        """An array of each shape, side by side in one block, with whatever was there before."""
        sizes = [-(-int(np.prod(shape)) * dtype.itemsize // ALIGNED) * ALIGNED for shape in shapes]
        begins = [sum(sizes[:place]) for place in range(len(sizes))]
        arena = self._take(sum(sizes))
        return [
            arena[begin : begin + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
            for begin, shape in zip(begins, shapes, strict=True)
        ]

    def _take(self, size: int) -> np.ndarray:
        """(size,) uint8: of a block that is free, or of a new one; others that are free are let go, so that none gather."""
        block = self._free.popleft() if self._free else None
        self._free.clear()
        if block is None or block.nbytes < size + ALIGNED:
            block = np.empty(size + ALIGNED, np.uint8)
        arena = np.frombuffer(block.data, np.uint8)
        held = weakref.finalize(arena.base, self._free.append, block)  # which every array in it leads to
        held.atexit = False
        first = -arena.ctypes.data % ALIGNED
        return arena[first : first + size]
