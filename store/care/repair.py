"""`python -m store repair STORE [--from REPLICA]`: mends what can be mended, and un-commits what must be made again.

1. The small files first (`survey`).  One that is lost is taken from the replica, or made again from what vouches for it;
   it is held in memory, and everything after goes by it.
2. Every file that the commits list is read.
3. With a replica: damaged files are taken from there, each checked before it is put in place; then the small files of 1.
   Without one: Zarr's metadata and the card are made again from the store's metadata; a part that lost a file is
   un-committed; where the metadata or weights are lost, the creation is.
4. The seal is written when everything is whole.

At any moment the store is whole, unfinished, or as damaged as before; running the command again goes on.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from store import layout
from store.care.checking import Entry, entry_of, in_parallel
from store.care.findings import Finding, counts, spans
from store.care.remove import alone, local_folder, remove, uncommit, unseal
from store.care.survey import RECORD, Survey, remaking
from store.care.verify import Check, strangers, threads_for
from store.errors import DamagedError, MismatchError, UnreachableError, UsageError
from store.files import json_bytes, sha256_bytes
from store.format import part_name
from store.metadata import documents
from store.places import Folder, Place, place_of
from store.sizes import human_size
from store.writer import sealed


@dataclass(frozen=True)
class RepairSettings:
    """Mend a store: from a copy, from itself, or by un-committing what must be harvested again."""

    store: Annotated[str, tyro.conf.Positional]
    """the store, a folder of this machine"""
    replica: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """a copy of the same store, a folder or URL: every damaged or missing file is taken from there, parts that are not
    committed yet too. Without it what cannot be made again from the store itself is un-committed"""
    remove_unlisted: bool = False
    """remove files that no commit lists; whatever they are, they are not ours"""
    threads: int | None = None
    """files read at the same time; default: as many as the machine has cores, at most 8"""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}: it must be at least 1")


@dataclass
class Repaired:
    """What `repair` did."""

    taken: list[str] = field(default_factory=list)
    """files that came from the replica"""
    remade: list[str] = field(default_factory=list)
    """files made again from what the store says of itself"""
    uncommitted: list[int] = field(default_factory=list)
    """parts that must be made again"""
    uncreated: bool = False
    """whether metadata or weights must be made again"""
    removed: list[str] = field(default_factory=list)
    """leftovers, and with `remove_unlisted` foreign files"""
    left: list[str] = field(default_factory=list)
    """what could not be repaired, a sentence each"""
    id: str | None = None
    """the content id of the store, when it is whole now"""


def run(settings: RepairSettings) -> Repaired:
    """Repair the store, saying what is done; what that was.

    Errors: `MismatchError` for a replica of another store, or while another process writes; `DamagedError` at the end when
    something could neither be mended nor un-committed.
    """
    place = place_of(settings.store)
    path = local_folder(place, "repair")
    work = _Repair(path, settings.threads or threads_for(place))
    work.do(settings.replica, settings.remove_unlisted)
    work.close()
    return work.done


class _Overlay(Folder):
    """A folder in which some files read as if they were mended already."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        return self.held[name] if name in self.held else super().read(name)


class _Repair:
    """One repair of one store."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.here = _Overlay(path)
        self.done = Repaired()
        self.unlisted: list[Finding] = []
        self.seen = Survey(self.here, threads)
        if self.seen.writers:
            writers = ", ".join(f"{name} by {holder}" for name, holder in self.seen.writers.items())
            raise MismatchError(f"{path} is being written ({writers}): wait until that ends, then repair")

    def do(self, replica: str | None, remove_unlisted: bool) -> None:
        source = None if replica is None else place_of(replica)
        if source is None:
            self._hold_record()
        else:
            self._hold_from(source)
        self.meta = self.seen.meta
        check = Check(self.seen)
        findings = list(check.findings())
        self.entries = check.entries
        foreign = list(strangers(self.seen))
        self.done.left += [each.text() for each in (*self.seen.findings, *findings) if each.kind == "unreadable"]
        if source is None:
            self._give_up(findings)
        else:
            self._take(source, findings)
        self._clear(foreign, remove_unlisted)
        self._seal()

    def _hold_record(self) -> None:
        """A lost record of creation, made again from the files that it lists, where the seal or every commit vouches for it."""
        seen = self.seen
        if seen.created is not None or seen.meta is None or not (seen.was_sealed or seen.was_created):
            return
        data = seen.record()
        if data is None:
            return
        if seen.sealed is not None:
            certain = sha256_bytes(data) == seen.sealed[RECORD]
        else:
            made = {name: entry_of(content) for name, content in documents(seen.meta).items()}
            certain = bool(seen.committed) and json.loads(data)["files"] == made
        if certain:
            self.here.held[layout.STORE_COMMIT] = data
        self._look_again(certain)

    def _hold_from(self, source: Place) -> None:
        """The lost small files as the replica has them, as far as what is whole here agrees."""
        theirs = Survey(source, threads_for(source), commits=False)
        _refuse_other(self.seen, theirs)
        if self.seen.meta is None:
            self._hold(source, [layout.ROOT])
        parts = None if self.seen.sealed is None and self.seen.meta is None else self.seen.n_parts
        if self.seen.created is None and theirs.created is not None and parts in (None, theirs.n_parts):
            self._hold(source, [layout.STORE_COMMIT])
        self._look_again(bool(self.here.held))
        lost = [layout.part_commit(part) for part in range(self.seen.n_parts) if part not in self.seen.committed]
        self._hold(source, lost)
        self._look_again(bool(lost))
        unfit = [each.name for each in self.seen.findings if each.name in self.here.held]
        for name in unfit:
            del self.here.held[name]
        self._look_again(bool(unfit))

    def _look_again(self, changed: bool) -> None:
        """Judge the small files anew, those that are held in memory in the place of those that lie on the disk."""
        if changed:
            self.seen = Survey(self.here, self.threads)

    def _hold(self, source: Place, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.here.held[name] = source.read(name)

    def _take(self, source: Place, findings: list[Finding]) -> None:
        """Put in place what the replica has: files of parts and of the creation, then the commits that list them."""
        wanted = [each for each in findings if each.kind in ("damaged", "missing")]
        entries = [self.entries[each.name] for each in wanted]
        failed: set[int | None] = set()
        with tqdm(total=sum(map(_size, entries)), unit="B", unit_scale=True, desc="take", disable=not wanted) as bar:
            jobs = zip(wanted, entries, strict=True)
            threads = max(self.threads, threads_for(source))
            for each, problem in in_parallel(lambda job: (job[0], self._fetch(source, *job)), jobs, threads):
                bar.update(_size(self.entries[each.name]))
                if problem is None:
                    self._say(self.done.taken, each.name, f"taken from {source}: {each.name}")
                else:
                    failed.add(each.part)
                    self.done.left.append(f"{each.text()}; {problem}")
        for name, data in sorted(self.here.held.items()):
            part = self.seen.part_of(name)
            if name != layout.ROOT and part not in failed:
                with alone(self.path, "create" if part is None else part_name(part)):
                    self.here.write(name, data)
                self._say(self.done.taken, name, f"taken from {source}: {name}")
        for each in self.seen.findings:
            if each.kind in ("damaged", "missing", "other-run") and each.name != layout.SEAL:
                self.done.left.append(f"{each.text()}; {source} cannot mend it")

    def _fetch(self, source: Place, finding: Finding, entry: Entry) -> str | None:
        """Put one file of the replica in place; what is wrong with it there, or None."""
        if not entry:
            return "nothing says what it should be"
        try:
            self.here.write_pieces(finding.name, entry["bytes"], _checked(source, finding.name, entry))
        except FileNotFoundError:
            return f"{source} has no such file"
        except (DamagedError, UnreachableError) as error:
            return str(error)
        return None

    def _give_up(self, findings: list[Finding]) -> None:
        """Make again what follows from the metadata; un-commit the rest."""
        seen = self.seen
        bad = [each for each in (*seen.findings, *findings) if each.kind in ("damaged", "missing", "other-run")]
        parts = sorted({each.part for each in bad if each.part is not None})
        for part in parts:
            reasons = [each for each in bad if each.part == part]
            more = f" (and {len(reasons) - 1:,} more)" if len(reasons) > 1 else ""
            print(f"part {part} is un-committed: {reasons[0].text()}{more}", flush=True)
        if parts:
            freed = uncommit(self.path, {part: seen.names_of(part) for part in parts})
            self.done.uncommitted += parts
            print(
                f"removed: the files of {spans([(part, part) for part in parts], 'part')}, {human_size(freed)}",
                flush=True,
            )
        made = documents(seen.meta) if seen.meta is not None and seen.created is not None else {}
        lost = []
        for each in (each for each in bad if each.part is None and each.name != layout.SEAL):
            if each.name in made and entry_of(made[each.name]) == seen.created_files[each.name]:
                self.here.write(each.name, made[each.name])
                self._say(self.done.remade, each.name, f"made again: {each.name}")
            else:
                lost.append(each)
        if lost and seen.meta is None and not (layout.runs_folder(self.path) / "settings.json").exists():
            # nobody could say who makes it again
            self.done.left += [f"{each.text()}; take it from a copy: --from COPY" for each in lost]
        elif lost:
            self._uncreate(lost)
        elif layout.STORE_COMMIT in self.here.held:
            self.here.write(layout.STORE_COMMIT, self.here.held[layout.STORE_COMMIT])
            self._say(self.done.remade, layout.STORE_COMMIT, f"made again: {layout.STORE_COMMIT}")

    def _uncreate(self, lost: list[Finding]) -> None:
        """Let the creation be done again; the parts stay committed."""
        with alone(self.path, "create"):
            unseal(self.path)
            remove(self.path, [layout.STORE_COMMIT])
            remove(self.path, [each.name for each in lost])
        self.done.uncreated = True
        for each in lost:
            print(f"removed, to be written again: {each.text()}", flush=True)

    def _clear(self, foreign: list[Finding], remove_unlisted: bool) -> None:
        """Remove what killed processes left, and, when asked to, what nobody lists."""
        kinds = ("leftover", "unlisted") if remove_unlisted else ("leftover",)
        for each in (each for each in foreign if each.kind in kinds):
            remove(self.path, [each.name])
            self._say(self.done.removed, each.name, f"removed: {each.text()}")
        for part in self.seen.absent:
            there = [name for name in self.seen.names_of(part) if (self.path / name).exists()]
            if there and not (self.path / layout.part_commit(part)).exists():
                with alone(self.path, part_name(part)):
                    freed = human_size(remove(self.path, there))
                line = f"removed: {len(there):,} files, {freed}, of part {part}, which no process finished"
                self._say(self.done.removed, layout.part_commit(part), line)
        self.unlisted = [each for each in foreign if each.kind == "unlisted" and not remove_unlisted]

    def _seal(self) -> None:
        """Write the seal when nothing else is wrong."""
        self.here.held.clear()
        self._look_again(self.changed or bool(self.seen.findings))
        of_seal = [each.name == layout.SEAL and each.kind in ("damaged", "unsealed") for each in self.seen.findings]
        if of_seal and all(of_seal) and self.seen.meta is not None and not self.done.left:
            with alone(self.path, "create"):
                self.here.write(layout.SEAL, json_bytes(sealed(self.path, self.seen.meta)))
            self._say(self.done.remade, layout.SEAL, f"made again: {layout.SEAL}")
            self._look_again(True)
        self.done.id = self.seen.id if not self.seen.findings else None

    @property
    def changed(self) -> bool:
        done = self.done
        return bool(done.taken or done.remade or done.uncommitted or done.uncreated or done.removed)

    def close(self) -> None:
        """Say what is left to do; `DamagedError` when something is as damaged as before."""
        done, place = self.done, Folder(self.path)
        if self.unlisted:
            print(f"left alone: {counts(self.unlisted)} (--remove-unlisted removes them)")
        if done.left:
            raise DamagedError(f"{self.path}: {len(done.left):,} could not be repaired:\n" + "\n".join(done.left))
        if done.id is not None:
            print(f"{self.path} is whole{'' if self.changed else ', there was nothing to repair'}, id {done.id}")
        else:
            state = "; ".join(each.detail for each in self.seen.findings)
            print(f"{self.path} is not finished: {state}. What is missing is made by: {remaking(self.meta, place)}")

    def _say(self, kept: list[str], name: str, line: str) -> None:
        kept.append(name)
        print(line, flush=True)


def _size(entry: Entry) -> int:
    return int(entry.get("bytes", 0))


def _checked(source: Place, name: str, entry: Entry) -> Iterator[bytes]:
    """A file of the replica; `DamagedError` at its end when it is not what was committed, so that nothing is put in place."""
    digest, length = hashlib.sha256(), 0
    for piece in source.pieces(name, entry["bytes"]):
        digest.update(piece)
        length += len(piece)
        yield piece
    if (length, digest.hexdigest()) != (entry["bytes"], entry["sha256"]):
        raise DamagedError(f"{source.where(name)} is not what was committed either")


def _refuse_other(ours: Survey, theirs: Survey) -> None:
    """`MismatchError` unless the replica is a copy of the store, as far as both can say what they are."""
    if ours.id is not None and theirs.id is not None:
        if ours.id != theirs.id:
            raise MismatchError(
                f"{theirs.place} is no replica of {ours.place}: it is store {theirs.id}, and this is store {ours.id}"
            )
    elif ours.origin is None or ours.origin != theirs.origin:
        raise MismatchError(
            f"{theirs.place} is no replica of {ours.place}: its origin is {theirs.origin}, and here it is {ours.origin}"
        )
