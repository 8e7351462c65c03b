"""What is done at once, by a thread of this process or by a worker elsewhere: a whole site, a run, or a shard.

A task may be done twice, or by two at the same time: it publishes the same bytes under the same names.
"""

import errno
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy

from store.errors import DamagedError, StoreError
from store.files import publish, temporary_of, write_bytes
from store.packing.budget import THREADS, Budget
from store.packing.folder import Entry, PackFolder
from store.packing.plan import PackPlan
from store.packing.reading import Means, Reading, columns_in
from store.packing.scratch import RunFile, write_run
from store.packing.shard import entry_of, write_shard
from store.packing.sink import Advance
from store.shards import means_file, shard_file
from store.sites import Point, Site


@dataclass(frozen=True)
class Task:
    """One thing to do: `whole` a site, its run `number`, or its shard `number`."""

    kind: str
    site: Site
    number: int = 0
    skip: frozenset[int] = field(default=frozenset())
    """shards of a whole site that are there already"""


class Hands:
    """Does tasks for one pack in one process."""

    def __init__(
        self, plan: PackPlan, budget: Budget, folder: PackFolder, advance: Advance, *, one_at_a_time: bool = False
    ) -> None:
        """`one_at_a_time`: whatever thread does a task, no other does one meanwhile."""
        self.plan, self.budget, self.folder, self.advance = plan, budget, folder, advance
        self._memory: Any = SimpleNamespace() if one_at_a_time else threading.local()

    def do(self, task: Task) -> dict[str, Entry]:
        """The files of the pack that the task made."""
        kinds: Mapping[str, Callable[[Task], dict[str, Entry]]] = {
            "whole": self._whole, "run": self._run, "shard": self._shard,
        }  # fmt: skip
        return kinds[task.kind](task)

    def _room(self, count: int) -> np.ndarray:
        """So many bytes for activations, the same ones for each task of this thread, or of all."""
        if len(getattr(self._memory, "held", ())) < count:
            self._memory.held = None  # before there are two
            self._memory.held = np.empty(count, np.uint8)
        return np.asarray(self._memory.held[:count])

    def _whole(self, task: Task) -> dict[str, Entry]:
        """Read a site into memory and cut its shards from there."""
        share, site, cuts = self.budget.shares[task.site.stream], task.site, self.plan.cuts[task.site.stream]
        reading = Reading(self.plan, site, share.runs[0], self._room, self.advance)
        reading.fill(share.readers)
        order = np.empty(len(reading.destinations), np.int64)
        order[reading.destinations] = np.arange(len(order))

        def cut(shard: int) -> tuple[str, Entry]:
            chosen = order[cuts[shard] : cuts[shard + 1]]
            return self._publish(site, shard, reading.activations, chosen, reading.tokens[chosen], share.block)

        with ThreadPoolExecutor(max(THREADS // share.run_lanes, 1)) as pool:
            try:
                files = dict(pool.map(cut, (shard for shard in range(len(cuts) - 1) if shard not in task.skip)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        means = Means(self.plan, site)
        means.add(reading.sums)
        return files | self.publish_means(site, means)

    def _run(self, task: Task) -> dict[str, Entry]:
        """Read a run and write its scratch file."""
        share, site = self.budget.shares[task.site.stream], task.site
        run, layout = share.runs[task.number], self.budget.layout(site)
        reading = Reading(self.plan, site, run, self._room, self.advance)
        reading.fill(share.readers)
        path = self.folder.run_path(site, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(path, secrets.token_hex(4))
        try:
            found = write_run(
                temporary, layout, self.plan.cuts[site.stream], reading.destinations, reading.tokens,
                tuple(reading.activations.values()), reading.sums, np.empty(share.block, np.uint8), self.advance,
            )  # fmt: skip
            temporary.replace(path)  # not synced: it is soon gone, and every piece of it is proved when it is read
            self.folder.finish_run(site, run, {"bytes": path.stat().st_size, "crc32c": found})
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"the disk of the scratch files, {self.folder.scratch}, is full. What is finished is kept: make room, or "
                    "give another --scratch, then run the same command again"
                ) from None
            raise
        return {}

    def _shard(self, task: Task) -> dict[str, Entry]:
        """Put a shard together from the scratch files."""
        share, site, shard = self.budget.shares[task.site.stream], task.site, task.number
        first, last = (int(cut) for cut in self.plan.cuts[site.stream][shard : shard + 2])
        rows, layout, d_model = last - first, self.budget.layout(site), self.plan.store.meta.d_model
        destinations, tokens = np.empty(rows, np.int64), np.empty(rows, np.int32)
        columns = columns_in(self._room, self.plan.points, rows, d_model, self.plan.dtype)
        done = 0
        for run in share.runs:
            with RunFile(self.folder.run_path(site, run), layout, run[1] - run[0]) as file:
                rest = [column[done:] for column in columns.values()]
                took = file.segment(shard, destinations[done:], tokens[done:], rest)
            self.advance(took * layout.record)
            done += took
        order = np.full(rows, -1, np.int64)
        if done == rows and not ((destinations < first) | (destinations >= last)).any():
            order[destinations - first] = np.arange(rows)
        if done != rows or (order < 0).any():
            raise DamagedError(
                f"{self.folder.scratch / str(site)}: the runs do not hold the {rows} rows of shard {shard}, each once. "
                "Remove that folder and run the same command again"
            )
        return dict([self._publish(site, shard, columns, order, tokens[order], share.block)])

    def _publish(
        self,
        site: Site,
        shard: int,
        activations: Mapping[Point, np.ndarray],
        order: np.ndarray,
        tokens: np.ndarray,
        block: int,
    ) -> tuple[str, Entry]:
        """Write a shard and its record; its name and entry."""
        name = shard_file(site, shard)
        entry: Entry = {}
        about: dict[str, Any] = {"pack": self.plan.key, "site": str(site), "shard": shard}
        provenance = self.plan.rows[site.stream].provenance(int(self.plan.cuts[site.stream][shard]), tokens)

        def write(temporary: Path) -> None:
            room = np.empty(block, np.uint8)
            entry.update(write_shard(temporary, about, activations, order, provenance, room, self.advance))

        publish(self.folder.out / name, write)
        self.folder.finish(name, entry)
        return name, entry

    def publish_means(self, site: Site, means: Means) -> dict[str, Entry]:
        """Write the means of a site, which come last of its files."""
        data = safetensors.numpy.save(dict(means.result()))
        name, entry = means_file(site), entry_of(data)
        write_bytes(self.folder.out / name, data)
        self.folder.finish(name, entry)
        return {name: entry}

    def means_of_runs(self, site: Site) -> dict[str, Entry]:
        """Write the means of a site from the sums in its scratch files."""
        means, layout = Means(self.plan, site), self.budget.layout(site)
        for run in self.budget.shares[site.stream].runs:
            with RunFile(self.folder.run_path(site, run), layout, run[1] - run[0]) as file:
                means.add(file.sums())
        return self.publish_means(site, means)
