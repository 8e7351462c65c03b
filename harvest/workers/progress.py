"""What a worker says of itself while it works: `STORE.runs/workers/TIME-HOST-PID.json`, for `python -m harvest status STORE`.

A thread writes the file again every few seconds, so that its age says whether the process is alive, also while it loads a
model or waits and holds no part.  Nothing of a harvest depends on it: a disk that is full or gone stops the file and not
the harvest.  Who may fill a part is the leases' affair alone.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harvest.runs import name_of_run
from harvest.workers.shares import Worker
from store import layout
from store.errors import Interrupted
from store.files import temporary_of
from store.leases import BEATS, LEASE_SECONDS, myself
from store.sites import spans

State = Literal["loading", "drawing", "waiting", "ended", "failed"]
BEAT_SECONDS = 6.0
ROOM = 2**20
"""bytes that must be free for a record before the harvest has looked at the disk"""
RECENT_SECONDS = 300.0
"""a rate is that of the last five minutes: what a harvest does now, and not what it did last night"""


def workers_folder(out: Path) -> Path:
    """Where the workers of a store say how far they are."""
    return layout.runs_folder(out) / "workers"


@dataclass
class Progress:
    """What one worker has done and does; a context, which it is alive in."""

    file: Path | None = None
    """None: nobody is told"""
    worker: Worker = field(default_factory=Worker)
    lease_seconds: float = LEASE_SECONDS
    state: State = "loading"
    device: str = ""
    parts: list[int] = field(default_factory=list)
    """committed here"""
    images: int = 0
    """of these"""
    drawn: int = 0
    """images, those of parts that were lost or are not committed yet among them"""
    part: int | None = None
    """that is drawn now"""
    part_drawn: int = 0
    """images of it"""
    said: str = ""
    """what it waits for, or how it ended"""
    wanted: bool = True
    """set to False by another thread, it ends the work with the batch that is drawn"""
    settled: bool = False
    """whether the store is known to be this run's: until then nothing is left of a run that is refused"""

    def __post_init__(self) -> None:
        self._begun = self._part_begun = self._last = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()
        self._known: float | None = None
        self._lock, self._writing, self._stop = threading.Lock(), threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, out: Path, worker: Worker, lease_seconds: float | None = None) -> "Progress":
        """That of this process, which is about to fill the store at `out`."""
        return cls(workers_folder(out) / f"{name_of_run()}.json", worker, lease_seconds or LEASE_SECONDS)

    def __enter__(self) -> "Progress":
        if self.file is not None:
            self._write()
            self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.state = "ended" if error is None else "failed"
        if isinstance(error, KeyboardInterrupt):
            self.said = "interrupted"
        elif error is not None:
            self.said = (str(error) or type(error).__name__).splitlines()[0]
        self.part = None
        if self.settled or error is None:
            self._write()
        elif self.file is not None:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
                for folder in self.file.parents[:2]:  # where nothing else is in them
                    folder.rmdir()

    def ready(self, device: str) -> None:
        """The model is loaded, the store is there and ours."""
        self.device, self.settled = device, True
        self._write()

    def takes(self, part: int) -> None:
        """This worker holds a part and begins to draw it."""
        with self._lock:
            self.state, self.part, self.part_drawn, self.said = "drawing", part, 0, ""
            self._part_begun = time.monotonic()
            if not self._recent:
                self._recent.append((self._part_begun, self.drawn))
        self._write()  # at once, for a part may take long

    def draws(self, count: int) -> None:
        """So many images more were drawn; fewer than none when a part was lost.  `Interrupted` when no more are wanted."""
        if not self.wanted:
            raise Interrupted("the harvest that gave out this part was ended")
        now = time.monotonic()
        with self._lock:
            self.drawn, self._last = self.drawn + max(count, 0), now
            self.part_drawn = max(self.part_drawn + count, 0)
            if count > 0:
                self._recent.append((now, self.drawn))
            while len(self._recent) > 2 and now - self._recent[0][0] > RECENT_SECONDS:
                self._recent.popleft()

    def commits(self, part: int, images: int) -> None:
        """A part was committed here."""
        with self._lock:
            self.parts.append(part)
            self.images += images

    def waits(self, said: str) -> None:
        """Nothing is left but what others hold."""
        with self._lock:
            before, self.state, self.part, self.said = self.state, "waiting", None, said
            self._known = self.rate()
            self._recent.clear()  # and a rate begins anew
        if before != "waiting":
            self._write()

    def rate(self) -> float | None:
        """Images a second, lately, or before it waited; None where that is not known yet."""
        return self._measured() or self._known

    def _measured(self) -> float | None:
        if len(self._recent) < 2:
            return None
        (first, before), (last, now) = self._recent[0], self._recent[-1]
        return (now - before) / (last - first) if last > first else None

    def facts(self) -> dict[str, Any]:
        """What the file holds.  Seconds are counted back from the file's own time, so that no two clocks need agree."""
        now = time.monotonic()
        with self._lock:
            return {
                **myself(),
                "worker": self.worker.name,
                "by": self.worker.by,
                "device": self.device,
                "state": self.state,
                "part": self.part,
                "part_drawn": self.part_drawn if self.part is not None else 0,
                "part_seconds": round(now - self._part_begun, 1),
                "parts": spans(tuple(sorted(self.parts))) if self.parts else "",
                "images": self.images,
                "drawn": self.drawn,
                "images_per_second": self.rate(),
                "seconds": round(now - self._begun, 1),
                "idle_seconds": round(now - self._last, 1),
                "said": self.said,
                "silent_after": self.lease_seconds,
            }

    def _beat(self) -> None:
        while not self._stop.wait(min(BEAT_SECONDS, self.lease_seconds / BEATS)):
            self._write()

    def _write(self) -> None:
        """Let the file appear whole; without syncing it, for it is of no use after a power cut."""
        if self.file is None:
            return
        temporary = temporary_of(self.file, "beat")
        with self._writing, contextlib.suppress(OSError):
            if not self.settled and _may_be_refused(self.file.parents[2]):
                return
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(self.facts(), indent=1))
                temporary.replace(self.file)
            except OSError:  # a full disk
                temporary.unlink(missing_ok=True)
                if self._stop.is_set():
                    self._write_over()

    def _write_over(self) -> None:
        """Say the last word in the room that the file has already, where there is no more: JSON may end in blanks."""
        assert self.file is not None
        with self.file.open("r+b") as file:
            room = os.fstat(file.fileno()).st_size
            file.write(json.dumps(self.facts()).encode().ljust(room))


def _may_be_refused(folder: Path) -> bool:
    """Whether a harvest into a folder will probably be refused: what it is told of the disk is to be true then."""
    return not folder.exists() or shutil.disk_usage(folder).free < ROOM
