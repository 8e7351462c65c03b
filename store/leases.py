"""Who is writing what: leases that any number of processes, on any number of machines with one file system, agree on.

1. A lease is a file `STORE.runs/leases/NAME.GENERATION.json`, made by exclusive creation: one process alone succeeds.
2. Whoever holds it keeps touching it.  One that was not touched for a minute, or as long as it says itself, by the clock
   of the file system, or as long before that clock comes to its time, or whose process is dead on this machine, or that
   was given back, may be followed by the next generation, made the same way.
3. The holder of the highest generation holds the part.  Every rename of a file of the part checks again that there is no
   higher one, so a process that was stopped for an hour finds that it has lost the part, and commits nothing.

A process frozen between that last check and its rename can still rename, a whole file of its own and never its
successor's, because each lease names its temporary files by a token.  The file that it then puts in place holds the same
bytes, because a part's bytes depend on nothing but the settings (with `--allow-mixed` they may differ: then `verify`
finds the file damaged).
"""

import contextlib
import json
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import LostLeaseError

LEASE_SECONDS = 60.0
"""after which a silent process loses its part, unless its lease names another time"""
BEATS = 10
"""how many times a lease is touched before it would expire"""
POLL_SECONDS = 0.2
ATTEMPTS = 20
MOST_SECONDS = 86_400.0
"""that a lease may say it lasts after its last touch; one that says more, or no number, lasts as long as one that says nothing"""


class Lease:
    """A part, or the creation of a store, held by this process."""

    def __init__(self, file: Path, name: str, generation: int, token: str, seconds: float) -> None:
        self.file, self.name, self.generation, self._token, self.seconds = file, name, generation, token, seconds
        before = (_about(_file(file.parent, name, number)) for number in range(1, generation))
        self.tag = token
        """names the temporary files written under this lease, so that nobody who lost one ever touches those of another"""
        tags = (about.get("tag", about.get("token")) for about in before)
        numbers = map(str, range(1, generation + 1))  # by which older versions of Granary named theirs
        self.followed = (*(each for each in tags if isinstance(each, str) and each.isalnum()), *numbers)
        """the tags of those that held it before: what they left half-written may be removed"""

    def check(self) -> None:
        """`LostLeaseError` unless this process still holds it."""
        try:
            mine = json.loads(self.file.read_bytes()).get("token") == self._token
        except (OSError, ValueError, AttributeError):
            mine = False
        if not mine or _file(self.file.parent, self.name, self.generation + 1).exists():
            raise LostLeaseError(
                f"{self.name} was taken over by another process, because this one had not been heard of for "
                f"{self.seconds:g} s: nothing of it was committed here"
            )

    def touch(self) -> None:
        """Say that this process is alive."""
        with contextlib.suppress(OSError):
            os.utime(self.file)

    def give_back(self) -> None:
        """Let others have it; the file stays, so that an older generation never comes back."""
        temporary = self.file.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            try:
                temporary.write_text(json.dumps({"released": True, "tag": self.tag}))
                temporary.replace(self.file)
            except OSError:  # a full disk: to be older than a lease can be takes no room
                temporary.unlink(missing_ok=True)
                os.utime(self.file, (0, 0))


class Leases:
    """The leases of a store, and a thread that touches those which this process holds."""

    def __init__(self, folder: Path, seconds: float | None = None) -> None:
        self.folder, self.seconds = folder, seconds or LEASE_SECONDS
        self._held: dict[str, Lease] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, name: str) -> Lease | None:
        """The lease, or None while another process holds it."""
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process has just removed the folder
                self.folder.mkdir(parents=True, exist_ok=True)
                return self._take(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._take(name)

    def _take(self, name: str) -> Lease | None:
        generation = _highest(self.folder, name)
        if generation and not self._free(_file(self.folder, name, generation)):
            return None
        file, token = _file(self.folder, name, generation + 1), secrets.token_hex(8)
        try:
            with file.open("x") as opened:
                opened.write(json.dumps({"token": token, "seconds": self.seconds, **myself()}))
        except FileExistsError:
            return None
        except OSError as error:  # a full disk: an empty file would keep everybody waiting
            file.unlink(missing_ok=True)
            error.filename = error.filename or str(file)
            raise
        if _highest(self.folder, name) != generation + 1:  # the folder was cleared meanwhile, and others began anew
            file.unlink(missing_ok=True)
            return None
        lease = Lease(file, name, generation + 1, token, self.seconds)
        self._held[name] = lease
        self._beat()
        return lease

    @contextmanager
    def held(self, name: str, wait: bool) -> Iterator[Lease | None]:
        """Hold a lease while the context lasts: wait for it, or get None while another process holds it."""
        lease = self.take(name)
        while lease is None and wait:
            time.sleep(POLL_SECONDS)
            lease = self.take(name)
        try:
            yield lease
        finally:
            if lease is not None:
                self.give_back(lease)

    def give_back(self, lease: Lease) -> None:
        """End a lease, unless it was lost."""
        self._held.pop(lease.name, None)
        with contextlib.suppress(LostLeaseError):
            lease.check()
            lease.give_back()
        if not self._held:
            self._stop.set()

    def holder(self, name: str) -> str | None:
        """Who holds a lease now, in words; None when it could be taken."""
        generation = _highest(self.folder, name)
        file = _file(self.folder, name, generation)
        if not generation or self._free(file):
            return None
        about = _about(file)
        return f"process {about['pid']} on {about['host']}" if {"pid", "host"} <= set(about) else "another process"

    def clear(self) -> None:
        """Remove every lease, all at the same moment: the store is finished, and whoever clears holds its creation."""
        away = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}.old")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(away)
            for _ in range(ATTEMPTS):  # whoever was about to make a file in it may still do so
                shutil.rmtree(away, ignore_errors=True)
                if not away.exists():
                    break

    def _free(self, file: Path) -> bool:
        about = _about(file)
        if about.get("released") or is_dead(about):
            return True
        try:
            age = self._now() - file.stat().st_mtime
            return abs(age) > _seconds(about)  # a clock that was set back leaves times to come, which nobody alive gave
        except FileNotFoundError:
            return False  # cleared meanwhile: look again

    def _now(self) -> float:
        """The time by the clock of the file system, which all machines share."""
        probe = self.folder / f"clock.{os.getpid()}.{threading.get_ident()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        if self._thread is None or not self._thread.is_alive() or self._stop.is_set():
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._touch_all, args=(self._stop,), name="leases", daemon=True)
            self._thread.start()

    def _touch_all(self, stop: threading.Event) -> None:
        while not stop.wait(self.seconds / BEATS):
            for lease in list(self._held.values()):
                lease.touch()


def _about(file: Path) -> dict[str, Any]:
    """Who took a lease; nothing of one that is being written, was damaged or is gone: its age decides then."""
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _seconds(about: Mapping[str, Any]) -> float:
    """After how long a silence a lease ends."""
    said = about.get("seconds")
    return float(said) if isinstance(said, int | float) and 0 <= said <= MOST_SECONDS else LEASE_SECONDS


@dataclass(frozen=True)
class Holding:
    """A lease as somebody sees it who only looks on."""

    name: str
    about: Mapping[str, Any]
    """`host`, `pid` and what else the holder wrote; empty where that cannot be read"""
    touched: float
    """when its holder was last heard of: the file's time"""
    seconds: float
    """after how long a silence it ends"""


def holdings(folder: Path, but: Collection[str] = ()) -> list[Holding]:
    """The leases that were taken and not given back, in the order of their names, without those named `but`; writes nothing."""
    highest: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in folder.iterdir():
            name, _, generation = file.stem.rpartition(".")
            if file.suffix == ".json" and generation.isdecimal() and name not in but:
                highest[name] = max(int(generation), highest.get(name, 0))
    found = []
    for name, number in sorted(highest.items()):
        file = _file(folder, name, number)
        about = _about(file)
        with contextlib.suppress(FileNotFoundError):  # cleared meanwhile
            if not about.get("released"):
                found.append(Holding(name, about, file.stat().st_mtime, _seconds(about)))
    return found


def _file(folder: Path, name: str, generation: int) -> Path:
    return folder / f"{name}.{generation}.json"


def _highest(folder: Path, name: str) -> int:
    generation = 0
    while _file(folder, name, generation + 1).exists():
        generation += 1
    return generation


def myself() -> dict[str, Any]:
    """How this process is told from every other: `host`, `pid`, when it `started`, and in which table of `processes`."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "processes": _processes()}


def is_dead(about: Mapping[str, Any]) -> bool:
    """Whether who wrote `myself` is a process of this machine that is no more; False when that cannot be known."""
    return is_here(about) and bool(_started(about["pid"]) != about["started"])


def is_here(about: Mapping[str, Any]) -> bool:
    """Whether who wrote `myself` is, or was, a process of this machine, and not hidden from us: then `is_dead` knows."""
    here = _processes()
    if here is None or about.get("processes") != here:
        return False
    pid = about.get("pid")  # a damaged file may say anything
    return isinstance(pid, int) and isinstance(about.get("started"), str) and not _is_hidden(pid)


def is_stopped(about: Mapping[str, Any]) -> bool:
    """Whether who wrote `myself` is a process of this machine that was stopped, as Ctrl-Z and SIGSTOP do."""
    if not is_here(about) or is_dead(about):
        return False
    return _stat(about["pid"])[:1] in (["T"], ["t"])


def _processes() -> str | None:
    """Names this boot of this machine and its table of processes, which containers have apart; None where /proc is unknown."""
    try:
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{Path('/proc/self/ns/pid').stat().st_ino}"
        )
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot, so that a number used again is not taken for it; None when there is none."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str]:
    """What /proc says of a process, from its state on; nothing where there is none, or none that we may see."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_hidden(pid: int) -> bool:
    """Whether a process is there of which /proc says nothing: another user's, where it is mounted with `hidepid`."""
    if _stat(pid):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):  # there is none, or none can have that number
        pass
    return False
