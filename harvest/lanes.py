"""How values leave the device that a model runs on: the one place that knows streams, events and pinned memory.

    Direct   the model runs on the CPU: nothing travels; a hook converts the rows of its site into the part's arrays, while they
             are in the cores' caches, with the model's own threads
    Ring     it runs elsewhere: rows are staged there, (site, image, kept token, d_model), in the dtype that the model computes
             in; as a step ends they are converted there, and one copy to pinned memory begins on a side stream

A ring has two ends.  `send` is called in the model's thread as a step ends and must not wait; `move` is called in the staging's
thread and may.  `Cuda` is all of CUDA that a ring needs; tests put another in its place.  `Traffic` lets a few slots go round
between the two threads.  A device computes behind the thread that asks it to: that thread standing still is no loss as long as the
device has something to do, so only the time after that counts as waiting.

This file needs torch and nothing else, so that `bench/gpu_staging.py` can run it where there is no more.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

LOOK_SECONDS = 0.001
"""between two looks whether a device still computes, while the model's thread stands still"""


@dataclass
class Piece:
    """The buffers of one stream and point of one slot."""

    staged: Tensor
    """where hooks put kept rows"""
    stored: Tensor
    """the same in the store's dtype, on the same device; `staged` itself where nothing is converted"""
    landed: Tensor
    """the same on the host"""


@dataclass
class Slot:
    """The kept rows of one step of one batch, on their way."""

    pieces: dict[Any, Piece] = field(default_factory=dict)
    arrived: Any = None
    """what says that the copies are done"""


class Traffic:
    """A few slots that go round: the model's thread takes one and sends it off, a thread of this one moves what arrives."""

    def __init__(
        self,
        slots: int,
        move: Callable[[Slot, Any], None],
        waited: Callable[[float], None],
        drop: Callable[[Slot], None] = lambda _slot: None,
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """`move(slot, load)` is called in the thread for what was sent; `waited(seconds)` when the model stood still.

        `idle()` says whether the device has computed all that it was asked for: until then nothing stands still.  When a move
        has failed, the rest is dropped; `drop(slot)` waits until nothing is written into its buffers any more.
        """
        self._unmade, self._move_one, self._waited, self._drop, self._idle = slots, move, waited, drop, idle
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._sent: queue.Queue[tuple[Slot, Any] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def take(self) -> Slot:
        """A free slot: a new one as long as there may be more, else one that was moved, which may take its time."""
        if self._unmade and self._free.empty():
            self._unmade -= 1
            return Slot()
        slot = self._next_free()
        self._check()
        return slot

    def _next_free(self) -> Slot:
        """The next slot that is free; the time from when the device has nothing to do is counted as waiting."""
        while not self._idle():
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=LOOK_SECONDS)
        begun = time.perf_counter()
        slot = self._free.get()
        self._waited(time.perf_counter() - begun)
        return slot

    def send(self, slot: Slot, load: Any) -> None:
        """Leave a slot to the thread, and what it needs to know of it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._move_all, name="staging", daemon=True)
            self._thread.start()
        self._sent.put((slot, load))

    def give_back(self, slot: Slot) -> None:
        """Free a slot that is not to be sent."""
        self._free.put(slot)

    def drain(self) -> None:
        """Wait until all that was sent is moved; what went wrong on the way is raised here, or by `take`."""
        begun = time.perf_counter()
        self._sent.join()
        self._waited(time.perf_counter() - begun)
        self._check()

    def close(self) -> None:
        """End the thread when it has moved what is on its way."""
        if self._thread is not None:
            self._sent.put(None)
            self._thread.join()
            self._thread = None

    def _move_all(self) -> None:
        while (sent := self._sent.get()) is not None:
            slot, load = sent
            try:
                if self._error is None:
                    self._move_one(slot, load)
                else:
                    self._drop(slot)
            except BaseException as error:  # the model's thread raises it
                self._error = error
            finally:
                del sent, load  # or a part would stay in memory until the next one comes
                self._free.put(slot)
                self._sent.task_done()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class Direct:
    """Within a CPU's memory."""

    def put(self, into: Tensor, values: Tensor, some_empty: bool = True) -> float | None:
        """Convert a site's `values` (image, kept token, d_model) into the part's array.

        The sum of squared rounding errors, of which `squared_errors` says more; None for equal dtypes.  `some_empty`: there may be
        slots of NaN, which count nothing; without any, a plain sum gives the same bits sooner.
        """
        into.copy_(values)
        if into.dtype == values.dtype:
            return None
        lost = into.to(torch.float32, copy=True).sub_(values).square_()
        return float(lost.nansum(dtype=torch.float64) if some_empty else lost.sum(dtype=torch.float64))


@runtime_checkable
class Port(Protocol):
    """What a ring needs of a device."""

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer on the device."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer on the host that the device can write while others compute."""

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Begin to copy (from the device, to pinned) when all that was asked of the device is done; what `wait` waits for."""

    def wait(self, copied: Any) -> None:
        """Wait for a `copy`; nothing else that the device does is waited for."""

    def mark(self) -> Any:
        """What `passed` asks about: all that the device was asked to compute so far."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has computed all of that; does not wait."""


class Ring:
    """From staged buffers on a device, through pinned memory, into arrays on the host."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self._computed: Any = None

    def piece(self, shape: tuple[int, ...], computed: torch.dtype, stored: torch.dtype) -> Piece:
        """Buffers for what is staged; made once a slot."""
        staged = self.port.on_device(shape, computed)
        converted = staged if stored == computed else self.port.on_device(shape, stored)
        return Piece(staged, converted, self.port.pinned(shape, stored))

    def send(self, slot: Slot, count: int) -> dict[Any, Tensor]:
        """Send the first `count` images of each piece off; rounding errors (site,) by piece, where values are rounded.

        Whole buffers are copied, for they lie in one piece; of a short batch the end is not used.
        """
        errors = {}
        for where, piece in slot.pieces.items():
            if piece.stored is not piece.staged:
                piece.stored.copy_(piece.staged)
                lost = squared_errors(piece.stored[:, :count], piece.staged[:, :count])
                assert lost is not None
                errors[where] = lost
        self._computed = self.port.mark()
        slot.arrived = self.port.copy([(piece.stored, piece.landed) for piece in slot.pieces.values()])
        return errors

    def idle(self) -> bool:
        """Whether the device has computed everything up to the last `send`."""
        return self._computed is None or self.port.passed(self._computed)

    def arrive(self, slot: Slot) -> None:
        """Wait until what was sent is there."""
        self.port.wait(slot.arrived)

    def move(self, piece: Piece, into: Tensor) -> None:
        """Move a piece that arrived into (site, image, kept token, d_model) of the store's dtype."""
        into.copy_(piece.landed[:, : into.shape[1]])


class Cuda:
    """A CUDA device: copies run on a stream of their own, beside the model's kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Port`."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Port`."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> "torch.cuda.Event":
        """See `Port`."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            copied: torch.cuda.Event = self.stream.record_event()
        return copied

    def wait(self, copied: "torch.cuda.Event") -> None:
        """See `Port`."""
        copied.synchronize()

    def mark(self) -> "torch.cuda.Event":
        """See `Port`."""
        computed: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return computed

    def passed(self, mark: "torch.cuda.Event") -> bool:
        """See `Port`."""
        return bool(mark.query())  # type: ignore[no-untyped-call]


def chosen(source: Tensor, index: Tensor | None, then: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The rows of `source` (image, token, width) at `index` (image, kept token), put through `then` where it is given.

    `index` counts the rows of the batch laid flat, so that whole rows are copied, and from all images at once; None: all rows, and
    the model's own memory where they go through nothing.
    """
    if index is not None:
        source = source.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
    return source if then is None else then(source)


def select_into(target: Tensor, source: Tensor, index: Tensor | None, then: Callable[[Tensor], Tensor] | None) -> None:
    """Put what `chosen` gives into `target` (image, kept token, d_model)."""
    if index is not None and then is None:
        torch.index_select(source.flatten(0, 1), 0, index.flatten(), out=target.flatten(0, 1))
    else:
        target.copy_(chosen(source, index, then))


def lane_of(device: torch.device) -> Direct | Ring:
    """The lane from a device."""
    return Direct() if device.type == "cpu" else Ring(Cuda(device))


def squared_errors(stored: Tensor, exact: Tensor) -> Tensor | None:
    """(site,) float64 sums of the squared differences between what is stored and what was computed; None for equal dtypes.

    Empty slots are NaN and count nothing.  Each site is summed by itself, as harvests always did: the order of a sum decides its
    last bits, and those are in the commits.  So no more than a site is held in float32; nothing is fetched from the device.
    """
    if stored.dtype == exact.dtype:
        return None
    sums = torch.empty(len(stored), dtype=torch.float64, device=stored.device)
    lost = torch.empty_like(stored[0], dtype=torch.float32)  # one for all: fresh memory is slower than arithmetic
    for place, (rounded, whole) in enumerate(zip(stored, exact, strict=True)):
        lost.copy_(rounded).sub_(whole)  # both exact, and faster than a difference of two dtypes
        sums[place] = lost.square_().nansum(dtype=torch.float64)
    return sums
