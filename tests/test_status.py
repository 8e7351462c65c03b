"""`status` says who fills a store, how fast and until when, of any store in any state, and changes nothing."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import store.leases
from harvest import HarvestSettings, runs
from harvest.__main__ import COMMANDS
from harvest.workers import roster
from harvest.workers.progress import Progress, workers_folder
from harvest.workers.roster import Clock
from harvest.workers.shares import Worker
from harvest.workers.status import describe, duration, look
from store.command import program
from store.errors import ForeignError
from store.files import write_json
from store.format import part_name
from store.layout import SEAL, STORE_COMMIT, part_commit, runs_folder
from store.writer import StoreWriter
from tests.small_store import SmallStore
from tests.test_leases import a_lease, parts_of, tiny_meta
from tests.test_store import tree

SECONDS = {"seconds": 100.0, "part_seconds": 20.0, "idle_seconds": 1.0}


def begun(path: Path, parts: int = 8, committed: int = 3) -> StoreWriter:
    """A store of parts of four images, some of which are there."""
    meta = tiny_meta(4 * parts)
    writer, content = StoreWriter.open_or_create(path, meta), parts_of(meta)
    for part in range(committed):
        writer.write_part(part, content[part])
    return writer


def a_worker(path: Path, pid: int, age: float = 1.0, host: str = "node7", **facts: Any) -> None:
    """A record as a worker of another machine would leave it, `age` seconds old."""
    whole = {"host": host, "pid": pid, "started": "0", "processes": f"{host}:1", "worker": f"{pid}/9", "by": "srun",
             "device": "cpu", "state": "drawing", "part": None, "part_drawn": 0, "parts": "", "images": 0, "drawn": 0,
             "images_per_second": None, "said": "", "silent_after": 60.0, **SECONDS, **facts}  # fmt: skip
    folder = workers_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{pid}.json"
    file.write_text(json.dumps(whole))
    os.utime(file, (time.time() - age,) * 2)


def holds(path: Path, pid: int, part: int, age: float = 1.0, host: str = "node7") -> None:
    file = a_lease(
        runs_folder(path) / "leases", part_name(part), host=host, pid=pid, processes=f"{host}:1", seconds=60.0
    )
    os.utime(file, (time.time() - age,) * 2)


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def test_it_says_who_draws_what_and_when_all_will_be_done(tmp_path: Path) -> None:
    path = begun(tmp_path / "s").path
    a_worker(path, 0, part=3, part_drawn=2, images_per_second=0.5, parts="0-1", images=8, device="NVIDIA H100")
    a_worker(path, 1, part=5, part_drawn=1, images_per_second=0.25, parts="2", images=4)
    for pid, part in ((0, 3), (1, 5), (1, 4)):
        holds(path, pid, part)
    text = describe(look(path))
    assert "37.5 %\n12 of 32 images: 3 of 8 parts, 3 held, 2 not begun\n" in text
    assert "2 workers, 0.75 images/s, time left 23 s, until " in text  # (32 - 12 - 3) / 0.75
    assert "0/9     node7, process 0, NVIDIA H100" in text
    assert [word in row_of(text, "0/9") for word in ("drawing", "3 (2 of 4)", " 8 ", "0.5", " s ago")] == [True] * 5
    assert "5 (1 of 4), writes 4" in row_of(text, "1/9")


def test_it_tells_the_silent_the_lost_the_waiting_the_hung_and_the_ended_apart(tmp_path: Path) -> None:
    path = begun(tmp_path / "s").path
    a_worker(path, 0, age=45, part=3, images_per_second=1.0)  # its record is old and its lease is not
    holds(path, 0, 3, age=2)
    a_worker(path, 1, age=300, part=4, images_per_second=1.0)
    holds(path, 1, 4, age=300)
    a_worker(path, 2, state="waiting", said="waiting for part 3, held by process 0 on node7")
    a_worker(path, 3, part=5, idle_seconds=1200, images_per_second=1.0)
    a_worker(path, 4, age=4000, state="ended", parts="0", images=4)
    a_worker(path, 5, age=4000, state="failed", said="no space is left")
    a_worker(path, 6, state="loading")
    holds(path, 7, 7)  # of a program that leaves no record
    text = describe(look(path))
    expected = {"0/9": "drawing", "1/9": "silent, has lost part 4", "2/9": "for part 3, held by process 0 on node7",
                "3/9": "no image for 2", "4/9": "ended", "5/9": "failed: no space is left",
                "6/9": "loading the model", "-": "holds a part"}  # fmt: skip
    assert {name: what in row_of(text, name) for name, what in expected.items()} == dict.fromkeys(expected, True), text
    assert re.search(r"no image for 2\d min \d\d s", row_of(text, "3/9"))
    assert row_of(text, "-").partition("holds a part")[2].split()[0] == "7"
    assert "5 workers, 1 of them drawing, 1 images/s" in text
    assert "3 of 8 parts, 2 held, 3 not begun" in text


def test_this_process_is_alive_and_one_of_this_machine_that_is_no_more_is_dead(tmp_path: Path) -> None:
    writer = begun(tmp_path / "s")
    with Progress.of(writer.path, Worker(0, 2, by="--worker")) as progress:
        progress.ready("cpu")
        lease = writer.leases.take(part_name(3))
        assert lease is not None
        progress.takes(3)
        progress.draws(2)
        progress._write()
        (seen,) = look(writer.path).roster.workers
        assert (seen.life, seen.holds, seen.facts["part_drawn"]) == ("alive", (3,), 2)
        a_worker(writer.path, 2**22 + 1, host=os.uname().nodename, processes=store.leases.myself()["processes"])
        assert [each.life for each in look(writer.path).roster.workers] == ["dead", "alive"]
        writer.leases.give_back(lease)
    assert sorted(each.life for each in look(writer.path).roster.workers) == ["dead", "over"]


def test_a_store_that_nobody_works_on_says_how_to_go_on(tmp_path: Path) -> None:
    writer = begun(tmp_path / "s")
    assert f"nobody works on it now. Go on: python -m harvest --resume {writer.path}" in describe(look(writer.path))
    for part in writer.missing():
        writer.write_part(part, parts_of(writer.meta)[part])
    assert "all parts are there, and nobody has sealed them yet" in describe(look(writer.path))
    assert writer.seal()
    assert describe(look(writer.path)) == f"{writer.path}: finished, 32 images in 8 parts"


def test_a_store_that_is_just_being_begun_is_not_taken_for_a_foreign_folder(tmp_path: Path) -> None:
    a_worker(tmp_path / "s", 0, state="loading")
    text = describe(look(tmp_path / "s"))
    assert text.startswith(f"{tmp_path / 's'}: not begun yet, prepared by 1 worker")
    assert "loading the model" in row_of(text, "0/9")
    (tmp_path / "s" / "commits").mkdir(parents=True)
    (tmp_path / "s" / "activations").mkdir()
    (tmp_path / "s" / ".zarr.json.1.tmp").write_text("{")
    assert look(tmp_path / "s").meta is None
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(ForeignError, match=r"it has no zarr\.json"):
        look(tmp_path / "s")


def test_it_writes_nothing(tmp_path: Path) -> None:
    path = begun(tmp_path / "s").path
    a_worker(path, 0, part=3)
    holds(path, 0, 3)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path, *tmp_path.rglob("*"))}
    content = tree(tmp_path)
    for _ in range(2):
        assert program("harvest", COMMANDS, ["status", str(path)], default="harvest") == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path, *tmp_path.rglob("*"))} == before
    assert tree(tmp_path) == content


def without_zarr_json(made: SmallStore) -> None:
    (made.path / "zarr.json").unlink()


def with_half_a_zarr_json(made: SmallStore) -> None:
    data = (made.path / "zarr.json").read_bytes()
    (made.path / "zarr.json").write_bytes(data[: len(data) // 2])


def without_a_commit(made: SmallStore) -> None:
    (made.path / part_commit(1)).unlink()


def with_another_seal(made: SmallStore) -> None:
    content = (made.path / SEAL).read_text()
    (made.path / SEAL).write_text(content.replace("part-00001", "part-00009"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without_zarr_json, "zarr.json is missing from a store that was committed"),
        (with_half_a_zarr_json, "is not JSON any more"),
        (without_a_commit, "is missing from a finished store"),
        (with_another_seal, "was damaged or edited"),
    ],
)
def test_a_damaged_store_is_one_message(
    small_store: Callable[..., SmallStore],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[SmallStore], None],
    message: str,
) -> None:
    made = small_store()
    harm(made)
    assert program("harvest", COMMANDS, ["status", str(made.path)], default="harvest") == 1
    said = capsys.readouterr()
    assert not said.out and message in said.err and said.err.count("error:") == 1


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nothing", 1, "there is no store at"),
        ("folder", 1, "is no Granary store"),
        ("file", 1, "a store is a folder"),
        ("s3://bucket/store", 2, "python -m store info s3://bucket/store"),
    ],
)
def test_what_is_no_store_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    where = name if "://" in name else str(tmp_path / name)
    assert program("harvest", COMMANDS, ["status", where], default="harvest") == code
    said = capsys.readouterr()
    assert not said.out and message in said.err


def test_records_that_cannot_be_read_are_counted_and_the_many_that_ended_are_one_line(tmp_path: Path) -> None:
    path = begun(tmp_path / "s").path
    for pid in range(12):
        a_worker(path, pid, age=1000 - pid, state="ended", images=4)
    for name, content in (("a", ""), ("b", "[1]"), ("c", '{"state": "drawing"}')):
        (workers_folder(path) / f"{name}.json").write_text(content)
    (workers_folder(path) / "d.json").mkdir()
    text = describe(look(path))
    assert "and 4 workers that ended or went before, with 16 images (--all shows them)" in text
    assert "4 records beside the store cannot be read" in text
    assert sum("/9" in line for line in text.splitlines()) == 8
    assert sum("/9" in line for line in describe(look(path), every=True).splitlines()) == 12


def test_leases_that_cannot_be_read_do_not_say_that_nobody_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begun(tmp_path / "s").path
    (runs_folder(path) / "leases").rename(tmp_path / "away")
    (runs_folder(path) / "leases").touch()
    assert "nobody works on it now" in describe(look(path))  # a file holds no leases

    def refused(folder: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(roster, "holdings", refused)  # for root everything can be read
    text = describe(look(path))
    assert "3 of 8 parts" in text
    assert f"who works on it cannot be seen: {runs_folder(path) / 'leases'}: Permission denied" in text


def test_an_extension_that_did_not_end_is_not_a_store_that_only_lacks_its_seal(tmp_path: Path) -> None:
    path = begun(tmp_path / "s", 3, 3).path
    assert "all parts are there, and nobody has sealed them yet" in describe(look(path))
    (path / STORE_COMMIT).unlink()  # killed before it wrote the metadata of the longer store
    text = describe(look(path))
    assert f"its creation, or its extension, did not end. Go on: python -m harvest --resume {path}" in text
    a_worker(path, 0, state="loading")
    assert "1 worker, time left: not known yet; the store is being made or extended" in describe(look(path))


def test_a_clock_that_is_ahead_is_told_from_workers_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begun(tmp_path / "s").path

    def works(age: float) -> None:
        a_worker(path, 0, age=age, part=3, images_per_second=1.0)
        holds(path, 0, 3, age=age)

    works(1000)
    text = describe(look(path))
    assert (
        "nobody was heard of for 16 min" in text and "--watch shows who goes on" in text and "nobody works" not in text
    )
    clock = Clock()
    assert [seen.life for seen in look(path, clock).roster.workers] == ["silent"]
    works(990)  # touched after that look: this clock is ahead by 990 seconds or more
    (seen,) = look(path, clock).roster.workers
    assert (seen.life, seen.holds) == ("alive", (3,)) and clock.fast > 900 and seen.heard < 60
    ages = iter((1000.0, 990.0))

    def sleep(_seconds: float) -> None:
        if (age := next(ages, None)) is None:
            raise KeyboardInterrupt
        works(age)

    monkeypatch.setattr("harvest.workers.status.time.sleep", sleep)
    works(1010)
    assert program("harvest", COMMANDS, ["status", str(path), "--watch"], default="harvest") == 0
    assert "1 worker, 1 images/s" in capsys.readouterr().out.rpartition("silent")[2]
    monkeypatch.setattr("harvest.workers.status.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("harvest.workers.status.SURE_SECONDS", 0.0)
    assert (
        program("harvest", COMMANDS, ["status", str(path), "--watch"], default="harvest") == 0
    )  # one look, and it ends


def test_a_process_of_this_machine_that_runs_is_not_silent_whatever_clocks_say(tmp_path: Path) -> None:
    path, me = begun(tmp_path / "s").path, store.leases.myself()
    a_worker(path, age=1000, part=3, **me)
    os.utime(a_lease(runs_folder(path) / "leases", part_name(3), seconds=60.0, **me), (1, 1))
    (seen,) = look(path).roster.workers
    assert (seen.life, seen.holds) == ("alive", (3,))


ODD: list[dict[str, Any]] = [
    {"images": "many"}, {"part_drawn": "two"}, {"images_per_second": float("nan")}, {"images_per_second": -1.0},
    {"seconds": 1e30}, {"seconds": float("inf")}, {"images": 10**400}, {"part": "3"}, {"part": 1.5}, {"state": ["drawing"]},
    {"silent_after": "long"}, {"parts": [1], "pid": "x"},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: next(iter(odd)))
def test_an_odd_record_is_counted_and_not_believed(tmp_path: Path, odd: dict[str, Any]) -> None:
    path = begun(tmp_path / "s").path
    a_worker(path, 0, part=3)
    file = workers_folder(path) / "0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    assert "1 record beside the store cannot be read" in describe(look(path))


def test_a_rate_that_is_next_to_nothing_gives_no_date(tmp_path: Path) -> None:
    path = begun(tmp_path / "s").path
    a_worker(path, 0, part=3, images_per_second=1e-300)
    holds(path, 0, 3)
    text = describe(look(path))
    assert "time left more than a year" in text and "until" not in text


def test_watching_ends_when_nobody_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = begun(tmp_path / "s").path
    words = ["status", str(path), "--watch", "--every", "0.1"]
    assert program("harvest", COMMANDS, words, default="harvest") == 0
    assert capsys.readouterr().out.count("nobody works on it now") == 1


def test_a_run_that_is_refused_leaves_no_record_and_one_that_failed_says_why(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(ValueError, match="refused"), Progress.of(path, Worker()):
        assert len(look(path).roster.alive) == 1
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="later"), Progress.of(path, Worker()) as progress:
        progress.ready("cpu")
        raise ValueError("later\nand longer")
    (record,) = [json.loads(file.read_text()) for file in workers_folder(path).glob("*.json")]
    assert (record["state"], record["said"]) == ("failed", "later")


def test_a_worker_that_a_full_disk_ended_says_so_in_the_room_that_its_record_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Progress.of(tmp_path / "s", Worker()) as progress:
        progress.ready("cpu")
        with runs.record(HarvestSettings(out=tmp_path / "s"), 4) as note:
            monkeypatch.setattr(Path, "write_text", full)
            monkeypatch.setattr(Path, "write_bytes", full)
            try:
                write_json(tmp_path / "x.json", {})
            finally:
                note(0, 1.0, False, {})  # which says no word louder than the error itself
    monkeypatch.undo()
    (record,) = [json.loads(file.read_text()) for file in workers_folder(tmp_path / "s").glob("*.json")]
    assert record["state"] == "failed"
    assert record["said"] == f"[Errno 28] No space left on device: '{tmp_path / 'x.json'}'"


def test_a_worker_without_a_part_is_silent_when_its_record_is_older_than_it_says(tmp_path: Path) -> None:
    writer = begun(tmp_path / "s")
    a_worker(writer.path, 0, age=20, state="loading")
    assert [seen.life for seen in look(writer.path).roster.workers] == ["alive"]
    a_worker(writer.path, 0, age=61, state="loading")
    assert [seen.life for seen in look(writer.path).roster.workers] == ["silent"]


def test_a_rate_is_that_of_the_last_minutes() -> None:
    progress = Progress()
    progress.takes(0)
    assert progress.rate() is None
    for _ in range(3):
        progress.draws(4)
    first, last = progress._recent[0][0], progress._recent[-1][0]
    assert progress.rate() == pytest.approx(12 / (last - first))
    progress.draws(-12)
    assert (progress.drawn, progress.part_drawn) == (12, 0)
    rate = progress.rate()
    for _ in range(3):  # it says each second what it waits for
        progress.waits("waiting for part 2")
    assert progress.rate() == rate


def test_durations_read_as_one_says_them() -> None:
    found = [duration(seconds) for seconds in (0.4, 59.0, 61.0, 3599.0, 3601.0, 9e4, 2e5)]
    assert found == ["0 s", "59 s", "1 min 01 s", "59 min 59 s", "1 h 00 min", "25 h 00 min", "2 days 7 h"]
