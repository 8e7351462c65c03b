"""A pack that is killed, damaged on the way, short of room or not alone ends in the same bytes, and nothing is lost."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

import store.pack
import store.packing.folder
import store.packing.sink
import store.packing.tasks
from store import Site
from store.errors import (
    DamagedError,
    StoreError,
    UnfinishedError,
    UsageError,
)
from store.packing.crew import ThreadCrew
from store.shards import open_pack
from tests.small_packs import digests, make


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a pack dies when it has read or written so many pieces; what it half wrote stays."""
    advance, left = ThreadCrew._advance, calls

    def dies(self: ThreadCrew, count: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        advance(self, count)

    monkeypatch.setattr(ThreadCrew, "_advance", dies)


@pytest.mark.parametrize(("memory", "kills"), [("9MB", (5, 60, 30)), ("20MB", (5, 30, 23))])
def test_a_killed_pack_goes_on_and_ends_in_the_same_bytes(
    large_pack_store: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
    kills: tuple[int, ...],
) -> None:
    path, expected = large_pack_store
    out = tmp_path / "killed"
    for survived in kills:
        with monkeypatch.context() as patch:
            killed_after(survived, patch)
            with pytest.raises(KeyboardInterrupt):
                make(path, out, shard_mb=1, memory=memory)
        with pytest.raises(UnfinishedError, match="not finished"):
            open_pack(out)
        (out / "img_0").mkdir(exist_ok=True)
        (out / "img_0" / ".shard-00001.safetensors.0badf00d.tmp").write_bytes(b"half a shard")
    with pytest.raises(UsageError, match="seed: there 1, asked for 2"):
        make(path, out, shard_mb=1, seed=2)
    for shard in sorted((out / "img_0").glob("shard*"))[:1]:
        shard.write_bytes(b"torn")
    make(path, out, shard_mb=1, memory=memory)
    assert digests(out) == expected


def test_what_a_killed_pack_finished_is_not_done_again(
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large_pack_store
    out, scratch = tmp_path / "killed", tmp_path / "scratch"
    with monkeypatch.context() as patch:
        killed_after(50, patch)
        with pytest.raises(KeyboardInterrupt):
            make(path, out, shard_mb=1, memory="6MB", scratch=scratch)
    kept = {file: file.stat().st_mtime_ns for file in (*out.rglob("shard*s"), *scratch.rglob("*.run"))}
    assert any(file.suffix == ".run" for file in kept)
    touched = {}
    drop = store.packing.folder.PackFolder.drop_scratch

    def looked_at(self: Any, site: Site) -> None:
        touched.update({file: file.stat().st_mtime_ns for file in kept if file.exists()})
        drop(self, site)

    monkeypatch.setattr(store.packing.folder.PackFolder, "drop_scratch", looked_at)
    make(path, out, shard_mb=1, memory="6MB", scratch=scratch)
    assert touched == kept and digests(out) == expected
    assert not list(scratch.iterdir())


def test_a_damaged_scratch_file_is_found_and_made_anew(
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large_pack_store
    shard = store.packing.tasks.Hands._shard

    def after_damage(self: Any, task: Any) -> Any:
        for file in list(self.folder.scratch.rglob("*.run"))[:1]:
            with file.open("r+b") as content:
                content.seek(-9, os.SEEK_END)
                content.write(b"x")
        return shard(self, task)

    monkeypatch.setattr(store.packing.tasks.Hands, "_shard", after_damage)
    with pytest.raises(DamagedError, match=r"-\d+\.run, a scratch file.*run the same command again"):
        make(path, tmp_path / "p", shard_mb=1, memory="5MB")
    monkeypatch.setattr(store.packing.tasks.Hands, "_shard", shard)
    assert digests(make(path, tmp_path / "p", shard_mb=1, memory="5MB").path) == expected


def test_scratch_files_elsewhere_go_when_scratch_is_another(
    large_pack_store: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = large_pack_store
    with monkeypatch.context() as patch:
        killed_after(20, patch)
        with pytest.raises(KeyboardInterrupt):
            make(path, tmp_path / "p", shard_mb=1, memory="9MB", scratch=tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").glob("granary-pack-*/*.json")] == ["mark.json"]
    make(path, tmp_path / "p", shard_mb=1, memory="9MB", scratch=tmp_path / "b")
    assert f"left at {tmp_path / 'a'}/granary-pack-" in capsys.readouterr().out
    assert digests(tmp_path / "p") == expected
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def test_two_processes_do_not_make_one_pack(pack_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    (out / "unfinished").mkdir(parents=True)
    lock = os.open(out / "unfinished" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="is being made by another process"):
        make(pack_store, out)
    os.close(lock)
    assert make(pack_store, out).files


def test_a_disk_that_fills_up_is_said_and_nothing_is_lost(
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large_pack_store
    write, left = os.write, 20

    def full(file: int, data: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(store.packing.sink.os, "write", full)
        with pytest.raises(
            StoreError, match=r"disk of the scratch files, .*unfinished/scratch, is full\. What is finished is kept"
        ):
            make(path, tmp_path / "p", shard_mb=1, memory="9MB")
    assert digests(make(path, tmp_path / "p", shard_mb=1, memory="9MB").path) == expected
