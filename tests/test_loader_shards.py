"""What is wrong with a shard is said before a step is taken on it, and how well a pack is mixed is measured."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import train.rows.reading
import train.rows.staging
from store.errors import DamagedError, GranaryError, MismatchError, NonFiniteError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.shards import METADATA_KEY, Pack, crc32c_hex, open_pack, shard_file
from tests.written_pack import SITE, telling_rows, written_pack
from train.rows.loader import Loader
from train.rows.mixing import mixing
from train.rows.reading import is_finite, read_shard

BOTH = ("mlp_in", "mlp_out")


def three_shards(path: Path) -> Pack:
    return written_pack(path, [telling_rows(i, 200) for i in range(3)])


def rewrite(pack: Pack, change: Callable[[dict[str, Any], dict[str, Any]], None], checksums: bool = True) -> None:
    """Change columns and metadata of the second shard; with `checksums` the manifest is made to agree."""
    name = shard_file(SITE, 1)
    columns: dict[str, Any] = {key: np.array(column) for key, column in pack.shards(SITE)[1].columns().items()}
    about = {"pack": pack.key, "site": str(SITE), "shard": 1}
    change(columns, about)
    data = safetensors.numpy.save(columns, {METADATA_KEY: json.dumps(about)})
    (pack.path / name).write_bytes(data)
    if checksums:
        manifest = read_self_checked(pack.path / "manifest.json")
        manifest["files"][name] = {"bytes": len(data), "crc32c": crc32c_hex(data)}
        write_json(pack.path / "manifest.json", self_checked(manifest))


def cut(pack: Pack) -> None:
    path = pack.shards(SITE)[1].path
    path.write_bytes(path.read_bytes()[:-100])


def flip(pack: Pack) -> None:
    path = pack.shards(SITE)[1].path
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def lose(pack: Pack) -> None:
    pack.shards(SITE)[1].path.unlink()


def swap(pack: Pack) -> None:
    second, third = (pack.shards(SITE)[index].path for index in (1, 2))
    second.write_bytes(third.read_bytes())


def stranger(pack: Pack) -> None:
    rewrite(pack, lambda _, about: about.update(pack="another"))


def wrong_column(pack: Pack) -> None:
    rewrite(pack, lambda columns, _: columns.update(mlp_in=columns["mlp_in"].astype(np.float16)))


def no_column(pack: Pack) -> None:
    rewrite(pack, lambda columns, _: columns.pop("mlp_out"))


def nan(pack: Pack) -> None:
    def change(columns: dict[str, Any], _: Any) -> None:
        columns["mlp_out"][77, 3] = -np.inf
        columns["image"][77], columns["step"][77], columns["token"][77] = 9, 2, 31

    rewrite(pack, change)


def nan_sigma(pack: Pack) -> None:
    rewrite(pack, lambda columns, _: columns["sigma"].__setitem__(5, np.nan))


@pytest.mark.parametrize(
    ("harm", "error", "reason", "seen_by_check"),
    [
        (cut, DamagedError, "shard-00001.safetensors has .* bytes where the manifest names", True),
        (lose, DamagedError, "shard-00001.safetensors is missing", True),
        (swap, MismatchError, "shard-00001.safetensors is a shard of another pack or place", True),
        (stranger, MismatchError, "says .*'another'.*expected", True),
        (wrong_column, DamagedError, r"column mlp_in is .*F16.*expected bfloat16", True),
        (no_column, DamagedError, "column mlp_out is None", True),
        (flip, DamagedError, "shard-00001.safetensors differs from the checksum", False),
        (nan, NonFiniteError, r"img_0 mlp_out at step 2 of image 9, token 31 .*\(row 77; 1 such rows", False),
        (nan_sigma, NonFiniteError, r"img_0 sigma at step 0 of image 0, token 5 .*\(row 5;", False),
    ],
)
def test_a_shard_that_cannot_be_trained_on_is_named_before_a_step_is_taken_on_it(
    tmp_path: Path, harm: Callable[[Pack], None], error: type[GranaryError], reason: str, seen_by_check: bool
) -> None:
    harm(three_shards(tmp_path))
    loader = Loader(open_pack(tmp_path), SITE, BOTH, 50, 0)
    if seen_by_check:
        with pytest.raises(error, match=reason):
            loader.check()
    else:
        loader.check()
    batches = loader.batches(0, 12)
    assert len(list(itertools.islice(batches, 4))) == 4, "the shard before it"
    for asking in (lambda: next(batches), lambda: loader.batch(0, 4), lambda: list(loader.batches(0, 12))):
        with pytest.raises(error, match=reason):
            asking()
    with pytest.raises(error, match=reason):
        read_shard(loader.shards[1], BOTH)


def test_a_shard_that_ends_or_fails_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = three_shards(tmp_path).shards(SITE)[1]
    columns = type(shard).columns

    def looked_at_before(self: Any, *names: str) -> dict[str, np.ndarray]:
        found = columns(self, *names)
        cut(shard.pack)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(shard), "columns", looked_at_before)
        with pytest.raises(DamagedError, match=r"shard-00001.safetensors ended at byte \d+ while it was read"):
            read_shard(shard, BOTH)
    shard.path.write_bytes(three_shards(tmp_path / "again").shards(SITE)[1].path.read_bytes())

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train.rows.reading.os, "posix_fadvise", fails)
    with pytest.raises(DamagedError, match=r"cannot be read .*Input/output error"):
        read_shard(shard, BOTH)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_of_all_bit_patterns_those_are_finite_that_numpy_says(dtype: Any) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    values = patterns.view(dtype) if np.dtype(dtype).itemsize == 2 else (patterns.astype(np.uint32) << 16).view(dtype)
    expected = np.isfinite(values.astype(np.float32))
    assert is_finite(values[expected]) and (~expected).sum() > 0
    assert not any(is_finite(values[index : index + 1]) for index in np.flatnonzero(~expected))
    assert all(is_finite(values[index : index + 1]) for index in np.flatnonzero(expected)[:: 2**8 - 1])


@pytest.mark.parametrize("block", [1 << 18, 64, 50, 7])
def test_a_nan_is_found_wherever_blocks_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(train.rows.reading, "BLOCK", block)
    for row, channel in ((0, 0), (3, 2), (7, 3), (2, 1)):
        rows = telling_rows(0, 8, dtype=np.float32)
        whole = written_pack(tmp_path / f"{row}-whole", [rows]).shards(SITE)[0]
        found = read_shard(whole, ("mlp_out",), whole=False)
        assert "mlp_in" not in found and np.array_equal(found["mlp_out"].numpy(), rows["mlp_out"])
        rows["mlp_in"][row, channel] = np.nan
        (shard,) = written_pack(tmp_path / f"{row}-nan", [rows]).shards(SITE)
        for all_of_it in (True, False):
            with pytest.raises(NonFiniteError, match=rf"\(row {row}; 1 such rows"):
                read_shard(shard, BOTH, whole=all_of_it)


def test_a_point_without_a_column_is_not_read(tmp_path: Path) -> None:
    pack = written_pack(tmp_path, [{"mlp_out": telling_rows(0, 100)["mlp_out"]}])
    with pytest.raises(UsageError, match="no column mlp_in"):
        read_shard(pack.shards(SITE)[0], BOTH)
    with pytest.raises(UsageError, match="no mlp_in"):
        Loader(pack, SITE, BOTH, 50, 0)


def from_images(path: Path, images: np.ndarray, shards: int) -> Pack:
    """A pack whose row r comes from image images[r]."""
    parts = np.array_split(images.astype(np.int32), shards)
    return written_pack(path, [telling_rows(i, len(part)) | {"image": part} for i, part in enumerate(parts)])


def test_a_mixed_pack_has_about_the_pairs_of_a_perfect_shuffle_and_one_in_order_has_many_more(tmp_path: Path) -> None:
    in_order = np.repeat(np.arange(100), 5 + np.arange(100) % 7)
    shuffled = np.random.default_rng(0).permutation(in_order)
    mixed = mixing(from_images(tmp_path / "mixed", shuffled, 4), SITE, 64, 0, batches=8)
    assert mixed.ratio is not None and mixed.deviation is not None and mixed.batches == 8
    assert abs(mixed.ratio - 1) < 3 * mixed.deviation < 0.3
    alike = mixing(from_images(tmp_path / "in order", in_order, 4), SITE, 64, 0, batches=99)
    assert alike.ratio is not None and 3.5 < alike.ratio < 4.5, "each of four shards has images of its own"
    assert str(alike).startswith(f"mixing: {alike.pairs:,} pairs of rows of one image in 12 batches of 64 rows")


def test_the_expected_pairs_are_the_mean_over_all_batches_that_could_be(tmp_path: Path) -> None:
    images = np.array([0, 0, 0, 1, 1, 2, 5, 5])
    pairs = [
        sum(images[one] == images[other] for one, other in itertools.combinations(rows, 2))
        for rows in itertools.combinations(range(8), 4)
    ]
    found = mixing(from_images(tmp_path / "p", images, 1), SITE, 4, 0)
    assert found.batches == 2 and found.expected == pytest.approx(2 * np.mean(pairs))
    alone = mixing(from_images(tmp_path / "q", np.arange(8), 1), SITE, 4, 0)
    assert alone.ratio is None and "no image has two rows" in str(alone)


class FakeCuda:
    """Writes down in which order streams, events and the CPU act; everything happens at once on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.acts: list[str] = []
        fake, events = self, itertools.count()

        class Event:
            def __init__(self) -> None:
                self.name = next(events)

            def synchronize(self) -> None:
                fake.acts.append(f"cpu waits for {self.name}")

            def record(self, _: Any) -> None:
                fake.acts.append(f"copied {self.name}")

        class Stream:
            def __init__(self, *_: Any) -> None: ...

            def wait_event(self, event: Event) -> None:
                fake.acts.append(f"stream waits for {event.name}")

        @contextlib.contextmanager
        def stream(_: Any) -> Iterator[None]:
            yield

        for name, value in (("Event", Event), ("Stream", Stream), ("stream", stream)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, __: fake.acts.append("kept"))
        monkeypatch.setattr(train.rows.staging, "page_locked", lambda shape, dtype: torch.empty(shape, dtype=dtype))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())


def test_the_way_to_a_device_waits_for_its_own_copy_and_never_writes_into_a_buffer_that_is_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = three_shards(tmp_path)
    expected = [batch.at("mlp_in") for batch in Loader(pack, SITE, BOTH, 50, 0).batches(0, 12)]
    fake = FakeCuda(monkeypatch)
    on_device = Loader(pack, SITE, BOTH, 50, 0, device="cuda")
    found = [batch.at("mlp_in") for batch in on_device.batches(0, 12)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    acts = [act for act in fake.acts if act != "kept"]
    send = [[f"cpu waits for {n % 3}", f"copied {n % 3}"] for n in range(12)]
    receive = [[f"stream waits for {n % 3}"] for n in range(12)]
    one_ahead = send[0] + [act for n in range(1, 12) for act in send[n] + receive[n - 1]] + receive[11]
    assert acts == one_ahead
    assert fake.acts.count("kept") == 3 * 12, "the memory of both points and sigma outlives the stream that copied"
