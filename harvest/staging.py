"""Takes the kept rows of each step from the model to the arrays of their part, while the model goes on.

On a CPU a hook converts the kept rows of its site into the part's arrays, and that is all (`harvest.lanes.Direct`).  From a device:

1. A hook hands over the rows of its site while the block is computed; the kept ones are copied into the slot of this step, on
   the model's device and in its dtype: one buffer a stream and point, (site, image, kept token, d_model).
2. As the step ends, its slot is sent off (`harvest.lanes.Ring`): it is converted there, and one copy to pinned memory begins
   on a side stream.  Nothing of this makes the model's thread wait.
3. A thread waits until the slot has arrived and moves it into the part's arrays.
4. Where no slot is free, the model waits: so memory stays bounded, and `Waiting.copy` says for how long of that the device
   had nothing left to compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from harvest.capture import Rows
from harvest.lanes import Direct, Ring, Slot, Traffic, chosen, lane_of, select_into
from harvest.models.model import DTYPES, first_line
from harvest.waiting import Waiting
from store.errors import GranaryError
from store.format import StoreMeta
from store.sites import Point, Site, Stream
from store.sizes import human_size, many
from store.writer import Key

SLOTS = 2
"""one that the model fills while the other is on its way"""
MOST_BYTES = 8 * 2**30
"""where two slots take more than this, there is one, and the model waits for it"""
Positions = Mapping[tuple[Stream, int], np.ndarray]
"""(stream, step) -> (image, kept token) of a part, for streams of which not all tokens are kept; -1: an empty slot"""


@dataclass
class _Gathered:
    """A part that is being filled; its keys are (stream, step) and (stream, step, point)."""

    positions: Positions
    arrays: dict[tuple[Stream, int, Point], np.ndarray]
    """(site, image, kept token, d_model)"""
    tensors: dict[tuple[Stream, int, Point], Tensor]
    """the same memory"""
    errors: dict[tuple[Stream, int, Point], Any] = field(default_factory=dict)
    """(site,) float64, where values are rounded; on the model's device, and in an array where that is a CPU"""
    index: dict[tuple[Stream, int], Tensor] = field(default_factory=dict)
    """(image, kept token): which rows of the image's batch, laid flat; on the model's device"""
    empty: dict[tuple[Stream, int], Tensor] = field(default_factory=dict)
    """(image, kept token, 1): which of them stand for no token; absent where all do"""


@dataclass(frozen=True)
class _Load:
    """What a slot carries: the images from `first` on, of `step`, of a part."""

    part: _Gathered
    step: int
    first: int
    count: int


class Staging:
    """The way from hooks to the arrays of one part after the other; a context, in which its thread lives.

    For each part: `begin`; for each batch `batch`, and for each step of it `keep` for each site and point, then `step_ended`;
    `finish`.  All are called by the thread that runs the model.
    """

    def __init__(self, meta: StoreMeta, waiting: Waiting | None = None, lane: Direct | Ring | None = None) -> None:
        """`lane`: how values leave the device; default: that of the device that the first rows lie on."""
        self.meta, self.waiting = meta, waiting or Waiting()
        self._sites = {s: tuple(site for site in meta.site_objects if site.stream == s) for s in meta.streams}
        self._place = {site: place for sites in self._sites.values() for place, site in enumerate(sites)}
        self._stored = stored_in(meta)
        self._lane = lane
        self._part = _Gathered({}, {}, {})
        self._slot: Slot | None = None
        self._seen: set[tuple[Site, Point]] = set()
        self._step = self._first = self._count = 0
        self._traffic = Traffic(slots_of(meta), self._move, self.waiting.waited_for_copy, self._drop, self._idle)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self._traffic.close()

    def reserve(self, device: torch.device) -> None:
        """Make now the buffers that else are made as the first rows come by, so that a batch can be timed without that."""
        self._lane = self._lane or lane_of(device)
        if isinstance(self._lane, Direct):
            return
        slots = [self._traffic.take() for _ in range(slots_of(self.meta))]
        for slot in slots:
            for sites in self._sites.values():
                for point in self.meta.points:
                    self._target(self._lane, slot, sites[0], point, DTYPES[self.meta.dtype])
            self._traffic.give_back(slot)

    def begin(self, images: int, positions: Positions) -> None:
        """Begin a part of so many images; one that was not finished is dropped."""
        if self._slot is not None:
            self._traffic.give_back(self._slot)
            self._slot = None
        self._seen.clear()
        meta, logical = self.meta, self.meta.carrier.logical
        arrays: dict[tuple[Stream, int, Point], np.ndarray] = {
            (stream, step, point): np.empty((len(sites), images, meta.tokens[stream].kept, meta.d_model), logical)
            for stream, sites in self._sites.items()
            for step in meta.steps
            for point in meta.points
        }
        self._part = _Gathered(positions, arrays, {key: as_tensor(array) for key, array in arrays.items()})

    def batch(self, first: int, count: int) -> None:
        """Begin a batch with step 0: the images from `first` of the part on, a multiple of the batch size."""
        assert first % self.meta.batch_size == 0, first
        self._first, self._count, self._step = first, count, 0

    def keep(self, site: Site, point: Point, rows: Rows) -> None:
        """Copy the kept rows of a site into the slot of this step: what a hook calls.  What the store does not hold is passed over."""
        if self._step not in self.meta.steps or point not in self.meta.points:
            return
        source, stream = rows.source, site.stream
        assert source.shape[:2] == (self._count, self.meta.tokens[stream].total), (str(site), tuple(source.shape))
        self._index(stream, source.device)
        key, batch = (stream, self._step), slice(self._first, self._first + self._count)
        index, empty = (
            None if found is None else found[batch] for found in (self._part.index.get(key), self._part.empty.get(key))
        )
        self._lane = self._lane or lane_of(source.device)
        if isinstance(self._lane, Direct):
            values = chosen(source, index, rows.then)
            values = values if empty is None else values.masked_fill(empty, float("nan"))
            self._convert(self._lane, site, point, values, empty is not None)
        else:
            self._slot = self._slot or self._traffic.take()
            target = self._target(self._lane, self._slot, site, point, source.dtype)
            select_into(target, source, index, rows.then)
            if empty is not None:
                target.masked_fill_(empty, float("nan"))
        self._seen.add((site, point))

    def step_ended(self, step: int) -> None:
        """Send off what was kept of a step; the next one begins."""
        assert step == self._step, (step, self._step)
        self._step = step + 1
        if step not in self.meta.steps:
            return
        wanted = len(self._place) * len(self.meta.points)
        assert len(self._seen) == wanted, f"step {step}: {len(self._seen)} of {wanted} points of sites came by"
        self._seen.clear()
        if isinstance(self._lane, Direct):
            return
        slot, self._slot = self._slot, None
        assert slot is not None and self._lane is not None
        for (stream, point), lost in self._lane.send(slot, self._count).items():
            _add(self._part, (stream, step, point), lost)
        self._traffic.send(slot, _Load(self._part, step, self._first, self._count))

    def finish(self) -> tuple[dict[Key, np.ndarray], dict[Key, float]]:
        """What was kept of the part, when all of it has arrived: (image, kept token, d_model), and the rounding errors."""
        self._traffic.drain()
        part, self._part = self._part, _Gathered({}, {}, {})
        lost = {key: sums.tolist() for key, sums in part.errors.items()}  # from the device once a part
        arrays: dict[Key, np.ndarray] = {}
        errors: dict[Key, float] = {}
        for site, place in self._place.items():
            for step in self.meta.steps:
                for point in self.meta.points:
                    key = (site.stream, step, point)
                    arrays[site, step, point] = part.arrays[key][place]
                    errors[site, step, point] = lost[key][place] if key in lost else 0.0
        return arrays, errors

    def _convert(self, lane: Direct, site: Site, point: Point, values: Tensor, some_empty: bool) -> None:
        """Put the kept rows of a site (image, kept token, d_model) where they stay."""
        key, place, part = (site.stream, self._step, point), self._place[site], self._part
        lost = lane.put(part.tensors[key][place, self._first : self._first + self._count], values, some_empty)
        if lost is not None:
            if key not in part.errors:
                part.errors[key] = np.zeros(len(self._sites[site.stream]))
            part.errors[key][place] += lost

    def _target(self, lane: Ring, slot: Slot, site: Site, point: Point, computed: torch.dtype) -> Tensor:
        """Where the rows of a site go: (image, kept token, d_model)."""
        piece = slot.pieces.get((site.stream, point))
        if piece is None:
            meta, stream = self.meta, site.stream
            shape = (len(self._sites[stream]), batch_of(meta), meta.tokens[stream].kept, meta.d_model)
            try:
                with torch.inference_mode(False):
                    piece = slot.pieces[stream, point] = lane.piece(shape, computed, self._stored)
            except torch.OutOfMemoryError:  # of the device: the batch does not fit
                raise
            except RuntimeError as error:
                raise _not_pinned(meta, error) from None
        assert piece.staged.dtype == computed, (str(site), piece.staged.dtype, computed)
        return piece.staged[self._place[site], : self._count]

    def _index(self, stream: Stream, device: torch.device) -> None:
        """Put on the device which rows of a stream are kept at this step; once a part."""
        key, part = (stream, self._step), self._part
        positions = part.positions.get(key)
        if positions is None or key in part.index:
            return
        in_batch = np.arange(len(positions)) % self.meta.batch_size
        flat = np.maximum(positions, 0) + in_batch[:, None] * self.meta.tokens[stream].total
        with torch.inference_mode(False):
            part.index[key] = _to(device, torch.from_numpy(flat.astype(np.int64)))
            if (positions < 0).any():
                part.empty[key] = _to(device, torch.from_numpy(positions < 0).unsqueeze(-1))

    def _idle(self) -> bool:
        return not isinstance(self._lane, Ring) or self._lane.idle()

    def _drop(self, slot: Slot) -> None:
        assert isinstance(self._lane, Ring)
        self._lane.arrive(slot)

    def _move(self, slot: Slot, load: _Load) -> None:
        """Move a slot into the arrays of its part: what the thread does."""
        assert isinstance(self._lane, Ring)
        with self.waiting.threads.on("copy"):
            self._lane.arrive(slot)
            for (stream, point), piece in slot.pieces.items():
                key = stream, load.step, point
                into = load.part.tensors[key][:, load.first : load.first + load.count]
                self._lane.move(piece, into)


def _not_pinned(meta: StoreMeta, error: RuntimeError) -> GranaryError:
    """What to say when the host has no memory that a device may write."""
    size = slots_of(meta) * slot_bytes(meta) * stored_in(meta).itemsize // DTYPES[meta.dtype].itemsize
    return GranaryError(
        f"{human_size(size)} of pinned memory, for what {many(slots_of(meta), 'step')} of a batch keep, cannot be had: "
        f"{first_line(error)} Use a smaller --batch-size than {meta.batch_size}, keep fewer tokens (--tokens, --text-tokens) or "
        "layers, or give this process more memory that it may lock (ulimit -l, the limits of its container)"
    )


def _add(part: _Gathered, key: Any, lost: Tensor) -> None:
    """Add the errors of a batch to those of its part, in the order of batches."""
    part.errors[key] = part.errors[key] + lost if key in part.errors else lost


def _to(device: torch.device, values: Tensor) -> Tensor:
    """The same on a device, without waiting for what it computes: a copy from memory that is not pinned would."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory as a tensor; NumPy knows bfloat16 by `ml_dtypes` only."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def stored_in(meta: StoreMeta) -> torch.dtype:
    """What values are handed to the store in; fp8-e4m3 is made from bfloat16 there."""
    return DTYPES["bfloat16" if meta.store_dtype == "fp8-e4m3" else meta.store_dtype]


def batch_of(meta: StoreMeta) -> int:
    """Images of the largest batch that is drawn: no batch reaches over the end of a part."""
    return min(meta.batch_size, meta.chunk_images)


def slot_bytes(meta: StoreMeta) -> int:
    """Bytes of what one step of a batch keeps, in the dtype that the model computes in: one slot on its device; a CPU has none.

    As much again where it is converted there, in the store's dtype, and that again in pinned memory.
    """
    rows = sum(meta.tokens[site.stream].kept for site in meta.site_objects)
    return rows * batch_of(meta) * meta.d_model * len(meta.points) * DTYPES[meta.dtype].itemsize


def slots_of(meta: StoreMeta) -> int:
    """How many slots there are."""
    return SLOTS if SLOTS * slot_bytes(meta) <= MOST_BYTES else 1
