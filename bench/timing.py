"""How we time: ours and the alternative by turns, so that both see the same machine; the best of each counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One line of the table: seconds of ours and of the alternative, and the work both did."""

    what: str
    ours: float
    alternative: str
    other: float
    floor: str

    def line(self) -> str:
        ratio = self.ours / self.other
        return f"{self.what:<34} {self.ours:>8.3f} s   {self.alternative:<44} {self.other:>8.3f} s   {ratio:>6.2f}   {self.floor}"


def by_turns(ours: Callable[[], object], other: Callable[[], object], rounds: int = 3) -> tuple[float, float]:
    """(best seconds of ours, best seconds of the other), each run once to warm up and then `rounds` times by turns."""
    best = [float("inf"), float("inf")]
    for turn in range(rounds + 1):
        for index, work in enumerate((ours, other)):
            begun = time.perf_counter()
            work()
            if turn:
                best[index] = min(best[index], time.perf_counter() - begun)
    return best[0], best[1]
