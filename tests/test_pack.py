"""A pack holds every row of a split once, shuffled, aligned across sites, and the same bytes each time."""

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import store.pack
import store.packing.folder
import store.packing.sink
import store.packing.tasks
from store import Site, open_store
from store.errors import (
    DamagedError,
    ForeignError,
    MismatchError,
    NonFiniteError,
    StoreError,
    UnfinishedError,
    UsageError,
)
from store.files import read_self_checked, self_checked, write_json
from store.format import StreamTokens
from store.pack import PackSettings, run
from store.packing.budget import Budget, Share, _runs
from store.packing.crew import ThreadCrew
from store.packing.folder import PackFolder
from store.packing.plan import PackPlan
from store.packing.reading import Reading
from store.reader import Store
from store.shards import Pack, open_pack
from store.sizes import human_size, parse_size
from tests.toy_stores import SIGMAS, toy_store


@pytest.fixture(scope="module")
def a_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("store") / "s", n_images=40)


def make(a_store: Path, out: Path, **changes: Any) -> Pack:
    pack = run(PackSettings(**{"store": a_store, "out": out, "seed": 1, **changes}))
    assert pack is not None
    return pack


@contextlib.contextmanager
def in_runs(count: int) -> Iterator[None]:
    """As if the memory held a site only in about so many runs; 0: as it is."""
    share = Budget._share

    def small(self: Budget, stream: Any) -> Share:
        units, whole = self.units(stream), share(self, stream)
        return replace(whole, whole=False, runs=_runs(units, max(int(units.sum()) // count, int(units.max()))))

    with mock.patch.object(Budget, "_share", small) if count else contextlib.nullcontext():
        yield


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def whole(pack: Pack, site: Site) -> dict[str, np.ndarray]:
    shards = [shard.columns() for shard in pack.shards(site)]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def expect_rows_of_store(pack: Pack, path: Path) -> None:
    """Every row of the split stands in the pack exactly once, with the values that the store has for it."""
    there = open_store(path)
    table = there.prompts().to_pydict()
    images = [image for image, split in enumerate(table["split"]) if split == pack.split]
    for site in pack.sites:
        columns = whole(pack, site)
        got = sorted(zip(columns["image"].tolist(), columns["step"].tolist(), columns["token"].tolist(), strict=True))
        tokens = {step: there.tokens(site.stream, step) for step in there.steps}
        assert got == [(i, s, int(t)) for i in images for s in sorted(there.steps) for t in tokens[s][i] if t >= 0]
        for point in pack.points:
            for step in there.steps:
                at = columns["step"] == step
                slot = np.argmax(tokens[step][columns["image"][at]] == columns["token"][at][:, None], axis=1)
                expected = there.read(site, step, point)[columns["image"][at], slot]
                assert np.array_equal(columns[point][at].view(np.uint8), expected.view(np.uint8))
        assert np.array_equal(columns["sigma"], np.array(SIGMAS, np.float32)[columns["step"]])
        if site.stream == "txt":
            lengths = np.array(table["text_length"])[columns["image"]]
            assert np.array_equal(columns["real"], (columns["token"] < lengths).astype(np.uint8))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_images=st.integers(20, 45),
    steps=st.sampled_from([(0,), (1, 3), (0, 1, 2, 3)]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    policy=st.sampled_from(["all", "real+0", "real+1", "sample"]),
    runs=st.integers(0, 5),
    chunk_images=st.sampled_from([4, 8, 64]),
    split=st.sampled_from(["train", "val"]),
    seed=st.integers(0, 5),
)
def test_every_row_of_the_split_stands_in_the_pack_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    n_images: int,
    steps: tuple[int, ...],
    dtype: Any,
    policy: str,
    runs: int,
    chunk_images: int,
    split: Any,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    tokens = {"img": StreamTokens("sample", 3, 6), "txt": StreamTokens("sample", 5, 8)} if policy == "sample" else None
    changes = {} if tokens is None else {"tokens": tokens}
    path = toy_store(
        folder / "s", n_images, ("img_0", "txt_1"), steps, 4, 6, policy, dtype, chunk_images, seed, **changes
    )
    if split not in open_store(path).prompts().column("split").to_pylist():
        with pytest.raises(UsageError, match="none of the"):
            make(path, folder / "p", split=split)
        return
    with in_runs(runs):
        pack = make(path, folder / "p", split=split, seed=seed)
    pack.verify()
    expect_rows_of_store(pack, path)


def test_sites_of_a_stream_share_one_row_order_and_it_is_shuffled(a_store: Path, tmp_path: Path) -> None:
    pack = make(a_store, tmp_path / "p")
    first, second = whole(pack, Site.parse("img_0")), whole(pack, Site.parse("img_1"))
    for name in ("image", "step", "token", "sigma"):
        assert np.array_equal(first[name], second[name])
    assert not np.array_equal(first["mlp_in"], second["mlp_in"])
    assert (np.diff(first["image"]) < 0).mean() > 0.3
    assert not np.array_equal(
        whole(make(a_store, tmp_path / "q", seed=2), Site.parse("img_0"))["image"], first["image"]
    )


def test_means_are_those_of_the_split_and_of_real_and_padding_tokens_apart(a_store: Path, tmp_path: Path) -> None:
    pack = make(a_store, tmp_path / "p")
    for site in pack.sites:
        columns = whole(pack, site)
        for step in pack.steps:
            at = columns["step"] == step
            groups = {"all": at}
            if site.stream == "txt":
                groups |= {"real": at & (columns["real"] == 1), "padding": at & (columns["real"] == 0)}
                assert pack.manifest["streams"]["txt"]["real_rows"] == int(columns["real"].sum())
            for group, chosen in groups.items():
                mean = pack.mean(site, step, "mlp_out", group)  # type: ignore[arg-type]
                assert mean is not None
                assert np.allclose(mean, columns["mlp_out"][chosen].astype(np.float64).mean(axis=0), rtol=1e-12)
    assert pack.mean(Site.parse("img_0"), 0, "mlp_in", "real") is None


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store of a few MB a site, and what its pack of several shards is, made from memory."""
    folder = tmp_path_factory.mktemp("large")
    path = toy_store(folder / "s", n_images=150, sites=("img_0", "txt_0"), img_tokens=256, d_model=16, chunk_images=32)
    return path, digests(make(path, folder / "p", shard_mb=1).path)


def test_bytes_depend_on_memory_no_more_than_the_memory_is_exceeded(
    large: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, expected = large
    tracemalloc.start()
    pack = make(path, tmp_path / "p", shard_mb=1, sites="txt_0,img_0", memory="6MB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "runs: 3" in capsys.readouterr().out
    assert peak < 6e6
    assert digests(pack.path) == expected
    rows = pack.shard_rows("img")
    assert len(rows) > 5 and max(rows) - min(rows) <= 1
    assert max(p.stat().st_size for p in pack.path.rglob("shard*")) <= 1_001_000
    with pytest.raises(UsageError, match=r"--memory 1 MB is too little.*use --memory \d+MB"):
        make(path, tmp_path / "small", memory="1MB")


def test_each_byte_of_the_store_is_read_once(
    large: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large
    read, found = Store._chunk, []

    def counted(self: Store, spec: Any, part: int, out: Any) -> np.ndarray:
        found.append((spec.name, part))
        return read(self, spec, part, out)

    monkeypatch.setattr(Store, "_chunk", counted)
    assert digests(make(path, tmp_path / "p", shard_mb=1, memory="5MB").path) == expected
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 5  # sites, steps, points, chunks


PEAK = """
import sys
from pathlib import Path
from store.pack import PackSettings, run
from store.packing.crew import peak_memory
run(PackSettings(store=sys.argv[1], out=Path(sys.argv[2]), memory=sys.argv[3], shard_mb=4))
print("peak", peak_memory())
"""


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["150MB", "48MB"])
def test_the_peak_of_a_process_is_what_python_takes_and_the_memory_that_was_given(tmp_path: Path, memory: str) -> None:
    peaks = []
    for n_images in (24, 400):
        path = toy_store(tmp_path / f"s{n_images}", n_images, ("img_0",), d_model=512, img_tokens=64, chunk_images=16)
        words = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"p{n_images}"), memory]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("peak ")[-1]))
    site = sum(file.stat().st_size for file in path.rglob("c.*"))
    assert site > 100e6
    assert peaks[1] - peaks[0] < parse_size(memory), peaks


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
    large: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
    kills: tuple[int, ...],
) -> None:
    path, expected = large
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
    large: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large
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
    large: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large
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


def test_what_is_not_ours_in_out_is_refused_or_stays(a_store: Path, tmp_path: Path) -> None:
    for name in ("unfinished/thesis.txt", "unfinished/.thesis.txt.0badf00d.tmp", "unfinished/done/mine", ".mine.tmp"):
        out = tmp_path / name.replace("/", "-") / "p"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UsageError, match="is not a pack"):
            make(a_store, out)
        assert (out / name).read_text() == "mine"
    out = tmp_path / "p"
    (out / "unfinished").mkdir(parents=True)
    ours = (out / "unfinished" / ".plan.json.0badf00d.tmp", out / "unfinished" / "lock")
    for file in ours:
        file.touch()
    with mock.patch.object(store.pack, "_make", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        make(a_store, out)
    plan = PackFolder(PackPlan(open_store(a_store), PackSettings(store=a_store, out=out, seed=1)), out, None)
    plan.begin({})
    assert not ours[0].exists()
    (out / ".mine.tmp").touch()
    (out / ".x.tmp").mkdir()
    (out / "unfinished" / "mine").touch()
    make(a_store, out)
    assert (out / ".mine.tmp").exists() and (out / ".x.tmp").is_dir()
    assert [file.name for file in (out / "unfinished").iterdir()] == ["mine"]


def test_units_without_rows_take_neither_memory_nor_scratch(tmp_path: Path) -> None:
    path = toy_store(tmp_path / "s", n_images=24, sites=("img_0",), img_tokens=4, d_model=64, chunk_images=1)
    plan = PackPlan(open_store(path), PackSettings(store=path, out=tmp_path / "p", split="val"))
    budget = Budget(plan, 10**9, lanes=2)
    every = plan.rows["img"].unit_rows.reshape(-1)
    units = budget.units("img")
    assert len(units) < len(every) / 2 and units.sum() == every.sum() and (units > 0).all()
    reading = Reading(plan, plan.sites[0], (1, 3), lambda count: np.empty(count, np.uint8), lambda _count: None)
    reading.fill(1)
    assert len(reading.sums) == 2 and reading.sums.any(axis=(1, 2, 3)).all() and len(reading.tokens) == units[1:3].sum()
    assert _runs(np.array([5, 1, 1, 1, 9, 2]), 6) == ((0, 2), (2, 4), (4, 5), (5, 6))


def test_scratch_files_elsewhere_go_when_scratch_is_another(
    large: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = large
    with monkeypatch.context() as patch:
        killed_after(20, patch)
        with pytest.raises(KeyboardInterrupt):
            make(path, tmp_path / "p", shard_mb=1, memory="9MB", scratch=tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").glob("granary-pack-*/*.json")] == ["mark.json"]
    make(path, tmp_path / "p", shard_mb=1, memory="9MB", scratch=tmp_path / "b")
    assert f"left at {tmp_path / 'a'}/granary-pack-" in capsys.readouterr().out
    assert digests(tmp_path / "p") == expected
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def test_a_file_where_a_folder_is_wanted_is_said_before_anything_is_written(a_store: Path, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    for changes, reason in (
        ({"out": file / "p"}, r"--out .*file is a file"),
        ({"out": tmp_path / "p", "scratch": file}, r"--scratch .*file is a file"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(a_store, **changes)
    assert not (tmp_path / "p").exists()


def test_two_processes_do_not_make_one_pack(a_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    (out / "unfinished").mkdir(parents=True)
    lock = os.open(out / "unfinished" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="is being made by another process"):
        make(a_store, out)
    os.close(lock)
    assert make(a_store, out).files


def test_a_disk_that_fills_up_is_said_and_nothing_is_lost(
    large: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large
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


@pytest.mark.parametrize(("site", "point", "runs"), [("img_0", "mlp_out", 0), ("txt_0", "mlp_in", 3)])
def test_a_row_that_is_not_finite_is_named_before_anything_of_its_site_is_published(
    a_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, point: str, runs: int
) -> None:
    read = Store.read
    table = open_store(a_store).prompts().to_pydict()
    image = [image for image, split in enumerate(table["split"]) if split == "train"][20]

    def spoiled(self: Store, where: Site, step: int, what: str, first: int, last: int, out: Any = None) -> np.ndarray:
        values = read(self, where, step, what, first, last, out)  # type: ignore[arg-type]
        if (str(where), step, what) == (site, 2, point) and first <= image < last:
            values[image - first, 5, 1] = np.inf
            values[image - first, 5, 2] = -np.inf
        return values

    monkeypatch.setattr(Store, "read", spoiled)
    with (
        pytest.raises(
            NonFiniteError, match=f"{site} {point}, step 2, image {image}, token 5 is NaN or infinite; .*store rm"
        ),
        in_runs(runs),
    ):
        make(a_store, tmp_path / "p")
    assert not list((tmp_path / "p" / site).glob("*"))
    monkeypatch.setattr(Store, "read", read)
    assert make(a_store, tmp_path / "p").files


def test_a_plan_is_printed_and_nothing_written(
    a_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(PackSettings(store=a_store, out=tmp_path / "p", plan=True)) is None
    said = capsys.readouterr().out
    assert "2 img sites of" in said and "the store is read once" in said and "memory 2 GB" in said
    assert not (tmp_path / "p").exists()


def test_a_pack_of_one_row_is_a_pack_and_one_of_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy_store(
        tmp_path / "s", n_images=20, sites=("img_0", "txt_0"), steps=(1,), img_tokens=1, text_policy="real+0", seed=6
    )
    there = open_store(path)
    assert there.prompts().column("split").to_pylist().count("val") == 1
    pack = make(path, tmp_path / "p", split="val")
    assert pack.shard_rows("img") == (1,)
    expect_rows_of_store(pack, path)
    monkeypatch.setattr(Store, "tokens", lambda self, stream, step, a, b: np.full((b - a, 8), -1, np.int32))
    with pytest.raises(UsageError, match="no row of stream txt in the split 'val'"):
        make(path, tmp_path / "q", split="val", sites="txt_0")


def test_tokens_that_are_not_as_many_as_they_should_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"img": StreamTokens("sample", 3, 6)}
    path = toy_store(tmp_path / "s", sites=("img_0",), tokens=tokens)
    monkeypatch.setattr(Store, "tokens", lambda self, stream, step, a, b: np.tile(np.int32([1, 2, -1]), (b - a, 1)))
    with pytest.raises(DamagedError, match="are not as many as they should be"):
        make(path, tmp_path / "p")


def test_a_complete_pack_is_left_alone_and_another_is_refused(
    a_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(a_store, tmp_path / "p")
    assert capsys.readouterr().out.startswith("plan: ")
    before = digests(tmp_path / "p")
    make(a_store, tmp_path / "p")
    assert "complete already" in capsys.readouterr().out and digests(tmp_path / "p") == before
    for changes, reason in (
        ({"seed": 5}, "seed: there 1, asked for 5"),
        ({"split": "val"}, "split"),
        ({"sites": "img_0"}, "sites"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(a_store, tmp_path / "p", **changes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="is not a pack"):
        make(a_store, tmp_path / "other")


def test_wrong_settings_are_explained(a_store: Path, tmp_path: Path) -> None:
    for changes, reason in (
        ({"sites": "img_9"}, "no img_9; it has img_0, img_1, txt_0"),
        ({"points": "mlp_mid"}, "'mlp_mid' is no point"),
        ({"memory": "lots"}, "no size"),
        ({"shard_mb": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "give one of them"),
        ({"scheduler": "localhost"}, "no address"),
        ({"scratch": a_store / "scratch"}, "lies in the store"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(a_store, tmp_path / "p", **changes)
    with pytest.raises(ForeignError, match="no store"):
        make(tmp_path / "nowhere", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_full_disk_is_refused_before_anything_is_written(
    a_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.pack.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    with pytest.raises(StoreError, match=r"100 B are free.*another --out or --scratch"):
        make(a_store, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_scratch_files_are_counted_where_they_will_lie(
    large: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = large
    total = sum(file.stat().st_size for file in (path / "activations").rglob("c.*"))
    room = type("Usage", (), {"free": int(1.3 * total)})
    monkeypatch.setattr(store.pack.shutil, "disk_usage", lambda _path: room)
    with pytest.raises(StoreError, match="are free on that disk"):
        make(path, tmp_path / "p", shard_mb=1, memory="9MB")
    assert make(path, tmp_path / "p", shard_mb=1, memory="60MB").files


def test_a_pack_of_one_point_has_only_that_column(a_store: Path, tmp_path: Path) -> None:
    pack = make(a_store, tmp_path / "p", points="mlp_out", sites="img_0")
    columns = pack.shards(Site.parse("img_0"))[0].columns()
    assert set(columns) == {"mlp_out", "sigma", "image", "step", "token"}
    with pytest.raises(UsageError, match="--points mlp_in"):
        pack.require(Site.parse("img_0"), "mlp_in")


def test_damaged_and_foreign_shards_are_refused_before_they_are_mapped(a_store: Path, tmp_path: Path) -> None:
    pack, other = make(a_store, tmp_path / "p"), make(a_store, tmp_path / "q", seed=2)
    site = Site.parse("img_0")
    shard = pack.shards(site)[0]
    data = shard.path.read_bytes()
    shard.path.write_bytes(other.shards(site)[0].path.read_bytes())
    with pytest.raises(MismatchError, match="another pack"):
        shard.columns()
    shard.path.write_bytes(pack.shards(Site.parse("img_1"))[0].path.read_bytes())
    with pytest.raises(MismatchError, match="another pack or place"):
        shard.columns()
    shard.path.write_bytes(data[:-10])
    with pytest.raises(DamagedError, match="bytes where the manifest names"):
        shard.columns()
    shard.path.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(DamagedError, match="header"):
        shard.columns()
    shard.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    shard.columns()
    with pytest.raises(DamagedError, match="checksum"):
        pack.verify()
    shard.path.unlink()
    with pytest.raises(DamagedError, match="missing"):
        shard.columns()


def test_a_manifest_that_was_edited_or_is_of_another_version_is_refused(a_store: Path, tmp_path: Path) -> None:
    pack = make(a_store, tmp_path / "p")
    manifest = pack.path / "manifest.json"
    content = read_self_checked(manifest)
    write_json(manifest, self_checked({**content, "format_version": 9}))
    with pytest.raises(ForeignError, match="version 9"):
        open_pack(pack.path)
    write_json(manifest, {**content, "key": "0"})
    with pytest.raises(DamagedError, match="edited"):
        open_pack(pack.path)
    plan = {key: value for key, value in content["plan"].items() if key not in ("targets", "weights")}
    write_json(manifest, self_checked({**content, "plan": plan}))  # as packs were before targets could be recomputed
    before = open_pack(pack.path)
    assert before.targets == "stored" and before.shards(Site.parse("img_0"))[0].columns("mlp_out")
    del plan["order"]
    write_json(
        manifest, self_checked({**content, "plan": plan, "format_version": 1})
    )  # their order was drawn as a whole
    assert open_pack(pack.path).shards(Site.parse("img_0"))[0].columns("mlp_out")
    with pytest.raises(UsageError, match="order: there None, asked for 'granary-pack-2'"):
        make(a_store, pack.path)
    manifest.unlink()
    with pytest.raises(ForeignError, match="is no pack"):
        open_pack(pack.path)
    with pytest.raises(UsageError, match="there is no pack"):
        open_pack(tmp_path / "none")


def test_any_safetensors_reader_opens_a_shard(tmp_path: Path) -> None:
    path = toy_store(tmp_path / "s", store_dtype="float32")
    shard = make(path, tmp_path / "p").shards(Site.parse("txt_0"))[0]
    for name, column in safetensors.numpy.load_file(shard.path).items():
        assert np.array_equal(column, shard.columns()[name])


def test_reading_a_pack_imports_neither_zarr_nor_torch() -> None:
    code = "import sys, store.shards; sys.exit(any(name in sys.modules for name in ('zarr', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_are_read_and_written_as_people_do() -> None:
    assert (parse_size("2GB"), parse_size("1.5 MiB"), parse_size("64kb")) == (2 * 10**9, 3 * 2**19, 64000)
    assert (human_size(1_340_000_000), human_size(950), human_size(0)) == ("1.34 GB", "950 B", "0 B")
