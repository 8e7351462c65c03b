"""`python -m store verify STORE`: every file that the commits list, read and compared with its length and SHA-256.

A pack has no commits: `store.care.packs` reads it.

1. The small files are read and judged, each by what vouches for it (`survey`).
2. Every listed file is read, several at a time; of a sample the others are only looked up, on this machine.
3. A store on this machine is walked for files that no commit lists.  Files of parts that are not committed yet are no such.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from store import layout
from store.care.checking import Entry, Verdict, check_file, in_parallel, refused
from store.care.findings import Finding, Report, counts
from store.care.packs import verify_pack
from store.care.survey import Survey, remaking
from store.errors import DamagedError, UnfinishedError, UsageError
from store.files import is_temporary, sha256_bytes
from store.format import part_name
from store.places import Place, place_of
from store.shards import is_pack
from store.traces import parse_trace_file

LOCAL_THREADS, REMOTE_THREADS = 8, 16


@dataclass(frozen=True)
class VerifySettings:
    """Read every file of a store or a pack and compare it with its checksum."""

    store: Annotated[str, tyro.conf.Positional]
    """the store: a folder, or a URL (s3://, hf://, https://); or a pack"""
    sample: float | None = None
    """read only this share of the parts' files, such as 0.05, drawn by --seed; commits, metadata and weights always.
    Of what is left out, the lengths are compared where the store is on this machine"""
    seed: int = 0
    """draws the sample"""
    threads: int | None = None
    """files read at the same time; default: as many as the machine has cores, at most 8, and 16 for a remote store"""
    json: bool = False
    """print the findings as JSON"""

    def __post_init__(self) -> None:
        if self.sample is not None and not 0 < self.sample <= 1:
            raise UsageError(f"--sample is {self.sample}: write a share above 0 and at most 1, such as 0.05")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}: it must be at least 1")


def run(settings: VerifySettings) -> Report:
    """Print what `verify` finds; `DamagedError` or `UnfinishedError` unless all is well."""
    report = verify(settings.store, settings.sample, settings.seed, settings.threads)
    print(report.as_json() if settings.json else report.text(), flush=True)
    if not report.ok:
        error = UnfinishedError if all(each.kind == "unfinished" for each in report.findings) else DamagedError
        raise error(f"{report.store}: {counts(report.findings)}. {report.remedy}")
    return report


def verify(store: str | Path | Place, sample: float | None = None, seed: int = 0, threads: int | None = None) -> Report:
    """What is wrong with a store or a pack.  Errors: `ForeignError` for what is none of ours."""
    place, begun = place_of(store), time.monotonic()
    choose = chooser(sample, seed)
    if place.local is not None and is_pack(place.local):
        return verify_pack(place.local, threads or threads_for(place), choose)
    seen = Survey(place, threads or threads_for(place), choose)
    check = Check(seen, choose)
    findings = (*seen.findings, *check.findings(), *strangers(seen))
    remedy = remedy_of(seen, findings)
    seconds = time.monotonic() - begun
    looked = looked_for(seen)
    return Report(str(place), seen.id, findings, check.files, check.bytes, seconds, check.unread, looked, remedy)


def threads_for(place: Place) -> int:
    """How many files are read at the same time unless somebody says otherwise."""
    return REMOTE_THREADS if place.local is None else min(os.cpu_count() or 1, LOCAL_THREADS)


def chooser(sample: float | None, seed: int) -> Callable[[str], bool]:
    """Whether a file belongs to the sample: a function of its name and the seed, so nobody need list them all."""
    if sample is None:
        return lambda name: True
    most = int(sample * 2**64)
    return lambda name: int(sha256_bytes(f"{seed}:{name}".encode())[:16], 16) < most


Listed = tuple[str, int | None, Entry, bool]
"""name, part, entry, and whether it is to be read"""


class Check:
    """Reads the files that the whole commits of a store list."""

    def __init__(self, seen: Survey, choose: Callable[[str], bool] = lambda name: True) -> None:
        self.seen, self.choose = seen, choose
        self.files = self.bytes = self.unread = 0
        self.entries: dict[str, Entry] = {}
        """what was committed of the files that something is wrong with"""

    def findings(self) -> Iterator[Finding]:
        """What is wrong with them, in their order; what the survey found is not found again."""
        seen = self.seen
        known = {each.name for each in seen.findings}
        total = sum(entry.get("bytes", 0) for entry in seen.created_files.values())
        total += sum(size for _, size in seen.committed.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", mininterval=0.5) as bar:
            for (name, part, entry, whole), verdict in in_parallel(self._check, self._listed(), seen.threads):
                self.files += whole
                self.unread += not whole
                read = verdict.read if isinstance(verdict, Verdict) else verdict
                self.bytes += read
                bar.update(entry.get("bytes", 0) if whole else 0)
                if isinstance(verdict, Verdict) and name not in known:
                    self.entries[name] = entry
                    yield seen.finding(verdict.kind, name, verdict.detail, part)

    def _listed(self) -> Iterator[Listed]:
        for name, entry in self.seen.created_files.items():
            yield name, None, entry, True
        for part in self.seen.committed:
            for name, entry in self.seen.files_of(part).items():
                yield name, part, entry, self.choose(name)

    def _check(self, listed: Listed) -> tuple[Listed, Verdict | int]:
        name, _, entry, whole = listed
        if not whole and self.seen.place.local is None:
            return listed, 0
        return listed, check_file(self.seen.place, name, entry, whole)


def strangers(seen: Survey) -> Iterator[Finding]:
    """Files of a store on this machine that no commit lists, and what killed processes left; in the order of names."""
    if seen.place.local is not None:
        yield from _Walk(seen, seen.place.local).findings("")


class _Walk:
    """Goes through a store's folder; follows a link only where it stands for one of the store's own folders."""

    def __init__(self, seen: Survey, root: Path) -> None:
        self.seen, self.root = seen, root
        arrays = [pattern.rpartition("/")[0] for pattern in seen.patterns if "/c.#." in pattern]
        groups = {"", *arrays, *(folder for array in arrays for folder in _parents(array))}
        weights = seen.meta.weights_held if seen.meta is not None else []
        self.listed = {
            layout.CARD, layout.STORE_COMMIT, layout.SEAL,
            *(f"{group}/{layout.ROOT}".lstrip("/") for group in groups),
            *(f"weights/{name}" for name in weights),
            *seen.created_files,
        }  # fmt: skip
        self.folders = {folder for name in (*self.listed, *seen.patterns) for folder in _parents(name)}
        if seen.meta is not None and seen.meta.traced is not None:
            self.folders.add("traces")

    def findings(self, folder: str) -> Iterator[Finding]:
        try:
            with os.scandir(self.root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            kind, detail = refused(error)
            yield Finding(kind, folder or ".", None, detail)
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir() and (name in self.folders or not entry.is_symlink()):
                yield from self.findings(name)
            elif is_temporary(Path(name)):
                if not self._is_under_way(name):
                    yield Finding("leftover", name, None, "was left half-written by a killed process")
            elif self.seen.patterns and not self._is_listed(name):
                yield Finding("unlisted", name, None, "is listed by no commit")

    def _is_listed(self, name: str) -> bool:
        if self.seen.meta is None and parse_trace_file(name) is not None:
            return True  # whatever said their names is damaged
        if self.seen.created is None and self.seen.meta is None and name.startswith("weights/sha256-"):
            return True
        return name in self.listed or self.seen.part_of(name) is not None

    def _is_under_way(self, name: str) -> bool:
        """Whether a living process is writing this temporary file."""
        folder, _, file = name.rpartition("/")
        meant = f"{folder}/{file[1:].rsplit('.', 2)[0]}".lstrip("/")
        part = self.seen.part_of(meant)
        lease = "seal" if meant == layout.SEAL else "create" if part is None else part_name(part)
        return lease in self.seen.writers


def _parents(name: str) -> list[str]:
    words = name.split("/")
    return ["/".join(words[:count]) for count in range(1, len(words))]


def looked_for(seen: Survey) -> str:
    """Whether files that no commit lists were looked for, in words."""
    if seen.place.local is None:
        return "files that no commit lists were not looked for: a remote store is never listed"
    if not seen.patterns:
        return "which files no commit lists cannot be said: neither the metadata nor any commit is whole"
    return "files that no commit lists were looked for"


def remedy_of(seen: Survey, findings: Iterable[Finding]) -> str:
    """The command to run next."""
    kinds, place = {each.kind for each in findings}, seen.place
    if not kinds:
        return ""
    if kinds == {"unfinished"}:
        return f"go on with it: {remaking(seen.meta, place)}"
    if kinds == {"unreadable"}:
        return "see to it that these files can be read (permissions, the server), then verify again"
    if place.local is None:
        return (
            f"push it again from a whole copy: python -m store push COPY {place}; "
            "or pull it, repair that (python -m store repair FOLDER), and push it"
        )
    store = shlex.quote(str(place))
    if kinds <= {"unlisted", "leftover"} and "unlisted" in kinds:
        return f"remove them, if nobody wants them: python -m store repair {store} --remove-unlisted"
    return f"python -m store repair {store} [--from COPY]"
