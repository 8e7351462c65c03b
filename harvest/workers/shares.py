"""Which worker of how many this process is, and what that means: its share, its device, and what it does when that is done.

Nothing here is needed for a store to come out right: leases alone decide who fills a part, so two workers that take
themselves for the same one, or a share whose worker never came, cost at most a look at each lease.

1. `--worker i/n` wins; else torchrun's RANK and WORLD_SIZE, else srun's SLURM_PROCID among the tasks of its step; in an array
   each of its jobs is so many workers as it has such processes.
2. A worker fills its share, every n-th part from part i on, then what the others have not begun: the share of the next worker
   from its end, then that of the one after it.
3. When all that is left is held by others, one of those that are done stays and takes over from those that die; the rest end
   (`--wait`).  Whoever finds that no part is missing any more seals the store.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harvest.runs import as_begun
from harvest.settings import HarvestSettings
from store import layout
from store.format import part_name
from store.leases import Lease, Leases
from store.opening import peek, uncommitted

DASK = "dask"
WAITING = "waiting"
"""the lease of the one that stays"""


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that fill a store."""

    index: int = 0
    count: int = 1
    local: int | None = None
    """its number among those of its machine, where that was said"""
    by: str = ""
    """who said so, in words; empty for a process of its own"""

    @property
    def name(self) -> str:
        """`2/4`, `dask`, or nothing for a process of its own."""
        return self.by if self.by in ("", DASK) else f"{self.index}/{self.count}"

    def share(self, parts: Sequence[int]) -> list[int]:
        """Those of `parts` that are this worker's own."""
        return [part for part in parts if part % self.count == self.index]

    def rest(self, parts: Sequence[int]) -> list[int]:
        """The others of `parts`: the share of the worker after this one from its end, then that of the one after it, around."""
        shares: dict[int, list[int]] = {}
        for part in reversed(parts):
            shares.setdefault(part % self.count, []).append(part)
        others = [other % self.count for other in range(self.index + 1, self.index + self.count)]
        return [part for other in others for part in shares.get(other, ())]

    def placed(self, settings: HarvestSettings, devices: int | None = None) -> HarvestSettings:
        """The settings with the CUDA device that is this worker's, where there are several and `--device` names none of them.

        What is kept beside the store are the settings without it, for another worker goes on on another device.
        """
        if settings.device not in (None, "cuda") or self.local is None:
            return settings
        if devices is None:
            import torch

            devices = torch.cuda.device_count()
        if devices < 2:  # one that was given a GPU of its own sees one
            return settings
        return replace(settings, device=f"cuda:{self.local % devices}")

    def waits(self, asked: Literal["all", "one", "none"] | None) -> Literal["all", "one", "none"]:
        """`--wait`, or what follows from there being others."""
        return asked or ("one" if self.count > 1 else "all")


def greeted(settings: HarvestSettings) -> Worker:
    """Which worker this process is, said in a line where there are others."""
    worker = worker_of(settings, os.environ)
    if worker.by:
        print(f"worker {worker.name}, by {worker.by}", flush=True)
    return worker


def worker_of(settings: HarvestSettings, environ: Mapping[str, str]) -> Worker:
    """Which worker this process is, by `--worker` or by what started it."""
    rank = _torchrun(environ) or _srun(environ)
    local = rank.local if rank is not None else None
    if settings.worker is not None:
        return Worker(*settings.worker_of(), local, "--worker")
    if settings.parts != "all":  # divided by hand
        return Worker(local=local)
    array = _array(environ)
    if rank is None or array is None:
        return rank or array or Worker(local=local)
    by = f"{array.by} and {rank.by}"
    return Worker(array.index * rank.count + rank.index, array.count * rank.count, local, by)


def _torchrun(environ: Mapping[str, str]) -> Worker | None:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank is None or size is None or not rank < size:
        return None
    return Worker(rank, size, _number(environ, "LOCAL_RANK"), "torchrun (RANK, WORLD_SIZE)")


def _srun(environ: Mapping[str, str]) -> Worker | None:
    """The task of a job step; None for a batch script itself, which has the number 0, belongs to no step, and is alone."""
    rank, count = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    if rank is None or count is None or count < 2 or not rank < count:
        return None
    return Worker(rank, count, _number(environ, "SLURM_LOCALID"), "srun (SLURM_PROCID)")


def _array(environ: Mapping[str, str]) -> Worker | None:
    """The job of an array.  Of `--array=1,3,7` the numbers have gaps: two jobs may then have one share, which leases sort out."""
    number, count = _number(environ, "SLURM_ARRAY_TASK_ID"), _number(environ, "SLURM_ARRAY_TASK_COUNT")
    if number is None or count is None or count < 1:
        return None
    first = _number(environ, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(environ, "SLURM_ARRAY_TASK_STEP") or 1
    return Worker(max(number - first, 0) // step % count, count, None, "a SLURM array (SLURM_ARRAY_TASK_ID)")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


class Staying:
    """Whether a worker stays when all that is left is held by others."""

    def __init__(self, leases: Leases, wait: Literal["all", "one", "none"]) -> None:
        self.leases, self.wait = leases, wait
        self._lease: Lease | None = None

    def __call__(self) -> bool:
        """Whether to stay for now; with `one`, this process is the one from then on if nobody else is."""
        if self.wait == "one" and self._lease is None:
            self._lease = self.leases.take(WAITING)
        return self.wait == "all" or self._lease is not None

    def __enter__(self) -> "Staying":
        return self

    def __exit__(self, *_: object) -> None:
        self.ends()

    def ends(self) -> None:
        """Let another be the one: this process has something to draw again, or is done."""
        if self._lease is not None:
            self.leases.give_back(self._lease)
            self._lease = None


def nothing_to_do(settings: HarvestSettings, worker: Worker) -> str | None:
    """Why a worker of several need not even load the model, or None: the store is finished, or others do all that is left.

    Only where the store was begun with these settings, as the file beside it says; else the harvest itself finds out.
    """
    out = settings.out
    if worker.count < 2 or out is None or settings.extend is not None or not (out / layout.STORE_COMMIT).exists():
        return None
    there = peek(out)
    if there is None or not as_begun(settings, there):
        return None
    left = uncommitted(out, there)
    if not left:
        return "the store is finished" if is_finished(out) else None
    wait, leases = worker.waits(settings.wait), Leases(layout.runs_folder(out) / "leases")
    if wait == "all" or (wait == "one" and leases.holder(WAITING) is None):
        return None
    if any(leases.holder(part_name(part)) is None for part in left):
        return None
    return f"all of the {len(left)} parts that are left are held by others, and --wait {wait} leaves them to those"


def is_finished(out: Path) -> bool:
    """Whether a store has its seal."""
    return (out / layout.SEAL).exists()
