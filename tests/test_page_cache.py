"""What a harvest writes leaves the page cache when it is on the disk, and not before."""

import os
from pathlib import Path

import pytest

import store.writer
from tests.small_store import make_store


def test_large_files_are_dropped_after_they_were_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, dropped = set[int](), list[tuple[str, bool]]()

    def drop(descriptor: int, first: int, length: int, advice: int) -> None:
        assert (first, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        inode = os.fstat(descriptor).st_ino
        dropped.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, inode in synced))

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "posix_fadvise", drop)
    monkeypatch.setattr(store.writer, "FORGOTTEN", 64)
    make_store(tmp_path / "store")
    names = [name for name, _ in dropped]
    assert all(after for _, after in dropped)
    assert any(name.startswith(".c.") for name in names)
    assert not [name for name in names if ".json." in name]
    dropped.clear()
    monkeypatch.setattr(store.writer, "FORGOTTEN", 2**30)
    make_store(tmp_path / "other")
    assert not dropped


def test_a_file_system_that_does_not_take_the_hint_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(store.writer, "FORGOTTEN", 64)
    assert make_store(tmp_path / "store").store.n_images == 10
