"""What a pack is not made of, is not written into, and is not read from: each is said before it costs anything."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

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
    UsageError,
)
from store.files import read_self_checked, self_checked, write_json
from store.format import StreamTokens
from store.pack import PackSettings
from store.packing.folder import PackFolder
from store.packing.plan import PackPlan
from store.reader import Store
from store.shards import open_pack
from tests.small_packs import digests, in_runs, make
from tests.toy_stores import toy_store


def test_what_is_not_ours_in_out_is_refused_or_stays(pack_store: Path, tmp_path: Path) -> None:
    for name in ("unfinished/thesis.txt", "unfinished/.thesis.txt.0badf00d.tmp", "unfinished/done/mine", ".mine.tmp"):
        out = tmp_path / name.replace("/", "-") / "p"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(UsageError, match="is not a pack"):
            make(pack_store, out)
        assert (out / name).read_text() == "mine"
    out = tmp_path / "p"
    (out / "unfinished").mkdir(parents=True)
    ours = (out / "unfinished" / ".plan.json.0badf00d.tmp", out / "unfinished" / "lock")
    for file in ours:
        file.touch()
    with mock.patch.object(store.pack, "_make", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        make(pack_store, out)
    plan = PackFolder(PackPlan(open_store(pack_store), PackSettings(store=pack_store, out=out, seed=1)), out, None)
    plan.begin({})
    assert not ours[0].exists()
    (out / ".mine.tmp").touch()
    (out / ".x.tmp").mkdir()
    (out / "unfinished" / "mine").touch()
    make(pack_store, out)
    assert (out / ".mine.tmp").exists() and (out / ".x.tmp").is_dir()
    assert [file.name for file in (out / "unfinished").iterdir()] == ["mine"]


def test_a_file_where_a_folder_is_wanted_is_said_before_anything_is_written(pack_store: Path, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    for changes, reason in (
        ({"out": file / "p"}, r"--out .*file is a file"),
        ({"out": tmp_path / "p", "scratch": file}, r"--scratch .*file is a file"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(pack_store, **changes)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("site", "point", "runs"), [("img_0", "mlp_out", 0), ("txt_0", "mlp_in", 3)])
def test_a_row_that_is_not_finite_is_named_before_anything_of_its_site_is_published(
    pack_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str, point: str, runs: int
) -> None:
    read = Store.read
    table = open_store(pack_store).prompts().to_pydict()
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
        make(pack_store, tmp_path / "p")
    assert not list((tmp_path / "p" / site).glob("*"))
    monkeypatch.setattr(Store, "read", read)
    assert make(pack_store, tmp_path / "p").files


def test_tokens_that_are_not_as_many_as_they_should_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"img": StreamTokens("sample", 3, 6)}
    path = toy_store(tmp_path / "s", sites=("img_0",), tokens=tokens)
    monkeypatch.setattr(Store, "tokens", lambda self, stream, step, a, b: np.tile(np.int32([1, 2, -1]), (b - a, 1)))
    with pytest.raises(DamagedError, match="are not as many as they should be"):
        make(path, tmp_path / "p")


def test_a_complete_pack_is_left_alone_and_another_is_refused(
    pack_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(pack_store, tmp_path / "p")
    assert capsys.readouterr().out.startswith("plan: ")
    before = digests(tmp_path / "p")
    make(pack_store, tmp_path / "p")
    assert "complete already" in capsys.readouterr().out and digests(tmp_path / "p") == before
    for changes, reason in (
        ({"seed": 5}, "seed: there 1, asked for 5"),
        ({"split": "val"}, "split"),
        ({"sites": "img_0"}, "sites"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(pack_store, tmp_path / "p", **changes)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="is not a pack"):
        make(pack_store, tmp_path / "other")


def test_wrong_settings_are_explained(pack_store: Path, tmp_path: Path) -> None:
    for changes, reason in (
        ({"sites": "img_9"}, "no img_9; it has img_0, img_1, txt_0"),
        ({"points": "mlp_mid"}, "'mlp_mid' is no point"),
        ({"memory": "lots"}, "no size"),
        ({"shard_mb": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "give one of them"),
        ({"scheduler": "localhost"}, "no address"),
        ({"scratch": pack_store / "scratch"}, "lies in the store"),
    ):
        with pytest.raises(UsageError, match=reason):
            make(pack_store, tmp_path / "p", **changes)
    with pytest.raises(ForeignError, match="no store"):
        make(tmp_path / "nowhere", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_full_disk_is_refused_before_anything_is_written(
    pack_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.pack.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    with pytest.raises(StoreError, match=r"100 B are free.*another --out or --scratch"):
        make(pack_store, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_scratch_files_are_counted_where_they_will_lie(
    large_pack_store: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = large_pack_store
    total = sum(file.stat().st_size for file in (path / "activations").rglob("c.*"))
    room = type("Usage", (), {"free": int(1.3 * total)})
    monkeypatch.setattr(store.pack.shutil, "disk_usage", lambda _path: room)
    with pytest.raises(StoreError, match="are free on that disk"):
        make(path, tmp_path / "p", shard_mb=1, memory="9MB")
    assert make(path, tmp_path / "p", shard_mb=1, memory="60MB").files


def test_damaged_and_foreign_shards_are_refused_before_they_are_mapped(pack_store: Path, tmp_path: Path) -> None:
    pack, other = make(pack_store, tmp_path / "p"), make(pack_store, tmp_path / "q", seed=2)
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


def test_a_manifest_that_was_edited_or_is_of_another_version_is_refused(pack_store: Path, tmp_path: Path) -> None:
    pack = make(pack_store, tmp_path / "p")
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
        make(pack_store, pack.path)
    manifest.unlink()
    with pytest.raises(DamagedError, match=r"is a pack that lost its manifest\.json"):
        open_pack(pack.path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForeignError, match="is no pack"):
        open_pack(tmp_path / "empty")
    with pytest.raises(UsageError, match="there is no pack"):
        open_pack(tmp_path / "none")
