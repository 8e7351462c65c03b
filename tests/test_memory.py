"""A harvest needs memory for two parts, however many images it draws and however slow the disk is."""

import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from harvest import fill
from harvest.planning.plan import Plan
from store.format import StoreMeta
from store.writer import Part, StoreWriter
from tests.small_store import small_meta, small_part

ROOT = Path(__file__).parent.parent
PART = 4 * 12 * 4096 * 2 * 2
"""bytes of a part below: images, tokens, channels, bytes, points"""


def wide_meta(parts: int) -> StoreMeta:
    return small_meta(4 * parts, sites=("img_0",), steps=(0,), d_model=4096, pictures="none")


class Parts:
    """Makes parts up, and knows how many of them are in memory."""

    def __init__(self, meta: StoreMeta) -> None:
        self.meta, self.words = meta, ["a prompt"] * meta.n_images
        self.drawn, self.alive, self.most = 0, 0, 0

    def draw(self, plan: Plan, part: int, advance: Callable[[int], object], *_: object) -> Part:
        shape = (4, 12, 4096)
        values = {(site, 0, point): np.ones(shape, self.meta.carrier.logical) for site in self.meta.site_objects
                  for point in self.meta.points}  # fmt: skip
        table = small_part(self.meta, part, {}, self.words).prompts
        made = Part(values, {}, table, None)
        self.drawn += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(next(iter(values.values())), self._dropped)
        advance(4)
        return made

    def _dropped(self) -> None:
        self.alive -= 1


def harvested(path: Path, parts: int, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Fill a store as a harvest does, with parts that are made up."""
    meta = wide_meta(parts)
    made, plan = Parts(meta), object.__new__(Plan)
    object.__setattr__(plan, "meta", meta)
    monkeypatch.setattr(fill, "fill_part", made.draw)
    writer = StoreWriter.open_or_create(path, meta)
    with tqdm(total=meta.n_images, disable=True) as bar:
        fill._Line(plan, writer, bar).fill(writer.missing())
    return made


def test_no_more_than_two_parts_are_in_memory_and_none_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvested(tmp_path / "warm", 1, monkeypatch)
    peaks = []
    for parts in (3, 15):
        tracemalloc.start()
        made = harvested(tmp_path / f"{parts}", parts, monkeypatch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (made.drawn, made.most, made.alive) == (parts, 2, 0)
    assert abs(peaks[1] - peaks[0]) < 3 * PART, peaks  # twelve more of them would be seen


def test_a_stalled_disk_stops_the_drawing_after_one_more_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, write = threading.Event(), StoreWriter.write_part

    def slow(self: StoreWriter, *words: Any) -> None:
        assert stalled.wait(30)
        write(self, *words)

    monkeypatch.setattr(StoreWriter, "write_part", slow)
    found: list[Parts] = []
    draw = Parts.draw

    def counted(self: Parts, *words: Any) -> Part:
        found[:] = [self]
        return draw(self, *words)

    monkeypatch.setattr(Parts, "draw", counted)
    harvest = threading.Thread(target=harvested, args=(tmp_path / "store", 6, monkeypatch))
    harvest.start()
    end = time.monotonic() + 30
    while not (found and found[0].drawn == 2):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    assert (found[0].drawn, found[0].alive) == (2, 2)  # one being written, one waiting for it
    stalled.set()
    harvest.join()
    assert (found[0].drawn, found[0].most, found[0].alive) == (6, 2, 0)


PEAKS = """
import os, sys
from pathlib import Path
from tests.torture_workers import Worker, preload, start
preload()
for images in (128, 512):
    words = ["--layers", "all", "--num-inference-steps", "1", "--store-dtype", "float32", "--pictures", "none", "--weights",
             "none", "--batch-size", "16", "--threads", "1", "--images", str(images), "--out", f"{sys.argv[1]}/{images}"]
    worker = start(["harvest", *words], Path(f"{sys.argv[1]}/{images}.log"), default="harvest")
    _, status, usage = os.wait4(worker.pid, 0)
    assert status == 0, worker.said()
    print("peak", usage.ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_the_peak_of_a_real_harvest_does_not_grow_with_its_images(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PEAKS, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=600)
    assert done.returncode == 0, done.stderr
    few, many = map(int, re.findall(r"peak (\d+)", done.stdout))
    chunks = [file.stat().st_size for file in (tmp_path / "512").rglob("c.0.0.0")]
    assert sum(chunks) > 20e6  # a part: six more of them would be seen
    assert many - few < 3 * sum(chunks), (few, many)  # half of that; what malloc keeps is less
