"""The tasks of `scores` on the workers of a dask cluster that share its files: as `python -m store pack --scheduler` does it.

A worker opens store and dictionaries for itself and does one task at a time, with one thread, whatever its threads are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import analyze
import train
from analyze.inputs import open_analysis
from analyze.scoring.plan import ScorePlan, Task
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.work import Hands
from store.errors import MismatchError
from store.packing.cluster import SOURCES, ClusterCrew
from store.packing.courier import sources_of
from store.packing.crew import Progress, peak_memory
from store.packing.held import Held
from train.stopping import thread_count

LOADED = tuple(sources_of(Path(package.__file__ or "").parent) for package in (train, analyze))
"""of the sources as they were when this process loaded them; the store's are `SOURCES`"""


@dataclass(frozen=True)
class ScoreJob:
    """All that a worker must be told."""

    settings: ScoresSettings
    store: str
    """content id of the store"""
    subjects: tuple[tuple[str, str], ...]
    """name and identity of each dictionary"""
    device: str
    sources: str
    ours: tuple[str, ...]


def job_of(plan: ScorePlan) -> ScoreJob:
    """The job of a plan, its paths absolute."""
    settings, place = plan.settings, plan.store.place
    where = str(settings.store) if place.local is None else str(place.local.absolute())
    dictionaries = settings.dictionaries
    if "://" not in str(dictionaries) and not str(dictionaries).startswith("hf:"):
        dictionaries = dictionaries.absolute()
    whole = replace(settings, store=where, out=settings.out.absolute(), dictionaries=dictionaries)
    subjects = tuple((subject.name, subject.identity) for subject in plan.analysis.subjects)
    return ScoreJob(whole, plan.store.id, subjects, plan.device.type, SOURCES, LOADED)


def work(job: ScoreJob, task: Task) -> tuple[None, str, int]:
    """Do a task in a worker; the process's id and greatest memory."""
    import distributed

    with _held.hands(job) as hands, thread_count(1):
        hands.let_go(keep=[name for name, _ in task.panes])
        hands.do(task)
    return None, distributed.get_worker().id, peak_memory()


def end(job: ScoreJob) -> None:
    """Let a worker give back the memory of a job: at once, or when the task that it does has ended."""
    _held.end(job)


def _new_hands(job: ScoreJob) -> Hands:
    if (job.sources, job.ours) != (SOURCES, LOADED):
        raise MismatchError(
            f"a worker has loaded another version of Granary, at {analyze.__file__}: restart the workers"
        )
    analysis = open_analysis(job.settings)
    found = tuple((subject.name, subject.identity) for subject in analysis.subjects)
    if (analysis.store.id, found) != (job.store, job.subjects):
        raise MismatchError(
            f"a worker finds another store at {job.settings.store}, or other dictionaries at {job.settings.dictionaries}"
        )
    plan = ScorePlan(analysis, job.settings, ())
    if plan.device.type != job.device:
        raise MismatchError(
            f"a worker would compute on {plan.device.type}, this machine on {job.device}: say --device cpu, or use workers "
            "and a machine of one kind"
        )
    return Hands(plan, lambda _count: None)


_held: Held[ScoreJob, Hands] = Held(_new_hands)


class ScoreCluster(ClusterCrew):
    """The workers of a dask cluster, for scores."""

    work: Callable[..., Any] = staticmethod(work)
    end: Callable[..., None] = staticmethod(end)
    shared = "store, dictionaries and --out must lie"

    def __init__(self, plan: ScorePlan, progress: Progress) -> None:
        super().__init__(job_of(plan), progress, lambda task: len(plan.images(task.block)))

    def marks(self) -> list[Path]:
        """Files that every worker must see, beside the store's seal."""
        return [self.job.settings.out / "run.json"]

    def named(self, task: Any) -> str:
        """A task in words."""
        return f"images {task.block} of {task.site} step {task.step}"
