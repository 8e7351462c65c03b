"""Label files: what people called the features of a dictionary, kept so that any two copies can be merged.

    {"format": "granary labels", "version": 1, "labels": [{"feature", "text", "author", "time"}, …]}

1. Labels are only ever added: an empty text takes a label away, and the latest one of a feature is what is shown.
2. So the union of two files is the merge, whichever is merged into which, in any order, any number of times.
3. The file of `transcoder_img_6/` is `transcoder_img_6/labels.json`, that of `transcoder_img_6.pt` is
   `transcoder_img_6.labels.json`.  It is no part of the dictionary: no list with checksums names it.
4. Who writes holds a lock on the folder, reads the file again, and publishes the union whole.
"""

import fcntl
import json
import os
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import DamagedError, ForeignError, StoreError
from store.files import json_bytes, write_bytes
from store.sizes import many

FILE = "labels.json"
BESIDE = ".labels.json"
"""what takes the place of `.pt` in the name of the label file beside a published file"""
FORMAT, VERSION = "granary labels", 1
TIME = "%Y-%m-%dT%H:%M:%SZ"
LAST_TIME = "9998-12-31T23:59:59Z"
"""a second after any label there can be another moment that has four digits of a year"""
LONGEST = 200
"""characters of a text or an author: a name, not an essay"""
FEATURES = 2**31
"""more than any dictionary has"""
NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's control signs, halves of signs, and ends of lines; what is not assigned yet may be an emoji of next year"""
TURNS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""signs that turn the direction of what follows them: a label could make the line that it stands in say something else"""
UNSEEN = {"Cf", "Zs", "Mn", "Me"}
"""categories of what shows nothing alone: joiners, spaces, marks on the sign before them"""
BLANK = set("\u115f\u1160\u2800\u3164\uffa0")
"""letters and patterns that are drawn as nothing"""
START_ANEW = "restore it from a copy, or move it away to begin with no labels"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def shown(value: object) -> str:
    """The `repr` of something that a file holds, cut where it is long."""
    return _REPR.repr(value)


@dataclass(frozen=True, order=True)
class Label:
    """One thing that somebody said about a feature.  Labels sort as they lie in the file."""

    feature: int
    time: str
    """UTC, to the second: `2026-01-31T12:00:00Z`"""
    author: str
    text: str
    """what the feature is called; empty: that it is called nothing any more"""

    def __post_init__(self) -> None:
        """`ValueError` says what is wrong with it."""
        if not 0 <= self.feature < FEATURES:
            raise ValueError(
                f"feature is {shown(self.feature)}, expected a number from 0 on that a dictionary can have"
            )
        for name, value in (("text", self.text), ("author", self.author)):
            if len(value) > LONGEST:
                raise ValueError(f"{name} has {len(value):,} characters, expected at most {LONGEST}")
            if value != value.strip() or any(unicodedata.category(sign) in NO_TEXT for sign in value):
                raise ValueError(f"{name} is {shown(value)}, expected one line of text, no space around it")
            if TURNS & set(value):
                raise ValueError(f"{name} is {value!a}, expected no signs that turn the direction of the text")
            if value and all(sign in BLANK or unicodedata.category(sign) in UNSEEN for sign in value):
                raise ValueError(f"{name} is {value!a}, expected something that can be seen")
        if not self.author:
            raise ValueError("author is empty, expected a name")
        try:
            written = datetime.strptime(self.time, TIME).strftime(TIME)  # Z is in the format: UTC
        except ValueError:
            written = None
        if written != self.time:
            raise ValueError(f"time is {shown(self.time)}, expected UTC to the second, such as 2026-01-31T12:00:00Z")
        if self.time > LAST_TIME:
            raise ValueError(f"time is {self.time!r}, expected a moment before the year 9999")


KINDS = {"feature": int, "text": str, "author": str, "time": str}
"""what a label in a file has"""


def labels_file(place: Path) -> Path:
    """Where the labels of a dictionary lie: in its folder, or beside a published file."""
    return place.with_name(place.name.removesuffix(".pt") + BESIDE) if place.suffix == ".pt" else place / FILE


def latest(labels: Iterable[Label]) -> dict[int, str]:
    """Feature -> what it is called now, by the latest label of each; features without a name are left out."""
    shown = {label.feature: label.text for label in sorted(labels)}
    return {feature: text for feature, text in shown.items() if text}


def labels_bytes(labels: Iterable[Label]) -> bytes:
    """The content of a label file: equal labels are equal bytes."""
    return json_bytes({"format": FORMAT, "version": VERSION, "labels": [asdict(label) for label in sorted(labels)]})


def parse_labels(data: bytes, where: str) -> frozenset[Label]:
    """The labels in a file; `DamagedError` for what is no JSON or no labels, `ForeignError` for another format or version."""
    found = set()
    for number, entry in enumerate(parse_entries(data, where), start=1):
        if odd := sorted(set(entry) - set(KINDS)):
            named = ", ".join(shown(name) for name in odd[:3]) + (f" and {len(odd) - 3:,} more" if odd[3:] else "")
            raise DamagedError(f"{where}, label {number} has {named}, expected {', '.join(KINDS)} only: {START_ANEW}")
        found.add(label_of(entry, number, where))
    return frozenset(found)


def parse_entries(data: bytes, where: str, remedy: str = START_ANEW) -> list[dict[str, Any]]:
    """The objects under `labels` of a file of our format, unread; errors as for `parse_labels`, which say what to do."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON any more ({error}): {remedy}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ForeignError(f"{where} is no label file of ours, whose format is {FORMAT!r}: {remedy}")
    if (content["format"], content.get("version")) != (FORMAT, VERSION):
        raise ForeignError(
            f"{where} holds {shown(content['format'])} version {shown(content.get('version'))}, this Granary reads "
            f"{FORMAT!r} version {VERSION}: use the version that wrote it, or {remedy}"
        )
    entries = content.get("labels")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DamagedError(f"{where} holds no list of labels: {remedy}")
    return entries


def label_of(entry: Mapping[str, Any], number: int, where: str, remedy: str = START_ANEW) -> Label:
    """The label that an object says; `DamagedError` names the entry, and says what to do."""
    for name, kind in KINDS.items():
        if name not in entry:
            raise DamagedError(f"{where}, label {number} has no {name}: {remedy}")
        if type(entry[name]) is not kind:
            expected = "a whole number" if kind is int else "a text"
            raise DamagedError(
                f"{where}, label {number}: {name} is {shown(entry[name])}, expected {expected}: {remedy}"
            )
    try:
        return Label(**{name: entry[name] for name in KINDS})
    except ValueError as error:
        raise DamagedError(f"{where}, label {number}: {error}. {remedy[:1].upper()}{remedy[1:]}") from None


def read_labels(path: Path) -> frozenset[Label]:
    """The labels in a file of this machine, none where there is no file; errors as for `parse_labels`."""
    try:
        return parse_labels(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except IsADirectoryError:
        raise folder_instead(str(path)) from None


def folder_instead(where: str) -> ForeignError:
    """What is said of a folder that has the name of a label file."""
    return ForeignError(f"{where} is a folder, and labels lie in a file of that name: move it away, or rename it")


def note_leftover(path: Path) -> None:
    """Print that labels lie there already, where a dictionary is about to be made whose features they would name."""
    try:
        found = many(len(read_labels(path)), "label")
    except StoreError:
        found = "something that holds no labels that can be read"
    print(
        f"note: {path} is there from before, with {found}: what it says will name the features of the new dictionary; "
        "move it away unless that will be the same dictionary"
    )


class Added(NamedTuple):
    """What came of adding labels to a file."""

    labels: frozenset[Label]
    """all that the file holds"""
    new: int
    """how many were not there before"""


def add_labels(path: Path, labels: Iterable[Label]) -> Added:
    """Add labels to a file; of any number of writers at once none loses anything, and each label is new to one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        there = read_labels(path)  # again: another may have written since the caller looked
        found = there | frozenset(labels)
        if found != there:
            write_bytes(path, labels_bytes(found))
    return Added(found, len(found) - len(there))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, nobody else adds labels in this folder.  The kernel frees the lock however its holder ends; no file is left."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems lock no folders
            print(f"note: {folder} cannot be locked ({error.strerror}): let one at a time write labels there")
        yield
    finally:
        os.close(opened)
