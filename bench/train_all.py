"""`make bench-train`: packing, loading and training against their alternatives, in one run on one machine.

    pack      a pack against a plain copy of the same bytes, both cold                  bench.pack_copy
    loader    the loader against a sequential memory-mapped read with permutation       bench.loader
    step      a training step against a loop written as the reference's is described    bench.train_step
    shared    eight lambdas on one read against eight trainings that each read          bench.shared_read
    peers     sae-lens, dictionary-learning, eai-sparsify: rows/s, and FVU in a minute  bench.peers

The peers are taken from `.bench-peers/train`, where `make bench-train` puts them.  What was measured is kept as JSON too.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import loader, pack_copy, peers, shared_read, train_step
from bench.peer import PEERS
from bench.timing import Comparison, group, machine
from store.command import Command, program
from store.errors import UsageError
from store.files import write_json

GROUPS: dict[str, tuple[Callable[[], Iterable[Comparison]], str]] = {
    "pack": (pack_copy.comparisons, "at least 0.40 of the copy's speed, within --memory"),
    "loader": (loader.comparisons, "at least 0.8 of the memory map's speed"),
    "step": (train_step.comparisons, "with bfloat16 autocast at least 3 times the reference's loop"),
    "shared": (shared_read.comparisons, "at most 0.7 of the time where reading binds: a speed of 1.43"),
}
PARTS = (*GROUPS, "peers")


@dataclass(frozen=True)
class BenchSettings:
    """Measure packing, loading and training against their alternatives."""

    only: str = ",".join(PARTS)
    """parts to measure: pack, loader, step, shared, peers"""
    out: Path = Path("build/bench-train.json")
    """where the figures are kept"""

    def __post_init__(self) -> None:
        if odd := [part for part in self.only.split(",") if part not in PARTS]:
            raise UsageError(f"--only {self.only!r}: there is no {odd[0]!r}; there are {', '.join(PARTS)}")
        if "peers" in self.only.split(",") and not (PEERS / "installed").exists():
            raise UsageError(f"the peers are not in {PEERS}: run make bench-train, or leave them out with --only")


def run(settings: BenchSettings) -> None:
    """Print the tables, each line as it is measured, and keep the figures."""
    found: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0]}
    print(
        f"{found['machine']}; load {found['load']:.1f} at the start\nspeed = the alternative's time over ours: 2 is twice as fast"
    )
    for part in settings.only.split(","):
        begun = time.perf_counter()
        print(f"\n== {part}", flush=True)
        found[part] = peers.run() if part == "peers" else group(GROUPS[part][0](), GROUPS[part][1])
        print(f"   ({time.perf_counter() - begun:.0f} s)", flush=True)
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings.out, found)
    print(f"\nkept in {settings.out}")


COMMANDS = {"bench": Command(BenchSettings, run, "Measure packing, loading and training against their alternatives.")}

if __name__ == "__main__":
    sys.exit(program("bench.train_all", COMMANDS, default="bench"))
