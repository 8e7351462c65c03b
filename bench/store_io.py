"""What the store costs: one part of 201 MB written, read and verified, against a raw file, a memory map, zarr-python, tensorstore.

Least work: to write, the bytes onto the disk, one CRC-32C and, as the design asks of a commit, one SHA-256 of them; to read,
the bytes out of the page cache and one CRC-32C; to verify, the bytes out of the page cache and one SHA-256.  The float64
statistics of every channel, which a commit has too, are in one line and left out of another.  Reads come from the page cache,
which is the hard case: from a disk all of them wait for the disk.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from bench.groups import STORE_PEERS
from bench.lines import Line, Need, Peer, Size
from bench.timing import by_turns, quiet
from store import open_store
from store.care.verify import VerifySettings
from store.care.verify import run as verify
from store.format import StoreMeta, StreamTokens
from store.sizes import human_size
from store.statistics import Statistics, array_statistics
from store.writer import Key, Part, StoreWriter
from tests.small_store import small_meta, small_part

TOKENS = 192
SIZES = {"tiny": (2, 16, 1), "quick": (64, 1024, 4), "full": (64, 1024, 8)}
"""images, channels, rounds"""
WRITE_GOAL, READ_GOAL = 1 / 0.6, 2.0


def lines(size: Size) -> Iterator[Line]:
    """Write, read and verify."""
    images, channels, rounds = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), images, channels)
        amount = human_size(bench.bytes)
        yield from _written(bench, amount, rounds)
        others = {
            "memory map copied, unchecked": bench.read_map, "zarr-python, crc32c": bench.read_zarr,
            **_tensorstore_too(bench.read_tensorstore),
        }  # fmt: skip
        ours, *its = by_turns(bench.read_ours, *others.values(), rounds=rounds)
        peers = [Peer(other, seconds) for other, seconds in zip(others, its, strict=True)]
        peers[0] = replace(peers[0], goal=READ_GOAL)
        needs = (Need("cached", bench.bytes), Need("crc32c", bench.bytes))
        yield Line(f"read {amount} in whole chunks, checked", ours, tuple(peers), needs)
        ours, hashed = by_turns(bench.verify_ours, bench.hash_raw, rounds=rounds)
        needs = (Need("cached", bench.bytes), Need("sha256", bench.bytes))
        yield Line(f"verify {amount}, SHA-256", ours, (Peer("SHA-256 of the raw file, one thread", hashed),), needs)


def _written(bench: "Bench", amount: str, rounds: int) -> Iterator[Line]:
    """Both ways of ours beside all others in the same turns; at the end everything is there once, to be read."""
    works: dict[str, Callable[[], object]] = {
        "raw file, fsync": bench.write_raw, "zarr-python, crc32c, no fsync": bench.write_zarr,
        **_tensorstore_too(bench.write_tensorstore),
    }  # fmt: skip
    whole, known, *its = by_turns(
        bench.write_ours, bench.write_ours_without_statistics, *works.values(), rounds=rounds, before=bench.clear
    )
    raw, *others = (Peer(other, seconds) for other, seconds in zip(works, its, strict=True))
    needs = (Need("write", bench.bytes), Need("crc32c", bench.bytes), Need("sha256", bench.bytes))
    yield Line(f"write {amount}: statistics, commit", whole, (raw,), needs)
    yield Line(f"write {amount}: statistics known", known, (replace(raw, goal=WRITE_GOAL), *others), needs)
    bench.clear()
    for work in (bench.write_ours, *works.values()):
        work()


def _tensorstore_too(work: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """tensorstore's part in it, where it is installed."""
    if STORE_PEERS.missing() is None and str(STORE_PEERS.installed.parent) not in sys.path:
        sys.path.append(str(STORE_PEERS.installed.parent))
    return {"tensorstore, crc32c": work} if importlib.util.find_spec("tensorstore") else {}


def data(images: int, channels: int) -> tuple[StoreMeta, dict[Key, np.ndarray], Part]:
    """Eight arrays of one chunk each."""
    tokens = StreamTokens("all", TOKENS, TOKENS)
    meta = small_meta(
        n_images=images, sites=("img_0", "img_1"), d_model=channels, image_tokens=tokens, chunk_images=images, pictures="none"
    )  # fmt: skip
    meta = replace(meta, height=96, width=128)
    rng = np.random.default_rng(0)
    values = {
        (site, step, point): rng.standard_normal((images, TOKENS, channels), np.float32).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }
    return meta, values, small_part(meta, 0, values, ["p"] * images)


class Bench:
    """Every way of writing and reading the same values, below one folder."""

    def __init__(self, folder: Path, images: int, channels: int) -> None:
        self.folder = folder / "here"
        self.meta, self.values, self.part = data(images, channels)
        self.raw = [np.ascontiguousarray(value).view(np.uint16) for value in self.values.values()]
        self.bytes = sum(value.nbytes for value in self.raw)
        self.known: dict[int, Statistics] = {id(v): _known(v) for v in self.part.activations.values()}

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def write_ours(self) -> None:
        writer = StoreWriter.open_or_create(self.folder / "store", self.meta)
        writer.write_part(0, self.part)
        assert writer.seal()

    def write_ours_without_statistics(self) -> None:
        with mock.patch("store.writer.array_statistics", lambda values, *_more: self.known[id(values)]):
            self.write_ours()

    def write_raw(self) -> None:
        with (self.folder / "raw").open("wb", buffering=0) as file:
            for value in self.raw:
                file.write(value.data)
            os.fsync(file.fileno())

    def write_zarr(self) -> None:
        for index, value in enumerate(self.raw):
            array = zarr.create_array(
                self.folder / f"zarr/{index}", shape=value.shape, chunks=value.shape, dtype="uint16",
                serializer=BytesCodec(), compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
            )  # fmt: skip
            array[:] = value

    def write_tensorstore(self) -> None:
        for index, value in enumerate(self.raw):
            _tensorstore(self.folder / f"ts/{index}", value.shape)[...].write(value).result()

    def read_ours(self) -> None:
        store = open_store(self.folder / "store")
        for key in self.values:
            store.read(*key)

    def read_map(self) -> None:
        np.array(np.memmap(self.folder / "raw", np.uint16, "r"))

    def read_zarr(self) -> None:
        for index in range(len(self.raw)):
            zarr.open_array(self.folder / f"zarr/{index}", mode="r")[:]

    def read_tensorstore(self) -> None:
        for index in range(len(self.raw)):
            _tensorstore(self.folder / f"ts/{index}", None)[...].read().result()

    def verify_ours(self) -> None:
        with quiet():
            verify(VerifySettings(str(self.folder / "store")))

    def hash_raw(self) -> None:
        with (self.folder / "raw").open("rb") as file:
            hashlib.file_digest(file, "sha256")


def _known(values: np.ndarray) -> Statistics:
    found = array_statistics(values, None)
    assert isinstance(found, Statistics)
    return found


def _tensorstore(path: Path, shape: tuple[int, ...] | None) -> Any:
    import tensorstore

    spec: dict[str, object] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    if shape is None:
        return tensorstore.open(spec).result()
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": list(shape)}}
    metadata = {"shape": list(shape), "data_type": "uint16", "chunk_grid": grid, "codecs": codecs}
    return tensorstore.open({**spec, "metadata": metadata, "create": True}).result()
