"""The store keeps what it was given, shows only what is whole, and names what is damaged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from store import Site, open_store
from store.errors import DamagedError, ForeignError, MismatchError, NonFiniteError, UnfinishedError, UsageError
from store.format import StreamTokens, chunk_images, metadata_files, part_files
from store.writer import StoreWriter
from tests.small_store import SmallStore, make_store, small_meta, small_part

MakeStore = Callable[..., SmallStore]
IMG, TXT = Site.parse("img_0"), Site.parse("txt_0")


def tree(folder: Path | str) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    path = Path(folder)
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def random_values(meta):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    return {
        (site, step, point): rng.normal(size=(meta.n_images, meta.tokens[site.stream].kept, meta.d_model)).astype(
            meta.carrier.logical
        )
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_read_is_what_was_written_in_every_dtype(small_store: MakeStore, dtype: str) -> None:
    made = small_store(store_dtype=dtype)
    for (site, step, point), values in made.values.items():
        found = made.store.read(site, step, point)
        assert found.dtype == np.dtype(made.store.meta.carrier.logical)
        np.testing.assert_array_equal(found.astype(np.float32), values)
    np.testing.assert_array_equal(
        made.store.read(IMG, 1, "mlp_out", 3, 9).astype(np.float32), made.values[IMG, 1, "mlp_out"][3:9]
    )


def test_a_plain_zarr_reader_opens_the_carrier(small_store: MakeStore) -> None:
    made = small_store()
    array = zarr.open_group(made.path, mode="r")["activations/double.00/img/step.1/mlp_in"]
    assert array.attrs["logical_dtype"] == "bfloat16"
    np.testing.assert_array_equal(array[:].view(ml_dtypes.bfloat16), made.store.read(IMG, 1, "mlp_in"))


def test_a_chunk_that_was_never_written_reads_as_nan(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", small_meta())
    raw = zarr.open_array(writer.path / "activations/double.00/img/step.0/mlp_in", mode="r")[:]
    assert np.isnan(raw.view(ml_dtypes.bfloat16).astype(np.float32)).all()


def test_equal_content_gives_equal_bytes_and_one_id(tmp_path: Path) -> None:
    one, two = make_store(tmp_path / "a"), make_store(tmp_path / "elsewhere" / "b")
    assert tree(one.path) == tree(two.path)
    assert one.store.id == two.store.id


def test_sampled_tokens_are_stored_with_their_positions(small_store: MakeStore) -> None:
    made = small_store(image_tokens=StreamTokens("sample", 5, 12))
    positions = made.store.tokens("img", 1)
    assert positions.shape == (10, 5)
    assert (np.diff(positions, axis=1) > 0).all()
    assert len({tuple(row) for row in positions.tolist()}) > 1


def test_real_text_tokens_leave_the_rest_empty(small_store: MakeStore) -> None:
    made = small_store(text_tokens=StreamTokens("real+0", 8, 8))
    positions, lengths = made.store.tokens("txt", 0), made.store.prompts().column("text_length").to_numpy()
    np.testing.assert_array_equal((positions >= 0).sum(axis=1), lengths)
    read = made.store.read(TXT, 0, "mlp_in").astype(np.float32)
    assert np.isnan(read[positions < 0]).all()
    assert np.isfinite(read[positions >= 0]).all()


def test_an_unfinished_store_is_not_opened_unless_asked_for(tmp_path: Path) -> None:
    meta = small_meta()
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    writer.write_part(1, small_part(meta, 1, random_values(meta), ["p"] * 10))
    with pytest.raises(UnfinishedError, match="2 of 3 parts are missing"):
        open_store(tmp_path / "store")
    store = open_store(tmp_path / "store", unfinished=True)
    assert store.committed_parts == (1,)
    assert store.read(IMG, 0, "mlp_in", 4, 8).shape == (4, 12, 16)
    with pytest.raises(UnfinishedError, match="images 0 to 3"):
        store.read(IMG, 0, "mlp_in", 0, 8)


def test_a_store_filled_in_any_order_after_any_interruption_is_the_same(tmp_path: Path) -> None:
    meta = small_meta()
    values, words = random_values(meta), [f"prompt {i}" for i in range(10)]
    straight = StoreWriter.open_or_create(tmp_path / "straight", meta)
    for part in straight.missing():
        straight.write_part(part, small_part(meta, part, values, words))
    straight.seal()

    path = tmp_path / "broken"
    StoreWriter.open_or_create(path, meta).write_part(2, small_part(meta, 2, values, words))
    torn = path / "activations/double.00/img/step.0/mlp_in"
    killed = StoreWriter.open_or_create(path, meta)
    lease = killed.leases.take("part-00000")  # and never given back: its process is killed here
    assert lease is not None
    lease.file.write_text(json.dumps({**json.loads(lease.file.read_text()), "started": "0"}))
    (torn / ".c.0.0.0.1.tmp").write_bytes(b"half a chunk")
    (torn / "c.0.0.0").write_bytes(b"")
    (path / "prompts/.part-00000.parquet.1.tmp").write_bytes(b"half a table")
    again = StoreWriter.open_or_create(path, meta)
    assert again.missing() == [0, 1]
    for part in again.missing():
        again.write_part(part, small_part(meta, part, values, words))
    assert again.seal()
    assert tree(path) == tree(tmp_path / "straight")


def test_a_creation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    meta = small_meta()
    made = StoreWriter.open_or_create(tmp_path / "a", meta)
    before = tree(made.path)
    (made.path / "commits/store.json").unlink()
    shutil.rmtree(made.path / "activations/double.00/txt")
    StoreWriter.open_or_create(tmp_path / "a", meta)
    assert tree(made.path) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_stops_the_part_and_names_it(tmp_path: Path, bad: float) -> None:
    meta = small_meta()
    values = random_values(meta)
    values[TXT, 1, "mlp_out"][6, 2, 3] = bad
    writer = StoreWriter.open_or_create(tmp_path / "store", meta)
    with pytest.raises(NonFiniteError, match=r"txt_0 mlp_out at step 1 of image 6 .*prompt: 'p6'"):
        writer.write_part(1, small_part(meta, 1, values, [f"p{i}" for i in range(10)]))
    assert writer.missing() == [0, 1, 2]


def test_a_missing_record_of_creation_never_costs_what_was_committed(small_store: MakeStore) -> None:
    made = small_store()
    before = tree(made.path)
    (made.path / "commits/store.json").unlink()
    with pytest.raises(UsageError, match="holds another run"):
        StoreWriter.open_or_create(made.path, small_meta(seed=7))
    (made.path / "zarr.json").unlink()
    with pytest.raises(DamagedError, match="Mend it first: python -m store repair"):
        StoreWriter.open_or_create(made.path, made.store.meta)
    (made.path / "seal.json").unlink()
    with pytest.raises(MismatchError, match="belongs to a run of origin"):
        StoreWriter.open_or_create(made.path, small_meta(seed=7))
    assert StoreWriter.open_or_create(made.path, made.store.meta).seal()
    assert tree(made.path) == before


def test_metadata_that_json_changes_is_still_the_same_run(tmp_path: Path) -> None:
    meta = replace(small_meta(), model={"axes": (16, 56, 56)})
    StoreWriter.open_or_create(tmp_path / "store", meta)
    StoreWriter.open_or_create(tmp_path / "store", meta)


def test_a_store_can_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    assert make_store(tmp_path / "store").store.finished


def test_another_run_in_the_same_folder_is_refused_by_name(tmp_path: Path) -> None:
    StoreWriter.open_or_create(tmp_path / "store", small_meta())
    with pytest.raises(UsageError, match=r"holds another run; it differs in\n  seed: there 0, asked for 7"):
        StoreWriter.open_or_create(tmp_path / "store", small_meta(seed=7))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not a Granary store"):
        StoreWriter.open_or_create(tmp_path, small_meta())
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_part_is_claimed_by_one_process_at_a_time(tmp_path: Path) -> None:
    writer = StoreWriter.open_or_create(tmp_path / "store", small_meta())
    with writer.claim(0) as first, writer.claim(0) as second, writer.claim(1) as other:
        assert first is not None
        assert second is None
        assert other is not None
    with writer.claim(0) as again:
        assert again is not None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_chunk_is_an_error_that_names_the_file(small_store: MakeStore, damage: str) -> None:
    made = small_store()
    chunk = made.path / "activations/double.00/img/step.0/mlp_in/c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 4
    if damage == "delete":
        chunk.unlink()
    else:
        chunk.write_bytes(data if damage == "flip" else data[:-1])
    store = open_store(made.path)
    store.read(IMG, 0, "mlp_in", 0, 4)
    with pytest.raises(DamagedError, match=r"double\.00/img/step\.0/mlp_in"):
        store.read(IMG, 0, "mlp_in", 4, 8)


def test_a_whole_chunk_in_the_place_of_another_is_told(small_store: MakeStore) -> None:
    made = small_store()
    folder = made.path / "activations/double.00/img/step.0"
    shutil.copy(folder / "mlp_out/c.1.0.0", folder / "mlp_in/c.1.0.0")
    with pytest.raises(DamagedError, match="is a whole chunk, but not the one that was committed"):
        open_store(made.path).read(IMG, 0, "mlp_in", 4, 8)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("zarr.json", '"seed": 0', '"seed": 1'),
        ("commits/store.json", '"parts": 3', '"parts": 4'),
        ("commits/part-00001.json", '"part": 1', '"part": 2'),
        ("commits/part-00002.json", '"statistics"', ""),
        ("seal.json", '"part-00001"', '"part-00009"'),
    ],
)
def test_edited_metadata_does_not_open(small_store: MakeStore, name: str, before: str, after: str) -> None:
    made = small_store()
    file = made.path / name
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(DamagedError, match="python -m store repair"):
        open_store(made.path).read(IMG, 0, "mlp_in")


def test_a_commit_deleted_from_a_finished_store_is_not_taken_for_work_to_do(small_store: MakeStore) -> None:
    made = small_store()
    (made.path / "commits/part-00001.json").unlink()
    with pytest.raises(DamagedError, match=r"part-00001\.json is missing from a finished store"):
        open_store(made.path, unfinished=True).read(IMG, 0, "mlp_in")
    with pytest.raises(DamagedError, match="was lost, not left to be harvested"):
        StoreWriter.open_or_create(made.path, made.store.meta).missing()


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="there is no store at"):
        open_store(tmp_path / "nothing")
    with pytest.raises(ForeignError, match=r"has no zarr\.json"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "plain", zarr_format=3)
    with pytest.raises(ForeignError, match="no attribute 'granary'"):
        open_store(tmp_path / "plain")


def test_a_newer_format_is_refused(small_store: MakeStore) -> None:
    made = small_store()
    content = json.loads((made.path / "zarr.json").read_text())
    content["attributes"]["granary"]["format_version"] = 2
    (made.path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(ForeignError, match="format version 2; this Granary reads version 1"):
        open_store(made.path)


def test_asking_for_what_the_store_lacks_says_what_it_has(small_store: MakeStore) -> None:
    store = small_store().store
    with pytest.raises(UsageError, match="no site img_7; it has img_0, txt_0"):
        store.read(Site.parse("img_7"), 0, "mlp_in")
    with pytest.raises(UsageError, match="at step 9"):
        store.read(IMG, 9, "mlp_in")
    with pytest.raises(UsageError, match="images 8 to 11 are not in"):
        store.read(IMG, 0, "mlp_in", 8, 11)


def test_the_files_of_a_part_are_known_without_listing(small_store: MakeStore) -> None:
    made = small_store(image_tokens=StreamTokens("sample", 5, 12))
    promised = {name for part in range(3) for name in part_files(made.store.meta, part)}
    there = {
        name for name in tree(made.path) if not name.endswith("zarr.json") and not name.startswith(("commits", "seal"))
    }
    assert promised == there - {"README.md"}
    assert set(metadata_files(made.store.meta)) == {
        n for n in tree(made.path) if n.endswith(("zarr.json", "README.md"))
    }


def test_pictures_come_back_and_load_with_datasets(
    small_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    made = small_store()
    picture = made.store.picture(7)
    assert picture is not None
    assert (picture.size, picture.getpixel((0, 0))) == ((32, 24), (140, 140, 140))
    files = [str(made.path / f"images/part-{part:05d}.parquet") for part in range(3)]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[7]["image"].size == (32, 24)
    assert small_store(pictures="none").store.picture(0) is None


def test_chunks_hold_a_power_of_two_of_images_near_24_mib() -> None:
    assert chunk_images(1024 * 3072 * 2) == 4
    assert chunk_images(64 * 3072 * 2) == 64
    assert chunk_images(256 * 3072 * 2) == 16
    assert chunk_images(100) == 64
    assert chunk_images(10**9) == 4
