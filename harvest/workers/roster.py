"""Who fills a store, read from what lies beside it: the workers' own words, and the leases that decide who is alive.

Everything here only reads, so it may be asked of any store by anybody, as often as one likes.  Ages are differences between
times that one file system gave; the clock of this machine stands in for "now" unless a file is newer than that.
"""

import contextlib
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from harvest.workers.progress import State, workers_folder
from store import layout
from store.format import part_name
from store.leases import LEASE_SECONDS, Holding, holdings, is_dead, is_stopped

Life = Literal["alive", "stopped", "silent", "dead", "over"]
HUNG_SECONDS = 300.0
"""a worker that draws, lives, and has drawn nothing for so long is remarked on"""


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

    @property
    def alive(self) -> tuple[Seen, ...]:
        return tuple(seen for seen in self.workers if seen.life == "alive")

    @property
    def held(self) -> set[int]:
        """Parts that nobody else may take for now: a silent worker keeps its own until its lease ends."""
        return {part for seen in self.workers for part in seen.holds}


def roster_of(out: Path, committed: Collection[int]) -> Roster:
    """Who works or worked on the store at `out`, of which these parts are committed."""
    leases = holdings(layout.runs_folder(out) / "leases", but={part_name(part) for part in committed})
    records, unreadable = _records(workers_folder(out))
    clock = time.time()
    newest = max([clock, *(each.touched for each in leases), *(touched for _, touched in records)])
    of: dict[tuple[Any, ...], list[Holding]] = {}
    for lease in leases:
        of.setdefault(_identity(lease.about), []).append(lease)
    found = [_seen(facts, touched, of.pop(_identity(facts), []), newest) for facts, touched in records]
    without = of.values()  # leases of a program that keeps no record, such as one of an older version
    found += [_seen(held[0].about, max(each.touched for each in held), held, newest) for held in without]
    return Roster(tuple(sorted(found, key=lambda seen: (seen.begun, seen.who))), unreadable, newest - clock)


def _seen(facts: Mapping[str, Any], touched: float, leases: list[Holding], now: float) -> Seen:
    begun = touched - _seconds(facts, "seconds")
    heard = now - max([touched, *(lease.touched for lease in leases)])
    honoured = [lease for lease in leases if now - lease.touched <= lease.seconds and not is_dead(lease.about)]
    limit = _seconds(facts, "silent_after") or LEASE_SECONDS
    if facts.get("state") in ("ended", "failed"):
        life: Life = "over"
    elif is_dead(facts):
        life = "dead"
    elif is_stopped(facts):
        life = "stopped"
    else:
        life = "alive" if honoured or heard <= limit else "silent"
    parts = [lease.name.removeprefix("part-") for lease in honoured]
    return Seen(facts, life, max(heard, 0.0), begun, tuple(int(part) for part in parts if part.isdecimal()))


def _records(folder: Path) -> tuple[list[tuple[dict[str, Any], float]], int]:
    """What each worker said last, and when; and how many files say nothing."""
    found, unreadable = [], 0
    for file in sorted(folder.glob("*.json")):
        if file.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):
            touched = file.stat().st_mtime
            try:
                facts = json.loads(file.read_bytes())
            except ValueError:
                facts = None
            if isinstance(facts, dict) and facts.get("state") in get_args(State) and isinstance(facts.get("pid"), int):
                found.append((facts, touched))
            else:
                unreadable += 1
    return found, unreadable


def _identity(about: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(about.get(name)) for name in ("host", "pid", "started", "processes"))


def _seconds(facts: Mapping[str, Any], name: str) -> float:
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
