"""Processes that are killed: forks of one that has imported everything and has run nothing, or Pythons of their own.

A fork costs milliseconds where a start costs seconds of imports.  `Herd` starts them, ends them, and sees that nothing of them is
left behind.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Self

from store.command import program
from store.errors import GranaryError, UsageError

PATIENCE = 120.0
"""seconds after which a worker that neither ends nor gets anywhere is a failure"""
GRACE = 2.0
"""seconds that a `uname` or `ldconfig` of some library's may need to end by itself when its parent was killed"""
POLL = 0.002
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


@dataclass
class Worker:
    """One process that runs a program of ours, in a group of its own."""

    pid: int
    words: Sequence[str]
    log: Path
    code: int | None = None
    """exit code, or minus the signal that ended it"""

    def ended(self) -> bool:
        """Whether it is no more; it is reaped then."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Herd:
    """The workers of one torture, each with its log in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.alive: list[Worker] = []
        self.started = 0
        self.outlived = 0.0
        """seconds that what a worker left behind went on at most, before it ended by itself"""

    def begin(self, words: Sequence[str], fresh: bool = False, default: str = "") -> Worker:
        """Let `python -m WORDS` begin; a new Python when it is to be `fresh`.  `default`: the command that a first flag means."""
        self.started += 1
        worker = start(words, self.folder / f"log-{self.started}.txt", fresh, default)
        self.alive.append(worker)
        return worker

    def reap(self, workers: Sequence[Worker], grace: float = 0.0) -> None:
        """Wait until these have ended, and see that nothing of them is left `grace` seconds later, or `GRACE` if that is more."""
        for worker in workers:
            end = time.monotonic() + PATIENCE
            while not worker.ended():
                if time.monotonic() > end:
                    self.fail(worker, f"does not end for {PATIENCE:.0f} s")
                time.sleep(POLL)
            self.alive.remove(worker)
        begun = time.monotonic()
        end = begun + max(grace, GRACE)
        while orphans := self.orphans():
            if time.monotonic() > end:
                raise GranaryError(f"processes {orphans} were left behind by {[worker.pid for worker in workers]}")
            time.sleep(POLL)
            self.outlived = max(self.outlived, time.monotonic() - begun)

    def orphans(self) -> list[int]:
        """Living processes that are not workers and whose parent was one: as its reaper this process has inherited them."""
        known = {worker.pid for worker in self.alive}
        return [pid for pid in children() if pid not in known and os.waitpid(pid, os.WNOHANG) == (0, 0)]

    def finish(self) -> None:
        """Wait until all have ended by themselves, with exit code 0."""
        ending = list(self.alive)
        self.reap(ending)
        for worker in ending:
            if worker.code != 0:
                self.fail(worker, f"was let alone and ended with {worker.code}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill whoever is left."""
        for worker in self.alive:
            if not worker.ended():
                os.kill(worker.pid, signal.SIGKILL)
                os.waitpid(worker.pid, 0)

    def fail(self, worker: Worker, what: str) -> NoReturn:
        """`GranaryError` with the last words of a worker."""
        said = worker.said()[-3000:]
        raise GranaryError(f"process {worker.pid} ({' '.join(worker.words)}) {what}. Its last words:\n{said}")


@contextlib.contextmanager
def scene(folder: Path | None) -> Iterator[Path]:
    """A new folder to torture in, `folder` or a temporary one; kept, and said so, when something is wrong."""
    inherit_orphans()
    place = folder or Path(tempfile.mkdtemp(prefix="granary-torture-"))
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):
        raise UsageError(f"--folder {place} is not empty: choose a new one")
    try:
        yield place
    except BaseException:
        print(f"what it was working on is kept in {place}", file=sys.stderr)
        raise
    if folder is None:
        shutil.rmtree(place)


def inherit_orphans() -> None:
    """Become the parent of whatever a worker leaves behind, so that it cannot hide."""
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def preload() -> None:
    """Import what a harvest imports, so that a fork need not; runs nothing of it."""
    alone()
    from harvest.quiet import quiet

    with quiet():
        import pandas  # noqa: F401  # by pyarrow, when it first makes a table
        from diffusers import (  # noqa: F401
            AutoencoderKL,
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            FluxTransformer2DModel,
        )
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401

        import harvest.fill  # noqa: F401


def alone() -> None:
    """One thread, no GPU, no network: for this process and its forks, before torch is there."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(words: Sequence[str], log: Path, fresh: bool = False, default: str = "") -> Worker:
    """Let `python -m WORDS` begin, what it prints going to `log`; a new Python when it is to be `fresh`."""
    log.unlink(missing_ok=True)

    def work() -> int:
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", *words])
        sys.argv[:] = list(words)
        commands = import_module(f"{words[0]}.__main__").COMMANDS
        return program(words[0], commands, list(words[1:]), default=default or None)

    return Worker(_forked(work, log), words, log)


def done(work: Callable[[], object], log: Path) -> None:
    """Do some work in a fork and wait for it, so that this process runs and loads nothing; `GranaryError` where it fails."""

    def working() -> int:
        work()
        return 0

    worker = Worker(_forked(working, log), ["preparation"], log)
    if os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1]):
        raise GranaryError(f"what the torture begins with could not be made:\n{worker.said()[-3000:]}")


def _forked(work: Callable[[], int], log: Path) -> int:
    """The id of a child in a session of its own that does some work, prints to `log`, and ends with the code it gives."""
    pid = os.fork()
    if not pid:
        _become(work, log)
    return pid


def _become(work: Callable[[], int], log: Path) -> NoReturn:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell ignores for a background job
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def children() -> list[int]:
    """The processes whose parent is this one."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it may end while we look
            if (
                folder.name.isdecimal()
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
            ):
                found.append(int(folder.name))
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, also while it changes."""
    for where, _, names in os.walk(folder):
        for name in names:
            yield Path(where) / name


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in files_below(folder)}


def refuse_difference(found: Path, expected: Path, whole: dict[str, bytes]) -> None:
    """`GranaryError`, naming the files, unless a folder holds the bytes of an undisturbed one."""
    there = tree(found)
    odd = sorted(name for name in there.keys() | whole.keys() if there.get(name) != whole.get(name))
    if odd:
        raise GranaryError(f"{found} differs from {expected} in {', '.join(odd)}")
