"""Reads a store, alone: no model, no dataset, no repeated arguments, from a folder or from anything that fsspec reaches.

Opening checks the metadata against the record of creation, and that against the seal.  A commit is checked when first needed; a chunk
is committed and has its length and CRC-32C; a table or weights file its SHA-256.  No folder is listed: names follow from the metadata.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError

from store import layout, trust
from store.chunks import from_e4m3, read_chunk
from store.errors import DamagedError, GranaryError, UnfinishedError, UsageError
from store.files import sha256_bytes
from store.format import (
    ArraySpec,
    StoreMeta,
    array_path,
    array_specs,
    chunk_file,
    from_carrier,
    part_files,
    part_name,
    scale_path,
    tokens_path,
)
from store.opening import read_meta
from store.places import Place, place_of
from store.sites import Point, Site, Stream
from store.sizes import human_size
from store.statistics import Statistics, merged
from store.strata import OPTIONAL_COLUMNS
from store.trace_reading import TraceReader

TABLES_KEPT, COMMITS_KEPT, REMOTE_THREADS = 8, 64, 8


class Store(TraceReader):
    """A store opened for reading; `open_store(path)` is the way to one.  Traces: `TraceReader`."""

    def __init__(self, place: Place, meta: StoreMeta, created: dict[str, Any], seal: dict[str, Any] | None) -> None:
        self.place, self.meta = place, meta
        self._created, self._seal = created, seal
        self._commits: dict[int, dict[str, Any]] = {}
        self._crcs: dict[int, np.ndarray] = {}
        self._tables: dict[str, pa.Table] = {}
        self._threads = 1 if place.local is not None else REMOTE_THREADS

    @classmethod
    def open(cls, location: str | Path | Place, unfinished: bool = False) -> "Store":
        """The store at a path or URL.

        Errors: `ForeignError`, `DamagedError`, `UnreachableError`; `UnfinishedError` unless `unfinished`.
        """
        place = place_of(location)
        meta = read_meta(place)
        record = trust.found(place, layout.STORE_COMMIT)
        seal = trust.found(place, layout.SEAL)
        if record is None and seal is None:
            raise UnfinishedError(
                f"{place} was not created to its end: run the command that makes it again, it goes on from there"
            )
        if record is None:
            raise trust.damaged(place, layout.STORE_COMMIT, "is missing from a finished store")
        store = cls(place, meta, trust.checked(place, layout.STORE_COMMIT, record), None)
        trust.check_form(place, layout.STORE_COMMIT, store._created)
        trust.check_entry(place, layout.ROOT, place.read(layout.ROOT), store._created["files"].get(layout.ROOT))
        if store._created.get("origin") != meta.origin:
            raise trust.damaged(place, layout.STORE_COMMIT, "belongs to another run than zarr.json")
        if seal is not None:
            store._seal = trust.checked(place, layout.SEAL, seal)
            names = {Path(layout.STORE_COMMIT).stem, *(part_name(part) for part in range(meta.n_parts))}
            if not isinstance(store._seal.get("commits"), dict) or set(store._seal["commits"]) != names:
                raise trust.damaged(
                    place, layout.SEAL, f"does not seal the {meta.n_parts} parts that zarr.json promises"
                )
            if sha256_bytes(record) != store._seal["commits"][Path(layout.STORE_COMMIT).stem]:
                raise trust.damaged(place, layout.STORE_COMMIT, "differs from what the seal names")
        elif not unfinished:
            missing = meta.n_parts - len(store.committed_parts)
            state = f"{missing} of {meta.n_parts} parts are missing" if missing else "it has no seal yet"
            raise UnfinishedError(
                f"{place} is not finished: {state}. Run the command that makes it again, it goes on from there."
            )
        return store

    @property
    def path(self) -> str:
        """Where the store lies: a path or a URL."""
        return str(self.place)

    @property
    def id(self) -> str:
        """The content id: the seal's SHA-256, equal for equal content wherever the store lies."""
        if self._seal is None:
            raise UnfinishedError(f"{self.path} is not finished, so it has no content id yet")
        return f"sha256-{self._seal['sha256']}"

    @property
    def origin(self) -> str:
        """What made it, but for its length: equal for a store and for what it is extended to."""
        return self.meta.origin

    @property
    def finished(self) -> bool:
        return self._seal is not None

    @property
    def n_images(self) -> int:
        return self.meta.n_images

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.meta.site_objects

    @property
    def steps(self) -> tuple[int, ...]:
        return self.meta.steps

    @property
    def points(self) -> tuple[Point, ...]:
        return self.meta.points

    @property
    def recomputed(self) -> bool:
        """Whether mlp_out is to be computed from mlp_in and `weights_file`, because it was not stored."""
        return self.meta.targets == "recomputed"

    @property
    def chunk_images(self) -> int:
        """Images a chunk: reading in multiples of it touches every chunk once."""
        return self.meta.chunk_images

    @cached_property
    def committed_parts(self) -> tuple[int, ...]:
        """The parts that are there: all of a finished store; of another one, those whose commit is there now."""
        parts = range(self.meta.n_parts)
        if self.finished:
            return tuple(parts)
        with ThreadPoolExecutor(self._threads) as pool:
            there = list(pool.map(lambda part: self.place.exists(layout.part_commit(part)), parts))
        return tuple(part for part, found in zip(parts, there, strict=True) if found)

    def commit(self, part: int) -> dict[str, Any]:
        """The commit of a part, checked.  `UnfinishedError` when it is not there yet, `DamagedError` when it was lost or changed."""
        if part not in self._commits:
            name = layout.part_commit(part)
            data = trust.found(self.place, name)
            if data is None and self._seal is not None:
                raise trust.damaged(self.place, name, "is missing from a finished store")
            if data is None:
                images = self.meta.part_images(part)
                raise UnfinishedError(
                    f"{self.path}: images {images.start} to {images.stop - 1} (part {part}) are not there yet: "
                    "run the command that makes it again"
                )
            found = trust.checked(self.place, name, data)
            if self._seal is not None and sha256_bytes(data) != self._seal["commits"][part_name(part)]:
                raise trust.damaged(self.place, name, "differs from what the seal names")
            if found.get("origin") != self.meta.origin or found.get("part") != part:
                raise trust.damaged(self.place, name, "belongs to another run or part")
            trust.check_form(self.place, name, found)
            images = self.meta.part_images(part)
            if found.get("images") != [images.start, images.stop]:
                raise trust.damaged(
                    self.place, name, f"is of images {found.get('images')}, not of {images.start} to {images.stop - 1}"
                )
            if set(found["files"]) != set(part_files(self.meta, part)):
                raise trust.damaged(self.place, name, "does not list the files that a part has")
            self._crcs[part] = self._chunk_crcs(part, found)
            _keep(self._commits, part, found, COMMITS_KEPT)
        return self._commits[part]

    def statistics(self, site: Site, step: int, point: Point) -> Statistics:
        """Mean, variance, norms and rounding error over the committed parts, merged in their order."""
        return merged(self._part_statistics(part, [(site, step, point)])[0] for part in self.committed_parts)

    def all_statistics(self) -> dict[tuple[Site, int, Point], Statistics]:
        """`statistics` of every array, each part read once."""
        keys = [(site, step, point) for site in self.sites for step in self.steps for point in self.points]
        totals: list[Statistics] = []
        for part in self.committed_parts:
            found = self._part_statistics(part, keys)
            totals = [merged(pair) for pair in zip(totals, found, strict=True)] if totals else found
        return dict(zip(keys, totals, strict=True))

    def _part_statistics(self, part: int, keys: Iterable[tuple[Site, int, Point]]) -> list[Statistics]:
        name = f"statistics/{part_name(part)}.safetensors"
        data, commit = self._file(name, part), self.commit(part)
        try:
            tensors, scalars = safetensors.numpy.load(data), commit["statistics"]
            return [
                Statistics.of_part(f"{site}/step.{step}/{point}", tensors, scalars[str(site)][str(step)][point])
                for site, step, point in keys
            ]
        except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise trust.damaged(self.place, name, f"and its commit hold no statistics: {error!r}") from None

    @property
    def size_bytes(self) -> int:
        """Bytes of all committed parts."""
        return sum(entry["bytes"] for part in self.committed_parts for entry in self.commit(part)["files"].values())

    def read(
        self,
        site: Site,
        step: int,
        point: Point,
        start: int = 0,
        stop: int | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Activations (image, kept token, d_model) of images `start` to `stop`, in the logical dtype.

        With `out`, contiguous and of their shape and dtype, they are read into it: whole chunks without another copy.
        Errors: `UsageError` for what the store does not have, `UnfinishedError` for a part that is not there yet, `DamagedError`.
        """
        if site not in self.sites:
            raise UsageError(f"{self.path} has no site {site}; it has {', '.join(self.meta.sites)}")
        if step not in self.steps or point not in self.points:
            why = ": its targets are to be recomputed" if self.recomputed and point == "mlp_out" else ""
            there = f"it has {', '.join(self.points)} at steps {', '.join(map(str, self.steps))}"
            raise UsageError(f"{self.path} has no {point} at step {step}{why}; {there}")
        carrier, span = self.meta.carrier, self._range(start, stop)
        into = None if out is None or carrier.scaled else out.view(carrier.stored)
        values = self._read(array_path(site, step, point), *span, into)
        if not carrier.scaled:
            return from_carrier(values, self.meta)
        exact = from_e4m3(values, self._read(scale_path(site, step, point), *span))
        if out is not None:
            out[:] = exact
        return exact if out is None else out

    def tokens(self, stream: Stream, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Kept positions (image, kept token), int32; -1 marks an empty slot (text policies `real…` only)."""
        first, last = self._range(start, stop)
        policy = self.meta.tokens.get(stream)
        if policy is None:
            raise UsageError(f"{self.path} has no stream {stream!r}; it has {', '.join(self.meta.streams)}")
        if policy.all_kept:
            return np.broadcast_to(np.arange(policy.kept, dtype=np.int32), (last - first, policy.kept))
        if step not in self.steps:
            raise UsageError(f"{self.path} has no step {step}; it has steps {', '.join(map(str, self.steps))}")
        return self._read(tokens_path(stream, step), first, last)

    def prompts(self) -> pa.Table:
        """One row an image: the columns of FORMAT.md (prompt, seed, split, text_length, sigma, …) and the prompt file's own."""
        return self._prompts

    def prompt_columns(self, *names: str, if_there: bool = False) -> pa.Table:
        """The named columns of `prompts()`; of OPTIONAL_COLUMNS, or `if_there` of all, those that there are.  No others are held."""
        sure = set() if if_there else {*names}.difference(OPTIONAL_COLUMNS)
        return self._joined_prompts(lambda t: t.select([n for n in names if n in sure or n in t.column_names]))

    @cached_property
    def _prompts(self) -> pa.Table:
        return self._joined_prompts(lambda table: table)

    def _joined_prompts(self, chosen: Callable[[pa.Table], pa.Table]) -> pa.Table:
        if not self.committed_parts:
            raise UnfinishedError(f"{self.path} has no committed part yet: run the command that makes it again")
        names = [(f"prompts/{part_name(part)}.parquet", part) for part in self.committed_parts]
        try:
            with ThreadPoolExecutor(self._threads) as pool:
                return pa.concat_tables(pool.map(lambda each: chosen(self._table(*each)), names))
        except (pa.ArrowException, KeyError) as error:
            what = f"has other columns than those of later parts: {error}"
            raise trust.damaged(self.place, names[0][0], what) from None

    def picture(self, image: int) -> Image.Image | None:
        """The picture of an image, RGB, or None when the store keeps no pictures."""
        if self.meta.pictures == "none":
            return None
        first, _ = self._range(image, image + 1)
        part, row = divmod(first, self.meta.chunk_images)
        name = f"images/{part_name(part)}.parquet"
        if name not in self._tables:
            _keep(self._tables, name, self._table(name, part), TABLES_KEPT)
        try:
            data = self._tables[name].column("image")[row].as_py()["bytes"]
            return Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:  # whatever Pillow raises at bytes that are no picture
            raise trust.damaged(self.place, name, f"holds no picture of image {first}: {error!r}") from None

    def weights_file(self, site: Site) -> bytes | None:
        """The MLP matrices of a site as a safetensors file, or None when the store does not carry them."""
        if site not in self.sites:
            raise UsageError(f"{self.path} has no site {site}; it has {', '.join(self.meta.sites)}")
        if self.meta.weights["policy"] != "copy":
            return None
        return self._created_file(f"weights/{self.meta.weights['files'][str(site)]}")

    def _created_file(self, name: str) -> bytes:
        return self._checked(name, self._created["files"].get(name))

    def _file(self, name: str, part: int) -> bytes:
        """A file of a part, checked against its commit."""
        return self._checked(name, self.commit(part)["files"].get(name))

    def _checked(self, name: str, entry: dict[str, Any] | None) -> bytes:
        data = trust.found(self.place, name)
        if data is None:
            raise trust.damaged(self.place, name, "is missing")
        trust.check_entry(self.place, name, data, entry)
        return data

    def _table(self, name: str, part: int) -> pa.Table:
        data, rows = self._file(name, part), len(self.meta.part_images(part))
        try:
            # not read_table: its threads may let go of the file when Python is ending, and abort the process
            table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise trust.damaged(self.place, name, f"is no table: {error}") from None
        if table.num_rows != rows:
            raise trust.damaged(self.place, name, f"has {table.num_rows} rows where the part has {rows} images")
        return table

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        last = self.n_images if stop is None else stop
        if not 0 <= start <= last <= self.n_images:
            raise UsageError(f"images {start} to {last} are not in {self.path}: it has 0 to {self.n_images - 1}")
        return start, last

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in array_specs(self.meta)}

    def _read(self, name: str, start: int, stop: int, into: np.ndarray | None = None) -> np.ndarray:
        spec, chunk = self._specs[name], self.chunk_images
        try:
            values = np.empty((stop - start, *spec.shape[1:]), spec.dtype) if into is None else into
        except (MemoryError, ValueError):
            raise _too_much(self.place, (stop - start, *spec.shape[1:]), spec.dtype) from None

        def fill(part: int) -> None:
            first, last = max(start, part * chunk), min(stop, (part + 1) * chunk)
            whole = last - first == chunk
            out = values[first - start : last - start]
            found = self._chunk(spec, part, out if whole else None)
            if not whole:
                out[:] = found[first - part * chunk : last - part * chunk]

        parts = range(start // chunk, -(-stop // chunk)) if stop > start else range(0)
        if self._threads == 1 or len(parts) == 1:
            for part in parts:
                fill(part)
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(fill, parts))
        return values

    @cached_property
    def _order(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self._specs)}

    def _chunk_crcs(self, part: int, commit: dict[str, Any]) -> np.ndarray:
        """The CRC-32C of every chunk of a part, uint32, in the order of the arrays: all that is kept of its commit for reading."""
        entries = [commit["files"][chunk_file(name, part)] for name in self._specs]
        try:
            return np.array([int(entry["crc32c"], 16) for entry in entries], np.uint32)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise trust.damaged(
                self.place, layout.part_commit(part), "does not say the CRC-32C of each chunk"
            ) from None

    def _chunk(self, spec: ArraySpec, part: int, out: np.ndarray | None) -> np.ndarray:
        file = chunk_file(spec.name, part)
        if part not in self._crcs:
            self.commit(part)
        crc = int(self._crcs[part][self._order[spec.name]])
        try:
            return read_chunk(self.place, file, spec.chunk, spec.dtype, spec.codec, crc, out)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise trust.damaged(self.place, file, "is missing") from None
        except DamagedError as error:
            raise DamagedError(f"{error}. {trust.remedy(self.place)}") from None
        except MemoryError:
            raise _too_much(self.place, spec.chunk, spec.dtype) from None


def _too_much(place: Place, shape: Sequence[int], dtype: str) -> GranaryError:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return GranaryError(f"{human_size(size)} of {place} do not fit into memory: read fewer images at once")


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    kept[key] = value
    for old in list(kept)[: len(kept) - most] if len(kept) > most else ():  # several threads may be at it
        kept.pop(old, None)
