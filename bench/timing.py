"""How we time and say it: ours and the alternative by turns, so that both see the same machine; the best of each counts."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SHORT = 0.1
"""seconds under which times are printed in milliseconds"""


@dataclass(frozen=True)
class Comparison:
    """One line of the table: seconds of ours and of the alternative, and the work both did."""

    what: str
    ours: float
    alternative: str
    other: float
    floor: str

    @property
    def speed(self) -> float:
        """The alternative's time over ours."""
        return self.other / self.ours

    def line(self) -> str:
        ratio = self.ours / self.other
        return f"{self.what:<34} {self.ours:>8.3f} s   {self.alternative:<44} {self.other:>8.3f} s   {ratio:>6.2f}   {self.floor}"


def by_turns(ours: Callable[[], object], other: Callable[[], object], rounds: int = 3) -> tuple[float, float]:
    """(best seconds of ours, best seconds of the other), each run once to warm up and then `rounds` times by turns."""
    mine, its = all_by_turns((ours, other), rounds)
    return mine, its


def all_by_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The best seconds of each, run once to warm up and then `rounds` times by turns."""
    best = [float("inf")] * len(works)
    for turn in range(rounds + 1):
        for index, work in enumerate(works):
            begun = time.perf_counter()
            work()
            if turn:
                best[index] = min(best[index], time.perf_counter() - begun)
    return best


def group(comparisons: Iterable[Comparison], goal: str, width: int = 44) -> list[dict[str, Any]]:
    """The comparisons as JSON has them, each printed as it is measured; `width`: characters for what was measured."""
    lines = []
    for line in comparisons:
        lines.append({**asdict(line), "speed": line.speed})
        print(
            f"{line.what:<{width}} {seconds_text(line.ours)}   {line.alternative:<40} {seconds_text(line.other)}   speed {line.speed:>6.2f}"
            f"   {line.floor}",
            flush=True,
        )
    print(f"goal: {goal}")
    return lines


def seconds_text(seconds: float) -> str:
    """`   1.234 s` or `  12.345 ms`, always as wide."""
    return f"{1e3 * seconds:>8.3f} ms" if seconds < SHORT else f"{seconds:>8.3f} s "


def machine() -> str:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
