"""How the memory of a process is divided: what is held always, and what each thing that is done at once takes.

A *lane* does one task at a time: reading a run, or writing a shard.  Two lanes let one read while the other writes, which
halves a run; where the memory is too small for two, there is one.  Every array of more than a few kB is counted here.
"""

from dataclasses import dataclass

import numpy as np

from store.errors import UsageError
from store.format import EMPTY_TOKEN, array_specs
from store.packing.plan import PackPlan
from store.packing.scratch import Layout
from store.reader import COMMITS_KEPT
from store.shuffle import BLOCK
from store.sites import Site, Stream
from store.sizes import human_size
from store.strata import GROUPS

assert EMPTY_TOKEN < 0
SUM_VALUES = 1 << 16
"""about as many are widened to float32 at once, to be added: they stay in the processor's cache"""
THREADS = 2
"""at work in a process, unless a server is to be waited for"""
REMOTE_READERS = 8
RUN_ROW, SHARD_ROW, UNIT_ROW = 28, 75, 72
"""bytes that are held for a row beside its activations: of a run its destination, rank among them and token; of a shard
its destination, order, token, provenance and what that is computed from; of a unit what its destinations are computed from"""
COMMIT_ENTRY = 700
"""bytes of a file's entry in a commit that is held"""


@dataclass(frozen=True)
class Share:
    """What one stream's sites are done with."""

    whole: bool
    """a site fits: it is read into memory and its shards are cut from there"""
    run_lanes: int
    shard_lanes: int
    readers: int
    """threads of a lane that read"""
    block: int
    """bytes of the block that files are written from"""
    runs: tuple[tuple[int, int], ...]
    """first unit and last + 1 of each run, counted among those that have rows"""


class Budget:
    """The memory of one process, divided."""

    def __init__(self, plan: PackPlan, memory: int, lanes: int) -> None:
        self.plan, self.memory, self.lanes = plan, memory, lanes
        meta = plan.store.meta
        arrays = sum(1 for _ in array_specs(meta))
        commits = min(COMMITS_KEPT, meta.n_parts) * arrays * COMMIT_ENTRY + meta.n_parts * arrays * 4
        self.fixed = sum(rows.nbytes for rows in plan.rows.values()) + commits
        self.shares = {stream: self._share(stream) for stream in plan.streams}

    def layout(self, site: Site) -> Layout:
        """Of the scratch files of a site."""
        meta = self.plan.store.meta
        groups = len(GROUPS[site.stream])
        return Layout(self.plan.shards(site), len(self.plan.points), groups, meta.d_model, self.plan.dtype)

    def scratch_bytes(self, stream: Stream) -> int:
        """Bytes of the scratch files of a site."""
        site = next(site for site in self.plan.sites if site.stream == stream)
        share, layout, units = self.shares[stream], self.layout(site), self.units(stream)
        if share.whole:
            return 0
        return sum(layout.size(last - first, int(units[first:last].sum())) for first, last in share.runs)

    def units(self, stream: Stream) -> np.ndarray:
        """Rows of each unit that has any: chunk by chunk, step by step."""
        every = self.plan.rows[stream].unit_rows.reshape(-1)
        return every[every > 0]

    def _share(self, stream: Stream) -> Share:
        units, rows = self.units(stream), self.plan.rows[stream].rows
        free = self.memory - self.fixed
        row, record = self._row(stream), self._row(stream) + RUN_ROW
        block = min(max(self.memory // 64, 1 << 16, row), 8 << 20)
        mixing = min(BLOCK, rows) * 8 * 8
        shard = int(np.diff(self.plan.cuts[stream]).max())
        whole_shard = shard * SHARD_ROW + block + mixing
        one_shard = whole_shard + shard * row
        sums = self._sums(stream)
        unit = int(units.max()) * record + sums
        readers = THREADS if self.plan.store.place.local is not None else REMOTE_READERS
        reader = self._reader(stream) + int(units.max()) * UNIT_ROW + mixing

        def room(lanes: int, readers: int) -> int:
            """What is left of a lane's share for the rows of a run."""
            return free // lanes - readers * reader - block

        need = self.fixed + max(one_shard, unit + reader + block)
        if self.memory < need:
            raise UsageError(
                f"--memory {human_size(self.memory)} is too little for stream {stream}: a shard takes "
                f"{human_size(one_shard)}, a chunk of the store {human_size(unit + reader + block)}, what is known of the rows "
                f"{human_size(self.fixed)}; use --memory {self._said(need)} or more, or a smaller --shard-mb"
            )
        everything = rows * record + sums * len(units)
        sites = sum(site.stream == stream for site in self.plan.sites)
        for lanes in range(min(self.lanes, sites), 0, -1):
            hands = max(readers // lanes, 1)
            if everything + THREADS // lanes * whole_shard <= room(lanes, hands):
                return Share(True, lanes, lanes, hands, block, ((0, len(units)),))
        lanes = next((n for n in range(self.lanes, 1, -1) if room(n, 1) >= max(unit, free // (2 * n))), 1)
        hands = max(
            (n for n in range(1, readers // lanes + 1) if room(lanes, n) >= max(unit, free // lanes // 2)), default=1
        )
        shard_lanes = max(min(self.lanes, free // one_shard), 1)
        runs = _runs(units * record + sums, max(room(lanes, hands), unit))
        return Share(False, lanes, shard_lanes, hands, block, runs)

    def _said(self, need: int) -> str:
        """What to write after --memory: it is of all processes of this machine."""
        return f"{-(-need * self.plan.settings.workers // 10**6)}MB"

    def _row(self, stream: Stream) -> int:
        """Bytes of a row's activations."""
        return len(self.plan.points) * self.plan.store.meta.d_model * np.dtype(self.plan.dtype).itemsize

    def _sums(self, stream: Stream) -> int:
        """Bytes of the sums of a unit: they are held once, and written from there."""
        return len(self.plan.points) * len(GROUPS[stream]) * self.plan.store.meta.d_model * 8

    def _reader(self, stream: Stream) -> int:
        """What one reading thread takes beside the rows it keeps: a chunk, what decoding it takes, rows to be added."""
        store, d_model = self.plan.store, self.plan.store.meta.d_model
        values = store.chunk_images * store.meta.tokens[stream].kept * d_model
        stored = values * np.dtype(store.meta.carrier.stored).itemsize
        copies = 2 if store.meta.codec == "none" and store.place.local is not None else 5
        decoded = values * (4 + 4 + 2 + 2) if store.meta.carrier.scaled else 0
        return copies * stored + decoded + 3 * 4 * (SUM_VALUES + d_model)


def _runs(taken: np.ndarray, most: int) -> tuple[tuple[int, int], ...]:
    """Consecutive units, as many in each run as take at most `most` bytes together; `taken` is what each takes."""
    upto = np.concatenate([[0], np.cumsum(taken)])
    runs, first = [], 0
    while first < len(taken):
        last = max(int(np.searchsorted(upto, upto[first] + most, side="right")) - 1, first + 1)
        runs.append((first, last))
        first = last
    return tuple(runs)
