"""Where activations are read: sites, and the short texts in which people name them.

A site is one (block, layer, stream).  `img_6` is the image stream of double block 6, the name that
checkpoint files carry; single-stream blocks have one sequence and the stream `joint`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from store.errors import UsageError

Stream = Literal["img", "txt", "joint"]
Kind = Literal["double", "single"]
Point = Literal["mlp_in", "mlp_out"]
POINTS: tuple[Point, ...] = get_args(Point)
DIGITS = 18
"""of a number that is written in a range, at most"""
MOST_LAYERS = 10_000
"""a transformer is not taken to have more"""


@dataclass(frozen=True, order=True)
class Site:
    """One place in the transformer where an MLP reads and writes: block kind, 0-based layer within it, stream."""

    kind: Kind
    layer: int
    stream: Stream

    def __str__(self) -> str:
        return f"{self.stream}_{self.layer}"

    @property
    def path(self) -> str:
        """The site's folder below `activations/`: `double.06/img`."""
        return f"{self.kind}.{self.layer:02d}/{self.stream}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `img_6`, `txt_6` or `joint_3` names; `UsageError` for anything else."""
        match = re.fullmatch(r"(img|txt|joint)_(\d+)", text.strip())
        if match is None:
            raise UsageError(f"{text!r} is no site: write img_6, txt_6 or joint_3 (stream, underscore, layer)")
        stream: Stream = match[1]  # type: ignore[assignment]  # the pattern admits nothing else
        return cls("single" if stream == "joint" else "double", int(match[2]), stream)


def parse_sites(text: str) -> tuple[Site, ...]:
    """The sites that `img_0-3,txt_6` names, in that order, each once."""
    found: dict[Site, None] = {}
    for word in text.split(","):
        match = re.fullmatch(r"(img|txt|joint)_(\d+)(?:-(\d+))?", word.strip())
        if match is None:
            raise UsageError(f"{word.strip()!r} in {text!r} names no sites: write for example img_0-3,txt_6")
        layers = _span(match[2], match[3], text)
        if layers[-1] >= MOST_LAYERS:  # before they are counted out
            raise UsageError(
                f"{word.strip()!r} in {text!r} names layer {layers[-1]}: layers go up to {MOST_LAYERS - 1}"
            )
        for layer in layers:
            found[Site.parse(f"{match[1]}_{layer}")] = None
    return tuple(found)


def choose_sites(text: str, available: Iterable[Site], where: str) -> tuple[Site, ...]:
    """The sites that `text` names (`all`: every one available); `UsageError` names what `where` has when one is missing."""
    there = tuple(available)
    if text.strip() == "all":
        return there
    wanted = parse_sites(text)
    missing = [str(site) for site in wanted if site not in there]
    if missing:
        raise UsageError(f"{where} has no {', '.join(missing)}; it has {', '.join(map(str, there))}")
    return wanted


def parse_numbers(text: str, count: int, what: str) -> tuple[int, ...]:
    """The ascending 0-based numbers that `0-3,7` names, or all `count` for `all`; `UsageError` beyond `count`."""
    if text.strip() == "all":
        return tuple(range(count))
    found: set[int] = set()
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if match is None:
            raise UsageError(
                f"{word.strip()!r} in {text!r} is no {what}: write numbers and ranges such as 0-3,7, or all"
            )
        asked = _span(match[1], match[2], text)
        if asked[-1] >= count:  # before they are counted out: 0-99999999999 would take all memory
            low, high = max(asked[0], count), asked[-1]
            span = str(low) if low == high else f"{low}-{high}"
            raise UsageError(f"there is no {what} {span}: {_there(count)}")
        found.update(asked)
    return tuple(sorted(found))


def _there(count: int) -> str:
    return f"there are {count}, 0 to {count - 1}" if count else "there are none"


def _span(first: str, last: str | None, text: str) -> range:
    if max(len(first), len(last or "")) > DIGITS:
        raise UsageError(
            f"{first if last is None else f'{first}-{last}'} in {text!r} has a number of more than {DIGITS} digits"
        )
    low, high = int(first), int(last if last is not None else first)
    if high < low:
        raise UsageError(f"the range {first}-{last} in {text!r} runs backwards: write {last}-{first}")
    return range(low, high + 1)


def spans(numbers: Sequence[int]) -> str:
    """`0-3,7` for the ascending numbers 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
