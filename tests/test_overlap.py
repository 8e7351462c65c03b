"""A harvest says who waited for whom, in its summary and in its record; and the script for a GPU runs in small."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from bench import gpu_staging
from harvest import HarvestSettings, fill, run
from harvest.planning.plan import Plan
from store.writer import Part, StoreWriter
from tests.test_memory import Parts, wide_meta


def line_of(path: Path, monkeypatch: pytest.MonkeyPatch, parts: int) -> fill._Line:
    """Fills a store with parts that are made up, in no time."""
    meta = wide_meta(parts)
    plan = object.__new__(Plan)
    object.__setattr__(plan, "meta", meta)
    monkeypatch.setattr(fill, "fill_part", Parts(meta).draw)
    writer = StoreWriter.open_or_create(path, meta)
    with tqdm(total=meta.n_images, disable=True) as bar:
        line = fill._Line(plan, writer, bar)
        line.fill(writer.missing())
    return line


def test_a_slow_disk_is_what_the_model_says_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = StoreWriter._put

    def slow(self: StoreWriter, *words: Any) -> Any:
        with self.spent.on("disk"):
            time.sleep(0.1)
        return put(self, *words)

    monkeypatch.setattr(StoreWriter, "_put", slow)
    waiting = line_of(tmp_path / "store", monkeypatch, 4).waiting
    assert waiting.disk > 0.3 and waiting.disk > 2 * waiting.encode
    assert waiting.last > 0.1 and "of the time it waited for the disk; a faster disk" in waiting.said()


def test_a_slow_encoding_is_told_from_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = StoreWriter._array

    def slow(self: StoreWriter, *words: Any) -> Any:
        time.sleep(0.5)
        return array(self, *words)

    monkeypatch.setattr(StoreWriter, "_array", slow)
    waiting = line_of(tmp_path / "store", monkeypatch, 3).waiting
    assert waiting.encode > waiting.disk and "it waited for the encoding; more cores" in waiting.said()


def test_pictures_are_encoded_by_a_thread_of_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Part] = []
    write = StoreWriter.write_part

    def seen(self: StoreWriter, part: int, content: Part, *words: Any) -> None:
        made.append(content)
        write(self, part, content, *words)

    monkeypatch.setattr(StoreWriter, "write_part", seen)
    out = tmp_path / "store"
    done = run(HarvestSettings(out=out, images=2, layers="0", num_inference_steps=1, batch_size=2, weights="none"))
    assert isinstance(done, fill.Summary) and done.finished and callable(made[0].pictures)
    (record,) = [file for file in (tmp_path / "store.runs").glob("*.json") if file.name != "settings.json"]
    waited = json.loads(record.read_text())["waiting"]
    assert waited == done.waiting.facts()
    assert waited["model"] > 0 and set(waited["threads"]) == {"encode", "disk"}  # on a CPU nothing is copied beside


def test_the_script_for_a_gpu_runs_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_staging.main(["--small", "--device", "cpu", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    assert len(found) == 4 and not any(case["wrong"] for case in found)
    assert json.loads((tmp_path / "found.json").read_text())["cases"] == found
    assert capsys.readouterr().out.count("0 sites differ") == 4
