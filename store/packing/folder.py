"""The folder of a pack while it is made: who holds it, what is finished in it and proved, what is to be thrown away.

    OUT/unfinished/plan.json                            what is being made; another plan is refused
    OUT/unfinished/lock                                 held by the process that makes it
    OUT/unfinished/done/img_0/shard-00000….json         length and CRC-32C of a file that is finished
    OUT/unfinished/scratch/img_0/0-12.run               a run (or below --scratch), proved in the same way
    SCRATCH/granary-pack-…/mark.json                    what workers must see below --scratch

A file is finished when its record is there and holds.  All of `unfinished` goes when the manifest has come.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from store.errors import DamagedError, ForeignError, MismatchError, StoreError, UsageError
from store.files import (
    json_bytes,
    read_self_checked,
    self_checked,
    sha256_bytes,
    temporary_of,
    write_json,
)
from store.packing.plan import PackPlan
from store.packing.scratch import Layout, RunFile
from store.shards import JOURNAL, MANIFEST, MEANS, UNFINISHED, crc32c_of, open_pack
from store.sites import Site

Entry = dict[str, Any]
_NAMES = (
    rf"manifest|plan|mark|shard-\d{{5,}}\.safetensors|sha256-[0-9a-f-]+\.safetensors|{re.escape(MEANS)}|\d+-\d+\.run"
)
TEMPORARY = re.compile(rf"\.(?:{_NAMES})(?:\.json)?\.[0-9a-f]{{8}}\.tmp")
"""what a killed process left of a file of a pack, or of a record of one"""
SCRATCH_MARK = "mark.json"


def scratch_of(key: str, out: Path, scratch: Path) -> Path:
    """The folder below --scratch of the pack with this key at this place."""
    return scratch / f"granary-pack-{sha256_bytes(f'{key}:{out.absolute()}'.encode())[:16]}"


class PackFolder:
    """OUT, and what is in it."""

    def __init__(self, plan: PackPlan, out: Path, scratch: Path | None) -> None:
        self.plan, self.out, self.work = plan, out, out / UNFINISHED
        self.scratch = self.work / "scratch"
        if scratch is not None:  # of this pack at this place
            self.scratch = scratch_of(plan.key, out, scratch)

    def refuse_foreign(self) -> None:
        """`UsageError` or `MismatchError` where OUT holds anything but nothing, or this pack, finished or not."""
        if (self.out / MANIFEST).exists():
            self._refuse_other(open_pack(self.out).manifest["plan"])
        elif (self.work / "plan.json").exists():
            self._refuse_other(self._begun()["plan"])
        elif (self.out / JOURNAL).exists():
            raise UsageError(
                f"{self.out} holds an unfinished pack of an older Granary: remove it, or choose another --out"
            )
        elif self.out.exists() and (
            not self.out.is_dir() or any(not self._is_ours(file) for file in self.out.iterdir())
        ):
            raise UsageError(f"{self.out} exists and is not a pack: choose another --out, or remove it")

    def _begun(self) -> dict[str, Any]:
        """What an earlier run noted that it was making."""
        return read_self_checked(self.work / "plan.json", f"Remove {self.out}, and make the pack from the start")

    def _is_ours(self, file: Path) -> bool:
        """Of an OUT without plan: what a process leaves that is killed before it has written one."""
        if file != self.work or file.is_symlink() or not file.is_dir():
            return False
        return all(each.is_file() and (each.name == "lock" or _is_leftover(each)) for each in file.iterdir())

    def _refuse_other(self, there: dict[str, Any]) -> None:
        content = self.plan.content
        odd = [key for key in content if there.get(key) != content[key]]
        lines = [f"  {key}: there {_short(there.get(key))}, asked for {_short(content[key])}" for key in odd]
        if not lines:
            return
        text = f"{self.out} holds another pack; it differs in\n" + "\n".join(lines)
        if there.get("store") != content["store"]:
            raise MismatchError(f"{text}\nIt was made from another store: choose another --out, or remove it.")
        raise UsageError(f"{text}\nChoose another --out, or remove it.")

    @property
    def complete(self) -> bool:
        return (self.out / MANIFEST).exists()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else makes this pack meanwhile; `StoreError` when somebody does.  What is killed holds nothing any more."""
        file = self._locked()
        try:
            yield
        finally:
            os.close(file)

    def _locked(self) -> int:
        while True:
            self.work.mkdir(parents=True, exist_ok=True)
            file = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise StoreError(
                    f"{self.out} is being made by another process: wait until it ends, or choose another --out"
                ) from None
            except OSError:  # a file system without locks: two would do the work twice, and publish the same bytes
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), (self.work / "lock").stat()):
                    return file
            os.close(file)  # the one who held it has finished, and removed it

    def begin(self, runs: Mapping[Site, Iterable[str]]) -> None:
        """Note the plan; throw away what killed processes left half-written, and runs that were cut otherwise."""
        self._leave_scratch()
        content = {"key": self.plan.key, "plan": self.plan.content, "scratch": str(self.scratch.absolute())}
        write_json(self.work / "plan.json", self_checked(content))
        for root in {self.out, self.scratch}:
            for leftover in root.glob("**/.*.tmp"):
                if _is_leftover(leftover):
                    leftover.unlink(missing_ok=True)
        if self.scratch.parent != self.work and any(True for each in runs.values() for _ in each):
            write_json(self.scratch / SCRATCH_MARK, {"key": self.plan.key, "once": secrets.token_hex(8)})
        for site in self.plan.sites:
            names = {*runs.get(site, ()), *(f"{name}.json" for name in runs.get(site, ()))}
            folder = self.scratch / str(site)
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.name not in names and file.is_file():
                    file.unlink()

    def _leave_scratch(self) -> None:
        """Remove the scratch files of an earlier run elsewhere, or say where they lie."""
        if not (self.work / "plan.json").exists():
            return
        there = self._begun().get("scratch")
        if not isinstance(there, str) or Path(there) == self.scratch.absolute() or not Path(there).is_dir():
            return
        old = Path(there)
        if old in (self.work.absolute() / "scratch", scratch_of(self.plan.key, self.out, old.parent)):
            shutil.rmtree(old, ignore_errors=True)
            print(f"the scratch files that an earlier run left at {old} are removed: --scratch is another now")
        else:
            print(f"an earlier run, with OUT at another place, left scratch files at {old}: remove them")

    def finish(self, name: str, entry: Entry) -> None:
        """Record a file of the pack that is published."""
        self._note(self.work / "done" / f"{name}.json", entry)

    def finished(self, names: Sequence[str], say: Callable[[int], object]) -> dict[str, Entry]:
        """Those of the named files whose record holds: every byte of them is read."""
        records = {name: entry for name in names if (entry := self._record(self.work / "done" / f"{name}.json"))}
        if not records:
            return {}

        def holds(name: str) -> bool:
            path, entry = self.out / name, records[name]
            sound: bool = (
                path.is_file() and path.stat().st_size == entry["bytes"] and crc32c_of(path) == entry["crc32c"]
            )
            say(entry["bytes"])
            return sound

        with ThreadPoolExecutor(2) as pool:
            return {name: records[name] for name, sound in zip(records, pool.map(holds, records), strict=True) if sound}

    def run_path(self, site: Site, run: tuple[int, int]) -> Path:
        """The scratch file of a run."""
        return self.scratch / str(site) / run_name(run)

    def finish_run(self, site: Site, run: tuple[int, int], entry: Entry) -> None:
        """Record a scratch file that is published."""
        path = self.run_path(site, run)
        self._note(path.with_name(f"{path.name}.json"), entry)

    def _note(self, path: Path, entry: Entry) -> None:
        """Write a record.  It is not synced: what it is of is, and a lost or torn record costs doing that once more."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(path, secrets.token_hex(4))
        temporary.write_bytes(json_bytes(self_checked({**entry, "key": self.plan.key})))
        temporary.replace(path)

    def run_finished(self, site: Site, run: tuple[int, int], layout: Layout, size: int) -> bool:
        """Whether the scratch file of a run is there and whole; its segments are proved when they are read."""
        path = self.run_path(site, run)
        entry = self._record(path.with_name(f"{path.name}.json"))
        if entry is None or not path.is_file() or not path.stat().st_size == entry["bytes"] == size:
            return False
        with RunFile(path, layout, run[1] - run[0]) as file:
            return file.head_crc() == str(entry["crc32c"])

    def _record(self, path: Path) -> Entry | None:
        """A record, or None where there is none, or not a whole one of this pack."""
        try:
            found = read_self_checked(path)
        except (DamagedError, ForeignError):
            return None
        return {"bytes": found["bytes"], "crc32c": found["crc32c"]} if found.get("key") == self.plan.key else None

    def drop_scratch(self, site: Site) -> None:
        """Remove the scratch files of a site."""
        shutil.rmtree(self.scratch / str(site), ignore_errors=True)

    def clear(self) -> None:
        """Remove all that belongs to the making alone."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if (self.work / "plan.json").exists():
            shutil.rmtree(self.work / "done", ignore_errors=True)
        for file in self.work.iterdir() if self.work.is_dir() else ():
            if _is_leftover(file):
                file.unlink(missing_ok=True)
        for name in ("plan.json", "lock"):  # the plan after all that it tells to be ours
            (self.work / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something in it that is not ours
            self.work.rmdir()


def _is_leftover(file: Path) -> bool:
    return TEMPORARY.fullmatch(file.name) is not None and file.is_file() and not file.is_symlink()


def run_name(run: tuple[int, int]) -> str:
    """`0-12.run`: the first unit, and the one after the last."""
    return f"{run[0]}-{run[1]}.run"


def _short(value: Any) -> str:
    return repr(value["id"] if isinstance(value, dict) and "id" in value else value)
