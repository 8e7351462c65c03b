"""A full disk is one clear message; nothing that was committed is lost, and once there is room the same command goes on.

The disk is a tmpfs of its own where this process may mount one; a line in the output says so, or says that it may not.
What it cannot do everywhere is done everywhere by other means: every fsync fails once, and files may not grow.
"""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from harvest.__main__ import COMMANDS
from harvest.planning import estimate
from store import open_store
from store.command import guarded, program
from store.format import StoreMeta
from store.layout import runs_folder
from store.writer import Part, StoreWriter
from tests.small_store import small_meta, small_part, weights_content
from tests.test_store import tree

PAGE = 4096
DISK = 2 * 2**20
META = small_meta(4, sites=("img_0",), steps=(0,), d_model=4, chunk_images=2, weights=True)
VALUES = {
    (site, 0, point): np.random.default_rng(0).normal(size=(4, 12, 4)).astype(ml_dtypes.bfloat16)
    for site in META.site_objects
    for point in META.points
}
PARTS: list[Part] = [small_part(META, part, VALUES, ["one", "two", "three", "four"]) for part in range(2)]
QUICK = {
    "images": 70, "layers": 1, "num_inference_steps": 1, "streams": "txt", "resolution": 8, "max_sequence_length": 8,
    "pictures": "none", "batch_size": 16, "threads": 1, "weights": "none",
}  # fmt: skip


def fill(path: Path, meta: StoreMeta = META) -> None:
    """Create a store, or go on with it, to its end."""
    writer = StoreWriter.open_or_create(path, meta, weights_content)
    for part in writer.missing():
        writer.write_part(part, PARTS[part])
    assert writer.seal()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "store"
    fill(path)
    return tree(path)


class SmallDisk:
    """A tmpfs, and a file on it that takes all its room but so much."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "somebody-else's"

    def leave(self, size: int) -> None:
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(self.folder).free - size, 1))
        assert size - PAGE < shutil.disk_usage(self.folder).free <= size

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[SmallDisk | None]:
    """A disk of 2 MB, or None where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "granary-test", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
        refusal = done.stderr.strip() if done.returncode else None
    except OSError as error:
        refusal = str(error)
    with capsys.disabled():
        print(
            f"[full disk: {'a real tmpfs' if refusal is None else f'no tmpfs may be mounted ({refusal}): injected'}]",
            end="",
        )
    if refusal is not None:
        yield None
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def failed(work: Callable[[], Any], capsys: pytest.CaptureFixture[str], reason: str) -> str | None:
    """The one message of a command that fails with exit code 1; None when it succeeds."""
    capsys.readouterr()
    code = guarded(work)
    if code == 0:
        return None
    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {reason}: "), error
    assert error.count("\n") == 1
    assert "What was committed is safe" in error
    return error


def nothing_is_lost(path: Path) -> int:
    """How many parts are committed; each of them can be read, and no half-written file lies about."""
    assert not list(path.parent.rglob("*.tmp"))
    if not (path / "commits/store.json").exists():
        return 0
    store = open_store(path, unfinished=True)
    for part in store.committed_parts:
        for key, values in VALUES.items():
            np.testing.assert_array_equal(store.read(*key, 2 * part, 2 * part + 2), values[2 * part : 2 * part + 2])
        assert store.picture(2 * part) is not None
    return len(store.committed_parts)


def stage(message: str) -> str:
    """At which stage a disk was full, by the file that the message names."""
    name = message.split(": ")[2].split(". What")[0]
    stages = {
        "/c.": "chunk", "/prompts/part": "table", "/images/part": "table", "/statistics/part": "statistics",
        "/commits/part": "commit", "/seal.json": "seal", ".runs/": "lease",
    }  # fmt: skip
    return next((kind for sign, kind in stages.items() if sign in name), "creation")


@contextmanager
def no_room_for(sign: str, reason: int) -> Iterator[list[str]]:
    """The first fsync of a path that contains `sign` finds no room, as it does where a file system gives out room late."""
    fsync, met = os.fsync, []

    def fails_once(descriptor: int) -> None:
        path = f"{Path(f'/proc/self/fd/{descriptor}').readlink()}$"
        if sign in path and not met:
            met.append(path)
            raise OSError(reason, os.strerror(reason))
        fsync(descriptor)

    os.fsync = fails_once
    try:
        yield met
    finally:
        os.fsync = fsync


STAGES = {"creation", "chunk", "table", "statistics", "commit", "seal"}


def test_a_disk_that_is_full_at_any_page_costs_nothing_but_time(
    small_disk: SmallDisk | None, tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    if small_disk is None:  # the next test fails every write
        return
    stages, pages, committed = set(), 0, set()
    while True:
        path = small_disk.folder / f"{pages}" / "store"
        path.parent.mkdir()
        small_disk.leave(pages * PAGE)
        message = failed(lambda: fill(path), capsys, "No space left on device")  # noqa: B023
        if message is None:
            break
        stages.add(stage(message))
        committed.add(nothing_is_lost(path))
        small_disk.make_room()
        fill(path)
        assert tree(path) == whole, f"after {pages} pages"
        assert not (runs_folder(path) / "leases").exists()
        shutil.rmtree(path.parent)
        pages += 1
    assert stages >= STAGES, stages
    assert committed == {0, 1, 2}
    assert pages > 25


SIGNS = {
    "creation": ("/.zarr.json.", "/.README.md.", "/weights/.sha256", "/store/activations$", "/commits/.store.json."),
    "chunk": ("/mlp_in/.c.0.0.0.", "/mlp_out/.c.1.0.0."), "table": ("/prompts/.part-00000.", "/images/.part-00001."),
    "statistics": ("/statistics/.part-00001.", "/store/statistics$"), "commit": ("/commits/.part-00000.", "/commits/.part-00001."),
    "seal": ("/.seal.json.",),
}  # fmt: skip
"""what `no_room_for` looks for, by stage; a folder is synced when all its names are there"""


@pytest.mark.parametrize(("stage_meant", "sign"), [(stage, sign) for stage in SIGNS for sign in SIGNS[stage]])
def test_room_that_is_missing_late_costs_nothing_but_time(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str], stage_meant: str, sign: str
) -> None:
    path = tmp_path / "store"
    quota = stage_meant in ("chunk", "commit")
    with no_room_for(sign, errno.EDQUOT if quota else errno.ENOSPC) as met:
        message = failed(lambda: fill(path), capsys, "Disk quota exceeded" if quota else "No space left on device")
    assert met
    assert message is not None
    assert stage(message) == stage_meant or sign.endswith("$")
    committed = nothing_is_lost(path)
    assert committed == {"creation": 0, "seal": 2}.get(stage_meant, committed)
    fill(path)
    assert tree(path) == whole


def test_a_limit_on_the_length_of_files_is_a_message_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, limits[1]))
    try:
        assert failed(lambda: fill(tmp_path / "store"), capsys, "File too large") is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert nothing_is_lost(tmp_path / "store") == 0
    fill(tmp_path / "store")


def harvest(out: Path) -> int:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    return program("harvest", COMMANDS, [*words, f"--out={out}"], default="harvest")


def test_a_harvest_goes_on_when_there_is_room_again(
    small_disk: SmallDisk | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harvest(tmp_path / "whole") == 0
    monkeypatch.setattr(estimate, "refuse_what_does_not_fit", lambda *_: None)  # somebody takes the room after that
    if small_disk is None:
        out = tmp_path / "store"
        with no_room_for("/commits/.part-00001.", errno.ENOSPC):
            code = harvest(out)
    else:
        out = small_disk.folder / "store"
        small_disk.leave(120 * 1024)
        code = harvest(out)
        small_disk.make_room()
    error = capsys.readouterr().err
    assert code == 1
    assert "error: No space left on device" in error
    assert "Traceback" not in error
    assert not list(out.rglob("*.tmp"))
    assert len(open_store(out, unfinished=True).committed_parts) < 2
    assert program("harvest", COMMANDS, ["--resume", str(out)], default="harvest") == 0
    assert tree(out) == tree(tmp_path / "whole")


def test_a_harvest_that_cannot_fit_is_refused_before_anything_is_written(
    small_disk: SmallDisk | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if small_disk is None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=PAGE))
        out = tmp_path / "store"
    else:
        small_disk.leave(PAGE)
        out = small_disk.folder / "store"
    assert harvest(out) == 1
    assert "4.1 KB free" in capsys.readouterr().err
    assert not out.exists()
    assert not runs_folder(out).exists()
