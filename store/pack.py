"""Makes a pack: every row of one split of a store, shuffled once, so that training reads in order.

1. The rows of a stream are its kept (image, step, token) slots.  A keyed permutation, computed and never stored, gives each
   its place; all sites of the stream share it, so their rows stay aligned.  Places are cut into equal shards.
2. A site that fits into `--memory` is read, and its shards are cut from there.
3. A larger one goes twice through the disk: as much of it as fits is read, put in the order of the places and written to a
   scratch file (a run); then each shard is put together from one piece of every run.
4. Every byte of the store is read once.  Sites come one after another, the manifest last; what a killed pack finished is kept.

Equal store and settings give equal bytes, whatever the memory, the workers, and however often the pack was killed.
"""

import errno
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from store import open_store
from store.errors import GranaryError, StoreError, UsageError
from store.files import self_checked, write_bytes, write_json
from store.packing.budget import Budget
from store.packing.crew import Crew, ThreadCrew
from store.packing.folder import Entry, PackFolder, run_name
from store.packing.plan import PackPlan
from store.packing.settings import PackSettings
from store.packing.shard import entry_of
from store.packing.tasks import Hands, Task
from store.shards import FORMAT, FORMAT_VERSION, MANIFEST, Pack, means_file, open_pack, shard_file, weights_name
from store.sites import Site
from store.sizes import human_size, many, parse_size

__all__ = ["PackSettings", "run"]


class Packing:
    """One run of `pack`: what is to be written, and what is written already."""

    def __init__(self, plan: PackPlan, budget: Budget, folder: PackFolder) -> None:
        self.plan, self.budget, self.folder = plan, budget, folder
        self.files: dict[str, Entry] = {}

    def names(self, site: Site) -> list[str]:
        """The files of a site, its means last."""
        return [*(shard_file(site, index) for index in range(self.plan.shards(site))), means_file(site)]

    def cost(self, task: Task) -> int:
        """Bytes that a task reads and writes."""
        plan, share, stream = self.plan, self.budget.shares[task.site.stream], task.site.stream
        row, rows = plan.row_bytes(stream), plan.cuts[stream]
        if task.kind == "whole":
            written = sum(int(rows[i + 1] - rows[i]) * row for i in range(plan.shards(task.site)) if i not in task.skip)
            return plan.read_bytes(stream) + written
        layout = self.budget.layout(task.site)
        if task.kind == "shard":
            return int(rows[task.number + 1] - rows[task.number]) * (row + layout.record)
        first, last = share.runs[task.number]
        units = self.budget.units(stream)[first:last]
        meta = plan.store.meta
        chunk = meta.chunk_images * meta.tokens[stream].kept * meta.row_bytes * len(plan.points)
        return len(units) * chunk + layout.size(len(units), int(units.sum()))

    def tasks(self, site: Site, kind: str) -> list[Task]:
        """What is still to be done for a site, of a kind."""
        share = self.budget.shares[site.stream]
        missing = [name for name in self.names(site) if name not in self.files]
        if not missing or share.whole != (kind == "whole"):
            return []
        shards = range(self.plan.shards(site))
        there = frozenset(index for index in shards if shard_file(site, index) in self.files)
        if kind == "whole":
            return [Task("whole", site, 0, there)]
        if kind == "shard":
            return [Task("shard", site, index) for index in shards if index not in there]
        layout, units = self.budget.layout(site), self.budget.units(site.stream)
        sizes = [layout.size(last - first, int(units[first:last].sum())) for first, last in share.runs]
        return [
            Task("run", site, number)
            for number, (each, size) in enumerate(zip(share.runs, sizes, strict=True))
            if not self.folder.run_finished(site, each, layout, size)
        ]

    def announce(self) -> None:
        """Print what will be read and written; refuse a disk that is too small."""
        plan, budget, settings = self.plan, self.budget, self.plan.settings
        lines, read, moved = [], 0, 0
        for stream, rows in plan.rows.items():
            sites = [site for site in plan.sites if site.stream == stream]
            share, scratch = budget.shares[stream], budget.scratch_bytes(stream)
            read += len(sites) * plan.read_bytes(stream)
            moved += len(sites) * scratch
            how = "fits into memory" if share.whole else f"runs: {len(share.runs)}, scratch: {human_size(scratch)}"
            each = "each " if len(sites) > 1 else ""
            shards = many(plan.shards(sites[0]), "shard")
            lines.append(f"{many(len(sites), f'{stream} site')}, {each}{rows.rows:,} rows in {shards} ({how})")
        if plan.weights:
            of_mlps = human_size(sum(plan.weights_bytes.values()))
            lines.append(f"targets recomputed: mlp_in and {many(len(plan.weights_bytes), 'MLP')} ({of_mlps})")
        print(f"plan: {human_size(plan.total_bytes)} for {settings.split}: " + "; ".join(lines))
        most = max(budget.scratch_bytes(stream) for stream in plan.streams)
        each = "each worker" if settings.scheduler else f"each of {settings.workers} workers"
        of_whom = "" if settings.workers == 1 and not settings.scheduler else f" for {each}"
        print(
            f"  the store is read once: {human_size(read)}; scratch {human_size(most)} at a time, {human_size(2 * moved)} "
            f"written and read in all; memory {human_size(budget.memory)}{of_whom}, beside Python's own",
            flush=True,
        )
        self._refuse_small_disk(most)

    def _refuse_small_disk(self, scratch: int) -> None:
        there = 0
        if self.folder.work.exists():
            names = (name for site in self.plan.sites for name in self.names(site))
            there = sum(path.stat().st_size for name in names if (path := self.folder.out / name).is_file())
            there += sum(path.stat().st_size for path in self.folder.scratch.rglob("*.run"))
        needs: dict[Path, int] = {}
        for folder, size in ((self.folder.out, self.plan.total_bytes - there), (self.folder.scratch, scratch)):
            disk = _existing(folder)
            same = next((other for other in needs if other.stat().st_dev == disk.stat().st_dev), disk)
            needs[same] = needs.get(same, 0) + size
        for disk, size in needs.items():
            free = shutil.disk_usage(disk).free
            if free < size:
                raise StoreError(
                    f"{disk}: {human_size(size)} are to be written and {human_size(free)} are free on that disk: "
                    "make room, or choose another --out or --scratch"
                )

    def begin(self) -> None:
        """Take over what an earlier run finished, throw away the rest; every byte that is kept is read."""
        runs = {
            site: [run_name(each) for each in self.budget.shares[site.stream].runs]
            for site in self.plan.sites
            if not self.budget.shares[site.stream].whole
        }
        self.folder.begin(runs)
        names = [*self.plan.weights_bytes, *(name for site in self.plan.sites for name in self.names(site))]
        with tqdm(unit="B", unit_scale=True, desc="what is there", delay=1) as bar:
            self.files |= self.folder.finished(names, bar.update)

    def copy_weights(self) -> None:
        """Copy the MLPs of the sites, for recomputed targets."""
        for site in self.plan.sites if self.plan.weights else ():
            name = weights_name(self.plan.weights[str(site)])
            if name not in self.files:
                data = self.plan.store.weights_file(site)
                assert data is not None
                write_bytes(self.folder.out / name, data)
                self.files[name] = entry_of(data)
                self.folder.finish(name, self.files[name])

    def write(self, crew: Crew, hands: Hands) -> None:
        """Have what is missing done, site after site, the manifest last."""
        for stream in self.plan.streams:
            sites, share = [site for site in self.plan.sites if site.stream == stream], self.budget.shares[stream]
            whole = [task for site in sites for task in self.tasks(site, "whole")]
            self._done(crew.do(whole, share.run_lanes))
            for site in sites if not share.whole else ():
                if all(name in self.files for name in self.names(site)):
                    self.folder.drop_scratch(site)
                    continue
                self._done(crew.do(self.tasks(site, "run"), share.run_lanes))
                self._done(crew.do(self.tasks(site, "shard"), share.shard_lanes))
                self.files |= hands.means_of_runs(site)
                self.folder.drop_scratch(site)
        content = {
            "format": FORMAT, "format_version": FORMAT_VERSION, "key": self.plan.key, "plan": self.plan.content,
            "streams": self.plan.streams_content(), "files": self.files,
        }  # fmt: skip
        write_json(self.folder.out / MANIFEST, self_checked(content))
        self.folder.clear()

    def _done(self, results: Iterable[Mapping[str, Entry]]) -> None:
        for files in results:
            self.files |= files


def _existing(path: Path) -> Path:
    """The path, or the nearest parent that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def run(settings: PackSettings) -> Pack | None:
    """The pack at `settings.out`: made, finished from where it was killed, or already complete; None with `plan`.

    Errors: `UsageError`, `MismatchError` and `DamagedError` for what cannot be packed, `NonFiniteError` for a row that is not
    finite, `StoreError` for a full disk or a pack that another process is making, `UnreachableError` for a scheduler.
    """
    store = open_store(settings.store)
    if store.place.local is not None:
        for flag, path in (("--out", settings.out), ("--scratch", settings.scratch)):
            if path is not None and path.resolve().is_relative_to(store.place.local.resolve()):
                raise UsageError(
                    f"{flag} {path} lies in the store: choose a folder beside it, a store holds nothing else"
                )
    for flag, path in (("--out", settings.out), ("--scratch", settings.scratch)):
        if path is not None and not (there := _existing(path)).is_dir() and (flag, there) != ("--out", path.absolute()):
            raise UsageError(f"{flag} {path}: {there} is a file, and a folder is wanted there: choose another {flag}")
    plan = PackPlan(store, settings)
    folder = PackFolder(plan, settings.out, settings.scratch)
    folder.refuse_foreign()
    if folder.complete:
        return _complete(folder)
    alone = settings.workers == 1 and settings.scheduler is None
    memory = parse_size(settings.memory) // settings.workers
    packing = Packing(plan, Budget(plan, memory, lanes=2 if alone else 1), folder)
    packing.announce()
    if settings.plan:
        return None
    begun = time.perf_counter()
    try:
        with folder.held():
            folder.refuse_foreign()
            if folder.complete:  # another process had it, and has just ended
                return _complete(folder)
            peaks, moved = _make(packing, memory, alone)
    except OSError as error:
        if isinstance(error, GranaryError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"the disk of {settings.out} is full. What is finished is kept: make room, then run the same command again"
        ) from None
    pack = open_pack(settings.out)
    seconds = max(time.perf_counter() - begun, 1e-9)
    print(
        f"{settings.out}: {human_size(plan.total_bytes)} in {len(pack.files)} files; {human_size(moved)} read and written in "
        f"{seconds:.1f} s ({moved / seconds / 1e6:.0f} MB/s); peak memory {' + '.join(human_size(peak) for peak in peaks)}\n"
        f"next: python -m train {f'--pack {settings.out}' if pack.split == 'train' else f'--pack … --val {settings.out}'} …"
    )
    return pack


def _complete(folder: PackFolder) -> Pack:
    folder.clear()  # a kill may have come between the manifest and this
    print(f"{folder.out} is complete already: the same pack, nothing to do")
    return open_pack(folder.out)


def _make(packing: Packing, memory: int, alone: bool) -> tuple[list[int], int]:
    """Make the pack; the greatest memory of each process, and the bytes read and written."""
    packing.begin()
    packing.copy_weights()
    kinds = ("whole", "run", "shard")
    total = sum(packing.cost(t) for site in packing.plan.sites for kind in kinds for t in packing.tasks(site, kind))
    with tqdm(total=total, unit="B", unit_scale=True, desc="pack", mininterval=0.5) as bar:

        def hands(advance: Any) -> Hands:
            return Hands(packing.plan, packing.budget, packing.folder, advance)

        with _crew(packing, memory, alone, bar, hands) as crew:
            packing.write(crew, hands(lambda _count: None))
            return crew.peaks(), int(bar.n)


def _crew(packing: Packing, memory: int, alone: bool, bar: "tqdm[Any]", hands: Any) -> Crew:
    if alone:
        return ThreadCrew(hands, bar.update)
    from store.packing.cluster import ClusterCrew, job_of  # dask is imported when it is needed

    return ClusterCrew(job_of(packing.plan, memory), bar.update, packing.cost)
