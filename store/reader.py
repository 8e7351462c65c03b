"""Reads a store, alone: no model, no dataset, no repeated arguments.

Opening checks the metadata and every commit against its checksum; reading an array checks that the
chunks it needs are committed and have their committed length, and CRC-32C checks their content.  No
folder is ever listed: names follow from the metadata.
"""

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from PIL import Image

from store import layout
from store.errors import DamagedError, UnfinishedError, UsageError
from store.files import read_self_checked, sha256_file
from store.format import StoreMeta, array_path, chunk_file, from_carrier, part_name, tokens_path
from store.sites import Point, Site, Stream

REMEDY = "Restore the file from a copy of the store, or harvest the store again."


class Store:
    """A store opened for reading; `open_store(path)` is the way to one."""

    def __init__(self, path: Path, meta: StoreMeta, commits: dict[int, dict[str, Any]], store_id: str | None) -> None:
        self.path, self.meta = path, meta
        self._commits, self._id = commits, store_id
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def open(cls, path: Path, unfinished: bool = False) -> "Store":
        """The store at `path`.  Errors: `ForeignError`, `DamagedError`; `UnfinishedError` unless `unfinished`."""
        meta = layout.read_meta(path)
        if not layout.store_commit(path).exists():
            raise UnfinishedError(f"{path} was not created to its end: run its harvest again, it goes on from there")
        created = read_self_checked(layout.store_commit(path))
        for name, entry in created["files"].items():
            if name.endswith("zarr.json"):
                _check_file(path / name, entry, whole=True)
        commits = {}
        for part in range(meta.n_parts):
            if layout.part_commit(path, part).exists():
                commits[part] = read_self_checked(layout.part_commit(path, part))
        sealed = layout.seal(path).exists()
        if sealed:
            _check_seal(path, meta, commits)
        elif not unfinished:
            missing = meta.n_parts - len(commits)
            state = f"{missing} of {meta.n_parts} parts are missing" if missing else "it has no seal yet"
            raise UnfinishedError(f"{path} is not finished: {state}. Run its harvest again, it goes on from there.")
        return cls(path, meta, commits, read_self_checked(layout.seal(path))["sha256"] if sealed else None)

    @property
    def id(self) -> str:
        """The content id: the seal's SHA-256, equal for equal content wherever the store lies."""
        if self._id is None:
            raise UnfinishedError(f"{self.path} is not finished, so it has no content id yet")
        return f"sha256-{self._id}"

    @property
    def finished(self) -> bool:
        return self._id is not None

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
    def chunk_images(self) -> int:
        """Images a chunk: reading in multiples of it touches every chunk once."""
        return self.meta.chunk_images

    @property
    def committed_parts(self) -> tuple[int, ...]:
        return tuple(self._commits)

    def statistics(self, site: Site, step: int, point: Point) -> list[dict[str, Any]]:
        """The statistics of one array, a dict a committed part (`store.statistics.merged` makes them one)."""
        return [commit["statistics"][str(site)][str(step)][point] for commit in self._commits.values()]

    @property
    def size_bytes(self) -> int:
        """Bytes of all committed parts."""
        return sum(entry["bytes"] for commit in self._commits.values() for entry in commit["files"].values())

    def read(self, site: Site, step: int, point: Point, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Activations (image, kept token, d_model) of images `start` to `stop`, in the logical dtype.

        Errors: `UsageError` for a site, step or point that the store does not have, `UnfinishedError`
        for a part not harvested yet, `DamagedError` naming the file and the remedy.
        """
        if site not in self.sites:
            raise UsageError(f"{self.path} has no site {site}; it has {', '.join(self.meta.sites)}")
        if step not in self.steps or point not in self.points:
            raise UsageError(f"{self.path} has no {point} at step {step}; it has {self.points} at steps {self.steps}")
        return from_carrier(self._read(array_path(site, step, point), *self._range(start, stop)), self.meta)

    def tokens(self, stream: Stream, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Kept positions (image, kept token), int32; -1 marks an empty slot (text policies `real…` only)."""
        first, last = self._range(start, stop)
        policy = self.meta.tokens.get(stream)
        if policy is None:
            raise UsageError(f"{self.path} has no stream {stream!r}; it has {', '.join(self.meta.streams)}")
        if policy.all_kept:
            return np.broadcast_to(np.arange(policy.kept, dtype=np.int32), (last - first, policy.kept))
        return self._read(tokens_path(stream, step), first, last)

    def prompts(self) -> pa.Table:
        """One row an image: the columns of FORMAT.md (prompt, seed, split, text_length, sigma, …) and the prompt file's own."""
        return self._prompts

    @cached_property
    def _prompts(self) -> pa.Table:
        if not self._commits:
            raise UnfinishedError(f"{self.path} has no committed part yet: run its harvest again")
        return pa.concat_tables([self._table(f"prompts/{part_name(part)}.parquet", part) for part in self._commits])

    def picture(self, image: int) -> Image.Image | None:
        """The picture of an image, RGB, or None when the store keeps no pictures."""
        if self.meta.pictures == "none":
            return None
        first, _ = self._range(image, image + 1)
        part, row = divmod(first, self.meta.chunk_images)
        self._commit(part)
        table = self._table(f"images/{part_name(part)}.parquet", part)
        data = table.column("image")[row].as_py()["bytes"]
        return Image.open(io.BytesIO(data)).convert("RGB")

    def _table(self, name: str, part: int) -> pa.Table:
        if name not in self._tables:
            _check_file(self.path / name, self._commits[part]["files"][name], whole=True)
            self._tables[name] = pq.read_table(self.path / name)
            while len(self._tables) > 8:
                del self._tables[next(iter(self._tables))]
        return self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        return {}

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        last = self.n_images if stop is None else stop
        if not 0 <= start <= last <= self.n_images:
            raise UsageError(f"images {start} to {last} are not in {self.path}: it has 0 to {self.n_images - 1}")
        return start, last

    def _commit(self, part: int) -> dict[str, Any]:
        if part not in self._commits:
            images = self.meta.part_images(part)
            raise UnfinishedError(
                f"{self.path}: images {images.start} to {images.stop - 1} (part {part}) are not harvested yet: run its harvest again"
            )
        return self._commits[part]

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        for part in range(start // self.chunk_images, -(-stop // self.chunk_images)):
            file = chunk_file(name, part)
            _check_file(self.path / file, self._commit(part)["files"][file], whole=False)
        if name not in self._arrays:
            self._arrays[name] = zarr.open_array(self.path / name, mode="r", zarr_format=3)
        try:
            return np.asarray(self._arrays[name][start:stop])
        except (ValueError, RuntimeError, OSError) as error:
            files = f"{self.path / name} (images {start} to {stop - 1})"
            raise DamagedError(f"{files} cannot be read: {error}. {REMEDY}") from None


def _check_file(path: Path, entry: dict[str, Any], whole: bool) -> None:
    """Length, and with `whole` the checksum, of a committed file."""
    try:
        length = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {REMEDY}") from None
    if length != entry["bytes"]:
        raise DamagedError(f"{path} has {length} bytes where {entry['bytes']} were committed. {REMEDY}")
    if whole and sha256_file(path) != entry["sha256"]:
        raise DamagedError(f"{path} differs from its committed checksum. {REMEDY}")


def _check_seal(path: Path, meta: StoreMeta, commits: dict[int, dict[str, Any]]) -> None:
    sealed = read_self_checked(layout.seal(path))["commits"]
    for name, digest in sealed.items():
        file = path / "commits" / f"{name}.json"
        if not file.exists():
            raise DamagedError(f"{file} is missing from a finished store. {REMEDY}")
        if sha256_file(file) != digest:
            raise DamagedError(f"{file} differs from what the seal names. {REMEDY}")
    if len(commits) != meta.n_parts:
        raise DamagedError(
            f"{layout.seal(path)} seals {len(sealed) - 1} parts where zarr.json promises {meta.n_parts}. {REMEDY}"
        )
