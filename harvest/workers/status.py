"""`python -m harvest status STORE`: how far a store is, who fills it, how fast, until when, and who went silent.

It reads and writes nothing, so it may be asked while others write, by people who may not.
"""

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from harvest.workers.roster import Clock, Roster, Seen, roster_of
from store import layout
from store.errors import ForeignError, UsageError
from store.files import is_temporary, read_self_checked
from store.format import StoreMeta
from store.opening import OURS, read_meta, uncommitted
from store.sites import spans
from store.sizes import many

ENDED_SHOWN = 8
BAR = 32
SURE_SECONDS = 15.0
"""two beats of a worker and more: after so long --watch has seen whether silent ones go on"""
YEAR = 365 * 86_400.0
COLUMNS = ("worker", "process", "since", "does", "part", "parts", "images", "images/s", "heard of")
RIGHT = {"parts", "images", "images/s"}


@dataclass(frozen=True)
class StatusSettings:
    """Say how far a store is, who fills it, and how long that will take."""

    store: tyro.conf.Positional[str]
    """the store, also one that is just being begun"""
    watch: bool = False
    """look again and again until the store is finished or nobody works on it; Ctrl-C ends it"""
    every: float = 5.0
    """with --watch: seconds between two looks"""
    all: bool = False
    """a line for each worker that ever was, and not only for the last that ended"""

    def __post_init__(self) -> None:
        if not 0.1 <= self.every <= 86_400:
            raise UsageError(f"--every is {self.every:g}: it must be at least 0.1, and at most a day")


@dataclass(frozen=True)
class Look:
    """A store and its workers at one moment."""

    path: Path
    meta: StoreMeta | None
    """None for a store that is just being begun"""
    committed: frozenset[int]
    sealed: bool
    roster: Roster
    created: bool = True
    """whether its creation, or its extension, has ended"""

    @property
    def over(self) -> bool:
        """Whether nothing will change any more: all that are there have ended, or gone."""
        return not self.roster.alive

    @property
    def silent(self) -> tuple[Seen, ...]:
        """Workers of other machines of which nothing was heard lately, by the clock of this one."""
        return () if self.sealed else tuple(seen for seen in self.roster.workers if seen.life == "silent")

    @property
    def images(self) -> int:
        """Images that are committed."""
        return 0 if self.meta is None else sum(len(self.meta.part_images(part)) for part in self.committed)

    @property
    def rate(self) -> float:
        """Images a second of all who draw now."""
        return sum(seen.rate or 0.0 for seen in self.roster.alive)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last image is drawn, at the rate of now; None where nothing says."""
        if self.meta is None or self.sealed or not self.rate:
            return None
        begun = sum(int(seen.facts.get("part_drawn") or 0) for seen in self.roster.alive)
        return max(self.meta.n_images - self.images - begun, 0) / self.rate


def run(settings: StatusSettings) -> str:
    """Print the status of a store, with `--watch` again and again; returns the last text.

    Errors: `ForeignError` for a folder that is no store, `DamagedError` for one that lost something.
    """
    path = folder_of(settings.store)
    if not settings.watch:
        text = describe(look(path), settings.all)
        print(text)
        return text
    clock, begun = Clock(), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # that is how one stops watching
        while True:
            seen = look(path, clock)
            text = describe(seen, settings.all)
            print(f"\033[H\033[2J{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
            if seen.over and (not seen.silent or time.monotonic() - begun > SURE_SECONDS):
                break
            time.sleep(settings.every)
    return text


def folder_of(store: str) -> Path:
    """The folder of a store here; `UsageError` for a URL, beside which there are no workers."""
    if "://" in store:
        raise UsageError(
            f"{store}: who fills a store is written beside it on the file system that the workers share; give that folder, "
            f"or say what is in this one: python -m store info {store}"
        )
    return Path(store)


def look(path: Path, clock: Clock | None = None) -> Look:
    """A store and its workers as they are now; `ForeignError` or `DamagedError` when there is none that can be used.

    `clock`: what earlier looks have told of this machine's clock.
    """
    if not (path / layout.ROOT).exists():
        roster = roster_of(path, (), clock)
        begins = any(seen.facts.get("state") == "loading" or seen.holds for seen in roster.workers)
        if begins and (not path.exists() or _is_empty_of_others(path)):
            return Look(path, None, frozenset(), False, roster)
    meta = read_meta(path)
    for _ in range(3):  # a store that is finished between two looks has a seal in one and no commit in the other
        sealed = (path / layout.SEAL).exists()
        committed = _committed(path, meta)
        if not sealed or len(committed) == meta.n_parts:
            break
    if sealed:
        uncommitted(path, meta)  # which says what is missing from a store that is finished
        read_self_checked(path / layout.SEAL, f"Mend it: python -m store repair {path}")
    created = sealed or (path / layout.STORE_COMMIT).exists()
    return Look(path, meta, committed, sealed, roster_of(path, committed, clock), created)


def _is_empty_of_others(path: Path) -> bool:
    """Whether a folder without zarr.json holds nothing but what a creation makes before it."""
    return path.is_dir() and {file.name for file in path.iterdir() if not is_temporary(file)} <= OURS


def _committed(path: Path, meta: StoreMeta) -> frozenset[int]:
    try:
        names = [file.name for file in (path / "commits").iterdir()]
    except FileNotFoundError:
        return frozenset()
    except NotADirectoryError:
        raise ForeignError(f"{path} is no Granary store: its commits are a file") from None
    parts = {int(match[1]) for name in names if (match := re.fullmatch(r"part-(\d{5,})\.json", name))}
    return frozenset(part for part in parts if part < meta.n_parts)


def describe(seen: Look, every: bool = False) -> str:
    """The text of `status`: a bar, what is left, and a table of workers."""
    lines = [_headline(seen), *_advice(seen)]
    shown, ended = _shown(seen.roster, every)
    if shown:
        lines += ["", *_table([_row(each, seen.meta) for each in shown])]
    if ended:
        images = sum(int(each.facts.get("images") or 0) for each in ended)
        lines.append(
            f"  and {many(len(ended), 'worker')} that ended or went before, with {many(images, 'image')} (--all shows them)"
        )
    if seen.roster.unreadable:
        lines.append(
            f"  {many(seen.roster.unreadable, 'record')} beside the store cannot be read; the store needs none of them"
        )
    if seen.roster.ahead > 5:
        lines.append(
            f"  the file system's clock is {duration(seen.roster.ahead)} or more ahead of this machine's, so times are rough"
        )
    return "\n".join(lines)


def _headline(seen: Look) -> str:
    if seen.meta is None:
        return f"{seen.path}: not begun yet, prepared by {many(len(seen.roster.alive), 'worker')}"
    meta, done = seen.meta, len(seen.committed)
    if seen.sealed:
        return f"{seen.path}: finished, {many(meta.n_images, 'image')} in {many(meta.n_parts, 'part')}"
    share = seen.images / meta.n_images
    bar = "█" * int(BAR * share) + "░" * (BAR - int(BAR * share))
    held = len(seen.roster.held)
    state = f"{done:,} of {many(meta.n_parts, 'part')}, {held:,} held, {meta.n_parts - done - held:,} not begun"
    return f"{seen.path}: {bar} {100 * share:.1f} %\n{seen.images:,} of {many(meta.n_images, 'image')}: {state}"


def _advice(seen: Look) -> list[str]:
    """What will happen, and what somebody should do."""
    if seen.sealed or seen.meta is None:
        return []
    again = f"python -m harvest --resume {seen.path}"
    if not seen.roster.alive:
        if seen.roster.refused:
            return [f"who works on it cannot be seen: {seen.roster.refused}"]
        if not seen.created:
            return [f"its creation, or its extension, did not end. Go on: {again}"]
        if len(seen.committed) == seen.meta.n_parts:
            return [f"all parts are there, and nobody has sealed them yet: {again}"]
        if seen.silent:
            ago = duration(min(each.heard for each in seen.silent))
            return [
                f"nobody was heard of for {ago} by this machine's clock; where that is ahead of the file system's, --watch "
                f"shows who goes on. If nobody does: {again}"
            ]
        return [f"nobody works on it now. Go on: {again}"]
    workers = many(len(seen.roster.alive), "worker")
    if seen.seconds_left is None:
        return [
            f"{workers}, time left: not known yet" + ("" if seen.created else "; the store is being made or extended")
        ]
    until = f", until {_clock(time.time() + seen.seconds_left)}" if seen.seconds_left < YEAR else ""
    drawing = sum(each.rate is not None for each in seen.roster.alive)
    of = "" if drawing == len(seen.roster.alive) else f", {drawing} of them drawing"
    return [f"{workers}{of}, {_rate(seen.rate)} images/s, time left {duration(seen.seconds_left)}{until}"]


def _shown(roster: Roster, every: bool) -> tuple[list[Seen], list[Seen]]:
    """Workers with a line of their own, and those that are counted together: of those that are no more all but the last few."""
    gone = [each for each in roster.workers if each.life in ("over", "dead") and not each.holds]
    counted = [] if every else sorted(gone, key=lambda each: -each.heard)[: max(len(gone) - ENDED_SHOWN, 0)]
    return [each for each in roster.workers if each not in counted], counted


def _row(seen: Seen, meta: StoreMeta | None) -> tuple[str, ...]:
    facts, device = seen.facts, str(seen.facts.get("device") or "")
    rate = facts.get("images_per_second") if seen.life in ("alive", "over") else None
    return (
        str(facts.get("worker") or "-"),
        seen.who + (f", {device}" if device and device != "cpu" else ""),
        _clock(seen.begun) if "seconds" in facts else "",
        _does(seen),
        _part(seen, meta),
        str(_count(str(facts.get("parts") or ""))),
        f"{int(facts.get('images') or 0):,}",
        _rate(float(rate)) if isinstance(rate, int | float) else "",
        "" if seen.life == "over" else f"{duration(seen.heard)} ago",
    )


def _does(seen: Seen) -> str:
    state = str(seen.facts.get("state", "holds a part"))
    if seen.life == "over":
        return "ended" if state == "ended" else f"failed: {str(seen.facts.get('said') or '')[:60]}"
    if seen.life == "dead":
        return "dead: its process is no more"
    if seen.life in ("stopped", "silent"):
        part = seen.facts.get("part")
        return seen.life if part is None or part in seen.holds else f"{seen.life}, has lost part {part}"
    if seen.hung is not None:
        return f"no image for {duration(seen.hung)}"
    return "loading the model" if state == "loading" else state


def _part(seen: Seen, meta: StoreMeta | None) -> str:
    """What it draws and writes; for one that waits, what it waits for."""
    part = seen.facts.get("part")
    others = [held for held in seen.holds if held != part]
    words = []
    if part in seen.holds and meta is not None and isinstance(part, int):
        words.append(f"{part} ({seen.facts.get('part_drawn') or 0} of {len(meta.part_images(part))})")
        words += [f"writes {spans(others)}"] if others else []
    elif seen.holds:
        words.append(spans(seen.holds))
    elif seen.life == "alive" and seen.facts.get("state") == "waiting":
        words.append(str(seen.facts.get("said") or "").removeprefix("waiting "))
    return ", ".join(words)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    kept = [i for i, name in enumerate(COLUMNS) if any(row[i] for row in rows)]
    table = [[COLUMNS[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [COLUMNS[i] in RIGHT for i in kept]
    return [
        (
            "  "
            + "  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(row, widths, right, strict=True))
        ).rstrip()
        for row in table
    ]


def _count(parts: str) -> int:
    """How many numbers `0-3,7` names; 0 for what is no such text."""
    found = [re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", word) for word in parts.split(",")]
    return sum(int(match[2] or match[1]) - int(match[1]) + 1 for match in found if match is not None)


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock(moment: float) -> str:
    """`14:05:09` of today, `Nov 21 14:05` of another day."""
    there, today = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M:%S" if there[:3] == today[:3] else "%b %d %H:%M", there)


def duration(seconds: float) -> str:
    """`9 s`, `3 min 04 s`, `2 h 05 min`, `3 days 4 h`, `more than a year`"""
    if seconds >= YEAR:
        return "more than a year"
    whole = round(seconds)
    for size, unit, smaller, of in ((86_400, "days", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= (2 if unit == "days" else 1) * size:
            rest = whole % size // smaller
            return f"{whole // size} {unit} {rest:0{1 if of == 'h' else 2}d} {of}"
    return f"{whole} s"
