"""A pack holds every row of a split once, shuffled, aligned across sites, and the same bytes each time."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store import Site, open_store
from store.errors import (
    UsageError,
)
from store.format import StreamTokens
from store.pack import PackSettings, run
from store.packing.budget import Budget, _runs
from store.packing.plan import PackPlan
from store.packing.reading import Reading
from store.reader import Store
from store.shards import Pack
from store.sizes import human_size, parse_size
from tests.small_packs import digests, in_runs, make, whole
from tests.toy_stores import SIGMAS, toy_store


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


def test_sites_of_a_stream_share_one_row_order_and_it_is_shuffled(pack_store: Path, tmp_path: Path) -> None:
    pack = make(pack_store, tmp_path / "p")
    first, second = whole(pack, Site.parse("img_0")), whole(pack, Site.parse("img_1"))
    for name in ("image", "step", "token", "sigma"):
        assert np.array_equal(first[name], second[name])
    assert not np.array_equal(first["mlp_in"], second["mlp_in"])
    assert (np.diff(first["image"]) < 0).mean() > 0.3
    assert not np.array_equal(
        whole(make(pack_store, tmp_path / "q", seed=2), Site.parse("img_0"))["image"], first["image"]
    )


def test_means_are_those_of_the_split_and_of_real_and_padding_tokens_apart(pack_store: Path, tmp_path: Path) -> None:
    pack = make(pack_store, tmp_path / "p")
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


def test_bytes_depend_on_memory_no_more_than_the_memory_is_exceeded(
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, expected = large_pack_store
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
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = large_pack_store
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


def test_a_plan_is_printed_and_nothing_written(
    pack_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(PackSettings(store=pack_store, out=tmp_path / "p", plan=True)) is None
    said = capsys.readouterr().out
    assert "2 img sites, each " in said and "the store is read once" in said and "memory 2 GB" in said
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


def test_a_pack_of_one_point_has_only_that_column(pack_store: Path, tmp_path: Path) -> None:
    pack = make(pack_store, tmp_path / "p", points="mlp_out", sites="img_0")
    columns = pack.shards(Site.parse("img_0"))[0].columns()
    assert set(columns) == {"mlp_out", "sigma", "image", "step", "token"}
    with pytest.raises(UsageError, match="--points mlp_in"):
        pack.require(Site.parse("img_0"), "mlp_in")


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
