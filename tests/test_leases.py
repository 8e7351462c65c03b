"""Processes that share a store agree on who writes what: the dead lose their parts, the slow cannot commit what they lost."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import store.leases
from store.errors import LostLeaseError
from store.format import StoreMeta, part_name
from store.layout import SEAL, runs_folder
from store.leases import Lease, Leases
from store.writer import Part, StoreWriter
from tests import lease_workers
from tests.small_store import small_meta, small_part
from tests.test_store import tree

SECONDS = 0.5
"""after which a silent worker loses its part, in these tests"""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.lease_workers"])


def tiny_meta(n_images: int = 12) -> StoreMeta:
    return small_meta(n_images, sites=("img_0",), steps=(0,), d_model=4, pictures="none")


def parts_of(meta: StoreMeta) -> dict[int, Part]:
    rng = np.random.default_rng(0)
    values = {
        (site, step, point): rng.normal(size=(64, meta.tokens[site.stream].kept, meta.d_model)).astype(
            meta.carrier.logical
        )
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }
    words = [f"prompt {i}" for i in range(meta.n_images)]
    return {part: small_part(meta, part, values, words) for part in range(meta.n_parts)}


def filled(path: Path, meta: StoreMeta) -> dict[str, bytes]:
    """The bytes of a store that one undisturbed worker writes."""
    writer = StoreWriter.open_or_create(path, meta)
    for part, content in parts_of(meta).items():
        writer.write_part(part, content)
    assert writer.seal()
    return tree(path)


@contextmanager
def process(work: Callable[..., None], *before: Any, after: tuple[Any, ...] = ()) -> Iterator[tuple[int, Connection]]:
    """A process that does `work(*before, pipe, *after)`: its id and our end of its pipe."""
    ours, theirs = PROCESSES.Pipe()
    worker: BaseProcess = PROCESSES.Process(target=work, args=(*before, theirs, *after))
    worker.start()
    theirs.close()
    assert worker.pid is not None
    try:
        yield worker.pid, ours
    finally:
        worker.kill()
        worker.join()
        ours.close()


def together(work: Callable[..., None], workers: int, *words: Any) -> list[Any]:
    """What each of some processes that do `work(*words, barrier, pipe)` at once has to say."""
    ready = PROCESSES.Barrier(workers, timeout=60)
    pipes = [PROCESSES.Pipe() for _ in range(workers)]
    all_of_them = [PROCESSES.Process(target=work, args=(*words, ready, theirs)) for _, theirs in pipes]
    for each in all_of_them:
        each.start()
    said = [ours.recv() for ours, _ in pipes]
    for each in all_of_them:
        each.join()
    for pair in pipes:
        for end in pair:
            end.close()
    return said


def a_lease(folder: Path, name: str, generation: int = 1, **about: Any) -> Path:
    """The file of a lease as another process would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.{generation}.json"
    file.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1, "started": "0", **about}))
    return file


def taken_after(leases: Leases, name: str) -> tuple[Lease, float]:
    """The lease, when it can be had, and the seconds that this took."""
    begun = time.monotonic()
    while (lease := leases.take(name)) is None:
        assert time.monotonic() - begun < 30
        time.sleep(0.01)
    return lease, time.monotonic() - begun


def test_the_part_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "leases")
    with process(lease_workers.hold, leases.folder, "part-00000", after=(60.0,)) as (pid, pipe):
        assert pipe.recv() is True
        assert leases.take("part-00000") is None
        assert leases.holder("part-00000") == f"process {pid} on {os.uname().nodename}"
        os.kill(pid, signal.SIGKILL)
        lease, seconds = taken_after(leases, "part-00000")
        assert lease.generation == 2
        assert seconds < 10  # and not the 60 that a silent process has


def test_a_number_that_another_process_has_now_is_not_taken_for_the_dead_one(tmp_path: Path) -> None:
    here = store.leases._processes()
    a_lease(tmp_path, "part-00000", pid=os.getpid(), started="1", processes=here)
    assert Leases(tmp_path).take("part-00000") is not None


def test_a_lease_of_another_machine_is_honoured_until_it_expires(tmp_path: Path) -> None:
    file = a_lease(tmp_path, "part-00003", processes="another boot:4026531836")
    leases = Leases(tmp_path)
    assert leases.take("part-00003") is None
    assert leases.holder("part-00003") == "process 1 on elsewhere"
    long_ago = time.time() - store.leases.LEASE_SECONDS
    os.utime(file, (long_ago + 5, long_ago + 5))
    assert leases.take("part-00003") is None
    os.utime(file, (long_ago - 1, long_ago - 1))
    lease = leases.take("part-00003")
    assert lease is not None
    assert lease.generation == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"processes": 7}'])
def test_a_lease_file_that_says_nothing_is_judged_by_its_age(tmp_path: Path, content: str) -> None:
    file = a_lease(tmp_path, "part-00000")
    file.write_text(content)
    leases = Leases(tmp_path)
    assert leases.take("part-00000") is None
    assert leases.holder("part-00000") == "another process"
    os.utime(file, (1, 1))
    assert leases.take("part-00000") is not None


def test_a_lease_that_was_given_back_can_be_taken_and_lost_leases_stay_lost(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    first = leases.take("part-00000")
    assert first is not None
    leases.give_back(first)
    second = Leases(tmp_path).take("part-00000")
    assert second is not None
    assert second.generation == first.generation + 1
    second.check()
    with pytest.raises(LostLeaseError, match="part-00000 was taken over by another process"):
        first.check()
    leases.give_back(first)  # changes nothing
    second.check()


def test_a_process_that_lives_keeps_its_part_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.leases, "LEASE_SECONDS", 0.3)
    with process(lease_workers.hold, tmp_path, "part-00000", after=(0.3,)) as (_, pipe):
        assert pipe.recv() is True
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert Leases(tmp_path).take("part-00000") is None
            time.sleep(0.05)


@pytest.mark.parametrize("pause_at", [0, 2, 4])
def test_a_worker_that_was_stopped_loses_its_part_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_at: int
) -> None:
    monkeypatch.setattr(store.leases, "LEASE_SECONDS", SECONDS)
    meta = tiny_meta(4)
    whole = filled(tmp_path / "whole", meta)
    path, content = tmp_path / "store", parts_of(meta)[0]
    with process(lease_workers.write_a_part, path, meta, content, after=(SECONDS, pause_at)) as (pid, pipe):
        assert pipe.recv() == "paused"  # it has written some files, and the beginning of another
        assert any(name.endswith(".tmp") for name in tree(path)) or pause_at == 4
        os.kill(pid, signal.SIGSTOP)
        writer = StoreWriter.open_or_create(path, meta)
        lease, seconds = taken_after(writer.leases, part_name(0))
        assert seconds > SECONDS / 2
        writer.write_part(0, content, lease)
        assert {name: data for name, data in whole.items() if name != SEAL} == tree(path)
        os.kill(pid, signal.SIGCONT)
        pipe.send("go on")
        kind, message = pipe.recv()
        assert kind == "LostLeaseError", message
        assert "nothing of it was committed here" in message
    writer.leases.give_back(lease)
    assert writer.seal()
    assert tree(path) == whole


def test_one_that_lost_its_part_between_the_last_look_and_the_rename_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tiny_meta(4)
    whole = filled(tmp_path / "whole", meta)
    writer, content = StoreWriter.open_or_create(tmp_path / "store", meta), parts_of(meta)[0]
    lease = writer.leases.take(part_name(0))
    assert lease is not None
    check, taken = Lease.check, []

    def overtaken(self: Lease) -> None:
        check(self)
        if self is lease and not taken:
            taken.append(self)
            os.utime(self.file, (1, 1))
            StoreWriter.open_or_create(writer.path, meta).write_part(0, content)

    monkeypatch.setattr(Lease, "check", overtaken)
    with pytest.raises(LostLeaseError):
        writer.write_part(0, content, lease)
    assert writer.seal()
    assert tree(writer.path) == whole


def test_half_written_files_of_a_dead_process_are_removed_by_its_successor(tmp_path: Path) -> None:
    meta = tiny_meta(4)
    whole = filled(tmp_path / "whole", meta)
    path, content = tmp_path / "store", parts_of(meta)[0]
    with process(lease_workers.write_a_part, path, meta, content, after=(60.0, 1)) as (pid, pipe):
        assert pipe.recv() == "paused"
        os.kill(pid, signal.SIGKILL)
        torn = [name for name in tree(path) if name.endswith(".tmp")]
        assert torn
        writer = StoreWriter.open_or_create(path, meta)
        lease, _ = taken_after(writer.leases, part_name(0))
    writer.write_part(0, content, lease)
    assert writer.seal()
    assert tree(path) == whole


def test_of_several_processes_that_want_a_part_exactly_one_gets_it(tmp_path: Path) -> None:
    rounds = 60
    for number in range(rounds):  # free, given back, left by a dead process, or silent for too long
        if number % 4 == 1:
            a_lease(tmp_path, part_name(number), released=True)
        if number % 4 == 2:
            a_lease(tmp_path, part_name(number), processes=store.leases._processes(), pid=2**22 + 1)
        if number % 4 == 3:
            os.utime(a_lease(tmp_path, part_name(number)), (1, 1))
    won = together(lease_workers.race, 4, tmp_path, rounds)
    assert Counter(number for each in won for number in each) == Counter(range(rounds))
    assert sum(map(bool, won)) > 1, "one process won every race: they did not run at the same time"


def test_processes_fill_a_store_together_and_each_part_is_written_once(tmp_path: Path) -> None:
    meta = tiny_meta(32)
    whole = filled(tmp_path / "whole", meta)
    parts = parts_of(meta)
    for number in range(3):
        path = tmp_path / f"store-{number}"
        done = together(lease_workers.fill, 3, path, meta, parts)
        assert sorted(part for each in done for part in each) == list(range(8)), done
        assert tree(path) == whole
        assert not (runs_folder(path) / "leases").exists()


def test_three_harvests_without_flags_draw_each_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    from harvest import fill
    from harvest.planning.plan import Plan

    meta = tiny_meta(48)
    parts, drawn = parts_of(meta), []
    plan = object.__new__(Plan)  # without a model: drawing is made up here
    object.__setattr__(plan, "meta", meta)

    def draw(plan: Any, part: int, advance: Callable[[int], object], *_: object) -> Part:
        drawn.append(part)
        time.sleep(0.01)
        advance(4)
        return parts[part]

    def harvest() -> None:
        writer = StoreWriter.open_or_create(tmp_path / "store", meta)
        with tqdm(total=meta.n_images, disable=True) as bar:
            fill._Line(plan, writer, bar).fill(writer.missing())
        assert writer.seal()

    monkeypatch.setattr(fill, "fill_part", draw)
    monkeypatch.setattr(fill, "WAIT_SECONDS", 0.02)
    workers = [threading.Thread(target=harvest) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(drawn) == list(range(12))
    assert tree(tmp_path / "store") == filled(tmp_path / "whole", meta)


def test_a_harvest_waits_for_a_part_that_it_lost_and_takes_it_over_from_a_successor_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import tqdm

    from harvest import fill
    from harvest.planning.plan import Plan

    meta = tiny_meta(12)
    whole = filled(tmp_path / "whole", meta)
    parts, drawn, write = parts_of(meta), [], StoreWriter.write_part
    plan = object.__new__(Plan)
    object.__setattr__(plan, "meta", meta)

    def draw(plan: Any, part: int, advance: Callable[[int], object], *_: object) -> Part:
        drawn.append(part)
        return parts[part]

    def lose_the_last_once(self: StoreWriter, part: int, content: Part, lease: Lease) -> None:
        if part == 2 and drawn.count(2) == 1:
            os.utime(a_lease(self.leases.folder, part_name(2), generation=2), (1, 1))
            lease.check()
        write(self, part, content, lease)

    monkeypatch.setattr(fill, "fill_part", draw)
    monkeypatch.setattr(StoreWriter, "write_part", lose_the_last_once)
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    with tqdm(total=meta.n_images, disable=True) as bar:
        assert fill._Line(plan, writer, bar).fill([0, 1, 2]) == 12
    assert drawn == [0, 1, 2, 2]
    assert writer.seal()
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize(
    "odd",
    [{"pid": None}, {"pid": "x"}, {"started": None}, {"seconds": float("nan")}, {"seconds": -1}, {"seconds": 10**400}],
)
def test_a_lease_that_says_odd_things_is_one_that_says_nothing(tmp_path: Path, odd: dict[str, Any]) -> None:
    leases = Leases(tmp_path)
    here = {} if "seconds" in odd else {"processes": store.leases.myself()["processes"]}
    file = a_lease(tmp_path, "part-00000", **here, **odd)
    assert leases.take("part-00000") is None
    os.utime(file, (1, 1))
    assert leases.take("part-00000") is not None


def test_leases_survive_that_another_process_removes_them_all(tmp_path: Path) -> None:
    wrong: list[BaseException] = []
    over = threading.Event()

    def take() -> None:
        leases = Leases(tmp_path / "leases")
        try:
            while not over.is_set():
                lease = leases.take("part-00000")
                leases.holder("part-00000")
                if lease is not None:
                    leases.give_back(lease)
        except BaseException as error:
            wrong.append(error)

    takers = [threading.Thread(target=take) for _ in range(3)]
    for each in takers:
        each.start()
    for _ in range(150):
        Leases(tmp_path / "leases").clear()
        time.sleep(0.002)
    over.set()
    for each in takers:
        each.join()
    assert not wrong
    Leases(tmp_path / "leases").clear()
    assert list(tmp_path.iterdir()) == []
