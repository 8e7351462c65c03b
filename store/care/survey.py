"""What a store's small files say: seal, record of creation, metadata, commits; which can be trusted, and what they promise.

1. The seal vouches for every commit, the record of creation among them.  Without a whole seal each vouches for itself.
2. The record vouches for the metadata.  Without it they must agree with the commits: all carry one origin.
3. A commit says which files its part has, and of what length and checksum.

Nothing here reads a chunk, or stops at the first thing that is wrong.
"""

import contextlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from store import layout
from store.care.checking import Entry, differs, entry_of, in_parallel, refused
from store.care.findings import Finding, Kind, costs_of, spans
from store.errors import DamagedError, StoreError
from store.files import json_bytes, parse_self_checked, self_checked, sha256_bytes
from store.format import StoreMeta, metadata_files, numbered_files, part_files, part_name
from store.leases import Leases
from store.metadata import documents
from store.opening import read_meta
from store.places import Place
from store.traces import parse_trace_file, part_of_trace, says_replay, trace_files

RECORD = PurePosixPath(layout.STORE_COMMIT).stem
BROKEN_JSON = (StoreError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""what a changed byte can make of reading JSON and the metadata in it"""
PARTS_MOST = 10**7
"""a number above it is no number of parts but damage, and nobody shall look for so many commits"""
NOT_ITS_OWN = "does not have the checksum that it carries: it was damaged or edited"
NOT_SUCH = "does not say what such a file of this store says: it was damaged or edited"
UNSEALED = "differs from what the seal names: it was damaged"
EXCHANGED = "is whole, but not the one that the seal names: it was exchanged"
LOST = "is missing from a finished store: it was lost, not left to be made"
CREATION = "its creation, or its extension, did not end"

_NUMBERED = re.compile(r"((?:.*/)?(?:c\.|part-))(\d+)(\..*)")


class Survey:
    """The small files of a store, read and judged; `findings` is what is wrong with them.

    `choose` says which files are to be read later, of which the bytes are counted; without `commits` those of parts are not
    read.  Errors: `ForeignError` and `DamagedError` where nothing of a store of ours can be found.
    """

    def __init__(
        self, place: Place, threads: int, choose: Callable[[str], bool] = lambda name: True, commits: bool = True
    ) -> None:
        self.place, self.threads, self._choose = place, threads, choose
        self.findings: list[Finding] = []
        self.meta: StoreMeta | None = None
        """the metadata, where they can be trusted"""
        self.sealed: dict[str, str] | None = None
        """SHA-256 of each commit, by the stem of its name: what a whole seal says"""
        self.id: str | None = None
        """the store's content id, where the seal is whole"""
        self.created: dict[str, Any] | None = None
        """the record of creation, where it is whole"""
        self.origin: str | None = None
        self.committed: dict[int, tuple[str, int]] = {}
        """the parts whose commit is whole: its SHA-256, and the bytes of its files"""
        self.absent: list[int] = []
        """the parts that have no commit"""
        self._images: dict[int, tuple[int, int]] = {}
        self._refused: set[str] = set()

        seal, record, root = (self._read(name) for name in (layout.SEAL, layout.STORE_COMMIT, layout.ROOT))
        self.was_sealed = seal is not None or layout.SEAL in self._refused
        """whether a seal is there, whole or not: the store was finished"""
        self.was_created = record is not None or layout.STORE_COMMIT in self._refused
        self._judge_seal(seal)
        self._judge_record(record)
        self._judge_root(root)
        self.n_parts = self._count_parts()
        if not (self.was_sealed or self.was_created or self.n_parts or (root is None and self._was_begun())):
            read_meta(place)  # says what there is instead of a store
        if commits:
            self._judge_commits()
            self._judge_origins()
            self._judge_state()

    def images_of(self, part: int | None) -> tuple[int, int] | None:
        """First and last image of a part; None where that cannot be known."""
        if part is None:
            return None
        if self.meta is not None and part < self.meta.n_parts:
            images = self.meta.part_images(part)
            return images.start, images.stop - 1
        return self._images.get(part)

    def files_of(self, part: int) -> dict[str, Entry]:
        """The files of a part whose commit is whole."""
        data = self._read(layout.part_commit(part), part)
        if data is None or sha256_bytes(data) != self.committed[part][0]:
            raise DamagedError(f"{self.place.where(layout.part_commit(part))} changed meanwhile: run the command again")
        files: dict[str, Entry] = json.loads(data)["files"]
        return files

    @cached_property
    def created_files(self) -> dict[str, Entry]:
        """What creation wrote, weights included, as far as it can be checked."""
        if self.created is not None:
            files: dict[str, Entry] = self.created["files"]
            return files
        if self.meta is None or not (self.was_sealed or self.was_created):
            return {}
        record = self.record()
        if record is not None and self.sealed is not None and sha256_bytes(record) == self.sealed[RECORD]:
            whole: dict[str, Entry] = json.loads(record)["files"]
            return whole
        made: dict[str, Entry] = {name: entry_of(data) for name, data in documents(self.meta).items()}
        return made | {f"weights/{name}": {} for name in self.meta.weights_held}

    def record(self) -> bytes | None:
        """The record of creation made again from the files that it lists; None when one of them cannot be read."""
        if self.meta is None:
            return None
        names = (*metadata_files(self.meta), *(f"weights/{name}" for name in self.meta.weights_held))
        try:
            files = {name: entry_of(self.place.read(name)) for name in sorted(names)}
        except OSError:
            return None
        content = {"files": files, "origin": self.meta.origin, "parts": self.meta.n_parts}
        return json_bytes(self_checked(content))

    def part_of(self, name: str) -> int | None:
        """The part that a file belongs to by its name, committed or not; None for what no part has."""
        pattern, part = _numbered(name)
        if pattern in self.patterns and part < self.n_parts:
            return part
        return part_of_trace(name, self.meta, self._images)

    def names_of(self, part: int) -> list[str]:
        """The files that a part has, its commit aside; nothing where no name can be known."""
        numbered = (name.replace("c.#", f"c.{part}").replace("part-#", part_name(part)) for name in self.patterns)
        traces = trace_files(self.meta, self.meta.part_images(part)) if self.meta is not None else []
        return sorted({*numbered, *traces} - {layout.part_commit(part)})

    @cached_property
    def patterns(self) -> set[str]:
        """The names of a part's files without its number, traces left out; empty where neither metadata nor any commit says them."""
        names: Iterable[str] = ()
        if self.meta is not None:
            names = numbered_files(self.meta, 0)
        elif self.committed:
            names = self.files_of(next(iter(self.committed)))
        found = {_numbered(name)[0] for name in names if parse_trace_file(name) is None}
        return found | {_numbered(layout.part_commit(0))[0]} if found else found

    @cached_property
    def writers(self) -> dict[str, str]:
        """Who is writing now: the name of each lease that a living process holds, and that process."""
        if self.place.local is None or self.sealed is not None:
            return {}
        leases = Leases(layout.runs_folder(self.place.local) / "leases")
        names = ("create", "seal", *map(part_name, self.absent))
        with contextlib.suppress(OSError):  # a file system that can only be read has no writers
            return {name: holder for name in names if (holder := leases.holder(name)) is not None}
        return {}

    def finding(self, kind: Kind, name: str, detail: str, part: int | None = None) -> Finding:
        """A finding of a file of this store, with what it costs."""
        return Finding(kind, name, part, detail, costs_of(name, self.meta, self.images_of(part)))

    def _found(self, kind: Kind, name: str, detail: str, part: int | None = None) -> None:
        self.findings.append(self.finding(kind, name, detail, part))

    def _read(self, name: str, part: int | None = None) -> bytes | None:
        try:
            return self.place.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._refused.add(name)
            kind, detail = refused(error)
            self._found(kind, name, detail, part)
            return None

    def _judge_seal(self, data: bytes | None) -> None:
        if data is None:
            return
        try:
            content = parse_self_checked(data, layout.SEAL)
            sealed = content["commits"]
            names = [RECORD, *(part_name(part) for part in range(len(sealed) - 1))]
            if set(sealed) != set(names) or not all(map(_is_hash, sealed.values())):
                raise ValueError("names")
        except BROKEN_JSON:
            self._found("damaged", layout.SEAL, NOT_ITS_OWN)
            return
        self.sealed, self.id = sealed, f"sha256-{content['sha256']}"

    def _judge_record(self, data: bytes | None) -> None:
        if data is None:
            if self.was_sealed and layout.STORE_COMMIT not in self._refused:
                self._found("missing", layout.STORE_COMMIT, LOST)
            return
        content = self._commit_content(layout.STORE_COMMIT, data, None)
        if content is None:
            return
        parts = content.get("parts")
        if type(parts) is not int or not 1 <= parts <= PARTS_MOST or layout.ROOT not in content["files"]:
            self._found("damaged", layout.STORE_COMMIT, NOT_SUCH)
            return
        self.created, self.origin = content, content["origin"]

    def _judge_root(self, data: bytes | None) -> None:
        if data is None:
            if layout.ROOT not in self._refused and (self.was_created or self.was_sealed):
                self._found("missing", layout.ROOT, "is missing")
            return
        if self.created is not None:
            detail = differs(data, self.created["files"][layout.ROOT])
            if detail is not None:
                self._found("damaged", layout.ROOT, detail)
                return
        try:
            meta = read_meta(self.place)
            if meta.origin and meta.n_parts > PARTS_MOST:
                raise ValueError(f"{meta.n_parts} parts")
        except BROKEN_JSON as error:
            if self.created is not None and isinstance(error, StoreError):
                raise  # it is what was written: of another version
            self._found("damaged", layout.ROOT, "does not hold the metadata of a store any more")
            return
        self.meta = meta

    def _count_parts(self) -> int:
        if self.sealed is not None:
            return len(self.sealed) - 1
        if self.created is not None:
            return int(self.created["parts"])
        if self.meta is not None:
            return self.meta.n_parts
        if self.place.local is not None:  # only the names are left to count by
            names = (file.name for file in (self.place.local / "commits").glob("part-*.json"))
            found = [_numbered(f"commits/{name}") for name in names]
            return 1 + max((part for pattern, part in found if pattern), default=-1)
        part = 0
        while self.place.exists(layout.part_commit(part)):
            part += 1
        return part

    def _was_begun(self) -> bool:
        """Whether a folder without any of the small files is a store whose files were lost, as `harvest` sees it too."""
        return self.place.local is not None and (self.place.local / "commits").is_dir()

    def _judge_commits(self) -> None:
        def read(part: int) -> tuple[int, bytes | None]:
            return part, self._read(layout.part_commit(part), part)

        self._origins: dict[int, str] = {}
        for part, data in in_parallel(read, range(self.n_parts), self.threads):
            name = layout.part_commit(part)
            if data is None:
                if name not in self._refused:
                    self.absent.append(part)
                continue
            content = self._commit_content(name, data, part)
            if content is None:
                continue
            self._origins[part] = content["origin"]
            self._images[part] = content["images"][0], content["images"][1] - 1
            total = sum(entry["bytes"] for each, entry in content["files"].items() if self._choose(each))
            self.committed[part] = sha256_bytes(data), total

    def _commit_content(self, name: str, data: bytes, part: int | None) -> dict[str, Any] | None:
        """A commit that is what the seal or its own checksum says, and lists what it should; else None, and a finding."""
        vouched = self.sealed is not None and sha256_bytes(data) == self.sealed[PurePosixPath(name).stem]
        try:
            content = json.loads(data) if vouched else parse_self_checked(data, name)
        except BROKEN_JSON:
            content = None
        if content is not None and self.sealed is not None and not vouched:
            if self.origin in (None, content.get("origin")):
                self._found("damaged", name, EXCHANGED, part)
            else:
                self._found("other-run", name, _of_another(content.get("origin"), self.origin), part)
        elif content is None:
            self._found("damaged", name, NOT_ITS_OWN if self.sealed is None else UNSEALED, part)
        elif not self._is_commit(content, part):
            self._found("damaged", name, NOT_SUCH, part)
        else:
            return dict(content)
        return None

    def _is_commit(self, content: object, part: int | None) -> bool:
        files = content.get("files") if isinstance(content, dict) else None
        if not isinstance(content, dict) or not isinstance(content.get("origin"), str) or not isinstance(files, dict):
            return False
        if not all(_is_entry(name, entry) for name, entry in files.items()):
            return False
        if part is None:
            return True
        images = content.get("images")
        if not (isinstance(images, list) and len(images) == 2 and all(type(each) is int for each in images)):
            return False
        if self.meta is None or content["origin"] != self.meta.origin or part >= self.meta.n_parts:
            return content.get("part") == part
        expected = self.meta.part_images(part)
        listed = set(files) == set(part_files(self.meta, part))
        return content.get("part") == part and images == [expected.start, expected.stop] and listed

    def _judge_origins(self) -> None:
        """All commits and the metadata are of one run; which one, the record says, or else most of them."""
        if self.created is None:
            votes = Counter([*self._origins.values(), *([self.meta.origin] if self.meta is not None else [])])
            self.origin = votes.most_common(1)[0][0] if votes else None
        for part, origin in self._origins.items():
            if origin != self.origin:
                del self.committed[part]
                self._found("other-run", layout.part_commit(part), _of_another(origin, self.origin), part)
        if self.meta is None:
            return
        if self.meta.origin != self.origin:
            self._found("other-run", layout.ROOT, _of_another(self.meta.origin, self.origin))
            self.meta = None
        elif self.meta.n_parts != self.n_parts:
            self._found(
                "damaged", layout.ROOT, f"promises {self.meta.n_parts} parts where {self.n_parts} were committed"
            )
            self.meta = None

    def _judge_state(self) -> None:
        if self.was_sealed:
            for part in self.absent:
                self._found("missing", layout.part_commit(part), LOST, part)
        elif not self.was_created:
            self.findings.append(Finding("unfinished", "", None, CREATION))
        elif self.absent:
            self.findings.append(Finding("unfinished", "", None, self._unfinished()))
        else:
            self._found("unsealed", layout.SEAL, "is missing, though every part is committed")

    def _unfinished(self) -> str:
        parts = spans([(part, part) for part in self.absent], "part")
        known = [each for part in self.absent if (each := self.images_of(part))]
        images = f" ({spans(known)})" if known else ""
        writers = "".join(f"; {name} is being written by {holder}" for name, holder in self.writers.items())
        return f"{parts} of {self.n_parts}{images} not committed yet{writers}"


def remaking(meta: StoreMeta | None, place: Place) -> str:
    """The one command that makes what a store lacks, in words."""
    store = shlex.quote(str(place))
    parent = (meta.parent if meta is not None else None) or {}
    if "imported" in parent:
        return f"the import that made it, again: python -m store import … --out {store}"
    if parent:
        return f"pull it again from where it was taken: python -m store pull SOURCE {store} …"
    if place.local is None:
        return f"pushing it again from where it is whole: python -m store push FOLDER {store}"
    if not (layout.runs_folder(place.local) / "settings.json").exists():
        return (
            f"copying it again from where it is whole (python -m store repair {store} --from COPY), or by the first run's own "
            f"flags with --out {store}"
        )
    return f"python -m harvest --resume {store}"


def _of_another(there: object, here: str | None) -> str:
    return f"belongs to another run: its origin is {there}, the store's {here}"


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_entry(name: str, entry: object) -> bool:
    """Whether a commit may list this: nothing that lies outside the store, above all."""
    inside = all(word not in ("", ".", "..") for word in name.split("/")) and "\0" not in name
    return (
        inside
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and _is_hash(entry.get("sha256"))
        and says_replay(name, entry)
    )


def _numbered(name: str) -> tuple[str, int]:
    """`prompts/part-#.parquet` and 3 for `prompts/part-00003.parquet`, and chunks alike; ("", -1) for other names."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return "", -1
    number = int(match[2]) if len(match[2]) < 18 else -1
    written = part_name(number) if match[1].endswith("part-") else f"c.{number}"
    if not (match[1] + match[2]).endswith(written):
        return "", -1
    return f"{match[1]}#{match[3]}", number
