"""`--dask`: the parts of a store filled by `dask.distributed` workers, processes of this machine or of a cluster's.

1. Every worker is asked whether it has our sources and sees the store's folder, as `python -m store pack --scheduler` does.
2. One loads the model, says what will be written, and creates the store.  This process never loads the model.
3. Parts are handed out a few at a time, so that a worker writes one while it draws the next; it loads the model for its first.
4. A worker that dies is replaced by dask and its parts are filled by another, under a new lease: the bytes are the same.
   Parts that processes outside the cluster hold are waited for here, where waiting costs nothing.
5. This process seals the store.
"""

import contextlib
import io
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import harvest
from harvest import runs
from harvest.settings import TINY_FLUX, HarvestSettings
from harvest.workers.progress import Progress
from harvest.workers.shares import DASK, Worker
from store import layout
from store.errors import MismatchError
from store.files import write_json
from store.format import StoreMeta, part_name
from store.opening import peek
from store.packing.cluster import LOOK_SECONDS, SOURCES, ClusterCrew, courier_code, within
from store.packing.courier import sources_of
from store.packing.crew import peak_memory
from store.packing.held import Held
from store.sites import spans
from store.sizes import many
from store.writer import StoreWriter

if TYPE_CHECKING:
    from harvest.fill import Summary

TOGETHER = 8
"""parts at most that a worker is given at once"""
TURNS = 4
"""times that each worker is given some, at least, where there are enough: so they end at about the same moment"""
POLL_SECONDS = 1.0
OURS = sources_of(Path(harvest.__file__ or "").parent)
"""of `harvest/`, as it was when this process loaded it; that of `store/` is `SOURCES`"""


@dataclass(frozen=True)
class Where:
    """Which dask cluster: a scheduler's address, or so many processes of this machine."""

    scheduler: str | None
    workers: int
    out: Path


@dataclass(frozen=True)
class HarvestJob:
    """All that a worker must be told."""

    settings: Where
    harvest: HarvestSettings
    asked: HarvestSettings
    run: str
    """names this run: two runs never share what a worker holds"""
    sources: str = SOURCES
    ours: str = OURS


@dataclass(frozen=True)
class Parts:
    """A task: fill these, as far as nobody else holds them.  Without any: create the store, and say what is to be done."""

    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Begun:
    """A store that is ready to be filled."""

    missing: tuple[int, ...]
    said: str
    """the plan, in words"""


def job_of(asked: HarvestSettings, settings: HarvestSettings) -> HarvestJob:
    """The job of a run, its paths absolute."""
    assert settings.out is not None
    out = Path(os.path.realpath(settings.out))  # a link may lead elsewhere where the worker is
    local = settings.dask_workers()
    prompts = None if settings.prompts is None else _absolute(settings.prompts)
    model = settings.model if settings.model == TINY_FLUX else _absolute(settings.model)
    whole = replace(settings, out=out, dask=None, prompts=prompts, model=model)
    where = Where(settings.dask if local is None else None, local or 0, out)
    return HarvestJob(where, whole, replace(asked, dask=None), runs.name_of_run())


def _absolute(name: str) -> str:
    """A file or folder of this machine by its whole path; anything else as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class Hands:
    """A worker that holds the model, and fills parts."""

    def __init__(self, job: HarvestJob) -> None:
        import distributed

        if (job.sources, job.ours) != (SOURCES, OURS):
            raise MismatchError(
                f"a worker has loaded another version of Granary, at {harvest.__file__}: restart the workers"
            )
        name = distributed.get_worker().name
        worker = Worker(local=name if isinstance(name, int) else None, by=DASK)
        self.progress = Progress.of(job.settings.out, worker, job.harvest.lease_seconds)
        self.progress.__enter__()
        try:
            self._open(job, worker)
        except BaseException as error:
            self.progress.__exit__(type(error), error, None)
            raise
        self.progress.waits("waiting for parts to be given")

    def _open(self, job: HarvestJob, worker: Worker) -> None:
        from harvest.planning.estimate import announce
        from harvest.planning.plan import make_plan
        from harvest.remaining import is_extension, missing_before_encoding, missing_parts

        settings, out, said = job.harvest, job.settings.out, io.StringIO()
        self.plan = make_plan(worker.placed(settings), lambda outline: missing_before_encoding(job.asked, outline))
        extending = is_extension(job.asked, self.plan)
        chosen = settings.parts_of(self.plan.meta.n_parts)
        missing = tuple(part for part in missing_parts(self.plan, extending) if part in chosen)
        if not (out / layout.STORE_COMMIT).exists() or extending:
            with contextlib.redirect_stdout(said):
                announce(self.plan, out, missing)
        self.begun = Begun(missing, said.getvalue())

        def begin(meta: StoreMeta) -> None:
            runs.keep_settings(settings, meta, extending)

        opened = StoreWriter.extend if extending else StoreWriter.open_or_create
        self.writer = opened(out, self.plan.meta, self.plan.weights, settings.allow_mixed, begin)
        self.writer.leases.seconds = self.progress.lease_seconds
        self.progress.ready(self.plan.meta.device)

    def do(self, task: Parts) -> Begun | int:
        """The images that were committed here, or what is to be done."""
        from harvest.fill import fill_parts

        if not task.numbers:
            return self.begun
        try:
            return fill_parts(self.plan, self.writer, task.numbers, self.progress)
        finally:
            self.progress.waits("waiting for parts to be given")

    def close(self) -> None:
        """Say that this worker has ended; its model goes with it."""
        self.progress.__exit__(None, None, None)


_held: Held[HarvestJob, Hands] = Held(Hands, Hands.close)


def work(job: HarvestJob, task: Parts) -> tuple[Begun | int, str, int]:
    """Do a task in a worker; what it made, and the process's id and greatest memory."""
    import distributed

    with _held.hands(job) as hands:
        made = hands.do(task)
    return made, distributed.get_worker().id, peak_memory()


def end(job: HarvestJob) -> None:
    """Let a worker give back the model: at once, or after the batch that it draws."""
    if (hands := _held.of(job)) is not None:
        hands.progress.wanted = False
    _held.end(job)


class HarvestCluster(ClusterCrew):
    """The workers of a dask cluster, for a harvest."""

    work: Callable[..., Any] = staticmethod(work)
    end: Callable[..., None] = staticmethod(end)
    spare = "Give a smaller --batch-size"
    alone = "say --dask local:N to work with N processes of this machine"
    shared = "the store's folder must lie"

    def __init__(self, job: HarvestJob) -> None:
        super().__init__(job, lambda _count: None, lambda _task: 0)

    def __exit__(self, *words: object) -> None:
        if self.job.settings.scheduler is None and self._closing:  # or their records would say that they died
            with contextlib.suppress(Exception):
                deliver, packed = courier_code()["deliver"], pickle.dumps((self.end, (self.job,)))
                within(LOOK_SECONDS, lambda: self.client.run(deliver, packed, on_error="ignore"))
        super().__exit__(*words)

    def marks(self) -> list[Path]:
        """A file beside the store that every worker must see."""
        return [_mark(self.job)]

    def seals(self) -> list[Path]:
        """None: the store may still have to be made."""
        return []

    def named(self, task: Any) -> str:
        """A task in words."""
        return f"parts {spans(task.numbers)}" if task.numbers else "the creation of the store"

    def size(self) -> int:
        """How many workers there are now."""
        return max(self._workers(), 1)


def run_on_cluster(asked: HarvestSettings, settings: HarvestSettings) -> "Summary":
    """Fill the store that `settings` describe on the workers of `--dask`; what was done."""
    from harvest.fill import Summary

    job = job_of(asked, settings)
    out, begun = job.settings.out, time.monotonic()
    write_json(_mark(job), {"run": job.run, "dask": settings.dask})
    try:
        with (crew := HarvestCluster(job)):
            ready: Begun = next(iter(crew.do([Parts()], 1)))
            print(ready.said, end="", flush=True)
            meta = peek(out)
            assert meta is not None
            writer = StoreWriter(out, meta)
            images, finished = _filled(crew, job, writer, ready.missing)
    finally:
        _mark(job).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _mark(job).parent.rmdir()  # of a run that was refused
    seconds = time.monotonic() - begun
    left = many(len(writer.missing()), "part")
    state = (
        f"finished: {many(meta.n_images, 'image')}" if finished else f"not finished: {left} of {meta.n_parts} missing"
    )
    print(
        f"{out}: {many(images, 'image')} harvested in {seconds:.1f} s by dask's workers; the store is {state}.\n"
        f"Look at it: python -m store info {out}"
    )
    return Summary(out, images, seconds, finished)


def _mark(job: HarvestJob) -> Path:
    return layout.runs_folder(job.settings.out) / f"{job.run}.dask"


def _filled(crew: HarvestCluster, job: HarvestJob, writer: StoreWriter, missing: Sequence[int]) -> tuple[int, bool]:
    """Have the missing parts filled, wait for those that others hold, and seal; (images the workers committed, whether it is sealed)."""
    total, ours, finished = sum(len(writer.meta.part_images(part)) for part in missing), set[int](), False

    def committed() -> int:
        """Images of the parts that were given out and are there: a worker that died has committed some, and could not say so."""
        return sum(len(writer.meta.part_images(part)) for part in ours if writer.is_committed(part))

    with (
        runs.record(job.harvest, total) as note,
        tqdm(total=total, unit="image", desc="harvest", mininterval=0.5, disable=not total) as bar,
        _following(writer, missing, bar),
    ):
        begun = time.monotonic()
        try:
            while left := [part for part in missing if not writer.is_committed(part)]:
                free = [part for part in left if writer.leases.holder(part_name(part)) is None]
                ours = (ours - set(left)) | set(
                    free
                )  # what is left and held is somebody else's, or given out again later
                if not free:
                    bar.set_postfix_str(
                        f"waiting for part {left[0]}, held by {writer.leases.holder(part_name(left[0]))}"
                    )
                    time.sleep(POLL_SECONDS)
                for _ in crew.do(bundles(free, crew.size()), 1):
                    pass
            finished = writer.seal()
        finally:
            images = committed()
            note(images, time.monotonic() - begun, finished, {})
    return images, finished


def bundles(parts: Sequence[int], workers: int) -> list[Parts]:
    """The parts, in order, a few to a task."""
    size = min(TOGETHER, max(1, len(parts) // (TURNS * workers)))
    return [Parts(tuple(parts[first : first + size])) for first in range(0, len(parts), size)]


@contextmanager
def _following(writer: StoreWriter, parts: Sequence[int], bar: "tqdm[None]") -> Iterator[None]:
    """Let the bar show which parts are committed while the context lasts."""
    over = threading.Event()

    def look() -> None:
        left, ended = set(parts), False
        while not ended:
            ended = over.wait(POLL_SECONDS)
            done = {part for part in left if writer.is_committed(part)}
            left -= done
            bar.update(sum(len(writer.meta.part_images(part)) for part in done))

    thread = threading.Thread(target=look, name="bar", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
