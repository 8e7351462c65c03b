"""Batches on their way to a CUDA device, so that the copy of one runs beside the step on another.

1. Rows are gathered, in the dtype of the pack, into page-locked buffers, three in turn.
2. A stream of its own copies them: half the bytes of float32 cross, and the device converts and recomputes.
3. The stream that trains waits for that copy alone, by an event; the CPU waits for nothing but a free buffer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DEPTH = 3
"""page-locked buffers: one being filled, one being copied, one to spare"""


class Slot:
    """One set of page-locked buffers, and the event that says when what was in them is on the device."""

    def __init__(self) -> None:
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor, rows: int) -> Tensor:
        """A page-locked tensor for so many rows of a column."""
        shape = (rows, *like.shape[1:])
        there = self._buffers.get(name)
        if there is None or there.shape != shape or there.dtype != like.dtype:
            there = self._buffers[name] = page_locked(shape, like.dtype)
        return there


class Staging:
    """The way of columns to one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = [Slot() for _ in range(DEPTH)]
        self._turn = 0

    def send(self, columns: Mapping[str, Tensor], rows: Tensor) -> "Sent":
        """Start copying those rows of columns in RAM; waits only where the copy of three batches ago has not ended."""
        slot = self._slots[self._turn % DEPTH]
        self._turn += 1
        slot.copied.synchronize()
        sent = {}
        with torch.cuda.stream(self.stream):
            for name, column in columns.items():
                buffer = slot.buffer(name, column, len(rows))
                torch.index_select(column, 0, rows, out=buffer)  # with all threads: the CPU has nothing else to do
                sent[name] = buffer.to(self.device, non_blocking=True)
            slot.copied.record(self.stream)
        return Sent(sent, slot, self.device)


class Sent:
    """Columns that are being copied."""

    def __init__(self, columns: dict[str, Tensor], slot: Slot, device: torch.device) -> None:
        self._columns, self._slot, self._device = columns, slot, device

    def columns(self) -> dict[str, Tensor]:
        """The columns on the device, for the current stream, which waits for the copy; call it before the buffers' turn comes again."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._slot.copied)
        for column in self._columns.values():
            column.record_stream(current)  # their memory was given out on the stream that copied
        return self._columns


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor in RAM that the device can copy from while the CPU goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
