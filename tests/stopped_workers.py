"""Four workers fill one store; one is killed, one is stopped, and the two others finish it: `python -m tests.stopped_workers`.

1. One worker harvests a store alone.
2. Four begin another as `--worker 0/4` to `--worker 3/4`.  As soon as two of them are inside a part, one is killed by
   SIGKILL and one is stopped by SIGSTOP; `status` must say so.
3. The two others end by themselves.  The store is finished then, and holds the bytes of the first.
4. The stopped one goes on, finds that it has lost its part, and ends; the store is as it was.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harvest.workers.progress import workers_folder
from harvest.workers.status import describe, look
from store.command import Command, program
from store.errors import GranaryError
from tests.torture import FLAGS, PART, PROMPTS, held_by
from tests.torture_workers import PATIENCE, POLL, Herd, Worker, preload, refuse_difference, scene, tree

WORKERS = 4


@dataclass(frozen=True)
class StoppedSettings:
    """Kill one and stop one of four workers; the store must be the one that one worker writes."""

    parts: int = 5
    """parts of the store"""
    lease_seconds: float = 6
    """after which the stopped one loses its part"""
    fresh: bool = False
    """let each worker be a Python of its own rather than a fork"""
    folder: Path | None = None
    """a new folder for the stores; default: a temporary one, which is kept when something is wrong"""


def run(settings: StoppedSettings) -> None:
    """Do it; `GranaryError` for a store that differs, a worker that fails or hangs, or a status that is wrong."""
    preload()
    with scene(settings.folder) as folder, Herd(folder) as herd:
        (folder / "prompts.txt").write_text(PROMPTS)
        flags = (*FLAGS, "--prompts", str(folder / "prompts.txt"), "--images", str(settings.parts * PART))
        herd.begin(["harvest", *flags, "--out", str(folder / "alone")], settings.fresh, default="harvest")
        herd.finish()
        whole, store = tree(folder / "alone"), folder / "together"
        begun = time.monotonic()
        for index in range(WORKERS):
            own = ("--worker", f"{index}/{WORKERS}", "--lease-seconds", f"{settings.lease_seconds:g}")
            herd.begin(["harvest", *flags, "--out", str(store), *own], settings.fresh, default="harvest")
        stopped = _stopped_inside_a_part(herd, store, lambda _: True)
        killed = _stopped_inside_a_part(herd, store, lambda worker: worker is not stopped)
        _wait_for_words(herd, store)
        os.kill(killed.pid, signal.SIGKILL)
        herd.reap([killed])
        _refuse_wrong_status(store, {stopped.pid: "stopped", killed.pid: "dead"})
        print(describe(look(store)))
        others = [worker for worker in herd.alive if worker is not stopped]
        herd.reap(others)
        for worker in others:
            if worker.code != 0:
                herd.fail(worker, f"was let alone and ended with {worker.code}")
        refuse_difference(store, folder / "alone", whole)
        seconds = time.monotonic() - begun
        print(f"finished by two of four workers in {seconds:.1f} s, byte-equal to the store of one")
        os.kill(stopped.pid, signal.SIGCONT)
        herd.finish()
        refuse_difference(store, folder / "alone", whole)
        if "taken over by another process" not in stopped.said():
            herd.fail(stopped, "did not say that it lost its part")
        print(f"the stopped one went on, found its part lost, and changed nothing\n{describe(look(store))}")


def _stopped_inside_a_part(herd: Herd, store: Path, chosen: Callable[[Worker], bool]) -> Worker:
    """A worker that is stopped now, while it holds a part that it has not committed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for worker in filter(chosen, herd.alive):
            if worker.ended():
                raise GranaryError(f"process {worker.pid} ended before two were inside a part: give more --parts")
            if not (held_by(store, worker.pid) and _says_that_it_draws(store, worker.pid)):
                continue
            os.kill(worker.pid, signal.SIGSTOP)
            while not _all_stand_still(worker.pid):  # a thread that syncs a file ends that first
                time.sleep(POLL)
            if held_by(store, worker.pid):
                return worker
            os.kill(worker.pid, signal.SIGCONT)
        time.sleep(POLL)
    raise GranaryError(f"no worker was inside a part for {PATIENCE:.0f} s")


def _says_that_it_draws(store: Path, pid: int) -> bool:
    for file in workers_folder(store).glob(f"*-{pid}.json"):
        with contextlib.suppress(FileNotFoundError):
            return bool(json.loads(file.read_bytes())["state"] == "drawing")
    return False


def _all_stand_still(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(file.read_text().rpartition(")")[2].split()[0] in "TtZX" for file in threads)


def _wait_for_words(herd: Herd, store: Path) -> None:
    """Wait until every worker has said something of itself, or found nothing to do and ended: one may come late on a busy machine."""
    end = time.monotonic() + PATIENCE
    for worker in herd.alive:
        while not worker.ended() and not list(workers_folder(store).glob(f"*-{worker.pid}.json")):
            if time.monotonic() > end:
                raise GranaryError(f"process {worker.pid} said nothing within {PATIENCE:.0f} s")
            time.sleep(POLL)


def _refuse_wrong_status(store: Path, lives: dict[int, str]) -> None:
    """`GranaryError` unless `status` sees these processes so, and the two others alive or ended."""
    found = {seen.facts["pid"]: seen.life for seen in look(store).roster.workers}
    others = {life for pid, life in found.items() if pid not in lives}
    if {pid: found.get(pid) for pid in lives} != lives or not others <= {"alive", "over"}:
        raise GranaryError(f"status sees {found}, and {lives} were expected")


COMMANDS = {"stopped": Command(StoppedSettings, run, "Kill one and stop one of four workers of a store.")}

if __name__ == "__main__":
    sys.exit(program("tests.stopped_workers", COMMANDS, default="stopped"))
