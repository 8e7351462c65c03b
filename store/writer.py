"""Writes a store, part by part, so that whatever can be seen is whole.

1. Creation writes the Zarr metadata, the card and the weights, then `commits/store.json` with their checksums.
2. A part's chunks, tokens, prompts, pictures and statistics are written, each by temporary file, fsync and rename; its
   traces before that, as they are captured.
3. Its commit is published last: every file with length and SHA-256, and the commit's own checksum.
4. When the last part lands, `seal.json` names the hash of every commit.

A reader trusts only commits, so a process killed anywhere costs at most the part that it was writing.  A part is
written under a lease, which is checked again before each rename.  Files are hashed with SHA-256 and not with CRC-32C,
because each chunk ends with its own CRC-32C, and the CRC of any message followed by its CRC is one and the same number.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from store import layout
from store.chunks import encode, from_e4m3, padded, to_e4m3
from store.errors import DamagedError, LostLeaseError, MismatchError, NonFiniteError
from store.files import (
    forget_cached,
    fsync_folder,
    json_bytes,
    parse_self_checked,
    read_self_checked,
    self_checked,
    sha256_bytes,
    temporary_of,
)
from store.format import (
    StoreMeta,
    array_path,
    array_specs,
    chunk_file,
    part_files,
    part_name,
    scale_path,
    to_float32,
    tokens_path,
)
from store.leases import Lease, Leases
from store.metadata import documents
from store.opening import holding_short_part, peek, refuse_extension, refuse_other, uncommitted
from store.sites import Point, Site, Stream
from store.spent import Spent
from store.statistics import Statistics, array_statistics, joint_statistics, statistics_bytes
from store.tables import table_bytes

WRITING_THREADS = 4
FORGOTTEN = 2**18
"""bytes from which on a file is not kept in the page cache"""
Key = tuple[Site, int, Point]
Pieces = Sequence[memoryview | bytes]


@dataclass(frozen=True)
class Part:
    """The content of one part, `n` images long."""

    activations: Mapping[Key, np.ndarray]
    """(site, step, point) -> (n, kept token, d_model) in the store's logical dtype; empty slots are NaN"""
    tokens: Mapping[tuple[Stream, int], np.ndarray]
    """(stream, step) -> (n, kept token) int32, for streams of which not all tokens are kept"""
    prompts: pa.Table
    pictures: pa.Table | Callable[[], pa.Table] | None
    """the table, or what makes it when a thread of the writer comes to it"""
    errors: Mapping[Key, float] = field(default_factory=dict)
    """(site, step, point) -> sum of squared differences between what was computed and `activations`; absent: none"""
    traces: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """file -> its entry in the commit, for traces: `StoreWriter.put_trace` has written them already"""


class StoreWriter:
    """A store that is being filled; `open_or_create` is the way to one."""

    def __init__(self, path: Path, meta: StoreMeta, mixed: dict[str, Any] | None = None) -> None:
        self.path, self.meta, self.mixed = path, meta, mixed
        self.leases = Leases(layout.runs_folder(path) / "leases")
        self.spent = Spent()  # on `encode` (statistics, checksums, compression, pictures) and on `disk`
        self._specs = {spec.name: spec for spec in array_specs(meta)}

    @classmethod
    def open_or_create(
        cls,
        path: Path,
        meta: StoreMeta,
        weights: Callable[[str], bytes] | None = None,
        allow_mixed: bool = False,
        begin: Callable[[StoreMeta], None] | None = None,
    ) -> "StoreWriter":
        """The store at `path`, created when nothing is there; `UsageError` when something else is.

        `weights(name)` is the content of a weights file, for a store that carries them.  With `allow_mixed` a store that
        was begun under another batch size, thread count, device or versions goes on, and its later commits say so.
        `begin` is called with the metadata when it is sure that this run may write here, before anything is written.
        """
        refuse_other(path, meta, allow_mixed)
        with Leases(layout.runs_folder(path) / "leases").held("create", wait=True) as lease:
            assert lease is not None
            writer = cls(path, *refuse_other(path, meta, allow_mixed))  # again, now that nobody else can begin
            if begin is not None:
                begin(writer.meta)
            if not (path / layout.STORE_COMMIT).exists():
                writer._create(lease, weights)
        return writer

    @classmethod
    def extend(
        cls,
        path: Path,
        meta: StoreMeta,
        weights: Callable[[str], bytes] | None = None,
        allow_mixed: bool = False,
        begin: Callable[[StoreMeta], None] | None = None,
    ) -> "StoreWriter":
        """The store at `path` made ready for `meta.n_images` images; committed parts stay as they are.

        `UsageError` unless `meta` differs from what is there in its length alone, and the store ends with a whole chunk,
        and `MismatchError` while another process writes a last part that is short.
        """
        refuse_extension(path, meta, allow_mixed)
        leases = Leases(layout.runs_folder(path) / "leases")
        with leases.held("create", wait=True) as lease, holding_short_part(path, meta, leases):
            assert lease is not None
            writer = cls(path, *refuse_extension(path, meta, allow_mixed))  # again, now that nobody else can extend
            if begin is not None:
                begin(writer.meta)
            there = peek(path)
            if (path / layout.STORE_COMMIT).exists() and there is not None and there.n_images == meta.n_images:
                return writer  # another worker has extended it, and may even have finished it
            for name in (layout.SEAL, layout.STORE_COMMIT):  # from here on the same command, or --resume, goes on
                (path / name).unlink(missing_ok=True)
                fsync_folder((path / name).parent)
            writer._create(lease, weights)
        return writer

    def _create(self, lease: Lease, weights: Callable[[str], bytes] | None) -> None:
        """Write metadata, card and weights, and the record of them; `MismatchError` when parts of another run are there."""
        meta = self.meta
        for part in range(meta.n_parts):
            self._check_origin(self.path / layout.part_commit(part))
        files = documents(meta)
        folders = {(self.path / name).parent for name in (*files, *part_files(meta, 0), layout.STORE_COMMIT)}
        if meta.weights_held:
            folders.add(self.path / "weights")
        real = Path(os.path.realpath(self.path))  # a link may lead to what is not there yet
        for folder in (real / "commits", *sorted(folders)):  # first what shows that the folder is ours
            folder.mkdir(parents=True, exist_ok=True)
        entries: dict[str, dict[str, Any]] = {}

        def put(name: str) -> None:
            entries[name] = self._put(name, (files[name],), lease)

        _all_of([partial(put, name) for name in files])
        for name in meta.weights_held:  # one at a time: together they may be gigabytes
            assert weights is not None
            entries[f"weights/{name}"] = self._put(f"weights/{name}", (weights(name),), lease)
        for folder in sorted({self.path, real.parent, *folders, *(f.parent for f in folders)}):
            fsync_folder(folder)
        record = self_checked({"files": dict(sorted(entries.items())), "origin": meta.origin, "parts": meta.n_parts})
        self._put(layout.STORE_COMMIT, (json_bytes(record),), lease)
        fsync_folder(self.path / "commits")

    def _check_origin(self, commit: Path) -> None:
        if commit.exists():
            mend = f"Mend it: python -m store repair {self.path} [--from COPY]"
            found = read_self_checked(commit, mend).get("origin")
            if found != self.meta.origin:
                raise MismatchError(
                    f"{commit} belongs to a run of origin {found}, and these settings give origin {self.meta.origin}: "
                    "go on with the settings that the store was made with, or choose another --out"
                )

    def missing(self) -> list[int]:
        """The parts that have no commit yet."""
        return uncommitted(self.path, self.meta)

    def is_committed(self, part: int) -> bool:
        return (self.path / layout.part_commit(part)).exists()

    @contextmanager
    def claim(self, part: int, wait: bool = False) -> Iterator[Lease | None]:
        """Hold a part against every other process; None while another one holds it, unless `wait`."""
        with self.leases.held(part_name(part), wait) as lease:
            yield lease

    def put_trace(self, lease: Lease, name: str, content: bytes, replay: Mapping[str, float]) -> dict[str, Any]:
        """Write a trace's file before its part is committed, so that none waits in memory; its entry in the commit.

        `replay` are its errors (`store.traces.REPLAYED`).  `LostLeaseError` when another process took the part over.
        """
        return {**self._put(name, (content,), lease), "replay": dict(replay)}

    def write_part(self, part: int, content: Part, lease: Lease | None = None) -> None:
        """Write and commit one part, under `lease` or one of its own.

        Errors: `NonFiniteError` names site, step and prompt of a NaN or an infinity; `LostLeaseError` when another process
        took the part over; either way nothing was committed.
        """
        if lease is None:
            with self.claim(part, wait=True) as own:
                return self.write_part(part, content, own)
        images = self.meta.part_images(part)
        entries: dict[str, dict[str, Any]] = dict(content.traces)
        statistics: dict[Key, Statistics] = {}

        def put_array(key: Key) -> None:
            with self.spent.on("encode"):
                statistics[key], pieces = self._array(part, content, key, images)
            for name, values in pieces.items():
                entries[name] = self._put_chunk(name, values, lease)

        def put_tokens(stream: Stream, step: int) -> None:
            name = chunk_file(tokens_path(stream, step), part)
            entries[name] = self._put_chunk(name, content.tokens[stream, step], lease)

        def put_table(folder: str, table: pa.Table | Callable[[], pa.Table]) -> None:
            name = f"{folder}/{part_name(part)}.parquet"
            with self.spent.on("encode"):
                data = table_bytes(table() if callable(table) else table)
            entries[name] = self._put(name, (data,), lease)

        _all_of(
            [partial(put_array, key) for key in content.activations]
            + [partial(put_tokens, *key) for key in content.tokens]
            + [partial(put_table, "prompts", content.prompts)]
            + ([partial(put_table, "images", content.pictures)] if content.pictures is not None else [])
        )
        name = f"statistics/{part_name(part)}.safetensors"
        entries[name] = self._put(name, (statistics_bytes(statistics),), lease)
        names = part_files(self.meta, part)
        assert set(entries) == set(names), sorted(set(entries) ^ set(names))
        made = {
            self.path / folder for name in content.traces for folder in Path(name).parents
        }  # when traces were written
        folders = {(self.path / name).parent for name in names} | made
        with self.spent.on("disk"):
            _all_of([partial(fsync_folder, folder) for folder in sorted(folders)])
        scalars: dict[str, Any] = {}
        for (site, step, point), found in statistics.items():
            scalars.setdefault(str(site), {}).setdefault(str(step), {})[point] = found.scalars()
        commit = {
            "part": part,
            "images": [images.start, images.stop],
            "origin": self.meta.origin,
            "files": entries,
            "statistics": scalars,
        }
        if self.mixed:
            commit["mixed"] = self.mixed
        there = peek(self.path)
        if there is not None and there.n_images != self.meta.n_images and there.part_images(part) != images:
            raise LostLeaseError(
                f"{self.path} was extended to {there.n_images} images meanwhile, so part {part} is longer now: run the harvest again"
            )
        self._put(layout.part_commit(part), (json_bytes(self_checked(commit)),), lease)
        fsync_folder(self.path / "commits")
        return None

    def seal(self) -> bool:
        """Write the seal when every part is committed; whether the store is finished."""
        if self.missing():
            return False
        with self.leases.held("create", wait=True) as lease:  # so that nobody extends it meanwhile
            assert lease is not None
            there = peek(self.path)
            if there is not None and there.n_images != self.meta.n_images:
                raise MismatchError(
                    f"{self.path} was extended to {there.n_images} images by another process meanwhile: "
                    "everything that was to be done here is done"
                )
            if self.missing():
                return False  # taken out meanwhile
            if not (self.path / layout.SEAL).exists():
                content = json_bytes(sealed(self.path, self.meta))
                self._put(layout.SEAL, (content,), lease)
                fsync_folder(self.path)
            self.leases.clear()
        return True

    def _array(self, part: int, content: Part, key: Key, images: range) -> tuple[Statistics, dict[str, np.ndarray]]:
        """The statistics of one array's part, and the values of its chunk files as they lie in Zarr."""
        site, step, point = key
        values = content.activations[key]
        expected = (len(images), self.meta.tokens[site.stream].kept, self.meta.d_model)
        assert values.shape == expected, (str(site), values.shape, expected)
        positions = content.tokens.get((site.stream, step))
        kept = None if positions is None else positions >= 0
        error = content.errors.get(key, 0.0)
        name = chunk_file(array_path(*key), part)
        if self.meta.carrier.scaled:
            bits, scale = to_e4m3(values)
            stored = from_e4m3(bits, scale)
            lost = to_float32(stored) - to_float32(values)
            error += float(np.square(lost if kept is None else lost[kept], dtype=np.float64).sum())
            pieces = {name: bits, chunk_file(scale_path(*key), part): scale}
        else:
            stored = values
            pieces = {name: values.view(np.uint16) if self.meta.store_dtype == "bfloat16" else values}
        if site.stream == "joint":
            places = np.arange(values.shape[1])[None] if positions is None else positions
            is_text = np.broadcast_to(places < self.meta.text_tokens, values.shape[:2])
            found = joint_statistics(stored, kept, is_text, error)
        else:
            found = array_statistics(stored, kept, error)
        if isinstance(found, int):
            prompt = content.prompts.column("prompt")[found].as_py()
            raise NonFiniteError(
                f"{site} {point} at step {step} of image {images.start + found} holds a NaN or an infinity "
                f"in {self.meta.store_dtype} (prompt: {prompt!r}). Nothing of this part was committed; "
                "try --dtype float32 or a store dtype of greater range (--store-dtype bfloat16)."
            )
        return found, pieces

    def _put_chunk(self, name: str, values: np.ndarray, lease: Lease) -> dict[str, Any]:
        """Publish a chunk; its commit names its CRC-32C as well, by which a reader tells it from every other chunk."""
        with self.spent.on("encode"):
            payload, trailer = self._encoded(name, values)
        return {**self._put(name, (payload, trailer), lease), "crc32c": trailer[::-1].hex()}

    def _encoded(self, name: str, values: np.ndarray) -> tuple[memoryview, bytes]:
        """The content of a chunk's file."""
        spec = self._specs[name.rpartition("/")[0]]
        return encode(padded(values, self.meta.chunk_images, spec.fill), spec.codec)

    def _put(self, name: str, pieces: Pieces, lease: Lease) -> dict[str, Any]:
        """Publish a file under a lease, and its length and SHA-256; the caller syncs the folder."""
        path = self.path / name
        for tag in (*lease.followed, lease.tag):  # what a process that lost the part left half-written
            temporary_of(path, tag).unlink(missing_ok=True)
        temporary = temporary_of(path, lease.tag)
        path.parent.mkdir(parents=True, exist_ok=True)  # a copy may have left out empty folders
        with self.spent.on("encode"):
            digest, length = hashlib.sha256(), 0
            for piece in pieces:
                digest.update(piece)
                length += len(piece)
        try:
            with self.spent.on("disk"):
                with temporary.open("xb", buffering=0) as file:  # a file of our own, whoever else is awake
                    for piece in pieces:
                        view = memoryview(piece)
                        while view:
                            view = view[file.write(view) :]
                    os.fsync(file.fileno())
                    if length >= FORGOTTEN and path.suffix != ".json":  # commits and metadata are read again soon
                        forget_cached(file.fileno())
                lease.check()
                temporary.replace(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                lease.check()  # whoever took the part over has removed the temporary file
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # which a full disk does not say
            raise
        return {"bytes": length, "sha256": digest.hexdigest()}


def sealed(path: Path, meta: StoreMeta) -> dict[str, Any]:
    """The content of the seal of a store whose parts are all committed; `DamagedError` for a commit that is not whole."""
    commits = {}
    for name in (layout.STORE_COMMIT, *(layout.part_commit(part) for part in range(meta.n_parts))):
        data = (path / name).read_bytes()
        found = parse_self_checked(data, str(path / name), f"Mend it: python -m store repair {path} [--from COPY]")
        images = None if "part" not in found else list(meta.part_images(found["part"]))
        if found.get("origin") != meta.origin or (images and found.get("images") != [images[0], images[-1] + 1]):
            raise DamagedError(f"{path / name} belongs to another run: python -m store repair {path}")
        commits[Path(name).stem] = sha256_bytes(data)
    return self_checked({"commits": commits})


def _all_of(jobs: Sequence[Callable[[], None]]) -> None:
    """Do all jobs, a few at a time; the first error stops those that have not begun."""
    with ThreadPoolExecutor(WRITING_THREADS) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
