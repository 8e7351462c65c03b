"""Writes a store, part by part, so that whatever can be seen is whole.

1. Creation writes the Zarr metadata, weights and cards, then `commits/store.json` with their checksums.
2. A part's chunks, tokens, prompts and pictures are written under their final names and fsynced.
3. Its commit is published last: every file with length and SHA-256, and the commit's own checksum.
4. When the last part lands, `seal.json` names the hash of every commit.

A reader trusts only commits, so a process killed anywhere costs at most the part that it was writing.
The commit hashes whole files with SHA-256 and not with CRC-32C, because each chunk ends with its own
CRC-32C, and the CRC of any message followed by its CRC is one and the same number.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from store import layout
from store.errors import DamagedError, NonFiniteError, UsageError
from store.files import (
    fsync_file,
    fsync_folder,
    is_temporary,
    json_bytes,
    self_checked,
    sha256_file,
    write_bytes,
    write_json,
)
from store.format import StoreMeta, array_path, part_files, part_name, to_carrier, tokens_path
from store.sites import Point, Site, Stream
from store.statistics import array_statistics
from store.tables import write_table

SETTLING_THREADS = 4


@dataclass(frozen=True)
class Part:
    """The content of one part, `n` images long."""

    activations: Mapping[tuple[Site, int, Point], np.ndarray]
    """(site, step, point) -> (n, kept token, d_model) in the store's logical dtype; empty slots are NaN"""
    tokens: Mapping[tuple[Stream, int], np.ndarray]
    """(stream, step) -> (n, kept token) int32, for streams of which not all tokens are kept"""
    prompts: pa.Table
    pictures: pa.Table | None


class StoreWriter:
    """A store that is being filled; `open_or_create` is the way to one."""

    def __init__(self, path: Path, meta: StoreMeta) -> None:
        self.path, self.meta = path, meta
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._leftovers = [] if layout.seal(path).exists() else _leftovers(path)

    @classmethod
    def open_or_create(cls, path: Path, meta: StoreMeta, weights: bytes | None = None) -> "StoreWriter":
        """The store at `path`, created when nothing is there; `UsageError` when something else is.

        `weights` is the content of the file that `meta.weights["file"]` names, for a store that carries it.
        """
        with _locked(path, "create"):
            refuse_other(path, meta)
            writer = cls(path, meta)
            if not layout.store_commit(path).exists():
                writer._create(weights)
        return writer

    def _create(self, weights: bytes | None) -> None:
        """Write what is missing of the metadata; never touches what is there."""
        meta = self.meta
        commits = [layout.seal(self.path), *(layout.part_commit(self.path, part) for part in range(meta.n_parts))]
        if any(file.exists() for file in commits):
            raise DamagedError(
                f"{layout.store_commit(self.path)} is missing from a store that has committed parts: "
                "restore it from a copy of the store"
            )
        for folder in ("commits", "prompts", "images"):
            if folder != "images" or meta.pictures != "none":
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        created = [_ensure_group(self.path, {"granary": meta.attributes()})]
        folders: set[str] = set()
        for name, shape, chunks, attributes in _arrays(meta):
            for parent in _parents(name):
                if parent not in folders:
                    folders.add(parent)
                    created.append(_ensure_group(self.path / parent, {}))
            _ensure_array(self.path / name, meta, shape, chunks, attributes)
            created.append(self.path / name / "zarr.json")
        if weights is not None:
            file = self.path / "weights" / meta.weights["file"]
            write_bytes(file, weights)
            created.append(file)
        self._clear_leftovers("zarr.", ".")
        files = {str(file.relative_to(self.path)): entry for file, entry in _settled(sorted(created)).items()}
        fsync_folder(self.path)
        fsync_folder(self.path.parent)
        write_json(layout.store_commit(self.path), self_checked({"files": files, "parts": meta.n_parts}))

    def missing(self) -> list[int]:
        """The parts that have no commit yet."""
        return uncommitted(self.path, self.meta)

    @contextmanager
    def claim(self, part: int) -> Iterator[bool]:
        """Hold a part against other processes of this machine; False when another one holds it.

        The lock is the kernel's: it ends with the process, however that ends.
        """
        with _locked(self.path, part_name(part), wait=False) as mine:
            yield mine

    def write_part(self, part: int, content: Part) -> None:
        """Write and commit one part; `NonFiniteError` names site, step and prompt of a NaN or an infinity."""
        images = self.meta.part_images(part)
        statistics = self._check(content, images)
        self._clear_leftovers(f"c.{part}.", f".{part_name(part)}.")
        for (site, step, point), values in content.activations.items():
            self._write_array(array_path(site, step, point), images, to_carrier(values, self.meta))
        for (stream, step), positions in content.tokens.items():
            self._write_array(tokens_path(stream, step), images, positions)
        write_table(self.path / "prompts" / f"{part_name(part)}.parquet", content.prompts)
        if content.pictures is not None:
            write_table(self.path / "images" / f"{part_name(part)}.parquet", content.pictures)
        files = [self.path / name for name in part_files(self.meta, part)]
        entries = _settled(files)
        commit = {
            "part": part,
            "images": [images.start, images.stop],
            "files": {str(file.relative_to(self.path)): entry for file, entry in entries.items()},
            "statistics": statistics,
        }
        write_json(layout.part_commit(self.path, part), self_checked(commit))

    def seal(self) -> bool:
        """Write the seal when every part is committed; whether the store is finished."""
        if self.missing():
            return False
        if not layout.seal(self.path).exists():
            names = [layout.store_commit(self.path)]
            names += [layout.part_commit(self.path, part) for part in range(self.meta.n_parts)]
            commits = {file.stem: sha256_file(file) for file in names}
            self._leftovers = _leftovers(self.path)  # again: another process may have died meanwhile
            self._clear_leftovers("")
            write_json(layout.seal(self.path), self_checked({"commits": commits}))
        return True

    def _check(self, content: Part, images: range) -> dict[str, Any]:
        statistics: dict[str, Any] = {}
        for (site, step, point), values in content.activations.items():
            expected = (len(images), self.meta.tokens[site.stream].kept, self.meta.d_model)
            assert values.shape == expected, (str(site), values.shape, expected)
            positions = content.tokens.get((site.stream, step))
            found, bad = array_statistics(values, None if positions is None else positions >= 0)
            if bad is not None:
                prompt = content.prompts.column("prompt")[bad].as_py()
                raise NonFiniteError(
                    f"{site} {point} at step {step} of image {images.start + bad} holds a NaN or an infinity "
                    f"in {self.meta.store_dtype} (prompt: {prompt!r}). Nothing of this part was written; "
                    "try --dtype float32 or a store dtype of greater range (--store-dtype bfloat16)."
                )
            statistics.setdefault(str(site), {}).setdefault(str(step), {})[point] = found
        return statistics

    def _write_array(self, name: str, images: range, values: np.ndarray) -> None:
        if name not in self._arrays:
            array = zarr.open_array(self.path / name, mode="r+", zarr_format=3, config={"write_empty_chunks": True})
            self._arrays[name] = array
        self._arrays[name][images.start : images.stop] = values

    def _clear_leftovers(self, *prefixes: str) -> None:
        """Remove what killed processes left half-written of the files with these prefixes."""
        for file in [file for file in self._leftovers if file.name.startswith(prefixes)]:
            file.unlink(missing_ok=True)
            self._leftovers.remove(file)


def _leftovers(path: Path) -> list[Path]:
    """Temporary files of killed processes below a folder."""
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return [file for file in found if is_temporary(file)]


def uncommitted(path: Path, meta: StoreMeta) -> list[int]:
    """The parts that have no commit yet; all of them where there is no store."""
    return [part for part in range(meta.n_parts) if not layout.part_commit(path, part).exists()]


def refuse_other(path: Path, meta: StoreMeta) -> None:
    """`UsageError` when `path` holds anything but nothing, or the store that `meta` describes."""
    found = layout.peek(path)
    if found is not None:
        there, here = (_leaves(json.loads(json_bytes(each.attributes()))) for each in (found, meta))
        if there != here:
            raise UsageError(_other_run(path, there, here))
    elif path.exists() and (not path.is_dir() or any(not is_temporary(file) for file in path.iterdir())):
        raise UsageError(f"{path} exists and is not a Granary store: choose another --out, or remove it")


@contextmanager
def _locked(path: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock of a store against other processes of this machine; without `wait`, whether it was free.

    The lock is the kernel's: it ends with the process, however that ends.  The file stays, in `STORE.runs/`.
    """
    folder = layout.runs_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _settled(files: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Length and SHA-256 of files that are on the disk now, names included; several at a time, as both wait outside Python."""
    with ThreadPoolExecutor(SETTLING_THREADS) as pool:
        entries = dict(zip(files, pool.map(_settle, files), strict=True))
    for folder in sorted({file.parent for file in files}):
        fsync_folder(folder)
    return entries


def _settle(file: Path) -> dict[str, Any]:
    fsync_file(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _arrays(meta: StoreMeta) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    """Name, shape, chunk shape and attributes of every array of a store."""
    for site in meta.site_objects:
        kept = meta.tokens[site.stream].kept
        for step in meta.steps:
            for point in meta.points:
                attributes = {"logical_dtype": meta.store_dtype, "site": str(site), "step": step, "point": point}
                shape = (meta.n_images, kept, meta.d_model)
                yield array_path(site, step, point), shape, (meta.chunk_images, kept, meta.d_model), attributes
    for stream in meta.streams:
        kept = meta.tokens[stream].kept
        if not meta.tokens[stream].all_kept:
            for step in meta.steps:
                yield (
                    tokens_path(stream, step),
                    (meta.n_images, kept),
                    (meta.chunk_images, kept),
                    {"stream": stream, "step": step},
                )


def _ensure_group(path: Path, attributes: dict[str, Any]) -> Path:
    """The metadata file of a group, written when it is not there."""
    file = path / "zarr.json"
    if not file.exists():
        zarr.create_group(path, zarr_format=3, attributes=attributes)
    return file


def _ensure_array(
    path: Path, meta: StoreMeta, shape: tuple[int, ...], chunks: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    """Create an array when it is not there."""
    if (path / "zarr.json").exists():
        return
    activations = len(shape) == 3
    zarr.create_array(
        path,
        shape=shape,
        chunks=chunks,
        dtype=meta.carrier.stored if activations else "int32",
        fill_value=(np.nan if meta.carrier.fill == "NaN" else meta.carrier.fill) if activations else -1,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        filters=(),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("image", "token", "channel")[: len(shape)],
        attributes=attributes,
        zarr_format=3,
    )


def _parents(name: str) -> list[str]:
    words = name.split("/")
    return ["/".join(words[:count]) for count in range(1, len(words))]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """`{"model": {"id": "x"}}` as `{"model.id": "x"}`."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, each in value.items() for k, v in _leaves(each, f"{name}.{key}".lstrip(".")).items()}


def _other_run(path: Path, there: dict[str, Any], here: dict[str, Any]) -> str:
    odd = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    lines = [f"  {key}: there {there.get(key)!r}, asked for {here.get(key)!r}" for key in odd]
    return (
        f"{path} holds another run; it differs in\n"
        + "\n".join(lines)
        + "\nRun with the settings that it was made with to go on, or choose another --out."
    )
