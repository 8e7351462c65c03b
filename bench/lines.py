"""What one line of the table says: seconds of ours and of its peers, and the least work that any way must do.

The floor of a line is what its least work takes at the rates of this machine, measured in the same run (`bench.machine`):

    floor = max(seconds of the disk, seconds of the processors),  each the sum of amount / rate over the needs that it serves

as if disk and processors worked at once, every core was busy from the first moment to the last, and nothing else was to be done.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from store.errors import DamagedError

Size = Literal["tiny", "quick", "full"]
"""how much is measured: tiny for tests (a moment a group), quick for the table (three minutes a group at most), full for a long look"""
Rate = Literal["write", "read", "cached", "copy", "crc32c", "sha256", "float32", "bfloat16"]
Seconds = tuple[float, ...]
OF_THE_DISK: tuple[Rate, ...] = ("write", "read")
MOVES: tuple[Rate, ...] = ("write", "read", "cached", "copy")
COUNTS: tuple[Rate, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Need:
    """So many bytes, or floating-point operations, that have to go through the machine at one of its measured rates."""

    rate: Rate
    amount: float


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work."""

    name: str
    seconds: Seconds
    """of every timed run"""
    goal: float | None = None
    """the greatest ours / its that we want"""


@dataclass(frozen=True)
class Line:
    """One piece of work, done by us and by others in turns."""

    what: str
    ours: Seconds
    """of every timed run"""
    peers: tuple[Peer, ...] = ()
    needs: tuple[Need, ...] = ()
    note: str = ""

    @property
    def best(self) -> float:
        """The shortest run of ours, in seconds."""
        return min(self.ours)

    @property
    def moved(self) -> float:
        """Bytes that have to be moved at least."""
        return sum(need.amount for need in self.needs if need.rate in MOVES)

    @property
    def operations(self) -> float:
        """Floating-point operations that have to be done at least; a multiplication and an addition are two."""
        return sum(need.amount for need in self.needs if need.rate in COUNTS)

    def ratio(self, peer: Peer) -> float:
        """Our best time over its best: 0.5 is twice as fast, 1.1 takes a tenth longer."""
        return self.best / min(peer.seconds)

    def floor(self, rates: Mapping[str, float]) -> tuple[float, str] | None:
        """(seconds, what binds: `disk` or `cores`) of the least work at these rates; None where no work was counted."""
        if not self.needs:
            return None
        taken = {"disk": 0.0, "cores": 0.0}
        for need in self.needs:
            taken["disk" if need.rate in OF_THE_DISK else "cores"] += need.amount / rates[need.rate]
        slower = max(taken, key=taken.__getitem__)
        return taken[slower], slower

    def as_json(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """What is kept: every sample, the needs, and what follows from them."""
        floor = self.floor(rates)
        found = {**asdict(self), "moved": self.moved, "operations": self.operations}
        found["floor"] = (
            None if floor is None else {"seconds": floor[0], "binds": floor[1], "over": self.best / floor[0]}
        )
        found["peers"] = [{**asdict(peer), "ratio": self.ratio(peer)} for peer in self.peers]
        return found


def line_of(value: Mapping[str, Any]) -> Line:
    """The line that `as_json` kept; `DamagedError` for what is no such thing."""
    try:
        peers = tuple(
            Peer(text_of(peer["name"]), _samples(peer["seconds"]), None if peer["goal"] is None else positive(peer["goal"]))
            for peer in value["peers"]
        )  # fmt: skip
        needs = tuple(Need(_rate(need["rate"]), positive(need["amount"])) for need in value["needs"])
        return Line(text_of(value["what"]), _samples(value["ours"]), peers, needs, text_of(value["note"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"a line of the table {wrong(error)}: these figures were not kept by `python -m bench`"
        ) from None


def positive(value: object) -> float:
    """The number; `ValueError` for what is no number, not finite, or not above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} where a number above 0 belongs")
    return value


def text_of(value: object) -> str:
    """The text; `ValueError` for what is none."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} where a text belongs")
    return value


def wrong(error: Exception) -> str:
    """What is wrong with kept figures, as the end of a sentence: `lacks 'ours'`, or what stands where something else belongs."""
    return f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"


def _samples(value: object) -> Seconds:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{value!r} where seconds of at least one run belong")
    return tuple(map(positive, value))


def _rate(value: object) -> Rate:
    for rate in get_args(Rate):
        if rate == value:
            found: Rate = rate
            return found
    raise ValueError(f"{value!r} where a rate belongs: {', '.join(get_args(Rate))}")


def spread(seconds: Seconds) -> float:
    """How far the runs of one thing lie apart: (median - shortest) / shortest; 0 for a single run."""
    ordered = sorted(seconds)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return (median - ordered[0]) / ordered[0]
