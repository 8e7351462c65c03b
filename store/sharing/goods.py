"""Packs, dictionaries, score matrices and analyses as files to be copied, the same way as stores.

They have no commits.  So a push writes, last, `granary-files.json`: what it is, and every file with length and SHA-256; a
pull reads that list, where listing a folder may be impossible, and writes last whatever makes the folder look whole.

The label file of a dictionary goes along and is on no list: people add to it at either end, and neither the dictionary nor
its name changes.  At the target it is merged with the one that is there (`store.labels`), and never put in its place.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from store import labels, layout
from store.errors import DamagedError, ForeignError, MismatchError, UnfinishedError, UnreachableError, UsageError
from store.files import READ_BLOCK, is_temporary, json_bytes, parse_self_checked, read_self_checked, self_checked
from store.labels import Label
from store.places import Place
from store.shards import LIST, MANIFEST, open_pack
from store.sharing.cargo import Batch, Cargo, File

FORMAT, VERSION = "granary files", 1
CONFIG, RESUME = "config.json", "resume.safetensors"
SWEEP = "sweep.json"
"""beside dictionaries, where train leaves a table and pictures of them: what those files are"""
RUN = "run.json"
ANALYSIS, SCORES = "granary analysis", "granary score matrix"
Entry = dict[str, Any]

QUESTIONS = 8
"""label files that are asked for at once"""
WRITINGS = 5
"""how often labels are written to a server where others write them at the same moment"""
KINDS = "a store, a pack, a dictionary, a folder of dictionaries, a score matrix, a folder of them, or an analysis"


class Goods(Cargo):
    """A folder of ours that is not a store: one batch, and what makes it look whole."""

    replaces = False

    def __init__(self, source: Place, kind: str, files: Mapping[str, Entry], with_list: bool) -> None:
        """`with_list` writes `granary-files.json` at the target."""
        self.source, self.kind, self.files = source, kind, dict(sorted(files.items()))
        content = {"format": FORMAT, "version": VERSION, "kind": kind, "files": self.files}
        self.list = File.of(LIST, json_bytes(self_checked(content)))
        self.name = f"{kind} sha256-{self_checked(content)['sha256']}"
        self.n_batches, self._with_list = 1, with_list
        self._last = {name for name in self.files if _makes_whole(kind, name)}
        folders = [name.removesuffix(CONFIG) for name in self._last if kind.startswith("dictionar")]
        self.label_files = tuple(sorted(folder + labels.FILE for folder in folders))
        """where labels may lie, one file a dictionary; none of them in `files`"""

    def sizes(self, batch: int) -> tuple[int, int]:
        return sum(entry["bytes"] for entry in self.files.values()), len(self.files)

    def batch(self, batch: int) -> Batch:
        return Batch(tuple(self._file(name) for name in self.files if name not in self._last), None)

    def last(self) -> tuple[File, ...]:
        whole = tuple(self._file(name) for name in sorted(self._last))
        return (*whole, self.list) if self._with_list else whole

    def read_labels(self, place: Place) -> dict[str, frozenset[Label]]:
        """The labels that lie at a place, by file; `DamagedError`, `ForeignError` for a file that holds none of ours."""
        with ThreadPoolExecutor(QUESTIONS) as pool:
            found = zip(self.label_files, pool.map(partial(_read_labels, place), self.label_files), strict=True)
        return {name: labels.parse_labels(data, place.where(name)) for name, data in found if data is not None}

    def merge_labels(self, target: Place) -> int:
        """Add the labels of the source to those at the target; how many were new there."""
        found = self.read_labels(self.source)
        return sum(_add_labels(target, name, new) for name, new in found.items() if new)

    def _file(self, name: str) -> File:
        return File(name, self.files[name]["bytes"], self.files[name]["sha256"], name)


def goods_at(source: Place, with_list: bool) -> Goods:
    """What lies at a place that is not a store.

    Errors: `UsageError` where nothing of ours is, `UnfinishedError`, `DamagedError` where it differs from its own checksums.
    """
    try:
        data = source.read(LIST)
    except (FileNotFoundError, NotADirectoryError):
        data = None
    if data is not None:
        found = parse_self_checked(data, source.where(LIST))
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION) or not _are_entries(found.get("files")):
            raise ForeignError(
                f"{source.where(LIST)} is of another version than this Granary reads ({FORMAT} {VERSION})"
            )
        return _without_labels(Goods(source, str(found["kind"]), found["files"], with_list), source.where(LIST))
    if source.local is None:
        raise UsageError(
            f"there is nothing of Granary at {source}: neither {layout.ROOT} of a store nor {LIST} of a push"
        )
    if not source.local.is_dir():
        raise UsageError(f"there is no folder {source}")
    kind = kind_of(source.local)
    if kind is None:
        raise ForeignError(f"{source} is nothing that travels: it is not {KINDS}. What others made, import first.")
    return _without_labels(Goods(source, kind, _entries(source.local, kind), with_list), str(source))


def _without_labels(goods: Goods, where: str) -> Goods:
    """The same goods; `ForeignError` where a label file is among the files, which would be put in the place of another."""
    if listed := [name for name in goods.label_files if name in goods.files]:
        raise ForeignError(
            f"{where} lists {listed[0]}, and labels are on no list, because they are merged: it was not written by Granary"
        )
    return goods


def kind_of(folder: Path) -> str | None:
    """`pack`, `dictionary`, `score matrix`, `analysis`, or the plural for a folder of the same; None for what is not ours."""
    if (folder / MANIFEST).exists():
        return "pack"
    if (folder / CONFIG).exists() or (folder / RESUME).exists():
        return "dictionary"
    if _json(folder / RUN).get("format") == ANALYSIS:
        return "analysis"
    if _json(folder / layout.ROOT).get("attributes", {}).get("format") == SCORES:
        return "score matrix"
    listed = _json(folder / SWEEP).get("files")
    beside = {SWEEP, *(name.split("/")[0] for name in (listed if isinstance(listed, dict) else ()))}
    inside = [each for each in sorted(folder.iterdir()) if not is_temporary(each) and each.name not in beside]
    kinds = {kind_of(each) if each.is_dir() else None for each in inside}
    if kinds and kinds <= {"dictionary", "dictionaries"}:  # a sweep has a folder for each setting
        return "dictionaries"
    plural = {"score matrix": "score matrices", "score matrices": "score matrices"}
    return plural.get(next(iter(kinds)) or "") if len(kinds) == 1 else None


def _add_labels(target: Place, name: str, new: frozenset[Label]) -> int:
    """Add labels to a file at the target; how many were new.

    On a server there is no lock: the file is written, then read again, and written once more where another push came
    between.  What such a push still overwrites is at its own source, and is merged again by the next push.
    """
    if target.local is not None:
        return labels.add_labels(target.local / name, new).new
    missing = None
    for _ in range(WRITINGS):
        data = _read(target.read, name)
        there = frozenset() if data is None else labels.parse_labels(data, target.where(name))
        missing = len(new - there) if missing is None else missing
        if new <= there:
            return missing
        with contextlib.suppress(MismatchError):  # another push made the file meanwhile: merge with it
            target.write(name, labels.labels_bytes(there | new), create_only=data is None)
    raise UnreachableError(
        f"{target.where(name)} is overwritten again and again by others: run the same command again when they are done"
    )


def _makes_whole(kind: str, name: str) -> bool:
    """Whether a folder of that kind looks finished by this file."""
    last = name.rpartition("/")[2]
    if kind == "pack":
        return name == MANIFEST
    if kind in ("dictionary", "dictionaries"):
        return last == CONFIG
    if kind == "analysis":
        return name == RUN
    return last == layout.ROOT and not name.endswith((f"scores/{layout.ROOT}", f"argmax_token/{layout.ROOT}"))


def _entries(folder: Path, kind: str) -> dict[str, Entry]:
    """Every file that travels, with length and SHA-256; `DamagedError` for one that differs from a checksum of its own."""
    if kind == "pack":
        return _of_pack(folder)
    if kind == "dictionary":
        return _of_dictionary(folder)
    if kind == "dictionaries":
        return _of_dictionaries(folder)
    return {str(path.relative_to(folder)): _hashed(path) for path in _walk(folder)}


def _of_pack(folder: Path) -> dict[str, Entry]:
    pack = open_pack(folder)
    pack.verify()
    return {name: _hashed(folder / name) for name in (*pack.files, MANIFEST)}


def _of_dictionaries(folder: Path) -> dict[str, Entry]:
    """The files of the dictionaries in a folder and in the folders in it, and what train left beside them."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.iterdir()):
        kind = kind_of(path) if path.is_dir() else None
        if kind in ("dictionary", "dictionaries"):
            found |= {f"{path.name}/{name}": entry for name, entry in _entries(path, kind).items()}
    if (folder / SWEEP).exists():
        found |= _listed(folder, SWEEP, "run the same train command again, it writes it anew")
    return found


def _of_dictionary(folder: Path) -> dict[str, Entry]:
    if not (folder / CONFIG).exists() and (folder / RESUME).exists():
        raise UnfinishedError(f"{folder} did not finish training: run the same train command again, then push it")
    return _listed(folder, CONFIG, "train or import it again")


def _listed(folder: Path, index: str, remedy: str) -> dict[str, Entry]:
    """The files that a list with checksums names, and the list; `DamagedError` for one that differs."""
    listed: dict[str, Entry] = read_self_checked(folder / index).get("files") or {}
    if not _are_entries(listed):
        raise ForeignError(f"{folder / index} is none of ours: it lists no files")
    found = {name: _hashed(folder / name) for name in (*listed, index)}
    for name, entry in listed.items():
        if {key: entry[key] for key in ("bytes", "sha256")} != found[name]:
            raise DamagedError(f"{folder / name} differs from the checksum in {index}: {remedy}")
    return found


def _hashed(path: Path) -> Entry:
    digest, length = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BLOCK):
                digest.update(block)
                length += len(block)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    return {"bytes": length, "sha256": digest.hexdigest()}


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, but what a killed process left half-written."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_temporary(path):
            yield from _walk(path)
        elif path.is_file() and not is_temporary(path):
            yield path


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _are_entries(found: object) -> bool:
    """Whether something has the form {name: {bytes, sha256}}, with names that stay inside a folder."""
    return (
        isinstance(found, dict)
        and bool(found)
        and all(
            isinstance(e, dict) and type(e.get("bytes")) is int and isinstance(e.get("sha256"), str)
            for e in found.values()
        )
        and all(isinstance(name, str) and not name.startswith("/") and ".." not in name.split("/") for name in found)
    )


def refuse_other_goods(goods: Goods, target: Place) -> None:
    """`MismatchError` or `UsageError` when something else lies at the target; what is there of the same is fine."""
    there = _read(target.read, LIST)
    if there is not None and there != goods.list.source:
        other = parse_self_checked(there, target.where(LIST))
        raise MismatchError(
            f"{target} holds {other.get('kind')} sha256-{other['sha256']}, and this is {goods.name}: choose another target"
        )
    if layout.ROOT not in goods.files and _read(target.read, layout.ROOT) is not None:
        raise UsageError(f"{target} holds a store or a Zarr group, and this is a {goods.kind}: choose another target")
    if target.local is not None and target.local.exists():
        if not target.local.is_dir():
            raise UsageError(f"{target} is a file: choose another folder")
        known = {*goods.files, *goods.label_files, LIST}
        odd = [path for path in _walk(target.local) if str(path.relative_to(target.local)) not in known]
        if odd:
            raise UsageError(f"{target} holds other files ({odd[0].relative_to(target.local)}): choose another folder")


def _read(read: Callable[[str], bytes], name: str) -> bytes | None:
    try:
        return read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_labels(place: Place, name: str) -> bytes | None:
    try:
        return _read(place.read, name)
    except IsADirectoryError:
        raise labels.folder_instead(place.where(name)) from None
