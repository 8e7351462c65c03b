"""The tasks of a pack on `dask.distributed`: processes of this machine, or the workers of a cluster that share its files.

1. Every worker is asked, by functions that travel as text (`courier.py`), which version of our sources it has and whether it
   sees the store and OUT.  One that does not is refused before anything is asked of it.  The scheduler needs nothing of ours.
2. A worker opens the store for itself and does one task at a time, whatever its threads: `--memory` is of one task.
3. A worker that dies is replaced by dask, and its task done again by another: it publishes the same bytes.
"""

import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import store as our_package
from store import open_store
from store.errors import GranaryError, MismatchError, UnreachableError, UsageError
from store.files import sha256_file
from store.packing import courier
from store.packing.budget import Budget
from store.packing.courier import sources_of
from store.packing.crew import Crew, Progress, peak_memory
from store.packing.folder import SCRATCH_MARK, Entry, PackFolder, scratch_of
from store.packing.held import Held
from store.packing.plan import PackPlan
from store.packing.settings import PackSettings
from store.packing.tasks import Hands, Task

CONNECT_SECONDS = 8
PROBE_SECONDS = 60.0
ALONE_SECONDS = 60.0
"""how long a cluster may be without a worker before the pack is given up"""
LOOK_SECONDS = 5.0
IGNORE_SIGINT = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
"""run in the workers of this machine: Ctrl-C is for this process, which ends them"""
AHEAD = 3
"""tasks a worker has waiting, so that it never does"""
REMEDY = (
    "Workers need this checkout on the file system that they share, and the same packages (requirements.lock): "
    "PYTHONPATH=CHECKOUT dask worker {scheduler} --nworkers 1 --nthreads 1"
)
SOURCES = sources_of(Path(our_package.__file__ or "").parent)
"""of the sources as they were when this process loaded them"""


@dataclass(frozen=True)
class Job:
    """All that a worker must be told: it opens store and folder for itself."""

    settings: PackSettings
    memory: int
    key: str
    sources: str


def job_of(plan: PackPlan, memory: int) -> Job:
    """The job of a plan, its paths absolute."""
    settings, place = plan.settings, plan.store.place
    where = str(settings.store) if place.local is None else str(place.local.absolute())
    scratch = None if settings.scratch is None else settings.scratch.absolute()
    whole = replace(settings, store=where, out=settings.out.absolute(), scratch=scratch)
    return Job(whole, memory, plan.key, SOURCES)


def work(job: Job, task: Task) -> tuple[dict[str, Entry], str, int]:
    """Do a task in a worker; the files it made, and the process's id and greatest memory."""
    import distributed

    with _held.hands(job) as hands:
        files = hands.do(task)
    return files, distributed.get_worker().id, peak_memory()


def end(job: Job) -> None:
    """Let a worker give back the memory of a job: at once, or when the task that it does has ended."""
    _held.end(job)


def _new_hands(job: Job) -> Hands:
    if job.sources != SOURCES:
        raise MismatchError(
            f"a worker has loaded another version of Granary, at {our_package.__file__}: restart the workers"
        )
    plan = PackPlan(open_store(job.settings.store), job.settings)
    if plan.key != job.key:
        raise MismatchError(f"a worker finds another store at {job.settings.store}")
    folder = PackFolder(plan, job.settings.out, job.settings.scratch)
    return Hands(plan, Budget(plan, job.memory, lanes=1), folder, lambda _count: None, one_at_a_time=True)


_held: Held[Job, Hands] = Held(_new_hands)


def courier_code() -> dict[str, Any]:
    """The functions of `courier.py` as code: of a module that nobody there can import, dask sends the functions themselves."""
    namespace: dict[str, Any] = {"__name__": "granary_courier"}
    exec(compile(Path(courier.__file__ or "").read_text(), "granary_courier", "exec"), namespace)
    return namespace


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns or raises; `TimeoutError` where it takes longer (it goes on in a thread that holds nobody up)."""
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def asked() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=asked, daemon=True).start()
    try:
        found, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return found


class ClusterCrew(Crew):
    """The workers of a dask cluster.  Other work than a pack's has a `job` of its own, with `settings` and `sources`."""

    work: Callable[..., Any] = staticmethod(work)
    """what a worker is to run, with the job and a task: (what the task made, the worker's id, its greatest memory)"""
    end: Callable[..., None] = staticmethod(end)
    spare = "Give less --memory"
    """what to do when workers have too little"""
    alone = "leave --scheduler out to work on this machine"
    """what to do where there is no scheduler"""
    shared = "store, --out and --scratch must lie"
    """what all workers must see"""

    def __init__(self, job: Any, progress: Progress, cost: Any) -> None:
        self.job, self._progress, self._cost = job, progress, cost
        self._peaks: dict[str, int] = {}
        self._closing: list[Any] = []

    def __enter__(self) -> "ClusterCrew":
        log = logging.getLogger("distributed")
        self._level = log.level
        log.setLevel(logging.CRITICAL)  # what goes wrong is said once, by the error
        try:
            self.client = self._connected()
            self._refuse_strangers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.job.settings.scheduler is not None and self._closing:
            with suppress(Exception):  # a worker that is gone, or was never ours, holds nothing
                deliver, packed = courier_code()["deliver"], pickle.dumps((self.end, (self.job,)))
                within(LOOK_SECONDS, lambda: self.client.run(deliver, packed, on_error="ignore"))
        while self._closing:
            self._closing.pop().close()
        logging.getLogger("distributed").setLevel(self._level)

    def _connected(self) -> Any:
        import distributed

        settings = self.job.settings
        if settings.scheduler is None:
            cluster = distributed.LocalCluster(
                n_workers=settings.workers, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=None,
                host="127.0.0.1", silence_logs=logging.CRITICAL, preload=[IGNORE_SIGINT],
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # None is port 8787, and who holds it is told
            )  # fmt: skip
            self._closing.append(cluster)
            self._closing.append(client := distributed.Client(cluster, set_as_default=False))
            return client
        try:
            client = distributed.Client(settings.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            raise UnreachableError(
                f"no dask scheduler answers at {settings.scheduler} ({said}): start one with dask scheduler, or {self.alone}"
            ) from None
        self._closing.append(client)
        self.client = client
        if not self._workers():
            raise UsageError(f"the scheduler at {settings.scheduler} has no worker. {self._remedy()}")
        return client

    def _workers(self) -> int:
        with self._answering():
            return len(self.client.scheduler_info(n_workers=-1)["workers"])

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """`UnreachableError` for what the client raises where scheduler or workers do not answer."""
        import distributed

        try:
            yield
        except (OSError, TimeoutError, RuntimeError, distributed.CancelledError) as error:
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            raise UnreachableError(
                f"the dask scheduler, or a worker, does not answer any more ({said}). What is finished is safe: run the "
                "same command again"
            ) from None

    def _remedy(self) -> str:
        return REMEDY.format(scheduler=self.job.settings.scheduler or "ADDRESS")

    def marks(self) -> list[Path]:
        """Files that every worker must see, beside the store's seal."""
        marks = [self.job.settings.out / "unfinished" / "plan.json"]
        if (settings := self.job.settings).scratch is not None:
            of_scratch = scratch_of(self.job.key, settings.out, settings.scratch) / SCRATCH_MARK
            marks += [of_scratch] if of_scratch.exists() else []
        return marks

    def seals(self) -> list[Path]:
        """The seal of the store that the workers read, where it is a folder."""
        local = open_store(self.job.settings.store).place.local
        return [] if local is None else [local / "seal.json"]

    def named(self, task: Any) -> str:
        """A task in words."""
        return f"{task.kind} {task.number} of {task.site}"

    def _refuse_strangers(self) -> None:
        """`MismatchError` naming a worker of another version, or one that does not see what we see."""
        marks = [*self.marks(), *self.seals()]
        expected = {str(mark): sha256_file(mark) for mark in marks}
        with self._answering():
            answers = within(PROBE_SECONDS, lambda: self.client.run(courier_code()["probe"], list(expected)))
        for address, found in answers.items():
            if found["sources"] is None:
                raise MismatchError(
                    f"worker {address} cannot import Granary's store ({found['error']}). {self._remedy()}"
                )
            if found["sources"] != self.job.sources:
                raise MismatchError(
                    f"worker {address} has loaded another version of Granary, at {found['where']}: restart the workers. "
                    f"{self._remedy()}"
                )
            for mark, digest in expected.items():
                if found["files"][mark] != digest:
                    there = "does not see" if found["files"][mark] is None else "sees another file at"
                    raise MismatchError(
                        f"worker {address} {there} {mark}: {self.shared} on a file system that all workers "
                        "share, under the same paths"
                    )

    def do(self, tasks: Sequence[Any], lanes: int) -> Iterator[Any]:
        deliver = courier_code()["deliver"]
        waiting = list(reversed(tasks))
        doing: dict[str, tuple[Any, Any]] = {}
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        while waiting or doing:
            workers = max(self._workers(), 1)
            while waiting and len(doing) < AHEAD * workers:
                task = waiting.pop()
                with self._answering():
                    future = self.client.submit(deliver, pickle.dumps((self.work, (self.job, task))), pure=False)
                doing[future.key] = future, task
                future.add_done_callback(ended.put)
            key = self._next(ended).key
            yield self._result(*doing.pop(key))

    def _next(self, ended: "queue.SimpleQueue[Any]") -> Any:
        """The next task that ended; `UnreachableError` when for long no worker is there to do any."""
        seen = time.monotonic()
        while True:
            try:
                return ended.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                pass
            now = time.monotonic()
            if self._workers():
                seen = now
            elif now - seen >= ALONE_SECONDS:
                raise UnreachableError(
                    f"all workers are gone, for {now - seen:.0f} s now: out of memory, or their hosts went away? Start some, "
                    f"then run the same command again, it goes on where it was. {self._remedy()}"
                )

    def _result(self, future: Any, task: Any) -> Any:
        import distributed

        with self._answering():
            error = future.exception()  # what the task raised; what the client does is raised
            packed: bytes = b"" if error is not None else future.result()
        if isinstance(error, distributed.KilledWorker):
            raise GranaryError(
                f"the worker doing {self.named(task)} died, and so did those that took its place "
                f"({error.last_worker.address}): out of memory? {self.spare}, or look into the worker's log; then run "
                "the same command again, it goes on where it was"
            )
        if isinstance(error, distributed.CancelledError | distributed.comm.CommClosedError):
            with self._answering():
                raise error
        if isinstance(error, ImportError | AttributeError | pickle.UnpicklingError):
            raise MismatchError(
                f"a worker that came late cannot import Granary as it is here ({type(error).__name__}: {error}): restart the "
                f"workers. {self._remedy()}"
            ) from error
        if error is not None:
            raise error
        made, worker, peak = pickle.loads(packed)
        self._peaks[worker] = max(peak, self._peaks.get(worker, 0))
        self._progress(self._cost(task))
        return made

    def peaks(self) -> list[int]:
        return [peak_memory(), *self._peaks.values()]
