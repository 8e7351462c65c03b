"""What the store costs, against a raw file, a memory map, plain zarr-python and tensorstore: `make bench-store`.

Fewest bytes: each activation once, in and out.  Fewest operations beyond the copy: one CRC-32C over it each way (21 GB/s here),
and, as the design asks of a commit, one SHA-256 when it is written (1.1 GB/s).  The float64 statistics of every channel are
measured apart.  Reads come from the page cache, which is the hard case: from a disk all of them wait for the disk.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from bench.timing import Comparison, by_turns
from store import Store, open_store
from store.care.verify import VerifySettings
from store.care.verify import run as verify
from store.format import StoreMeta, StreamTokens
from store.statistics import Statistics, array_statistics
from store.writer import Key, Part, StoreWriter
from tests.small_store import small_meta, small_part

PEERS = Path(__file__).parent.parent / ".bench-peers"
IMAGES, TOKENS, CHANNELS = 64, 192, 1024


def data() -> tuple[StoreMeta, dict[Key, np.ndarray], Part]:
    """Eight arrays of one 25 MB chunk each."""
    tokens = StreamTokens("all", TOKENS, TOKENS)
    meta = small_meta(
        n_images=IMAGES, sites=("img_0", "img_1"), d_model=CHANNELS, image_tokens=tokens, chunk_images=IMAGES, pictures="none"
    )  # fmt: skip
    meta = replace(meta, height=96, width=128)
    rng = np.random.default_rng(0)
    values = {
        (site, step, point): rng.normal(size=(IMAGES, TOKENS, CHANNELS)).astype(np.float32).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }
    return meta, values, small_part(meta, 0, values, ["p"] * IMAGES)


class Bench:
    """Every way of writing and reading the same values, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta, self.values, self.part = data()
        self.raw = [np.ascontiguousarray(value).view(np.uint16) for value in self.values.values()]
        self.bytes = sum(value.nbytes for value in self.raw)
        self.known: dict[int, Statistics] = {id(v): _known(v) for v in self.part.activations.values()}
        self._turn = 0

    def write_ours(self) -> None:
        self._turn += 1
        writer = StoreWriter.open_or_create(self.folder / f"store-{self._turn}", self.meta)
        writer.write_part(0, self.part)
        assert writer.seal()

    def write_ours_without_statistics(self) -> None:
        with mock.patch("store.writer.array_statistics", lambda values, _kept, _error: self.known[id(values)]):
            self.write_ours()

    def write_raw(self) -> None:
        with (self.folder / "raw").open("wb", buffering=0) as file:
            for value in self.raw:
                file.write(value.data)
            os.fsync(file.fileno())

    def write_zarr(self) -> None:
        self._turn += 1
        for index, value in enumerate(self.raw):
            array = zarr.create_array(
                self.folder / f"zarr-{self._turn}/{index}", shape=value.shape, chunks=value.shape, dtype="uint16",
                serializer=BytesCodec(), compressors=[Crc32cCodec()], config={"write_empty_chunks": True},
            )  # fmt: skip
            array[:] = value

    def write_tensorstore(self) -> None:
        self._turn += 1
        for index, value in enumerate(self.raw):
            _tensorstore(self.folder / f"ts-{self._turn}/{index}", value.shape)[...].write(value).result()

    def read_ours(self, store: Store) -> None:
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
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            verify(VerifySettings(str(self.folder / "store-1")))

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


def comparisons(peers: bool = False) -> list[Comparison]:
    """Write, read and verify; with `peers` against zarr-python and tensorstore as well."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        size = f"{bench.bytes / 1e6:.0f} MB once"
        lines: list[Comparison] = []

        def compare(what: str, ours: Callable[[], object], alternative: str, other: Callable[[], object]) -> None:
            lines.append(Comparison(what, *_swap(by_turns(ours, other), alternative), size))

        compare("write a part: statistics, commit", bench.write_ours, "raw file, fsync", bench.write_raw)
        compare(
            "write a part: statistics known", bench.write_ours_without_statistics, "raw file, fsync", bench.write_raw
        )
        if peers:
            compare(
                "write a part: statistics known",
                bench.write_ours_without_statistics,
                "zarr-python, crc32c, no fsync",
                bench.write_zarr,
            )
            compare(
                "write a part: statistics known",
                bench.write_ours_without_statistics,
                "tensorstore, crc32c",
                bench.write_tensorstore,
            )
            (bench.folder / f"zarr-{_last(bench, 'zarr')}").rename(bench.folder / "zarr")
            (bench.folder / f"ts-{_last(bench, 'ts')}").rename(bench.folder / "ts")
        store = open_store(bench.folder / "store-1")
        read = lambda: bench.read_ours(store)  # noqa: E731
        compare("read whole chunks, CRC-32C checked", read, "memory map copied, unchecked", bench.read_map)
        if peers:
            compare("read whole chunks, CRC-32C checked", read, "zarr-python, crc32c", bench.read_zarr)
            compare("read whole chunks, CRC-32C checked", read, "tensorstore, crc32c", bench.read_tensorstore)
        compare("verify every byte, SHA-256", bench.verify_ours, "SHA-256 of the raw file, one thread", bench.hash_raw)
    return lines


def _swap(times: tuple[float, float], alternative: str) -> tuple[float, str, float]:
    return times[0], alternative, times[1]


def _last(bench: Bench, kind: str) -> int:
    return max(int(folder.name.rpartition("-")[2]) for folder in bench.folder.glob(f"{kind}-*"))


def main() -> None:
    """Print the table; tensorstore is taken from `.bench-peers`, where `make bench-store` puts it."""
    sys.path.append(str(PEERS))
    if importlib.util.find_spec("tensorstore") is None:
        raise SystemExit("tensorstore is not there: run make bench-store")
    print(
        f"{os.cpu_count()} cores, best of 3 by turns; speed = the alternative's time over ours (1 is as fast, 2 twice as fast)"
    )
    for line in comparisons(peers=True):
        print(
            f"{line.what:<36} {line.ours:>7.3f} s   {line.alternative:<36} {line.other:>7.3f} s   speed {line.other / line.ours:>5.2f}"
        )
    print("goals: write at least 0.6 of a raw write with fsync, whole-chunk reads at least 0.5 of a memory map's copy")


if __name__ == "__main__":
    main()
