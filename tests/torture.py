"""Kills harvests at random moments and holds what they leave against an undisturbed store, byte by byte: `make torture`.

1. Two stores are harvested undisturbed, one as long as a round begins with and one as long as it is extended to.
2. A round harvests, resumes and extends a store with 1 or with 3 workers at once.  Workers are killed, one or all of them,
   while they start, while they create or extend the store, while they draw a part or while they write one, and others
   are started in their place; some get SIGTERM or SIGINT.
3. Whenever the workers have ended by themselves, the store must equal the undisturbed one.
4. Rounds go on until enough SIGKILLs fell inside a part: its lease was the dead process's, and it had no commit.

A worker is `python -m harvest` as the shell would run it.  Because a start costs seconds of imports, most workers are
forked from this process, which has imported everything, and has run and loaded nothing; one in `FRESH` is a new Python.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from store.command import Command, program
from store.errors import GranaryError
from store.layout import ROOT, SEAL, STORE_COMMIT, part_commit, runs_folder
from tests.torture_workers import (
    PATIENCE,
    POLL,
    Herd,
    Worker,
    files_below,
    preload,
    refuse_difference,
    scene,
    tree,
)

PROMPTS = "a red circle left of a blue square\na green triangle on black\ntwo white circles\n"
FLAGS = (
    *("--layers", "1", "--streams", "txt", "--num-inference-steps", "1", "--resolution", "8", "--max-sequence-length", "8"),
    *("--pictures", "none", "--batch-size", "16", "--threads", "1", "--weights", "copy", "--cycle"),
)  # fmt: skip
PART = 64
"""images a part of such a store"""
FRESH = 12
KILLS_A_PHASE = 5

Phase = Literal["harvest", "resume", "extend"]
Moment = Literal["any", "begin", "draw", "write"]
MOMENTS: tuple[Moment, ...] = ("any", "begin", *("draw",) * 3, *("write",) * 3)
SIGNALS = (signal.SIGKILL,) * 8 + (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class TortureSettings:
    """Kill harvests at random moments; every store must end as the bytes of an undisturbed one."""

    kills: int = 100
    """go on until so many SIGKILLs fell inside a part"""
    seed: int = 0
    """seed of the moments and of the choice of victims; the scheduler adds its own chance"""
    minutes: float = 10
    """fail when that takes longer"""
    workers: str = "1,3"
    """how many processes at once; rounds take turns"""
    parts: int = 2
    """parts of a store that is begun"""
    extended: int = 4
    """parts of a store that was extended"""
    fresh: bool = True
    """let one worker in twelve be a Python of its own rather than a fork"""
    aimed: bool = False
    """SIGKILL alone, and only while a part is drawn or written: more kills a minute that count, and of fewer kinds"""
    folder: Path | None = None
    """a new folder for the stores; default: a temporary one, which is kept when something is wrong"""


@dataclass
class Tally:
    """What was done to whom."""

    signals: Counter[str] = field(default_factory=Counter)
    inside: Counter[tuple[Phase, int]] = field(default_factory=Counter)
    """SIGKILLs that fell inside a part, by phase and number of workers"""
    writing: int = 0
    """those of them that came when files of the part were on the disk already"""
    rounds: int = 0
    compared: int = 0

    def text(self, seconds: float) -> str:
        """The closing summary."""
        count = sum(self.inside.values())
        kinds = ", ".join(f"{number} {name}" for name, number in sorted(self.signals.items()))
        cases = ", ".join(f"{p} by {w}: {number}" for (p, w), number in sorted(self.inside.items()))
        return (
            f"{sum(self.signals.values())} workers were ended ({kinds}) in {self.rounds} rounds, {seconds:.0f} s\n"
            f"{count} of {self.signals['SIGKILL']} SIGKILLs fell inside a part; in {self.writing} of these some of its "
            f"files were written already\n"
            f"inside a part, by phase and number of workers: {cases}\n"
            f"{self.compared} stores that were finished after kills: each byte-equal to the undisturbed one; "
            f"no process outlived a killed one"
        )


def run(settings: TortureSettings) -> Tally:
    """Do it; returns the tally.  `GranaryError` for a store that differs, a worker that fails or hangs, or too little time."""
    preload()
    numbers = [int(number) for number in settings.workers.split(",")]
    begun = time.monotonic()
    with scene(settings.folder) as folder, Torture(settings, folder) as torture:
        torture.undisturbed()
        while not torture.enough(numbers):
            seconds = time.monotonic() - begun
            if seconds > 60 * settings.minutes:
                raise GranaryError(f"{settings.minutes:g} minutes were not enough: {torture.tally.text(seconds)}")
            torture.round(numbers[torture.tally.rounds % len(numbers)])
            done = sum(torture.tally.inside.values())
            print(f"  {time.monotonic() - begun:4.0f} s  {done} of {settings.kills} kills inside a part", flush=True)
    print(torture.tally.text(time.monotonic() - begun))
    return torture.tally


class Torture(Herd):
    """Rounds of kills, and what came of them."""

    def __init__(self, settings: TortureSettings, folder: Path) -> None:
        super().__init__(folder)
        self.settings = settings
        (folder / "prompts.txt").write_text(PROMPTS)
        self.flags = (*FLAGS, "--prompts", str(folder / "prompts.txt"))
        self.chance = random.Random(settings.seed)
        self.tally = Tally()
        self.whole: dict[int, dict[str, bytes]] = {}
        """the undisturbed stores, by parts"""
        self.seconds = 1.0
        """that the longer of them took: how long a victim may live"""
        self.part_seconds = 1.0
        """from the lease of a part to its commit"""

    def undisturbed(self) -> None:
        """Harvest the two stores that all others must equal."""
        lengths = (self.settings.parts, self.settings.extended)
        begun = time.monotonic()
        for parts in lengths:
            out = self.folder / f"whole-{parts}"
            self.start((*self.flags, "--images", str(parts * PART), "--out", str(out)))
        self.finish()
        self.seconds = time.monotonic() - begun
        commits = (
            self.folder / f"whole-{lengths[0]}" / STORE_COMMIT,
            self.folder / f"whole-{lengths[0]}" / part_commit(0),
        )
        self.part_seconds = commits[1].stat().st_mtime - commits[0].stat().st_mtime
        self.whole = {parts: tree(self.folder / f"whole-{parts}") for parts in lengths}
        assert all(len([n for n in t if n.startswith("commits/part")]) == parts for parts, t in self.whole.items())
        print(
            f"  undisturbed stores of {lengths[0]} and {lengths[1]} parts: {self.seconds:.1f} s, "
            f"a part: {self.part_seconds:.2f} s",
            flush=True,
        )

    def enough(self, numbers: Sequence[int]) -> bool:
        """Whether as many kills as were asked for fell inside a part, and some in each phase and with each number of workers."""
        inside = self.tally.inside
        everywhere = {n for _, n in inside} >= set(numbers) and {phase for phase, _ in inside} == set(get_args(Phase))
        return everywhere and sum(inside.values()) >= self.settings.kills

    def round(self, workers: int) -> None:
        """One store: harvested, resumed and extended by so many workers at once, who are killed on the way."""
        store = self.folder / f"round-{self.tally.rounds}"
        at_first = (*self.flags, "--images", str(self.settings.parts * PART), "--out", str(store))
        resume = ("--resume", str(store))
        extend = ("--extend", str(store), "--images", str(self.settings.extended * PART))
        for _ in range(workers):
            self.start(at_first)
        self.kill_some(store, "harvest", workers, lambda: at_first)
        self.kill_some(store, "resume", workers, lambda: resume)
        self.finish()
        self.compare(store, self.settings.parts)
        for _ in range(workers):
            self.start(extend)
        self.kill_some(store, "extend", workers, lambda: extend)
        self.finish()
        self.compare(store, self.settings.extended)
        shutil.rmtree(store)
        shutil.rmtree(runs_folder(store))
        self.tally.rounds += 1

    def kill_some(self, store: Path, phase: Phase, workers: int, again: Callable[[], Sequence[str]]) -> None:
        """A few times: end one or all of those alive at some moment, and start as many with the words `again`."""
        aimed = self.settings.aimed
        for _ in range(2 if aimed else self.chance.randint(1, KILLS_A_PHASE)):
            if all(worker.ended() for worker in self.alive):
                break
            how = signal.SIGKILL if aimed else self.chance.choice(SIGNALS)
            moment = self.chance.choice(MOMENTS[2:] if aimed else MOMENTS)
            victim = self.await_moment(store, phase, moment)
            victims = list(self.alive) if self.chance.random() < 0.3 else [victim]
            hit = [victim for victim in victims if not victim.ended()]
            if how != signal.SIGKILL:  # one that has not come as far as the harvest dies as any Python does
                hit = [victim for victim in hit if "harvest tiny-flux" in victim.said()]
            for victim in hit:
                os.kill(victim.pid, how)
            self.reap(hit)
            for victim in hit:
                self.note(store, phase, workers, victim, how)
            for _ in hit:
                self.start(again())

    def await_moment(self, store: Path, phase: Phase, moment: Moment) -> Worker:
        """A worker at a moment of that kind in its life, or when all have ended."""
        if moment == "begin" and phase != "resume":
            sign = store / ROOT if phase == "harvest" else store / SEAL
            victim = self.poll(lambda _: (phase == "harvest") == sign.exists())
            pause = 0.03
        elif moment == "draw":
            victim = self.poll(lambda worker: bool(held_by(store, worker.pid)))
            pause = self.part_seconds
        elif moment == "write":
            victim = self.poll(lambda worker: any(_is_begun(store, part) for part in held_by(store, worker.pid)))
            pause = 0.015
        else:
            victim = self.chance.choice(self.alive)
            pause = self.seconds
        time.sleep(pause * self.chance.random())
        return victim

    def poll(self, sign: Callable[[Worker], bool]) -> Worker:
        """The first worker, in a random order, for which there is a sign, or any when all have ended."""
        order, end = self.chance.sample(self.alive, len(self.alive)), time.monotonic() + PATIENCE
        while True:
            for worker in order:
                if not worker.ended() and sign(worker):
                    return worker
            if all(worker.ended() for worker in order):
                return order[0]
            if time.monotonic() > end:
                self.fail(order[0], f"has got nowhere for {PATIENCE:.0f} s")
            time.sleep(POLL)

    def note(self, store: Path, phase: Phase, workers: int, victim: Worker, how: signal.Signals) -> None:
        """Count a worker that was ended, and see that it died as it should, alone."""
        if victim.code == 0 or "Look at it:" in victim.said():  # it had done its work before the signal came
            return
        self.tally.signals[how.name] += 1
        if how != signal.SIGKILL:
            if victim.code != 1 or "Traceback" in victim.said():
                self.fail(victim, f"was sent {how.name} and ended with {victim.code} rather than one message and 1")
            return
        parts = held_by(store, victim.pid)
        if parts:
            self.tally.inside[phase, workers] += 1
            self.tally.writing += any(_is_begun(store, part) for part in parts)

    def start(self, words: Sequence[str]) -> None:
        """Let a harvest begin."""
        fresh = self.settings.fresh and (self.started + 1) % FRESH == 0
        self.begin(["harvest", *words], fresh, default="harvest")

    def compare(self, store: Path, parts: int) -> None:
        """`GranaryError` unless the store is the undisturbed one, and no lease is left."""
        refuse_difference(store, self.folder / f"whole-{parts}", self.whole[parts])
        if (runs_folder(store) / "leases").exists():
            raise GranaryError(f"{store} is finished and {runs_folder(store) / 'leases'} is still there")
        self.tally.compared += 1


def held_by(store: Path, pid: int) -> list[int]:
    """The parts that process holds by a lease and that have no commit."""
    parts, folder = [], runs_folder(store) / "leases"
    try:
        files = list(folder.glob("part-*.json"))
    except FileNotFoundError:  # the store has just been finished
        return []
    for file in files:
        try:
            about = json.loads(file.read_bytes())
        except (OSError, ValueError):  # gone, or being written
            continue
        part = int(file.name.split(".")[0].removeprefix("part-"))
        if about.get("pid") == pid and not (store / part_commit(part)).exists():
            parts.append(part)
    return parts


def _is_begun(store: Path, part: int) -> bool:
    """Whether a file of a part, or the beginning of one, is on the disk."""
    names = (f"c.{part}.0.0", f".c.{part}.0.0.", f"part-{part:05d}.", f".part-{part:05d}.")
    return any(file.name.startswith(names) for file in files_below(store) if file.parent.name != "commits")


COMMANDS = {"torture": Command(TortureSettings, run, "Kill harvests at random moments and compare what they leave.")}

if __name__ == "__main__":
    sys.exit(program("tests.torture", COMMANDS, default="torture"))
