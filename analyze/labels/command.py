"""`python -m analyze label --dictionaries DIR [img_3/12 ["red circles"]]`: what features are called, edited and listed.

Labels of several dictionaries lie in one file where they travel by hand (`--export`, `--merge`, the report's page):

    {"format": "granary labels", "version": 1, "labels": [{"dictionary": "img_3", "feature": 12, "text", "author", "time"}, …]}

where `dictionary` is the site, or the dictionary's own name (`sae_img_3`), which it must be where a site has several.
"""

import getpass
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from analyze.labels.book import LabelBook
from analyze.labels.settings import LabelSettings
from store.errors import StoreError, UsageError
from store.files import json_bytes, write_bytes
from store.labels import FEATURES, FORMAT, LONGEST, VERSION, Label, label_of, parse_entries, shown
from train.dictionaries.collection import outline_dictionaries
from train.dictionaries.hub import on_hub

STREAM = "-"
"""standard input, or output"""
EXPORT_AGAIN = "write it again with --export or from the report's page, or mend it by hand; nothing was merged"

Books = dict[str, LabelBook]
"""the labels of every dictionary, by its name"""


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def run(settings: LabelSettings, clock: Callable[[], datetime] = now) -> Books:
    """The label books of all dictionaries, after what was asked for was done; `clock` says what time it is.

    Errors: `UsageError` for a feature or a dictionary that is not there, `DamagedError` or `ForeignError` for a label file that
    cannot be read; nothing is written then.
    """
    writes = settings.text is not None or settings.remove or settings.merge is not None
    if writes and on_hub(settings.dictionaries):
        raise UsageError(
            f"{settings.dictionaries} lies on the hub, where nobody keeps what is written into its cache: download it with "
            "`hf download … --local-dir DIR`, label that folder, and upload its label files"
        )
    books = books_of(settings.dictionaries)
    if settings.merge is not None:
        _merge(books, settings.merge)
    elif settings.export is not None:
        _export(books, settings.export, settings.dictionaries)
    elif settings.feature is None:
        _list(books)
    elif "/" not in settings.feature and not writes:
        name = dictionary_named(books, settings.feature)
        _list({name: books[name]})
    else:
        _one(books, settings, clock)
    return books


def books_of(dictionaries: Path) -> Books:
    """The labels of every dictionary of a folder, by the dictionary's name (`transcoder_img_3`); no weights are read."""
    found = outline_dictionaries(dictionaries)
    return {d.name: LabelBook.of(d.place, int(d.config.n_features)) for d in found if d.place is not None}


def dictionary_named(books: Books, said: str) -> str:
    """The dictionary that `img_3`, or `transcoder_img_3`, names; `UsageError` lists what there is."""
    fitting = [name for name in books if said in (name, name.split("_", 1)[1])]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UsageError(f"{said} has {len(fitting)} dictionaries here: say which, {' or '.join(fitting)}")
    name = said if len(said) <= LONGEST else shown(said)
    raise UsageError(f"there is no dictionary {name} here; there are {', '.join(books)}")


def _one(books: Books, settings: LabelSettings, clock: Callable[[], datetime]) -> None:
    assert settings.feature is not None
    said, _, number = settings.feature.rpartition("/")
    if not said or not number.isdecimal() or not number.isascii() or len(number.lstrip("0")) > len(str(FEATURES)):
        asked = settings.feature if len(settings.feature) <= LONGEST else shown(settings.feature)
        raise UsageError(f"{asked} names no feature: expected a dictionary and a number, such as img_3/12")
    name, feature = dictionary_named(books, said), int(number)
    book = books[name]
    if book.n_features is not None and feature >= book.n_features:
        raise UsageError(f"{name} has no feature {feature}: it has 0 to {book.n_features - 1}")
    before = book.text(feature)
    if settings.text is None and not settings.remove:
        for label in book.labels:
            if label.feature == feature:
                print(f"{label.time}  {label.author}: {label.text or '(label removed)'}")
        print(f"{said}/{feature} has no label" if before is None else f"{said}/{feature} · {before}")
        return
    if settings.remove and before is None:
        raise UsageError(f"{said}/{feature} has no label: there is nothing to remove")
    book.set(feature, "" if settings.text is None else settings.text.strip(), author_of(settings), clock())
    book.save()
    text = book.text(feature)
    was = f" (it was {before!r})" if before not in (None, text) else ""
    print(f"{said}/{feature} " + ("has no label any more" if text is None else f"· {text}") + f"{was} -> {book.path}")


def author_of(settings: LabelSettings) -> str:
    """Who labels: the one named, or who git says works here, or the name of the account."""
    if settings.author is not None:
        return settings.author.strip()
    try:
        asked = ["git", "config", "user.name"]
        name = subprocess.run(asked, capture_output=True, timeout=10, check=False).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        name = ""
    name = " ".join(name.split())
    if not 0 < len(name) <= LONGEST:
        try:
            name = getpass.getuser()
        except (OSError, KeyError):  # an account without a name, as containers have
            name = ""
    if not name:
        raise UsageError("nobody knows who you are: say --author NAME, or git config user.name NAME")
    return name


def _list(books: Books) -> None:
    shown = {name: book.texts() for name, book in books.items()}
    for name, texts in shown.items():
        last = {label.feature: label for label in books[name].labels}
        for feature, text in sorted(texts.items()):
            print(f"{name}/{feature} · {text}   ({last[feature].author}, {last[feature].time})")
    total = sum(map(len, shown.values()))
    print(f"labels: {total} features of {len(books)} dictionaries have one" if total else "labels: there are none yet")


def _merge(books: Books, source: Path) -> None:
    where = "standard input" if str(source) == STREAM else str(source)
    found = parse_transported(_read(source), where, books)
    added = {name: books[name].merge(labels) for name, labels in found.items()}  # all are checked before one is written
    added = {name: books[name].save() if count else 0 for name, count in added.items()}
    total = sum(len(labels) for labels in found.values())
    print(f"labels: {sum(added.values())} of {total} in {where} are new; they lie beside {len(added)} dictionaries")


def parse_transported(data: bytes, where: str, books: Books) -> Mapping[str, list[Label]]:
    """The labels of a file that `--export` or the report's page wrote, by the name of the dictionary.

    A label file of one dictionary is read as well where there is one dictionary only.
    """
    found: dict[str, list[Label]] = {}
    for number, entry in enumerate(parse_entries(data, where, EXPORT_AGAIN), start=1):
        said = entry.get("dictionary")
        if said is None and len(books) > 1:
            raise UsageError(
                f"{where}, label {number} does not say which dictionary it belongs to, and there are {', '.join(books)}: "
                "name the folder of one dictionary with --dictionaries"
            )
        name = next(iter(books)) if said is None else dictionary_named(books, str(said))
        found.setdefault(name, []).append(label_of(entry, number, where, EXPORT_AGAIN))
    return found


def _read(source: Path) -> bytes:
    if str(source) == STREAM:
        return sys.stdin.buffer.read()
    try:
        return source.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {source}: --merge reads what the report's page or --export wrote") from None


def _export(books: Books, target: Path, dictionaries: Path) -> None:
    entries = [{"dictionary": name, **asdict(label)} for name, book in books.items() for label in book.labels]
    content = json_bytes({"format": FORMAT, "version": VERSION, "labels": entries})
    if str(target) == STREAM:
        sys.stdout.write(content.decode())
        return
    if target.is_dir():
        raise UsageError(f"--export {target} is a folder: name a file in it")
    if target.resolve().is_relative_to(dictionaries.resolve()):
        raise UsageError(
            f"--export {target} lies among the dictionaries of {dictionaries}: name a file beside that folder"
        )
    if target.exists() and not _is_transported(target):
        raise UsageError(f"--export {target} exists and is no such export: choose another name, or remove it")
    write_bytes(target, content)
    print(f"labels: {len(entries)} of {len(books)} dictionaries -> {target}")


def _is_transported(path: Path) -> bool:
    """Whether a file holds nothing but labels that each say their dictionary: an older export, which may be written over."""
    try:
        entries = parse_entries(path.read_bytes(), str(path))
        for number, entry in enumerate(entries, start=1):
            label_of(entry, number, str(path))
    except (StoreError, OSError):
        return False
    return all(isinstance(entry.get("dictionary"), str) for entry in entries)
