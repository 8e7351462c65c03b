"""One place for the leases of a store whichever path names it, and files that no two of its writers share."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import store.leases
from store.errors import LostLeaseError
from store.format import part_name
from store.layout import SEAL, runs_folder
from store.leases import Lease, Leases, is_dead, is_here, myself
from store.writer import StoreWriter
from tests.test_leases import a_lease, filled, parts_of, tiny_meta
from tests.test_store import tree


def test_every_path_of_a_store_leads_to_one_folder_of_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk/s").mkdir(parents=True)
    (tmp_path / "home").symlink_to("disk")
    (tmp_path / "link").symlink_to("disk/s")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    (tmp_path / "to come").symlink_to("disk/new")
    expected = tmp_path / "disk/s.runs"
    monkeypatch.chdir(tmp_path / "disk/s")
    for path in ("../../link", "../../again", "../../home/s", "../s", ".", "inner/..", "../../link/../s", "../s/"):
        assert runs_folder(Path(path)) == expected, path
    monkeypatch.chdir(tmp_path)
    assert runs_folder(Path("to come")) == runs_folder(Path("disk/new")) == tmp_path / "disk/new.runs"
    (tmp_path / "circle").symlink_to("circle")
    assert runs_folder(tmp_path / "circle") == tmp_path / "circle.runs"


def test_a_part_is_held_against_those_who_reach_the_store_by_a_link(tmp_path: Path) -> None:
    meta = tiny_meta(4)
    writer = StoreWriter.open_or_create(tmp_path / "s", meta)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/link").symlink_to(tmp_path / "s")
    other = StoreWriter.open_or_create(tmp_path / "far/link", meta)
    with writer.claim(0) as lease:
        assert lease is not None
        assert other.leases.take(part_name(0)) is None
    assert sorted(file.name for file in (tmp_path / "far").iterdir()) == ["link"]


def test_a_store_is_made_where_a_link_leads_though_nothing_is_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("disk/new")
    filled(tmp_path / "link", tiny_meta(4))
    assert (tmp_path / "disk/new" / SEAL).is_file()
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["new", "new.runs"]
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".runs")] == []


def test_whoever_lost_a_part_touches_no_file_of_its_successor_even_under_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leases are cleared while a process is frozen before its rename, and numbers begin anew."""
    meta = tiny_meta(4)
    whole = filled(tmp_path / "whole", meta)
    writer, content = StoreWriter.open_or_create(tmp_path / "store", meta), parts_of(meta)[0]
    first = writer.leases.take(part_name(0))
    assert first is not None
    check, frozen, thaw, ends = Lease.check, threading.Event(), threading.Event(), list[Any]()

    def waits(self: Lease) -> None:
        if self is first and not frozen.is_set():
            frozen.set()
            assert thaw.wait(30)
        elif self is not first and not thaw.is_set():  # the successor's file is there and not renamed yet
            thaw.set()
            thread.join()
        check(self)

    def write() -> None:
        try:
            writer._put("prompts/part-00000.parquet", (b"1234",), first)
        except LostLeaseError as error:
            ends.append(error)

    monkeypatch.setattr(Lease, "check", waits)
    thread = threading.Thread(target=write)
    thread.start()
    assert frozen.wait(30)
    writer.leases.clear()
    second = Leases(writer.leases.folder).take(part_name(0))
    assert second is not None and second.generation == first.generation and second.tag != first.tag
    writer.write_part(0, content, second)
    assert len(ends) == 1  # who lost it was told, and nothing else happened
    assert writer.seal()
    assert tree(writer.path) == whole


def test_what_a_holder_left_half_written_is_removed_however_many_held_the_part_since(tmp_path: Path) -> None:
    meta = tiny_meta(4)
    writer = StoreWriter.open_or_create(tmp_path / "s", meta)
    tags = []
    for number in range(3):
        lease = Leases(writer.leases.folder).take(part_name(0))
        assert lease is not None
        tags.append(lease.tag)
        (writer.path / "prompts" / f".part-00000.parquet.{lease.tag}.tmp").write_bytes(b"torn")
        if number:
            lease.give_back()
        else:
            os.utime(lease.file, (1, 1))
    last = writer.leases.take(part_name(0))
    assert last is not None and last.followed[:3] == tuple(tags)
    writer.write_part(0, parts_of(meta)[0], last)
    assert not [name for name in tree(writer.path) if name.endswith(".tmp")]


def test_a_lease_of_a_time_to_come_does_not_last_until_then(tmp_path: Path) -> None:
    file = a_lease(tmp_path, "part-00000", processes="another boot:4026531836")
    leases, now = Leases(tmp_path), time.time()
    os.utime(file, (now + 3, now + 3))
    assert leases.take("part-00000") is None
    os.utime(file, (now + 3 * 86_400,) * 2)
    assert leases.holder("part-00000") is None
    assert leases.take("part-00000") is not None


def test_a_process_that_may_not_be_seen_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, where /proc is mounted with `hidepid`: only its silence ends its lease."""
    other = {**myself(), "pid": os.getppid(), "started": "7"}
    assert is_here(other) and is_dead(other)  # its number has another process now
    monkeypatch.setattr(store.leases, "_stat", lambda _pid: [])
    asked = list[int]()

    def kill(pid: int, number: int) -> None:
        asked.append(number)
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not is_here(other) and not is_dead(other)
    file = a_lease(tmp_path, "part-00000", **other)
    assert Leases(tmp_path).take("part-00000") is None
    os.utime(file, (1, 1))
    assert Leases(tmp_path).take("part-00000") is not None
    assert set(asked) == {0}
    monkeypatch.undo()
    assert is_dead({**other, "pid": 2**22 + 1}) and is_dead({**other, "pid": 10**30})  # no process has these numbers
