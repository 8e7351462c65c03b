"""`python -m bench compare OLD.json NEW.json`: what became faster, what slower, and what stayed within the spread of the runs.

A line with a peer is judged by ours / its, both measured by turns in one run, so that a machine that is slower today changes
nothing; a line without one by its seconds.  A change counts when it is greater than `LEAST` and greater than the spreads of all
samples that it is made of (a median's distance from the best), added as independent errors are.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench.lines import Line, Peer, spread
from bench.running import Run, doubts, run_of, whole
from bench.table import ratio_text, seconds_text
from store.errors import UsageError

LEAST = 0.05


@dataclass(frozen=True)
class CompareSettings:
    """Say what became faster or slower between two runs."""

    old: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OLD.json")]
    """the earlier run, as `python -m bench --out` kept it"""
    new: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NEW.json")]
    """the later run"""


@dataclass(frozen=True)
class ShowSettings:
    """Print the table of a run again."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.json")]
    """as `python -m bench --out` kept it"""


@dataclass(frozen=True)
class Change:
    """One line in both runs."""

    group: str
    what: str
    beside: str
    """the peer that it is judged by; empty where there is none"""
    seconds: tuple[float, float]
    """of ours, then and now"""
    factor: float
    """ours / its now over then; of the seconds where there is no peer.  0.5 is twice as fast"""
    noise: float

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `as before`."""
        if self.factor > 1 + self.noise:
            return "slower"
        return "faster" if self.factor < 1 / (1 + self.noise) else "as before"

    def text(self) -> str:
        """In one row."""
        then, now = self.seconds
        return (
            f"{self.verdict:<10} {self.group:<9} {self.what:<44} {seconds_text(then):>8} -> {seconds_text(now):>8}   "
            f"{ratio_text(self.factor):>6} times {'ours/its' if self.beside else 'the time':<8}   noise {self.noise:.0%}"
            + (f"   beside {self.beside}" if self.beside else "")
        )


def changes(old: Run, new: Run) -> Iterator[Change]:
    """Every line that is the same work in both, in the order of the table."""
    for group, lines in new.groups.items():
        before = {line.what: line for line in old.groups.get(group, ())}
        for line in lines:
            if (earlier := before.get(line.what)) is not None and earlier.needs == line.needs:
                yield _change(group, earlier, line)


def _change(group: str, old: Line, new: Line) -> Change:
    samples, name, factor = [old.ours, new.ours], "", new.best / old.best
    for peer in new.peers:
        if (same := _peer(old, peer.name)) is not None:
            samples, name, factor = [*samples, same.seconds, peer.seconds], peer.name, new.ratio(peer) / old.ratio(same)
            break
    return Change(group, new.what, name, (old.best, new.best), factor, max(LEAST, math.hypot(*map(spread, samples))))


def _peer(line: Line, name: str) -> Peer | None:
    return next((peer for peer in line.peers if peer.name == name), None)


def compare(settings: CompareSettings) -> list[Change]:
    """Print the changes, the greatest first; `UsageError` where the runs have no line in common."""
    old, new = run_of(settings.old), run_of(settings.new)
    found = sorted(changes(old, new), key=lambda change: change.factor)
    if not found:
        raise UsageError(
            f"{settings.old} (size {old.size}: {', '.join(old.groups)}) and {settings.new} (size {new.size}: {', '.join(new.groups)}) "
            "measured nothing in common: run both with the same --size and --only"
        )
    print(
        f"old: {settings.old}, {old.date}, {old.machine.text()}\nnew: {settings.new}, {new.date}, {new.machine.text()}"
    )
    if differences := old.machine.differences(new.machine):
        print(f"the machines differ ({'; '.join(differences)}): seconds are no measure, and ours / its only a weak one")
    print(
        "rates of the machine, new over old: "
        + ", ".join(f"{n} {new.rates[n] / rate:.2f}" for n, rate in old.rates.items())
    )
    for name, each in (("old", old), ("new", new)):
        if said := doubts(each):
            print(f"the {name} run is doubtful: {'; '.join(said)}. What follows says little")
    print("\n".join(change.text() for change in found))
    verdicts = [change.verdict for change in found]
    print(", ".join(f"{verdicts.count(word)} {word}" for word in ("faster", "slower", "as before")))
    if odd := _alone(old, new):
        print(f"in one run only, or not the same work in both: {'; '.join(odd)}")
    return found


def _alone(old: Run, new: Run) -> list[str]:
    """Lines that could not be compared."""
    both = {(change.group, change.what) for change in changes(old, new)}
    every = {(name, line.what): None for run in (old, new) for name, lines in run.groups.items() for line in lines}
    return [f"{group}, {what}" for group, what in every if (group, what) not in both]


def show(settings: ShowSettings) -> None:
    """Print the page that the run printed."""
    print("\n".join(whole(run_of(settings.run))))
