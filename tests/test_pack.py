"""A pack holds every row of a split once, shuffled, aligned across sites, and the same bytes each time."""

import hashlib
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

import store.pack
from store import Site, open_store
from store.errors import DamagedError, ForeignError, MismatchError, StoreError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.pack import PackSettings, run
from store.shards import Pack, open_pack
from store.sizes import human_size, parse_size
from tests.toy_stores import SIGMAS, toy_store


@pytest.fixture(scope="module")
def a_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("store") / "s", n_images=40)


def make(a_store: Path, out: Path, **changes: Any) -> Pack:
    return run(PackSettings(**{"store": a_store, "out": out, "seed": 1, **changes}))


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
            for step in there.steps:  # slot and token are one number under the policies used here
                at = columns["step"] == step
                expected = there.read(site, step, point)[columns["image"][at], columns["token"][at]]
                assert np.array_equal(columns[point][at].view(np.uint8), expected.view(np.uint8))
        assert np.array_equal(columns["sigma"], np.array(SIGMAS, np.float32)[columns["step"]])
        if site.stream == "txt":
            lengths = np.array(table["text_length"])[columns["image"]]
            assert np.array_equal(columns["real"], (columns["token"] < lengths).astype(np.uint8))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_images=st.integers(20, 45),
    steps=st.sampled_from([(0,), (1, 3), (0, 1, 2, 3)]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    policy=st.sampled_from(["all", "real+0"]),
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
    chunk_images: int,
    split: Any,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = toy_store(folder / "s", n_images, ("img_0", "txt_1"), steps, 4, 3, policy, dtype, chunk_images, seed)
    if split not in open_store(path).prompts().column("split").to_pylist():
        with pytest.raises(UsageError, match="none of the"):
            make(path, folder / "p", split=split)
        return
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


def test_bytes_depend_on_neither_memory_nor_shape_of_the_run(tmp_path: Path) -> None:
    path = toy_store(tmp_path / "s", n_images=300, sites=("img_0", "txt_0"), img_tokens=256, d_model=8, chunk_images=32)
    roomy = make(path, tmp_path / "roomy", shard_mb=1, sites="img_0,txt_0")
    tracemalloc.start()
    tight = make(path, tmp_path / "tight", shard_mb=1, sites="txt_0,img_0", memory="7MB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7e6
    assert digests(roomy.path) == digests(tight.path)
    rows = roomy.shard_rows("img")
    assert len(rows) > 5 and max(rows) - min(rows) <= 1
    assert max(p.stat().st_size for p in roomy.path.rglob("shard*")) <= 1_001_000
    with pytest.raises(UsageError, match=r"--memory 1MB is too little.*use --memory \d+MB"):
        make(path, tmp_path / "small", memory="1MB")


def test_a_killed_pack_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_store(tmp_path / "s", n_images=150, sites=("img_0",), img_tokens=256, d_model=8, chunk_images=32)
    expected = digests(make(path, tmp_path / "whole", shard_mb=1).path)
    publish, left = store.pack.write_bytes, 0

    def dies(file: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / f".{file.name}.0badf00d.tmp").write_bytes(data[:100])
            raise KeyboardInterrupt
        publish(file, data)

    monkeypatch.setattr(store.pack, "write_bytes", dies)
    for survived in (1, 3, 2):
        left = survived
        with pytest.raises(KeyboardInterrupt):
            make(path, tmp_path / "killed", shard_mb=1)
        with pytest.raises(UnfinishedError, match="not finished"):
            open_pack(tmp_path / "killed")
    monkeypatch.setattr(store.pack, "write_bytes", publish)
    (tmp_path / "killed" / "img_0" / "shard-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="seed: there 1, asked for 2"):
        make(path, tmp_path / "killed", shard_mb=1, seed=2)
    make(path, tmp_path / "killed", shard_mb=1)
    assert digests(tmp_path / "killed") == expected


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
    with pytest.raises(StoreError, match="100 B are free"):
        make(a_store, tmp_path / "p")
    assert not (tmp_path / "p").exists()


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
