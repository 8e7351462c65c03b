"""What a harvest does when it is stopped, when a part fails, and when others hold what is left: nothing is lost, and all of it is said."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from harvest import HarvestSettings, drawing, fill, runs
from harvest.fill import Summary
from harvest.planning.plan import Plan
from harvest.staging import Staging
from harvest.trace_writing import BlockTrace
from harvest.waiting import Waiting
from store.errors import LostLeaseError
from store.format import part_name
from store.leases import Leases
from store.writer import Part, StoreWriter
from tests.test_memory import Parts, wide_meta

Write = Callable[[StoreWriter, int, Part, Any], None]


class Harvest:
    """A store that is filled with parts that are made up, two batches of two images each."""

    def __init__(self, path: Path, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        meta = wide_meta(parts)
        self.made, self.drawn = Parts(meta), list[int]()
        plan = object.__new__(Plan)
        object.__setattr__(plan, "meta", meta)
        monkeypatch.setattr(fill, "fill_part", self._draw)
        self.writer = StoreWriter.open_or_create(path, meta)
        self.line = fill._Line(plan, self.writer, tqdm(total=meta.n_images, disable=True))
        self.before_second: Callable[[int], None] = lambda _part: None

    def _draw(self, plan: Plan, part: int, advance: Callable[[int], object], *_: object) -> Part:
        content = self.made.draw(plan, part, lambda _count: None)
        for batch in range(2):
            self.drawn.append(part)
            if batch == 0:
                self.before_second(part)
            advance(2)
        return content

    def until_written(self, _part: int) -> None:
        """Wait until the writer has nothing to do, before the first batch of a part ends."""
        end = time.monotonic() + 60
        while self.line._writing is not None and not self.line._writing[1].done() and time.monotonic() < end:
            time.sleep(0.001)


@contextmanager
def interrupted(_self: Waiting, *_: object) -> Iterator[None]:
    raise KeyboardInterrupt
    yield


def test_ctrl_c_while_the_disk_is_waited_for_finishes_the_part_that_is_being_written_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, write = threading.Event(), StoreWriter.write_part

    def slow(self: StoreWriter, part: int, content: Part, lease: Any = None) -> None:
        assert going.wait(60)
        write(self, part, content, lease)

    monkeypatch.setattr(StoreWriter, "write_part", slow)
    monkeypatch.setattr(Waiting, "for_writing", interrupted)
    harvest = Harvest(tmp_path / "store", 3, monkeypatch)
    timer = threading.Timer(0.1, going.set)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        harvest.line.fill(harvest.writer.missing())
    timer.join()
    assert harvest.writer.missing() == [1, 2] and harvest.line.images == 4
    assert all(harvest.writer.leases.holder(part_name(part)) is None for part in range(3))


def failing(error: Exception) -> Write:
    """Part 0 fails once."""
    write, left = StoreWriter.write_part, [error]

    def put(self: StoreWriter, part: int, content: Part, lease: Any = None) -> None:
        if part == 0 and left:
            raise left.pop()
        write(self, part, content, lease)

    return put


def test_a_part_that_cannot_be_written_is_said_as_the_next_batch_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoreWriter, "write_part", failing(OSError("no room")))
    harvest = Harvest(tmp_path / "store", 3, monkeypatch)
    harvest.before_second = harvest.until_written
    with pytest.raises(OSError, match="no room"):
        harvest.line.fill(harvest.writer.missing())
    assert harvest.drawn == [0, 0, 1] and harvest.writer.missing() == [0, 1, 2]


def test_a_part_that_was_lost_while_it_was_written_costs_the_one_that_is_drawn_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoreWriter, "write_part", failing(LostLeaseError("part-00000 was taken over")))
    harvest = Harvest(tmp_path / "store", 2, monkeypatch)
    harvest.before_second = harvest.until_written
    assert harvest.line.fill(harvest.writer.missing()) == 8
    assert harvest.drawn == [0, 0, 1, 1, 0, 0] and not harvest.writer.missing()


def test_waiting_for_what_others_hold_is_said_and_is_no_part_of_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest, pause = Harvest(tmp_path / "store", 2, monkeypatch), time.sleep
    others = Leases(harvest.writer.leases.folder)
    held = others.take(part_name(1))
    assert held is not None

    def freed(_seconds: float) -> None:
        pause(0.1)
        others.give_back(held)

    monkeypatch.setattr(time, "sleep", freed)
    assert harvest.line.fill(harvest.writer.missing()) == 8
    assert 0.1 <= harvest.line.waiting.others == harvest.line.waiting.facts()["others"]
    waiting = Waiting(model=1.0, others=8.0)
    assert "; the last part took 0.0 s more, and 8.0 s went by until others were done" in waiting.said()
    assert waiting.said().endswith("nothing held it up") and "others" not in Waiting(model=1.0).said()
    said = fill._closing(Summary(tmp_path / "store", 8, 10.0, True, waiting), harvest.writer, {})
    assert "8 images harvested in 10.0 s (4.0 images/s beside 8.0 s of waiting for others)" in said
    with runs.record(HarvestSettings(out=tmp_path / "store"), 8) as note:
        note(8, 10.0, True, waiting.facts())
    record = json.loads(next((tmp_path / "store.runs").glob("*Z-*.json")).read_text())
    assert record["images_per_second"] == 4.0 and record["seconds"] == 10.0 and record["waiting"]["others"] == 8.0


def test_a_store_that_others_finished_meanwhile_is_not_called_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest = Harvest(tmp_path / "store", 2, monkeypatch)
    summary = Summary(tmp_path / "store", 4, 1.0, False)
    harvest.line.fill([0])
    assert "not finished: 1 of 2 parts are still missing. Go on" in fill._closing(summary, harvest.writer, {})
    harvest.line.fill([1])
    assert "the store is whole, its last parts by others, who seal it: 8 images." in (
        fill._closing(summary, harvest.writer, {})
    )
    assert harvest.writer.seal()
    assert "the store is finished: 8 images, the last of them by others" in fill._closing(summary, harvest.writer, {})


def test_a_trace_that_is_waited_for_counts_for_the_disk_and_not_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    meta, part = wide_meta(1), Part({}, {}, Parts(wide_meta(1)).draw(object.__new__(Plan), 0, lambda _n: None).prompts, None)  # fmt: skip

    class Filler:
        def __init__(self, _plan: Plan, _part: int, traces: Any, _staging: Staging) -> None:
            self.traces = traces

        def fill(self, _advance: object) -> Part:
            for name in ("a", "b", "c"):
                self.traces.put([BlockTrace(name, {}, "{}", {})])
            return part

    def keep(name: str, _content: bytes, _replay: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return {}

    monkeypatch.setattr(drawing, "_Filler", Filler)
    plan = object.__new__(Plan)
    object.__setattr__(plan, "meta", meta)
    waiting = Waiting()
    begun = time.perf_counter()
    with Staging(meta, waiting) as staging, waiting.drawing():
        made = drawing.fill_part(plan, 0, None, keep, staging)
    taken = time.perf_counter() - begun
    assert set(made.traces) == {"a", "b", "c"}
    assert waiting.disk >= 0.1 and waiting.model <= taken - waiting.disk
