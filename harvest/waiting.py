"""Who waited for whom in a harvest: the model for a free slot, for the encoding, for the disk or for other workers.

The model, the copies, and the writing of the part before go on at the same time, so the seconds of each tell little: what
counts is how long the model stood still, and for whom.  It waits at four places only:

    for a free slot of the staging, with nothing left to compute                          `copy`
    for the part before, shared out as the writer's threads spent their time on it        `encode`, `disk`
    for the traces of the block before, which are written as they come (`--trace`)        `disk`
    for parts that others hold, when nothing else is left to do (`--wait`)                `others`

The last of these is no part of a harvest's rate: a worker that draws nothing is not slow.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from store.spent import Spent

NOTED = 0.01
"""a share of the time below which nobody speaks of waiting"""
TENTH = 0.05
"""seconds that are less than a tenth when they are rounded"""
ADVICE = {
    "copy": "the copies from the device to the host, or the host's memory, are what limits",
    "encode": "more cores, or --codec none, would help",
    "disk": "a faster disk, fewer tokens (--tokens, --text-tokens) or a smaller --store-dtype would help",
}


@dataclass
class Waiting:
    """Seconds of one harvest, as the thread that runs the model sees them; `threads` adds up what others did meanwhile."""

    model: float = 0.0
    """drawing, hooks and selection among it"""
    copy: float = 0.0
    """standing still until a slot of the staging was free, or the last one was moved"""
    encode: float = 0.0
    """standing still for statistics, checksums, pictures and compression of the part before"""
    disk: float = 0.0
    """standing still for writes, fsyncs and renames of the part before"""
    last: float = 0.0
    """writing the last part, when nothing was left to draw"""
    others: float = 0.0
    """waiting for parts that others held, when nothing else was left"""
    threads: Spent = field(default_factory=Spent)
    """seconds that threads spent: `copy`, `encode`, `disk`; those of several add up"""

    @property
    def total(self) -> float:
        """All of it but what others were waited for."""
        return self.model + self.copy + self.encode + self.disk + self.last

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count the time inside for the model, what it waits for copies and for traces apart."""
        begun, waited = time.perf_counter(), self.copy + self.disk
        try:
            yield
        finally:
            self.model += time.perf_counter() - begun - (self.copy + self.disk - waited)

    def waited_for_copy(self, seconds: float) -> None:
        """Count seconds that the model stood still for a copy."""
        self.copy += seconds

    def waited_for_trace(self, seconds: float) -> None:
        """Count seconds that the model's thread stood still for a trace that was being written."""
        self.disk += seconds

    @contextmanager
    def for_others(self) -> Iterator[None]:
        """Count the time inside as waiting for other workers."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.others += time.perf_counter() - begun

    @contextmanager
    def for_writing(self, before: Mapping[str, float], last: bool) -> Iterator[None]:
        """Count the time inside as standing still for a part whose writing began when `threads` had spent `before`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._share_out(time.perf_counter() - begun, before, last)

    def _share_out(self, seconds: float, before: Mapping[str, float], last: bool) -> None:
        if last:
            self.last += seconds
            return
        now = self.threads.seconds()
        encode, disk = (now.get(name, 0.0) - before.get(name, 0.0) for name in ("encode", "disk"))
        share = encode / (encode + disk) if encode + disk else 0.0
        self.encode += seconds * share
        self.disk += seconds * (1.0 - share)

    def said(self) -> str:
        """One sentence: `the model drew for 10.2 s and waited 1.4 s: copy 0.0 s, encode 0.2 s, disk 1.2 s (12 % of …: …)`."""
        waits = {name: getattr(self, name) for name in ADVICE}
        waited = sum(waits.values())
        each = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in waits.items())
        said = f"the model drew for {self.model:.1f} s and waited {waited:.1f} s ({each}); the last part took {self.last:.1f} s more"
        if self.others >= TENTH:
            said += f", and {self.others:.1f} s went by until others were done with the parts that they held"
        worst = max(waits, key=lambda name: waits[name])
        running = self.model + waited
        if waited < NOTED * running or not running:
            return f"{said}: nothing held it up"
        share = waits[worst] / running
        what = {"copy": "the copies", "encode": "the encoding", "disk": "the disk"}[worst]
        return f"{said}: {share:.0%} of the time it waited for {what}; {ADVICE[worst]}"

    def facts(self) -> dict[str, Any]:
        """What a run record keeps: seconds of the model and of its waits, and what threads spent at the same time."""
        return {
            "model": self.model,
            "waited": {name: getattr(self, name) for name in ADVICE},
            "last_part": self.last,
            "others": self.others,
            "threads": self.threads.seconds(),
        }
