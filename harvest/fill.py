"""One harvest, from prompts to a sealed store.

1. Fix the prompts, load the model, and write down everything that decides a byte (`plan`).
2. Open or create the store: the same plan goes on where it was, another plan is refused.
3. For each part that has no commit and that nobody else holds: draw its images batch by batch and keep the chosen rows.
   The part before is written meanwhile; never are there more than these two in memory, so a slow disk slows the model.
4. Wait for parts that others hold, and take them over from processes that died (`--wait`).
5. Seal the store when its last part is in.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from harvest import runs
from harvest.drawing import fill_part
from harvest.models.model import too_large
from harvest.planning.estimate import announce
from harvest.planning.plan import Outline, Plan, make_plan
from harvest.planning.rehearse import rehearse
from harvest.remaining import is_extension, missing_before_encoding, missing_parts
from harvest.settings import HarvestSettings
from harvest.staging import Staging
from harvest.waiting import TENTH, Waiting
from harvest.workers.progress import Progress
from harvest.workers.shares import Staying, Worker, greeted, is_finished, nothing_to_do
from store.errors import LostLeaseError
from store.format import StoreMeta, part_name
from store.leases import Lease
from store.writer import Part, StoreWriter

WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Summary:
    """What a harvest did."""

    store: Path
    images: int
    seconds: float
    finished: bool
    waiting: Waiting = field(default_factory=Waiting)
    """who waited for whom"""


def run(settings: HarvestSettings) -> Summary | None:
    """Fill the store that `settings` describe, or go on filling it; what was done.  None for `--plan`, which writes nothing."""
    asked, settings = settings, runs.restored(settings)
    if settings.plan:
        rehearse(asked, settings)
        return None
    assert settings.out is not None
    if held := runs.held_as_begun(asked, settings):
        print(f"{settings.out} was begun with {held}, and goes on so")
    if settings.dask is not None:
        from harvest.workers.cluster import run_on_cluster

        return run_on_cluster(asked, settings)
    worker = greeted(settings)
    if (why := nothing_to_do(settings, worker)) is not None:
        print(f"{settings.out}: nothing is left for this worker: {why}")
        return Summary(settings.out, 0, 0.0, is_finished(settings.out))
    with Progress.of(settings.out, worker, settings.lease_seconds) as progress:
        return _run(asked, settings, worker, progress)


def _run(asked: HarvestSettings, settings: HarvestSettings, worker: Worker, progress: Progress) -> Summary:
    assert settings.out is not None
    out, said = settings.out, list[Outline]()

    def accept(outline: Outline) -> None:
        missing = _chosen(settings, outline, missing_before_encoding(asked, outline))
        announce(outline, out, missing, worker.share(missing), measure=False)
        said.append(outline)

    plan = make_plan(worker.placed(settings), accept)
    extending = is_extension(asked, plan)
    missing = _chosen(settings, plan, missing_parts(plan, extending))
    share = worker.share(missing)
    announce(plan, out, missing, share, said=said[0] if said else None)

    def begin(meta: StoreMeta) -> None:
        runs.keep_settings(settings, meta, extending)

    opened = StoreWriter.extend if extending else StoreWriter.open_or_create
    writer = opened(out, plan.meta, plan.weights, settings.allow_mixed, begin)
    writer.leases.seconds = progress.lease_seconds
    progress.ready(plan.meta.device)
    images = sum(len(plan.meta.part_images(part)) for part in share)
    begun = time.monotonic()
    with (
        runs.record(settings, images) as note,
        tqdm(total=images, unit="image", desc="harvest", mininterval=0.5, disable=not missing) as bar,
        Staying(writer.leases, worker.waits(settings.wait)) as stays,
    ):
        line, finished = _Line(plan, writer, bar, progress, stays), False
        try:
            done = line.fill(share, worker.rest(missing))
            finished = writer.seal() if not writer.missing() else False
        finally:
            seconds = time.monotonic() - begun
            note(line.images, seconds, finished, line.waiting.facts())
    summary = Summary(out, done, seconds, finished, line.waiting)
    print(_closing(summary, writer, line.replay))
    return summary


def _chosen(settings: HarvestSettings, plan: Outline, missing: Sequence[int]) -> list[int]:
    """Those of the missing parts that `--parts` names."""
    chosen = settings.parts_of(plan.meta.n_parts)
    return [part for part in missing if part in chosen]


def _closing(summary: Summary, writer: StoreWriter, replay: Mapping[str, float]) -> str:
    rate, others = "", summary.waiting.others
    if summary.images:
        beside = f" beside {others:.1f} s of waiting for others" if others >= TENTH else ""
        speed = summary.images / max(summary.seconds - others, 1e-9)
        rate = f" in {summary.seconds:.1f} s ({speed:.1f} images/s{beside})"
    state = _state(summary, writer)
    errors = ", ".join(f"{name} {error:.2g}" for name, error in sorted(replay.items()))
    traces = f"traces are replayed with relative errors of at most: {errors}\n" if errors else ""
    waited = f"{summary.waiting.said()}\n" if summary.images else ""
    return (
        f"{summary.store}: {summary.images} images harvested{rate}; the store is {state}.\n{traces}{waited}"
        f"Look at it: python -m store info {summary.store}"
    )


def _state(summary: Summary, writer: StoreWriter) -> str:
    """What the store is now: finished, or what is missing and whose turn it is."""
    count, missing = writer.meta.n_images, writer.missing()
    if summary.finished:
        return f"finished: {count} images"
    if not missing:  # others put in what this process found missing a moment ago
        if is_finished(summary.store):
            return f"finished: {count} images, the last of them by others"
        return (
            f"whole, its last parts by others, who seal it: {count} images. "
            f"If they do not: python -m harvest --resume {summary.store}"
        )
    held = [part for part in missing if writer.leases.holder(part_name(part)) is not None]
    return f"not finished: {len(missing)} of {writer.meta.n_parts} parts are still missing" + (
        f", all held by others, who go on. See them: python -m harvest status {summary.store}"
        if held == missing
        else f". Go on: python -m harvest --resume {summary.store}"
    )


def fill_parts(plan: Plan, writer: StoreWriter, parts: Sequence[int], progress: Progress) -> int:
    """Fill parts, as far as nobody else holds them; how many images were committed here.  Without a bar: for a cluster's worker."""
    with tqdm(total=0, disable=True) as bar:
        return _Line(plan, writer, bar, progress, Staying(writer.leases, "none")).fill(parts)


class _Line:
    """Draws parts and has each written while the next is drawn."""

    def __init__(
        self,
        plan: Plan,
        writer: StoreWriter,
        bar: "tqdm[None]",
        progress: Progress | None = None,
        stays: Staying | None = None,
    ) -> None:
        """`progress` is told what happens here; `stays` says whether to wait when all that is left is held by others; default: yes."""
        self.plan, self.writer, self.bar = plan, writer, bar
        self.progress, self.stays = progress or Progress(), stays or Staying(writer.leases, "all")
        self.waiting = Waiting(threads=writer.spent)
        self.images = 0
        self.replay: dict[str, float] = {}
        """the greatest errors of the traces that were drawn here"""
        self._leases: dict[int, Lease] = {}
        self._writing: tuple[int, Future[None], Mapping[str, float]] | None = None
        """a part, its writing, and what the threads had spent when that began"""
        self._todo: deque[int] = deque()
        self._counted: set[int] = set()
        """parts that the bar's total holds"""

    def fill(self, parts: Sequence[int], then: Sequence[int] = ()) -> int:
        """Fill `parts`, and of `then` what nobody has begun, waiting at the end for what others hold; images committed here."""
        self._todo.extend((*parts, *then))
        self._counted.update(parts)
        idle = 0
        with ThreadPoolExecutor(1, "writer") as pool, Staging(self.plan.meta, self.waiting) as staging:
            try:
                while self._todo or self._writing:
                    if not self._todo:
                        self._settle(last=True)  # which may find that the part was lost, and is to be waited for
                        continue
                    part = self._todo.popleft()
                    if self._is_committed(part):
                        self._expect(part, False)
                        continue
                    lease = self.writer.leases.take(part_name(part))
                    if lease is None:
                        self._todo.append(part)
                        idle = self._wait(part, idle, len(self._todo))
                        continue
                    idle = 0
                    self._leases[part] = lease
                    if self._is_committed(part):  # by the one who held it a moment ago
                        self._give_back(part)
                        self._expect(part, False)
                        continue
                    self._expect(part, True)
                    self.stays.ends()  # those that are done meanwhile need one that waits, and may be it
                    self.progress.takes(part)
                    self.bar.set_postfix_str("", refresh=False)  # of a wait that is over
                    content = self._draw(part, lease, staging)
                    self._settle()
                    if content is None:
                        continue
                    for entry in content.traces.values():
                        self.replay |= {n: max(e, self.replay.get(n, 0.0)) for n, e in entry["replay"].items()}
                    job = pool.submit(self._write, part, content, lease)
                    self._writing = part, job, self.waiting.threads.seconds()
                    del content  # or the part would stay in memory while the one after the next is drawn
            finally:  # a part that is being written is finished and counted; one that is being drawn is dropped
                pool.shutdown(wait=True)
                if self._writing is not None:
                    with suppress(Exception):  # what brought us here is what is said
                        self._written()
                for part in list(self._leases):
                    self._give_back(part)
        return self.images

    def _draw(self, part: int, lease: Lease, staging: Staging) -> Part | None:
        """The content of a part, its traces written already; None when the part was lost meanwhile, and is to be waited for."""
        before = self.bar.n
        try:
            traced = self.plan.meta.traced is not None
            keep_trace = partial(self.writer.put_trace, lease) if traced else None
            with self.waiting.drawing():
                return fill_part(self.plan, part, self._drawn, keep_trace, staging)
        except torch.OutOfMemoryError as error:
            raise too_large(self.plan.meta, self.plan.meta.batch_size, error) from None
        except LostLeaseError as error:
            self.bar.write(str(error))
            self._advance(before - self.bar.n)
            self._todo.append(part)
            self._give_back(part)
            return None

    def _write(self, part: int, content: Part, lease: Lease) -> None:
        self.writer.write_part(part, content, lease)
        self.progress.commits(part, self._count(part))

    def _settle(self, last: bool = False) -> None:
        """Wait for the part that is being written; `last`: nothing is left to draw meanwhile."""
        if self._writing is None:
            return
        _, job, before = self._writing
        with self.waiting.for_writing(before, last):
            wait((job,))  # Ctrl-C here: `fill` waits on, for the part's files are under its lease until they are there
        self._written()

    def _written(self) -> None:
        """Count the part whose writing has ended, or have it drawn again where it was lost; raises what went wrong."""
        assert self._writing is not None
        (part, job, _), self._writing = self._writing, None
        try:
            job.result()
            self.images += self._count(part)
        except LostLeaseError as error:
            self.bar.write(str(error))
            self._advance(-self._count(part))
            self._todo.append(part)
        finally:
            self._give_back(part)

    def _wait(self, part: int, idle: int, left: int) -> int:
        """Pause when every part that is left is held by others; how many were met in a row."""
        if idle + 1 < left:
            return idle + 1
        self._settle()
        holders = {each: self.writer.leases.holder(part_name(each)) for each in self._todo}
        if not all(holders.values()):
            return 0
        if not self.stays():
            self._todo.clear()  # to those who hold them
            return 0
        holder = holders[part]
        said = f"waiting for part {part}, held by {holder}"
        self.progress.waits(said)
        self.bar.set_postfix_str(said)
        with self.waiting.for_others():
            time.sleep(WAIT_SECONDS)
        return 0

    def _expect(self, part: int, ours: bool) -> None:
        """Let the bar's total hold the images of a part when they are drawn here, and not when others have drawn them."""
        if (part in self._counted) != ours:
            self._counted ^= {part}
            self.bar.total += self._count(part) if ours else -self._count(part)

    def _drawn(self, count: int) -> None:
        """A batch is drawn; raises what went wrong meanwhile with the part before: the rest of this one would be for nothing."""
        self._advance(count)
        job = None if self._writing is None else self._writing[1]
        error = job.exception() if job is not None and job.done() else None
        if error is not None and not isinstance(error, LostLeaseError):  # that one is drawn again, after this one
            raise error

    def _advance(self, count: int) -> None:
        self.bar.update(count)
        self.progress.draws(count)

    def _is_committed(self, part: int) -> bool:
        return self.writer.is_committed(part)

    def _count(self, part: int) -> int:
        return len(self.plan.meta.part_images(part))

    def _give_back(self, part: int) -> None:
        self.writer.leases.give_back(self._leases.pop(part))
