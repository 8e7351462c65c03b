"""Kills packing and training at random moments and holds what they leave against undisturbed ones: `make torture-training`.

1. A small store is made, and packed and trained on once, undisturbed.
2. A round is one job: a pack that fits into memory, one that goes through scratch files, the same by two workers, or a training
   of several models at once with a checkpoint every few steps.  It is killed with SIGKILL a few times, somewhere in its life or
   while it is writing a file, and started again after each kill.
3. Then it is let alone.  Its end must be the bytes of the undisturbed one, and no process may outlive a killed one.
4. Rounds go on until enough kills fell inside a job: it had begun to write, and was not finished.

A job is `python -m store pack` or `python -m train` as the shell would run it.  Because a start costs seconds of imports, most
are forked from this process, which has imported everything, and has run and loaded nothing; the others are new Pythons.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from store.command import Command, program
from store.errors import GranaryError, UsageError
from tests.torture_workers import (
    PATIENCE,
    POLL,
    Herd,
    Worker,
    alone,
    done,
    files_below,
    refuse_difference,
    scene,
    tree,
)

MODELS = """\
- {activation: relu, dead: resample, dead_rows: 1000, resample_rows: 3000}
- {activation: topk, k: 4, dead: auxk, dead_rows: 1000}
- {activation: batchtopk, k: 4, nested: [0.25, 0.5]}
- {activation: jumprelu, l1: 1.0e-3, bandwidth: 0.1, skip: true}
"""
TRAINING = (
    *("--sites", "img_0", "--batch", "512", "--expansion", "4", "--time-embed-dim", "8", "--threads", "1", "--device", "cpu"),
    *("--epochs", "2", "--lr", "2e-3", "--schedule", "cosine", "--log-steps", "7", "--checkpoint-steps", "3"),
)  # fmt: skip
IMPORTED = (
    "store.__main__", "store.pack", "train.__main__", "tests.toy_stores",
    "matplotlib.backends.backend_agg", "torch.utils.tensorboard",
    "pandas",  # by pyarrow, when it first makes a table
    "torch._dynamo",  # by torch.optim, for the first optimizer
)  # fmt: skip
KINDS = ("whole", "scratch", "workers", "training")
KILLS_A_ROUND = 4
FRESH = 10
"""one job in so many is a Python of its own"""
STARTING = 60.0
"""seconds after which a dask worker that was starting when its parent was killed must have ended: it looks for its parent when
its imports are done, and does nothing before"""


@dataclass(frozen=True)
class TortureSettings:
    """Kill packs and trainings at random moments; every end must be the bytes of an undisturbed one."""

    kills: int = 50
    """go on until so many SIGKILLs fell inside a job"""
    seed: int = 0
    """seed of the moments; the scheduler adds its own chance"""
    minutes: float = 10
    """fail when that takes longer"""
    jobs: str = "whole,scratch,workers,training"
    """kinds of jobs: a pack that fits into memory, one by scratch files, that by two workers, a training; rounds take turns"""
    models: int = 4
    """how many of its four models are trained at once"""
    fresh: bool = True
    """let one job in ten be a Python of its own rather than a fork; one by two workers always is"""
    folder: Path | None = None
    """a new folder for all that is made; default: a temporary one, which is kept when something is wrong"""

    def __post_init__(self) -> None:
        if odd := [name for name in self.jobs.split(",") if name not in KINDS]:
            raise UsageError(f"--jobs {self.jobs!r}: there is no {odd[0]!r}; there are {', '.join(KINDS)}")


@dataclass(frozen=True)
class Job:
    """Something that is done to the end, whatever happens on the way."""

    name: str
    words: Callable[[Path], list[str]]
    """the command line that makes the folder"""
    whole: str
    """the undisturbed folder that it must equal"""
    fresh: bool = False


@dataclass
class Tally:
    """What was done to whom."""

    kills: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    """kills that fell inside a job, by kind"""
    writing: int = 0
    """those of them that left a file half written"""
    compared: Counter[str] = field(default_factory=Counter)
    outlived: float = 0.0
    """seconds that a process left behind by a killed one went on at most"""

    def text(self, seconds: float) -> str:
        """The closing summary."""
        inside = ", ".join(f"{name} {number}" for name, number in sorted(self.inside.items()))
        ends = ", ".join(f"{name} {number}" for name, number in sorted(self.compared.items()))
        return (
            f"{self.kills} kills in {self.compared.total()} rounds, {seconds:.0f} s\n"
            f"{self.inside.total()} of {self.kills} SIGKILLs fell inside a job ({inside}); {self.writing} of these left a file half "
            f"written\n"
            f"{self.compared.total()} jobs that were finished after kills ({ends}): each byte-equal to the undisturbed one; "
            f"no process outlived a killed one by more than {self.outlived:.1f} s"
        )


def run(settings: TortureSettings) -> Tally:
    """Do it; returns the tally.  `GranaryError` for an end that differs, a job that fails or hangs, or too little time."""
    preload()
    begun = time.monotonic()
    with scene(settings.folder) as folder, Torture(settings, folder) as torture:
        torture.undisturbed()
        while not torture.enough():
            seconds = time.monotonic() - begun
            if seconds > 60 * settings.minutes:
                raise GranaryError(f"{settings.minutes:g} minutes were not enough: {torture.tally.text(seconds)}")
            torture.round()
            done = torture.tally.inside.total()
            print(f"  {time.monotonic() - begun:4.0f} s  {done} of {settings.kills} kills inside a job", flush=True)
    print(torture.tally.text(time.monotonic() - begun))
    return torture.tally


def preload() -> None:
    """Import what packing and training import, so that a fork need not; runs nothing of it."""
    alone()
    for name in IMPORTED:
        import_module(name)


class Torture(Herd):
    """Rounds of kills, and what came of them."""

    def __init__(self, settings: TortureSettings, folder: Path) -> None:
        super().__init__(folder)
        self.settings = settings
        self.chance = random.Random(settings.seed)
        self.tally = Tally()
        self.trees: dict[str, dict[str, bytes]] = {}
        """the undisturbed folders"""
        self.seconds: dict[str, float] = {}
        """that each kind of job took undisturbed: how long a victim may live"""
        (folder / "models.yaml").write_text("\n".join(MODELS.split("\n")[: settings.models]))
        self.jobs = [job for job in self._known() if job.name in settings.jobs.split(",")]

    def _known(self) -> list[Job]:
        store, pack, val = (str(self.folder / name) for name in ("store", "train", "val"))

        def packing(*flags: str) -> Callable[[Path], list[str]]:
            return lambda out: ["store", "pack", store, "--shard-mb", "1", *flags, "--out", str(out)]

        models = str(self.folder / "models.yaml")

        def training(out: Path) -> list[str]:
            return ["train", "--pack", pack, "--val", val, "--models", models, *TRAINING, "--out", str(out)]

        return [
            Job("whole", packing(), "train"),
            Job("scratch", packing("--memory", SMALL), "train"),
            Job("workers", packing("--memory", SMALL_FOR_TWO, "--workers", "2"), "train", fresh=True),
            Job("training", training, "dictionaries"),
        ]

    def undisturbed(self) -> None:
        """Make the store, its packs, and the dictionaries; then do each kind of job once more, to see how long it takes."""
        done(lambda: made_store(self.folder / "store"), self.folder / "log-store.txt")
        for split in ("train", "val"):
            words = ["store", "pack", str(self.folder / "store"), "--shard-mb", "1", "--split", split]
            self.begin([*words, "--out", str(self.folder / split)])
            self.finish()
        for job in self.jobs:
            out = self.folder / (job.whole if job.name == "training" else f"first-{job.name}")
            begun = time.monotonic()
            self.begin(job.words(out), job.fresh, default="train")
            self.finish()
            self.seconds[job.name] = time.monotonic() - begun
            if job.whole not in self.trees:
                self.trees[job.whole] = tree(self.folder / job.whole)
            refuse_difference(out, self.folder / job.whole, self.trees[job.whole])
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        print(f"  undisturbed: {times}", flush=True)

    def enough(self) -> bool:
        """Whether as many kills as were asked for fell inside a job, some in each kind."""
        inside = self.tally.inside
        return set(inside) == {job.name for job in self.jobs} and inside.total() >= self.settings.kills

    def round(self) -> None:
        """One job: killed a few times, and then let alone."""
        job = self.jobs[self.tally.compared.total() % len(self.jobs)]
        out = self.folder / f"round-{self.tally.compared.total()}"
        for _ in range(self.chance.randint(2, KILLS_A_ROUND)):
            worker = self.start(job, out)
            self.await_moment(job, out, worker)
            if worker.ended():
                self.finish()
                break
            os.kill(worker.pid, signal.SIGKILL)
            self.reap([worker], STARTING if job.name == "workers" else 0)
            self.note(job, out, worker)
        self.start(job, out)
        self.finish()
        refuse_difference(out, self.folder / job.whole, self.trees[job.whole])
        self.tally.compared[job.name] += 1
        self.tally.outlived = self.outlived
        for leftover in (out, out.with_name(out.name + ".runs")):
            shutil.rmtree(leftover, ignore_errors=True)

    def start(self, job: Job, out: Path) -> Worker:
        """Let a job begin, or go on."""
        fresh = job.fresh or (self.settings.fresh and (self.started + 1) % FRESH == 0)
        return self.begin(job.words(out), fresh, default="train")

    def await_moment(self, job: Job, out: Path, worker: Worker) -> None:
        """Wait for some moment of its life, for one after its first file, for one at which it writes a file, or for its end."""
        kind = self.chance.choices(("life", "begun", "write"), (1, 2, 3))[0]
        if kind == "write":
            skip, seen = self.chance.randrange(12), set[str]()  # files that it may write before

            def sign() -> bool:
                seen.update(half_written(out))
                return len(seen) > skip

            self.poll(worker, sign)
            return
        if kind == "begun":
            self.poll(worker, lambda: any(files_below(out)))
        time.sleep(self.seconds[job.name] / 2 * self.chance.random())

    def poll(self, worker: Worker, sign: Callable[[], bool]) -> None:
        """Wait until there is a sign, or the worker has ended."""
        end = time.monotonic() + PATIENCE
        while not worker.ended() and not sign():
            if time.monotonic() > end:
                self.fail(worker, f"has got nowhere for {PATIENCE:.0f} s")
            time.sleep(POLL / 4)

    def note(self, job: Job, out: Path, victim: Worker) -> None:
        """Count a worker that was killed."""
        if victim.code == 0:  # it had done its work before the signal came
            return
        self.tally.kills += 1
        if out.exists() and tree(out) != self.trees[job.whole]:
            self.tally.inside[job.name] += 1
            self.tally.writing += bool(half_written(out))


def half_written(out: Path) -> list[str]:
    """The files below a folder that have not got their names yet."""
    return [str(file) for file in files_below(out) if file.suffix == ".tmp"]


def made_store(path: Path) -> None:
    """A store of about 12,000 img rows and 1,500 txt rows of two steps, that a dictionary can learn."""
    from tests.toy_stores import toy_store

    toy_store(path, STORE_IMAGES, ("img_0", "txt_0"), (0, 2), 64, 64, chunk_images=16, learnable=True)


STORE_IMAGES = 96
SMALL, SMALL_FOR_TWO = "3MB", "6MB"
COMMANDS = {
    "torture": Command(TortureSettings, run, "Kill packs and trainings at random moments and compare their ends.")
}

if __name__ == "__main__":
    sys.exit(program("tests.torture_training", COMMANDS, default="torture"))
