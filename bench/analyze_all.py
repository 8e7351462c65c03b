"""`make bench-analyze`: the analysis against its alternatives, in one run on one machine.

    scores      S = max over tokens from the store against one plain torch pass over the same rows in RAM    bench.scores
    features    statistics, top images and words in a stream of blocks against a loop over features          bench.features
    coherence   selection by unique prompts and coherence against loops over features                        bench.coherence
    memory      peak memory at ten times the images                                                          bench.analyze_memory

What was measured is kept as JSON too.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import analyze_memory, coherence, features, scores
from bench.timing import Comparison, group, machine
from store.command import Command, program
from store.errors import UsageError
from store.files import write_json

GROUPS: dict[str, tuple[Callable[[], Iterable[Comparison]], str]] = {
    "scores": (scores.comparisons, "within 1.5 times the plain pass: a speed of 0.67"),
    "features": (features.comparisons, "at least 4 times the loop, words too"),
    "coherence": (coherence.comparisons, "at least 8 times the loop with k x k products"),
}
PARTS = (*GROUPS, "memory")


@dataclass(frozen=True)
class BenchSettings:
    """Measure the analysis against its alternatives."""

    only: str = ",".join(PARTS)
    """parts to measure: scores, features, coherence, memory"""
    out: Path = Path("build/bench-analyze.json")
    """where the figures are kept"""

    def __post_init__(self) -> None:
        if odd := [part for part in self.only.split(",") if part not in PARTS]:
            raise UsageError(f"--only {self.only!r}: there is no {odd[0]!r}; there are {', '.join(PARTS)}")


def run(settings: BenchSettings) -> None:
    """Print the tables, each line as it is measured, and keep the figures."""
    found: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0]}
    print(f"{found['machine']}; load {found['load']:.1f} at the start; best of several, by turns")
    print("speed = the alternative's time over ours: 2 is twice as fast")
    for part in settings.only.split(","):
        begun = time.perf_counter()
        print(f"\n== {part}", flush=True)
        found[part] = memory() if part == "memory" else group(GROUPS[part][0](), GROUPS[part][1], width=48)
        print(f"   ({time.perf_counter() - begun:.0f} s)", flush=True)
        write_json(settings.out, found)
    print(f"\nkept in {settings.out}")


def memory() -> list[dict[str, Any]]:
    """The peaks of each command, printed one by one."""
    lines = []
    for line in analyze_memory.peaks():
        lines.append({**asdict(line), "ratio": line.ratio})
        print(
            f"{line.what:<64} {line.few / 1e6:>7.0f} MB   {line.many / 1e6:>7.0f} MB   ratio {line.ratio:>5.2f}",
            flush=True,
        )
    print(
        "goal: scores unchanged, that is within the spread of two runs; coherence grows by the embeddings, "
        f"{(analyze_memory.MORE - 1) * analyze_memory.FEW * analyze_memory.DIM * 4 / 1e6:.0f} MB, and by no copy of them"
    )
    return lines


COMMANDS = {"bench": Command(BenchSettings, run, "Measure the analysis against its alternatives.")}

if __name__ == "__main__":
    sys.exit(program("bench.analyze_all", COMMANDS, default="bench"))
