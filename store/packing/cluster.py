"""The tasks of a pack on `dask.distributed`: processes of this machine, or the workers of a cluster that share its files.

1. Every worker is asked, by functions that travel as text (`courier.py`), which version of our sources it has and whether it
   sees the store and OUT.  One that does not is refused before anything is asked of it.  The scheduler needs nothing of ours.
2. A worker opens the store for itself and does one task at a time, whatever its threads: `--memory` is of one task.
3. A worker that dies is replaced by dask, and its task done again by another: it publishes the same bytes.
"""

import logging
import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
from store.packing.folder import Entry, PackFolder
from store.packing.plan import PackPlan
from store.packing.settings import PackSettings
from store.packing.tasks import Hands, Task

CONNECT_SECONDS = 8
AHEAD = 3
"""tasks a worker has waiting, so that it never does"""
REMEDY = (
    "Workers need this checkout on the file system that they share, and the same packages (requirements.lock): "
    "PYTHONPATH=CHECKOUT dask worker {scheduler} --nworkers 1 --nthreads 1"
)


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
    return Job(whole, memory, plan.key, sources_of(Path(our_package.__file__ or "").parent))


_one_at_a_time = threading.Lock()


def work(job: Job, task: Task) -> tuple[dict[str, Entry], str, int]:
    """Do a task in a worker; the files it made, and the process's id and greatest memory."""
    import distributed

    with _one_at_a_time:
        files = _hands(job).do(task)
    return files, distributed.get_worker().id, peak_memory()


@lru_cache(maxsize=1)
def _hands(job: Job) -> Hands:
    if job.sources != sources_of(Path(our_package.__file__ or "").parent):
        raise MismatchError(f"a worker has another version of Granary, at {our_package.__file__}")
    plan = PackPlan(open_store(job.settings.store), job.settings)
    if plan.key != job.key:
        raise MismatchError(f"a worker finds another store at {job.settings.store}")
    folder = PackFolder(plan, job.settings.out, job.settings.scratch)
    return Hands(plan, Budget(plan, job.memory, lanes=1), folder, lambda _count: None)


def courier_code() -> dict[str, Any]:
    """The functions of `courier.py` as code: of a module that nobody there can import, dask sends the functions themselves."""
    namespace: dict[str, Any] = {"__name__": "granary_courier"}
    exec(compile(Path(courier.__file__ or "").read_text(), "granary_courier", "exec"), namespace)
    return namespace


class ClusterCrew(Crew):
    """The workers of a dask cluster."""

    def __init__(self, job: Job, progress: Progress, cost: Any) -> None:
        self.job, self._progress, self._cost = job, progress, cost
        self._peaks: dict[str, int] = {}
        self._closing: list[Any] = []

    def __enter__(self) -> "ClusterCrew":
        log = logging.getLogger("distributed")
        self._level = log.level
        log.setLevel(logging.CRITICAL)  # what goes wrong is said once, by the error
        try:
            self.client = self._connected()
            self._closing.append(self.client)
            self._refuse_strangers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._closing:
            self._closing.pop().close()
        logging.getLogger("distributed").setLevel(self._level)

    def _connected(self) -> Any:
        import distributed

        settings = self.job.settings
        if settings.scheduler is None:
            cluster = distributed.LocalCluster(
                n_workers=settings.workers, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=None,
                host="127.0.0.1", silence_logs=logging.CRITICAL,
            )  # fmt: skip
            self._closing.append(cluster)
            return distributed.Client(cluster, set_as_default=False)
        try:
            client = distributed.Client(settings.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            raise UnreachableError(
                f"no dask scheduler answers at {settings.scheduler} ({said}): start one with dask scheduler, or leave "
                "--scheduler out to work on this machine"
            ) from None
        if not client.scheduler_info(n_workers=-1)["workers"]:
            client.close()
            raise UsageError(f"the scheduler at {settings.scheduler} has no worker. {self._remedy()}")
        return client

    def _remedy(self) -> str:
        return REMEDY.format(scheduler=self.job.settings.scheduler or "ADDRESS")

    def _refuse_strangers(self) -> None:
        """`MismatchError` naming a worker of another version, or one that does not see what we see."""
        local = open_store(self.job.settings.store).place.local
        marks = [self.job.settings.out / "unfinished" / "plan.json"]
        marks += [] if local is None else [local / "seal.json"]
        expected = {str(mark): sha256_file(mark) for mark in marks}
        for address, found in self.client.run(courier_code()["probe"], list(expected)).items():
            if found["sources"] is None:
                raise MismatchError(
                    f"worker {address} cannot import Granary's store ({found['error']}). {self._remedy()}"
                )
            if found["sources"] != self.job.sources:
                raise MismatchError(
                    f"worker {address} runs another version of Granary, at {found['where']}. {self._remedy()}"
                )
            for mark, digest in expected.items():
                if found["files"][mark] != digest:
                    there = "does not see" if found["files"][mark] is None else "sees another file at"
                    raise MismatchError(
                        f"worker {address} {there} {mark}: store and --out must lie on a file system that all workers "
                        "share, under the same paths"
                    )

    def do(self, tasks: Sequence[Task], lanes: int) -> Iterator[dict[str, Entry]]:
        import distributed

        deliver = courier_code()["deliver"]
        waiting = list(reversed(tasks))
        doing: dict[Any, Task] = {}
        queue = distributed.as_completed([], loop=self.client.loop)
        while waiting or doing:
            workers = max(len(self.client.scheduler_info(n_workers=-1)["workers"]), 1)
            while waiting and len(doing) < AHEAD * workers:
                task = waiting.pop()
                future = self.client.submit(deliver, pickle.dumps((work, (self.job, task))), pure=False)
                doing[future] = task
                queue.add(future)
            done = next(queue)
            yield self._result(done, doing.pop(done))

    def _result(self, future: Any, task: Task) -> dict[str, Entry]:
        import distributed

        try:
            files: dict[str, Entry]
            files, worker, peak = pickle.loads(future.result())
        except distributed.KilledWorker as error:
            raise GranaryError(
                f"the worker doing {task.kind} {task.number} of {task.site} died, and so did those that took its place "
                f"({error.last_worker.address}): out of memory? Give less --memory, or look into the worker's log; then run "
                "the same command again, it goes on where it was"
            ) from None
        except (distributed.CancelledError, distributed.comm.CommClosedError) as error:
            raise UnreachableError(
                f"the dask scheduler went away ({error}). What is finished is safe: run the same command again"
            ) from None
        self._peaks[worker] = max(peak, self._peaks.get(worker, 0))
        self._progress(self._cost(task))
        return files

    def peaks(self) -> list[int]:
        return [peak_memory(), *self._peaks.values()]
