"""A user's own truth about images: a CSV file of which image shows what.

    image,cat,colour:red        one column an attribute
    0,1,0
    7,0,                        empty: not known, so image 7 says nothing about red

    image,attribute,value       or one row an image and attribute
    0,cat,1

`group:value` puts an attribute into a group, others are in the group `attribute`.  A column `group` is no attribute: images of
equal group belong together (those of one prompt, one scene, one photographer) and never stand in different halves.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from analyze.truth.attributes import Attribute
from store.errors import UsageError

YES, NO = ("1", "true", "yes"), ("0", "false", "no")
LONG = {"image", "attribute", "value"}
GROUP = "group"
OWN_GROUP = "attribute"


@dataclass(frozen=True)
class OwnTruth:
    """What a file says of the images of a store."""

    attributes: tuple[Attribute, ...]
    shown: Bool[np.ndarray, "image attribute"]
    known: Bool[np.ndarray, "image attribute"]
    """whether the file says it"""
    groups: dict[int, str] | None
    """the group of every image that has one; None for a file without that column"""


def read_attributes(path: Path, n_images: int) -> OwnTruth:
    """The attributes of a file, whether each image of the store shows each, and which images belong together.

    `UsageError` with the line for an image that the store has not, a value that is neither yes nor no, two answers or two groups.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--attributes {path} cannot be read as CSV: {error}") from None
    head = [name.strip() for name in lines[0]] if lines else []
    if "image" not in head or len(set(head) - {GROUP}) < 2 or len(set(head)) < len(head) or "" in head:
        raise UsageError(
            f"{path} has the columns {', '.join(head) or '(none)'}: expected image and one column an attribute, each once, "
            "or image,attribute,value; a column group may stand beside them"
        )
    answers: dict[tuple[str, int], bool] = {}
    groups: dict[int, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(head):
            raise UsageError(f"{path}, line {number}: {len(line)} cells where the header has {len(head)}")
        row = dict(zip(head, map(str.strip, line), strict=True))
        image = _image(row.pop("image"), n_images, f"{path}, line {number}")
        group = row.pop(GROUP, "")
        if group and groups.setdefault(image, group) != group:
            raise UsageError(
                f"{path}, line {number}: image {image} is in group {group!r}, and was in {groups[image]!r}"
            )
        told = {row["attribute"]: row["value"]} if set(head) - {GROUP} == LONG else row
        for name, value in told.items():
            _answer(answers, name, image, value, f"{path}, line {number}")
    if not answers:
        raise UsageError(f"{path} answers nothing: every row says of an image whether it shows an attribute, 1 or 0")
    return OwnTruth(*_arrays(answers, n_images), groups if GROUP in head else None)


def _image(text: str, n_images: int, where: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"{where}: {text!r} is no image: expected its number in the store")
    if int(text) >= n_images:
        raise UsageError(f"{where}: there is no image {text}: the store has 0 to {n_images - 1}")
    return int(text)


def _answer(answers: dict[tuple[str, int], bool], name: str, image: int, value: str, where: str) -> None:
    if value.lower() not in (*YES, *NO, ""):
        raise UsageError(f"{where}: {name} is {value!r}: expected 1 or 0, or nothing where it is not known")
    if not name:
        raise UsageError(f"{where}: the attribute has no name")
    if value:
        known = answers.setdefault((name, image), value.lower() in YES)
        if known != (value.lower() in YES):
            raise UsageError(f"{where}: image {image} was said to be the opposite of {name} = {value} before")


def _arrays(
    answers: dict[tuple[str, int], bool], n_images: int
) -> tuple[tuple[Attribute, ...], Bool[np.ndarray, "image attribute"], Bool[np.ndarray, "image attribute"]]:
    names = list(dict.fromkeys(name for name, _ in answers))
    shown, known = np.zeros((n_images, len(names)), bool), np.zeros((n_images, len(names)), bool)
    place = {name: number for number, name in enumerate(names)}
    for (name, image), yes in answers.items():
        shown[image, place[name]], known[image, place[name]] = yes, True
    return tuple(_attributes(names)), shown, known


def _attributes(names: Iterable[str]) -> Iterable[Attribute]:
    for name in names:
        group, separator, value = name.partition(":")
        yield Attribute(group.strip(), value.strip()) if separator and group and value else Attribute(OWN_GROUP, name)
