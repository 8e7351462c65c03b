"""Workers know which one they are, share a store without a plan made beforehand, and those that are left finish it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

import store.leases
from harvest import HarvestSettings, runs
from harvest.workers.cluster import TOGETHER, bundles
from harvest.workers.shares import WAITING, Staying, Worker, nothing_to_do, worker_of
from store.errors import UsageError
from store.format import part_name
from store.leases import Leases
from store.writer import StoreWriter
from tests.small_store import make_store, small_meta
from tests.test_leases import a_lease, parts_of, tiny_meta
from tests.test_store import tree

ROOT = Path(__file__).parent.parent
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9",
         "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "5"}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}


def settings(**words: Any) -> HarvestSettings:
    return HarvestSettings(out=Path("store"), **words)


@pytest.mark.parametrize(
    ("environ", "index", "count", "local"),
    [
        ({}, 0, 1, None),
        (TORCHRUN, 5, 8, 1),
        (SRUN, 2, 4, 0),
        (ARRAY, 3, 5, None),
        (ARRAY | BATCH_SCRIPT, 3, 5, None),
        (ARRAY | BATCH_SCRIPT | {"SLURM_NTASKS": "8"}, 3, 5, None),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "8"}, 0, 1, None),
        (ARRAY | SRUN, 3 * 4 + 2, 20, 0),
        (ARRAY | TORCHRUN, 3 * 8 + 5, 40, 1),
        (TORCHRUN | SRUN, 5, 8, 1),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, 0, 1, None),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, 2, 3, None),
        ({"RANK": "8", "WORLD_SIZE": "8"}, 0, 1, None),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "8"}, 0, 1, None),
        ({"RANK": "one", "WORLD_SIZE": "8"}, 0, 1, None),
    ],
)
def test_what_started_a_process_says_which_worker_it_is(
    environ: dict[str, str], index: int, count: int, local: int | None
) -> None:
    worker = worker_of(settings(), environ)
    assert (worker.index, worker.count, worker.local) == (index, count, local)
    assert bool(worker.by) == bool(worker.name) == (count > 1)


def test_a_flag_wins_over_what_started_the_process_and_parts_by_hand_over_both() -> None:
    worker = worker_of(settings(worker="1/3"), ARRAY | TORCHRUN)
    assert (worker.index, worker.count, worker.local) == (1, 3, 1)
    assert worker_of(settings(parts="0-3"), ARRAY | TORCHRUN).count == 1
    with pytest.raises(UsageError, match="not both"):
        settings(parts="0-3", worker="1/3")


@given(count=st.integers(1, 7), parts=st.sets(st.integers(0, 40)).map(sorted))
def test_every_worker_comes_to_every_part_and_shares_are_disjoint(count: int, parts: list[int]) -> None:
    workers = [Worker(index, count) for index in range(count)]
    assert sorted(part for worker in workers for part in worker.share(parts)) == parts
    for worker in workers:
        assert sorted(worker.share(parts) + worker.rest(parts)) == parts
        assert worker.share(parts) == sorted(worker.share(parts))
    assert Worker(1, 3).rest(range(9)) == [8, 5, 2, 6, 3, 0]


def test_a_worker_takes_the_device_of_its_number_where_it_sees_several() -> None:
    asked = settings()
    assert Worker(5, 8, local=1).placed(asked, devices=4).device == "cuda:1"
    assert Worker(5, 8, local=5).placed(asked, devices=4).device == "cuda:1"
    assert Worker(5, 8, local=1).placed(settings(device="cuda"), devices=4).device == "cuda:1"
    assert Worker(5, 8, local=1).placed(settings(device="cuda:3"), devices=4).device == "cuda:3"
    for alone in (
        Worker(5, 8, local=1).placed(asked, 1),
        Worker(5, 8, local=1).placed(asked, 0),
        Worker(5, 8).placed(asked, 4),
    ):
        assert alone is asked
    chosen = settings(device="cuda:3")
    assert Worker(5, 8, local=1).placed(chosen, 4) is chosen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dask": "local"}, "write local:2"),
        ({"dask": "local:0"}, "write local:2"),
        ({"dask": "here:8786"}, "tcp://HOST:8786"),
        ({"dask": "local:2", "worker": "0/2"}, "leave out --worker"),
        ({"lease_seconds": 0.2}, "at least 1"),
        ({"worker": "4/4"}, "from 0 to n - 1"),
        ({"worker": f"0/{'9' * 5000}"}, "from 0 to n - 1"),
    ],
)
def test_settings_of_workers_that_cannot_be_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(**words)


def test_one_of_those_that_are_done_stays_and_another_may_when_it_has_gone(tmp_path: Path) -> None:
    first, second = Leases(tmp_path), Leases(tmp_path)
    assert [Staying(first, "all")(), Staying(first, "none")()] == [True, False]
    with Staying(first, "one") as stays, Staying(second, "one") as other:
        assert [stays(), other(), stays(), other()] == [True, False, True, False]
    with Staying(second, "one") as other:
        assert other()
    assert first.holder(WAITING) is None
    with Staying(first, "one") as stays, Staying(second, "one") as other:
        assert stays()
        stays.ends()  # it has found a part to draw
        assert other() and not stays()


def test_a_worker_that_does_not_stay_leaves_what_others_hold_and_fills_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import tqdm

    from harvest import fill
    from harvest.planning.plan import Plan
    from harvest.workers.progress import Progress

    meta = tiny_meta(20)
    parts, plan = parts_of(meta), object.__new__(Plan)
    object.__setattr__(plan, "meta", meta)
    monkeypatch.setattr(fill, "fill_part", lambda _plan, part, *_: parts[part])
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    a_lease(writer.leases.folder, part_name(3))
    progress = Progress()
    worker = Worker(0, 2)
    with tqdm(total=12, disable=True) as bar:
        line = fill._Line(plan, writer, bar, progress, Staying(writer.leases, "none"))
        assert line.fill(worker.share(range(5)), worker.rest(range(5))) == 16
        assert bar.total == 16
    assert writer.missing() == [3]
    assert progress.parts == [0, 2, 4, 1]


def test_a_worker_that_comes_when_all_is_done_or_held_need_not_load_the_model(tmp_path: Path) -> None:
    made = make_store(tmp_path / "finished")
    done = HarvestSettings(out=made.path, layers="0", batch_size=4)
    runs.keep_settings(done, made.store.meta, False)
    worker = Worker(1, 4, by="torchrun")
    assert nothing_to_do(done, worker) == "the store is finished"
    assert nothing_to_do(done, Worker()) is None
    assert nothing_to_do(HarvestSettings(out=made.path, layers="1", batch_size=4), worker) is None
    meta = small_meta()
    writer = StoreWriter.open_or_create(tmp_path / "begun", meta)
    begun = HarvestSettings(out=writer.path, batch_size=4)
    runs.keep_settings(begun, meta, False)
    assert nothing_to_do(begun, worker) is None
    for part in range(meta.n_parts):
        a_lease(writer.leases.folder, part_name(part))
    assert nothing_to_do(begun, worker) is None  # it may be the one that stays
    a_lease(writer.leases.folder, WAITING)
    assert nothing_to_do(begun, worker) == (
        "all of the 3 parts that are left are held by others, and --wait one leaves them to those"
    )


def test_a_lease_ends_after_the_time_that_it_names_whoever_asks(tmp_path: Path) -> None:
    patient, hasty = Leases(tmp_path, 600.0), Leases(tmp_path, 2.0)
    assert patient.take("part-00000") is not None and hasty.take("part-00001") is not None
    for name in ("part-00000", "part-00001"):
        file = tmp_path / f"{name}.1.json"
        moment = file.stat().st_mtime - store.leases.LEASE_SECONDS
        os.utime(file, (moment - 5, moment - 5))
    assert hasty.take("part-00000") is None
    assert patient.take("part-00001") is not None


def test_parts_are_bundled_so_that_every_worker_gets_some_several_times() -> None:
    assert [task.numbers for task in bundles(range(5), 2)] == [(0,), (1,), (2,), (3,), (4,)]
    assert {len(task.numbers) for task in bundles(range(4000), 3)} == {TOGETHER}
    assert [part for task in bundles(range(50), 3) for part in task.numbers] == list(range(50))


def said_by(*words: str, **environ: str) -> str:
    """What a program says that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environ,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_four_workers_of_which_one_is_killed_and_one_is_stopped_leave_the_store_of_one(tmp_path: Path) -> None:
    said = said_by("tests.stopped_workers", "--folder", str(tmp_path))
    assert re.search(r"finished by two of four workers in [\d.]+ s, byte-equal", said), said
    assert "dead: its process is no more" in said and " stopped " in said


def blocks(kind: str) -> list[str]:
    """The listings of one kind of the page about clusters."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)


def test_the_scripts_of_the_page_about_clusters_are_what_shell_and_harvest_take() -> None:
    scripts = blocks("bash")
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (words,) = re.findall(r"-m harvest (.*)", script.replace("\\\n", " "))
        found = tyro.cli(HarvestSettings, args=words.split())
        assert (found.images, found.threads, found.out) == (60000, 8, Path("/shared/store"))


def test_the_script_for_dask_jobqueue_asks_for_a_harvest_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HarvestSettings] = []
    cluster = mock.Mock(scheduler_address="tcp://192.0.2.1:8786")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", mock.Mock(SLURMCluster=mock.Mock(return_value=cluster)))
    monkeypatch.setattr("harvest.run", asked.append)
    (script,) = blocks("python")
    exec(compile(script, "clusters.md", "exec"), {"__name__": "__main__"})
    assert [(each.dask, each.images) for each in asked] == [("tcp://192.0.2.1:8786", 60000)]
    assert cluster.scale.call_args.kwargs == {"jobs": 16}


@pytest.mark.slow
def test_four_pythons_of_which_one_is_killed_and_one_is_stopped_leave_the_store_of_one(tmp_path: Path) -> None:
    said = said_by(
        "tests.stopped_workers", "--fresh", "--parts", "16", "--lease-seconds", "10", "--folder", str(tmp_path)
    )
    assert "byte-equal to the store of one" in said


TINY = ("--layers", "1", "--streams", "txt", "--num-inference-steps", "1", "--resolution", "8", "--max-sequence-length", "8",
        "--pictures", "none", "--images", "320", "--threads", "1")  # fmt: skip


@pytest.mark.slow
def test_torchrun_and_dask_and_an_array_fill_the_store_that_one_worker_fills(tmp_path: Path) -> None:
    said_by("harvest", *TINY, "--out", str(tmp_path / "alone"))
    whole = tree(tmp_path / "alone")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "harvest")
    said = said_by(*torchrun, *TINY, "--out", str(tmp_path / "torchrun"))
    assert {"worker 0/2, by torchrun (RANK, WORLD_SIZE)", "worker 1/2, by torchrun (RANK, WORLD_SIZE)"} <= set(
        said.splitlines()
    )
    assert tree(tmp_path / "torchrun") == whole
    said = said_by("harvest", *TINY, "--out", str(tmp_path / "dask"), "--dask", "local:2")
    assert "320 images harvested" in said and "the store is finished: 320 images" in said
    assert tree(tmp_path / "dask") == whole
    said = said_by("harvest", *TINY, "--out", str(tmp_path / "array"), **ARRAY)
    assert "worker 3/5, by a SLURM array (SLURM_ARRAY_TASK_ID)" in said
    assert tree(tmp_path / "array") == whole
    said = said_by("harvest", *TINY, "--out", str(tmp_path / "array"), **ARRAY)
    assert said.splitlines()[-1].endswith("nothing is left for this worker: the store is finished")
