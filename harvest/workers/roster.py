"""Who fills a store, read from what lies beside it: the workers' own words, and the leases that decide who is alive.

Everything here only reads, so it may be asked of any store by anybody, as often as one likes.  Ages are differences between
times that one file system gave; the clock of this machine stands in for "now" unless a file is newer than that.  How far it is
ahead of the file system's shows when a file is touched between two looks (`Clock`).
"""

import contextlib
import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from harvest.workers.progress import State, workers_folder
from store import layout
from store.format import part_name
from store.leases import LEASE_SECONDS, Holding, holdings, is_dead, is_here, is_stopped

Life = Literal["alive", "stopped", "silent", "dead", "over"]
HUNG_SECONDS = 300.0
"""a worker that draws, lives, and has drawn nothing for so long is remarked on"""
MOST = 1e10
"""no number of a record is greater, seconds and images; one that is was not written by us"""
COUNTS = ("part_drawn", "images", "drawn")
SECONDS = ("part_seconds", "seconds", "idle_seconds", "silent_after")


@dataclass(frozen=True)
class Seen:
    """A worker as it is seen from outside."""

    facts: Mapping[str, Any]
    """what it says of itself (`Progress.facts`); `host` and `pid` alone for one that has only a lease"""
    life: Life
    heard: float
    """seconds since it was heard of"""
    begun: float
    """when it began, by the clock of the file system"""
    holds: tuple[int, ...]
    """parts of which it has a lease that is honoured, and that are not committed"""

    @property
    def rate(self) -> float | None:
        """Images a second that may be counted on; None for one that draws nothing now."""
        works = self.life == "alive" and self.facts.get("state") == "drawing" and self.hung is None
        rate = self.facts.get("images_per_second")
        return float(rate) if works and isinstance(rate, int | float) else None

    @property
    def hung(self) -> float | None:
        """Seconds for which a living worker has drawn nothing, where that is long."""
        if self.life != "alive" or self.facts.get("state") != "drawing":
            return None
        idle = _seconds(self.facts, "idle_seconds") + self.heard
        return idle if idle > HUNG_SECONDS else None

    @property
    def who(self) -> str:
        """`host, process 12`"""
        return f"{self.facts.get('host', 'unknown')}, process {self.facts.get('pid', '?')}"


@dataclass(frozen=True)
class Roster:
    """All workers of a store, those that began first first, and the parts in their hands."""

    workers: tuple[Seen, ...]
    unreadable: int
    """records that say nothing"""
    ahead: float
    """seconds by which the newest file is ahead of this machine's clock"""
    refused: str = ""
    """why the leases cannot be read; empty where they can"""

    @property
    def alive(self) -> tuple[Seen, ...]:
        return tuple(seen for seen in self.workers if seen.life == "alive")

    @property
    def held(self) -> set[int]:
        """Parts that nobody else may take for now: a silent worker keeps its own until its lease ends."""
        return {part for seen in self.workers for part in seen.holds}


@dataclass
class Clock:
    """The clock of this machine beside the file system's, for somebody who looks again and again."""

    fast: float = 0.0
    """seconds by which it is ahead, at least: a file that was touched since the last look is older by it than that look"""
    looked: float = math.inf
    touched: Mapping[str, float] = field(default_factory=dict)

    def now(self, touched: Mapping[str, float]) -> float:
        """The file system's time, as far as it can be told from when files were touched; never before the newest of them."""
        moment = time.time()
        since = [when for name, when in touched.items() if when > self.touched.get(name, math.inf)]
        if since:
            self.fast = max(self.looked - max(since), 0.0)
        self.looked, self.touched = moment, touched
        return max(moment - self.fast, *touched.values()) if touched else moment - self.fast


def roster_of(out: Path, committed: Collection[int], clock: Clock | None = None) -> Roster:
    """Who works or worked on the store at `out`, of which these parts are committed; `clock`: that of earlier looks."""
    clock = clock or Clock()
    folder, leases, refused = layout.runs_folder(out) / "leases", list[Holding](), ""
    try:
        leases = holdings(folder, but={part_name(part) for part in committed})
    except OSError as error:
        refused = f"{folder}: {error.strerror}"
    records, unreadable = _records(workers_folder(out))
    times = {f"lease {each.name}": each.touched for each in leases}
    newest = clock.now(times | {f"record {_identity(facts)}": touched for facts, touched in records})
    of: dict[tuple[Any, ...], list[Holding]] = {}
    for lease in leases:
        of.setdefault(_identity(lease.about), []).append(lease)
    found = [_seen(facts, touched, of.pop(_identity(facts), []), newest) for facts, touched in records]
    without = of.values()  # leases of a program that keeps no record, such as one of an older version
    found += [_seen(_named(held[0].about), max(each.touched for each in held), held, newest) for held in without]
    workers = tuple(sorted(found, key=lambda seen: (seen.begun, seen.who)))
    return Roster(workers, unreadable, newest - clock.looked, refused)


def _seen(facts: Mapping[str, Any], touched: float, leases: list[Holding], now: float) -> Seen:
    begun = touched - _seconds(facts, "seconds")
    heard = now - max([touched, *(lease.touched for lease in leases)])
    dead, stopped = is_dead(facts), is_stopped(facts)
    runs = is_here(facts) and not dead and not stopped  # and touches its leases, whatever clocks say
    honoured = [lease for lease in leases if runs or (now - lease.touched <= lease.seconds and not dead)]
    limit = _seconds(facts, "silent_after") or LEASE_SECONDS
    if facts.get("state") in ("ended", "failed"):
        life: Life = "over"
    elif dead:
        life = "dead"
    elif stopped:
        life = "stopped"
    else:
        life = "alive" if runs or honoured or heard <= limit else "silent"
    parts = [lease.name.removeprefix("part-") for lease in honoured]
    return Seen(facts, life, max(heard, 0.0), begun, tuple(int(part) for part in parts if part.isdecimal()))


def _records(folder: Path) -> tuple[list[tuple[dict[str, Any], float]], int]:
    """What each worker said last, and when; and how many files say nothing."""
    found, unreadable = [], 0
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            touched, facts = 0.0, None
            try:
                touched, facts = file.stat().st_mtime, json.loads(file.read_bytes())
            except FileNotFoundError:
                raise
            except (ValueError, RecursionError, OSError):  # damaged, no file, or another user's alone
                pass
            if isinstance(facts, dict) and _is_record(facts):
                found.append((facts, touched))
            else:
                unreadable += 1
    return found, unreadable


def _is_record(facts: Mapping[str, Any]) -> bool:
    """Whether somebody wrote this who writes as `Progress.facts` does; what is absent may be."""
    numbers = [facts.get(name, 0) for name in (*COUNTS, *SECONDS)]
    numbers += [0 if facts.get(name) is None else facts[name] for name in ("part", "images_per_second")]
    whole = [facts.get("pid"), *(facts.get(name, 0) for name in COUNTS), facts.get("part") or 0]
    state = facts.get("state")
    return (
        isinstance(state, str)
        and state in get_args(State)
        and all(isinstance(number, int | float) and 0 <= number <= MOST for number in numbers)
        and all(isinstance(number, int) for number in whole)
    )


def _named(about: Mapping[str, Any]) -> dict[str, Any]:
    """Who wrote a lease, without what else it says: its `seconds` are not those that a worker has run."""
    return {name: about[name] for name in ("host", "pid", "started", "processes") if name in about}


def _identity(about: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(about.get(name)) for name in ("host", "pid", "started", "processes"))


def _seconds(facts: Mapping[str, Any], name: str) -> float:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
