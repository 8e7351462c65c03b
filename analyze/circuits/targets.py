"""What is to be explained: targets as flags and CSV files write them, each with the image and step whose trace explains it.

    img_3:12:66                          feature 66 of the transcoder of img_3 at token 12
    img_3:max:66                         the same where it is most active in that image at that step
    red=img_3:12:66+0.5*img_3:13:66      a supernode: a weighted sum of features, traced back as one

One `Experiment` is one graph: an image, a step, and one target, or several that share a graph (`--together`).
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analyze.circuits.settings import GraphSettings
from store.errors import UsageError
from store.sites import Site, parse_numbers

COLUMNS = ("image", "step", "site", "token", "feature")
"""the columns that a CSV of targets needs"""
GROUP, DICTIONARY = "group", "dictionary"
DIGITS = 12
"""of an image or a step at most"""
WEIGHTS = 1e-6, 1e6
"""the smallest and the largest weight of a member, 0 aside"""
LABEL = 100
"""characters of the name of a supernode at most: it is part of the names of folders"""
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_ASK = re.compile(
    r"(?:(?P<weight>[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\*)?(?P<site>(?:img|txt|joint)_\d{1,9}):(?P<token>\d{1,9}|max):(?P<feature>\d{1,9})"
)


@dataclass(frozen=True)
class Ask:
    """One feature at one token, as it was asked for; token None is `max`."""

    site: Site
    token: int | None
    feature: int
    weight: float = 1.0

    def __str__(self) -> str:
        token = "max" if self.token is None else self.token
        weight = repr(self.weight).removesuffix(".0")  # reads back as the same number
        return ("" if self.weight == 1 else f"{weight}*") + f"{self.site}:{token}:{self.feature}"

    @classmethod
    def parse(cls, text: str, where: str) -> "Ask":
        """The feature that `img_3:12:66` means; `UsageError`, saying `where`, for anything else."""
        match = _ASK.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{where} {text!r} is no target: write site:token:feature such as img_3:12:66, or img_3:max:66 for the token "
                "where the feature is most active"
            )
        weight, (least, most) = float(match["weight"] or 1), WEIGHTS
        if weight and not least <= abs(weight) <= most:
            raise UsageError(
                f"{where} {text!r}: the weight {weight:g} is none from {least:g} to {most:g}: scale all of them"
            )
        return cls(_double(match["site"], where), _token(match["token"]), int(match["feature"]), weight)


@dataclass(frozen=True)
class Wanted:
    """One target: a feature, or a supernode of several with a name."""

    asks: tuple[Ask, ...]
    name: str | None = None

    def __str__(self) -> str:
        text = "+".join(map(str, self.asks))
        return text if self.name is None else f"{self.name}={text}"


@dataclass(frozen=True)
class Experiment:
    """One graph that is wanted."""

    image: int
    step: int
    wanted: tuple[Wanted, ...]
    where: str
    """how messages name it: the flag, or the file and line"""
    columns: dict[str, str] = field(default_factory=dict)
    """what else the CSV said of it"""
    dictionaries: tuple[tuple[Site, str], ...] = ()
    """which dictionary the CSV says that a feature is of, by the name that `analyze scan` gave it"""

    @property
    def top(self) -> int:
        """The highest layer of its targets: the blocks above it do not matter."""
        return max(ask.site.layer for ask in self.asks)

    @property
    def asks(self) -> Iterator[Ask]:
        """Every feature of its targets."""
        return (ask for wanted in self.wanted for ask in wanted.asks)

    def name(self, tokens: Sequence[int | None]) -> str:
        """What its folder is called, `image-00017.step-2.img_3.p12.f66`; `tokens` are those of `asks`; a None is called `max`."""
        start = f"image-{self.image:05d}.step-{self.step}"
        if len(self.wanted) > 1:
            return f"{start}.together"
        (wanted,) = self.wanted
        if wanted.name is not None:
            return f"{start}.{wanted.name}"
        (ask,) = wanted.asks
        return f"{start}.{ask.site}.{'max' if tokens[0] is None else f'p{tokens[0]}'}.f{ask.feature}"


def experiments(
    settings: GraphSettings, images: Sequence[int], steps: Sequence[int], n_images: int, n_steps: int
) -> list[Experiment]:
    """Every graph that is asked for, in order of image, then step, then as given.

    `images`, `steps`: what `all` stands for; `n_images`, `n_steps`: how many there are.
    `UsageError` names the flag, or the file and line, for what is no target and for one that stands twice.
    """
    if settings.targets is not None:
        return read_targets(settings.targets)
    wanted = [Wanted((_alone(Ask.parse(text, "--target")),)) for text in settings.target]
    wanted += [_supernode(text) for text in settings.supernode]
    _refuse_twice([(str(each), f"--target {each}") for each in wanted])
    _refuse_twice([(each.name, f"--supernode {each.name}") for each in wanted if each.name is not None])
    return [
        Experiment(
            image, step, group, " ".join(f"--{'target' if each.name is None else 'supernode'} {each}" for each in group)
        )
        for image in _numbers(settings.image, images, n_images, "image")
        for step in _numbers(settings.step, steps, n_steps, "step")
        for group in ([tuple(wanted)] if settings.together else [(each,) for each in wanted])
    ]


def _alone(ask: Ask) -> Ask:
    if ask.weight != 1:
        raise UsageError(f"--target {ask} has a weight, which belongs to the members of a --supernode: leave it out")
    return ask


def _supernode(text: str) -> Wanted:
    name, equals, parts = text.partition("=")
    if equals:
        _check_length(name.strip(), f"--supernode {name[:20]}…")
    if not equals or _LABEL.fullmatch(name.strip()) is None:
        raise UsageError(
            f"--supernode {text!r} is no supernode: write name=img_3:12:66+img_3:13:66, with a name of letters, digits, "
            "points, _ and -"
        )
    asks = tuple(Ask.parse(part, "--supernode") for part in re.split(r"(?<!\d[eE])\+", parts))
    _refuse_twice([((ask.site, ask.token, ask.feature), f"--supernode {text}: {ask}") for ask in asks])
    if nothing := [str(ask) for ask in asks if ask.weight == 0]:
        raise UsageError(f"--supernode {text}: {nothing[0]} weighs nothing: leave it out, or give it another weight")
    return Wanted(asks, name.strip())


def _check_length(name: str, where: str) -> None:
    """`UsageError` for a name that is too long for a folder."""
    if len(name) > LABEL:
        raise UsageError(f"{where} has a name of {len(name)} characters: write at most {LABEL}")


def _numbers(text: int | str | None, traced: Sequence[int], count: int, what: str) -> Sequence[int]:
    """The numbers below `count` that are asked for; `all`: those that are traced.  Which of the others are is checked later."""
    words = str(text).strip()
    return traced if words == "all" else parse_numbers(words, count, what)


def read_targets(path: Path) -> list[Experiment]:
    """The graphs that a CSV asks for, in order of image, then step, then of its rows.

    `UsageError` names file and line for a column that is missing, a value that is none, and a target that stands twice.
    """
    groups: dict[tuple[int, int, str], list[tuple[Ask, int, dict[str, str]]]] = {}
    for line, row in _rows(path):
        where = f"{path} line {line}:"
        image, step = (_whole(row[column], column, where) for column in ("image", "step"))
        ask = Ask.parse(":".join(row[column].strip() for column in ("site", "token", "feature")), where)
        if row.get(DICTIONARY, "").startswith("sae_"):
            raise UsageError(f"{where} {ask} is a feature of {row[DICTIONARY]}, an SAE: only transcoders make graphs")
        label = row.get(GROUP, "").strip()
        if label and _LABEL.fullmatch(label) is None:
            raise UsageError(f"{where} the group {label!r} is no name: use letters, digits, points, _ and -")
        _check_length(label, f"{where} the group {label[:20]}…")
        groups.setdefault((image, step, f"group {label}" if label else str(ask)), []).append((ask, line, row))
    found = []
    for (image, step, key), members in groups.items():
        name = key.removeprefix("group ") if key.startswith("group ") else None
        _refuse_rows(members, path, name)
        asks, lines, rows = zip(*members, strict=True)
        found.append(
            Experiment(
                image, step, (Wanted(asks, name),), f"{path} line {lines[0]}" + (f", group {name}" if name else ""),
                {column: text for column, text in rows[0].items() if column not in COLUMNS},
                tuple((ask.site, row[DICTIONARY]) for ask, row in zip(asks, rows, strict=True) if row.get(DICTIONARY)),
            )
        )  # fmt: skip
    return sorted(found, key=lambda each: (each.image, each.step))


def _refuse_rows(members: Sequence[tuple[Ask, int, dict[str, str]]], path: Path, name: str | None) -> None:
    """`UsageError` for two rows that are one target, naming both lines."""
    seen: dict[object, int] = {}
    for ask, line, _ in members:
        before = seen.setdefault((ask.site, ask.token, ask.feature), line)
        if before != line:
            of = "" if name is None else f" in the group {name}"
            raise UsageError(
                f"{path} line {line}: {ask} stands twice{of}, first in line {before}: name each target once"
            )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with their line numbers; `UsageError` for a file that is no CSV of targets."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}: --targets names a CSV, as python -m analyze scan writes it"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UsageError(f"--targets {path} is no CSV file ({error})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        there = [name.strip() for name in reader.fieldnames or ()]
        twice = sorted({name for name in there if there.count(name) > 1})
        if twice:
            raise UsageError(f"{path} has the column {', '.join(map(repr, twice))} twice: name each column once")
        missing = [name for name in COLUMNS if name not in there]
        if missing:
            raise UsageError(
                f"{path} has no column {', '.join(missing)}: a CSV of targets begins with {','.join(COLUMNS)}; this one has "
                f"{','.join(there) or 'nothing'}"
            )
        reader.fieldnames = there
        count = 0
        for row in reader:
            if None in row or None in row.values():
                raise UsageError(f"{path} line {reader.line_num}: {_fields(row)} values, expected {len(there)}")
            count += 1
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num} is not CSV: {error}") from None
    if not count:
        raise UsageError(f"{path} lists no target: it has the header and no row")


def _fields(row: dict[str | None, str | list[str] | None]) -> int:
    """How many values a row has that has too many or too few."""
    return sum(len(value) if isinstance(value, list) else value is not None for value in row.values())


def _whole(text: str, column: str, where: str) -> int:
    if re.fullmatch(rf"\d{{1,{DIGITS}}}", text.strip()) is None:
        raise UsageError(f"{where} the {column} {text!r} is no number: expected 0, 1, 2 …")
    return int(text)


def _double(text: str, where: str) -> Site:
    site = Site.parse(text)
    if site.kind != "double":
        raise UsageError(
            f"{where} {site} is a site of a single-stream block: graphs are of double blocks, img_… and txt_…"
        )
    return site


def _token(text: str) -> int | None:
    return None if text == "max" else int(text)


def _refuse_twice(given: Sequence[tuple[object, str]]) -> None:
    seen: set[object] = set()
    for key, said in given:
        if key in seen:
            raise UsageError(f"{said} stands twice: name each target once")
        seen.add(key)
