"""A pack made by several processes, or by the workers of a dask cluster, has the bytes of one made alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from store import Site, open_store
from store.errors import MismatchError, NonFiniteError, UnreachableError, UsageError
from store.pack import PackSettings, run
from store.packing import cluster
from store.packing.cluster import ClusterCrew, Job
from store.packing.courier import probe, sources_of
from store.packing.plan import PackPlan
from store.packing.tasks import Task
from store.shards import open_pack
from tests.test_pack import digests
from tests.toy_stores import toy_store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store, and the pack that one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    path = toy_store(folder / "s", n_images=60, sites=("img_0", "txt_0"), img_tokens=256, d_model=16, chunk_images=16)
    run(PackSettings(store=path, out=folder / "p", shard_mb=1))
    return path, digests(folder / "p")


def test_two_processes_write_the_bytes_of_one(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, expected = alone
    run(PackSettings(store=path, out=tmp_path / "p", shard_mb=1, memory="12MB", workers=2))
    assert digests(tmp_path / "p") == expected
    said = capsys.readouterr().out
    assert "runs: " in said and "6 MB for each of 2 workers" in said and said.count("MB + ") >= 1


def test_the_workers_of_a_scheduler_write_the_bytes_of_one(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distributed

    path, expected = alone
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None, host="127.0.0.1",
        memory_limit=None,
    ) as there:  # fmt: skip
        settings = PackSettings(
            store=path, out=tmp_path / "p", shard_mb=1, memory="6MB", scheduler=there.scheduler_address
        )
        run(settings)
        assert digests(tmp_path / "p") == expected
        read = cluster.Hands.do

        def spoiled(self: Any, task: Any) -> Any:
            raise NonFiniteError("img_0 mlp_in, step 0, image 3, token 5 is NaN")

        monkeypatch.setattr(cluster.Hands, "do", spoiled)
        with pytest.raises(NonFiniteError, match="image 3, token 5 is NaN"):
            run(replace(settings, out=tmp_path / "q"))
        monkeypatch.setattr(cluster.Hands, "do", read)
        there.scale(0)
        end = time.monotonic() + 20
        while there.scheduler.workers and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(UsageError, match=r"has no worker.*PYTHONPATH=CHECKOUT dask worker tcp://"):
            run(replace(settings, out=tmp_path / "q"))


def test_a_scheduler_that_does_not_answer_is_said_at_once(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.CONNECT_SECONDS < 10
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UnreachableError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        run(PackSettings(store=alone[0], out=tmp_path / "p", scheduler="tcp://127.0.0.1:9"))


def test_a_worker_of_another_version_or_without_our_files_is_refused(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    settings = PackSettings(store=alone[0], out=tmp_path / "p", scheduler="tcp://127.0.0.1:9")
    mark = tmp_path / "p" / "unfinished" / "plan.json"
    mark.parent.mkdir(parents=True)
    mark.write_text("{}")
    own = sources_of(ROOT / "store")
    crew = ClusterCrew(Job(settings, 10**9, "key", own), lambda _count: None, len)
    true = probe([str(mark), str(alone[0] / "seal.json")])
    assert true["sources"] == own and Path(true["where"]) == ROOT / "store"
    for answer, reason in (
        (
            {"sources": None, "error": "No module named 'store'"},
            r"worker tcp://w:1 cannot import .*No module named 'store'",
        ),
        (
            {"sources": "0" * 64},
            r"tcp://w:1 has loaded another version of Granary, at .*store: restart the workers.*same packages",
        ),
        ({"files": {**true["files"], str(mark): None}}, r"does not see .*plan\.json: .*under the same paths"),
        ({"files": {**true["files"], str(mark): "0"}}, r"sees another file at .*plan\.json"),
    ):
        crew.client = SimpleNamespace(run=lambda _probe, _marks, answer=answer: {"tcp://w:1": {**true, **answer}})
        with pytest.raises(MismatchError, match=reason):
            crew._refuse_strangers()
    crew.client = SimpleNamespace(run=lambda probe, marks: {"tcp://w:1": probe(marks)})
    crew._refuse_strangers()


def test_a_job_finds_out_for_itself_that_it_came_to_the_wrong_place(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    settings = PackSettings(store=alone[0], out=tmp_path / "p")
    with pytest.raises(MismatchError, match="another version"):
        cluster._new_hands(Job(settings, 10**9, "key", "0" * 64))
    with pytest.raises(MismatchError, match="another store"):
        cluster._new_hands(Job(settings, 10**9, "key", sources_of(ROOT / "store")))


def test_a_cluster_that_lost_its_workers_is_given_up(
    alone: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PackSettings(store=alone[0], out=tmp_path / "p", scheduler="tcp://127.0.0.1:9")
    crew = ClusterCrew(Job(settings, 10**9, "key", cluster.SOURCES), lambda _count: None, len)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "ALONE_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.05)
    never = SimpleNamespace(key="k", add_done_callback=lambda _call: None)
    crew.client = SimpleNamespace(
        scheduler_info=lambda n_workers: {"workers": {}}, submit=lambda *_, pure: never, run=lambda *_: time.sleep(1)
    )
    with pytest.raises(UnreachableError, match=r"all workers are gone.*dask worker tcp://"):
        list(crew.do([Task("whole", Site.parse("img_0"))], 1))
    for failure in (OSError("closed"), RuntimeError("loop is closed"), TimeoutError("late")):
        crew.client.scheduler_info = mock.Mock(side_effect=failure)
        with pytest.raises(UnreachableError, match=str(failure)):
            crew._workers()
    (tmp_path / "p" / "unfinished").mkdir(parents=True)
    (tmp_path / "p" / "unfinished" / "plan.json").touch()
    with pytest.raises(UnreachableError, match="no answer within"):
        crew._refuse_strangers()
    late = SimpleNamespace(exception=lambda: ModuleNotFoundError("No module named 'store'"))
    with pytest.raises(MismatchError, match=r"came late cannot import.*No module named 'store'.*restart"):
        crew._result(late, Task("whole", Site.parse("img_0")))


def test_a_worker_holds_one_room_whatever_its_threads_and_gives_it_back(
    alone: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    settings = PackSettings(store=alone[0], out=tmp_path / "p")
    job = cluster.job_of(PackPlan(open_store(alone[0]), settings), 10**9)
    with cluster._held.hands(job) as hands:
        rooms = [hands._room(100)]
    (other := threading.Thread(target=lambda: rooms.append(hands._room(100)))).start()
    other.join()
    assert np.shares_memory(*rooms)
    with cluster._held.hands(job) as again:
        cluster.end(job)  # a task is being done: the memory goes with its end
        assert again is hands and len(cluster._held) == 1
    assert len(cluster._held) == 0
    with cluster._held.hands(job) as anew:
        assert anew is not hands
    cluster.end(job)
    assert len(cluster._held) == 0


def start(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "store", "pack", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(pid: int) -> list[int]:
    """The worker processes that any thread of a process started."""
    found = [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = toy_store(tmp_path / "s", n_images=600, sites=("img_0",), img_tokens=256, d_model=64, chunk_images=16)
    run(PackSettings(store=path, out=tmp_path / "p", shard_mb=1))
    out = tmp_path / "q"
    making = start([str(path), "--out", str(out), "--shard-mb", "1", "--memory", "24MB", "--workers", "2"])
    killed: list[int] = []

    def kill() -> None:
        while making.poll() is None and len(killed) < 2:
            if len(list(out.glob("img_0/shard*"))) > 10 * len(killed) + 3:
                worker = workers_of(making.pid)[-1]
                os.kill(worker, signal.SIGKILL)  # only what this test started
                killed.append(worker)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    _, said = making.communicate(timeout=120)
    killer.join()
    assert making.returncode == 0, said
    assert killed and digests(out) == digests(tmp_path / "p")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_that_is_killed_for_good_leaves_no_process_and_goes_on(tmp_path: Path, workers: int) -> None:
    path = toy_store(
        tmp_path / "s", n_images=300, sites=("img_0", "img_1"), img_tokens=256, d_model=64, chunk_images=16
    )
    run(PackSettings(store=path, out=tmp_path / "p", shard_mb=1))
    out = tmp_path / "q"
    words = [str(path), "--out", str(out), "--shard-mb", "1", "--memory", "24MB", "--workers", str(workers)]
    for shards in (1, 9, 20):
        making = start(words)
        while making.poll() is None and len(list(out.glob("img_*/shard*"))) < shards:
            time.sleep(0.005)
        there = workers_of(making.pid) if making.poll() is None else []
        making.kill()
        making.communicate()
        end = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in there) and time.monotonic() < end:
            time.sleep(0.05)
        assert not [pid for pid in there if Path(f"/proc/{pid}").exists()]
    assert (out / "unfinished").exists()
    _, said = (making := start(words)).communicate(timeout=120)
    assert making.returncode == 0, said
    assert digests(out) == digests(tmp_path / "p")
    open_pack(out).verify()
