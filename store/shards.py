"""Reads a pack: memory-mapped columns of shuffled rows, without Zarr and without torch.

    PACK/manifest.json                    what the pack is; written last, carries its own SHA-256
    PACK/img_0/shard-00000.safetensors    columns: mlp_in, mlp_out (row, d_model); sigma (row,) float32; image, token
                                          (row,) int32; step (row,) int16; for txt also real (row,) uint8, for joint stratum
    PACK/img_0/means.safetensors          float64 means of the split: `mlp_in/step.0/all`; for txt also
                                          `…/real` and `…/padding`, for joint these and `…/image`
    PACK/weights/sha256-….safetensors     only with recomputed targets: the MLP that gives mlp_out from mlp_in

Row r of a shard is the same (image, step, token) at every site of a stream.  Before a shard is mapped
its length and its header are checked, because a truncated map reads as zeros.
"""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np

from store.errors import DamagedError, ForeignError, MismatchError, UnfinishedError, UsageError
from store.files import READ_BLOCK, read_self_checked
from store.format import Targets
from store.layout import ROOT
from store.sites import Point, Site, Stream
from store.strata import CODE_COLUMNS, GROUPS, Group

FORMAT = "granary-pack"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""format versions; in version 1 the order of the rows was drawn as a whole, and the plan does not name it"""
MANIFEST, MEANS = "manifest.json", "means.safetensors"
UNFINISHED = "unfinished"
"""the folder of what belongs to the making alone; it goes when the manifest has come"""
PLAN = "plan.json"
"""in that folder: what is being made"""
LIST = "granary-files.json"
"""what a push leaves at its target: kind and files of what was pushed (`store.sharing.goods`)"""
JOURNAL = "journal.json"
"""where an unfinished pack of version 1 kept its own"""
METADATA_KEY = "granary"  # one key alone: the safetensors library writes several in random order
REPACK = "Take it from a copy, or remove the pack and make it again with: python -m store pack"

_DTYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "I16": np.int16, "I32": np.int32, "U8": np.uint8,
}  # fmt: skip
SAFETENSORS_NAMES: dict[Any, str] = {dtype: name for name, dtype in _DTYPES.items()}
PROVENANCE: dict[str, Any] = {"sigma": np.float32, "image": np.int32, "step": np.int16, "token": np.int32}


def columns_of(stream: Stream, points: tuple[Point, ...], dtype: Any, coded: bool = True) -> dict[str, Any]:
    """Name and dtype of the columns of a shard; `coded`: with the kind of each token, where a stream has several."""
    extra = {CODE_COLUMNS[stream]: np.uint8} if coded and stream in CODE_COLUMNS else {}
    return {**dict.fromkeys(points, dtype), **PROVENANCE, **extra}


def shard_file(site: Site, index: int) -> str:
    """`img_0/shard-00000.safetensors`"""
    return f"{site}/shard-{index:05d}.safetensors"


def means_file(site: Site) -> str:
    return f"{site}/{MEANS}"


def weights_name(name: str) -> str:
    """`weights/sha256-….safetensors`, in a pack as in a store"""
    return f"weights/{name}"


def mean_name(point: Point, step: int, group: Group) -> str:
    """`mlp_in/step.0/all`"""
    return f"{point}/step.{step}/{group}"


def crc32c_hex(data: bytes) -> str:
    """CRC-32C, 8 hex digits."""
    return f"{crc32c.crc32c(data):08x}"


def crc32c_of(path: Path) -> str:
    """CRC-32C of a file, 8 hex digits."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            checksum = crc32c.crc32c(block, checksum)
    return f"{checksum:08x}"


@dataclass(frozen=True)
class Shard:
    """One shard of one site, not read yet."""

    pack: "Pack"
    site: Site
    index: int

    @property
    def rows(self) -> int:
        return self.pack.shard_rows(self.site.stream)[self.index]

    @property
    def path(self) -> Path:
        return self.pack.path / shard_file(self.site, self.index)

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """The named columns (all of them when none is named) as read-only memory maps.

        `UsageError` for a point that has no column, `DamagedError` for a missing, truncated or unreadable shard,
        `MismatchError` for one of another pack or place.
        """
        entry = self.pack.files[shard_file(self.site, self.index)]
        header, start = read_header(self.path, entry["bytes"])
        about = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
        expected = {"pack": self.pack.key, "site": str(self.site), "shard": self.index}
        if about != expected:
            raise MismatchError(
                f"{self.path} is a shard of another pack or place: it says {about}, expected {expected}. {REPACK}"
            )
        coded = len(self.pack.groups(self.site)) > 1
        dtypes = columns_of(self.site.stream, self.pack.points, self.pack.dtype, coded)
        wanted = names or tuple(dtypes)
        self.pack.require_stored(*(name for name in wanted if name not in dtypes))
        return {name: self._map(name, dtypes[name], header, start) for name in wanted}

    def _map(self, name: str, dtype: Any, header: dict[str, Any], start: int) -> np.ndarray:
        shape: tuple[int, ...] = (self.rows, self.pack.d_model) if name in self.pack.points else (self.rows,)
        found = header.get(name)
        if found is None or _DTYPES.get(found["dtype"]) is not dtype or tuple(found["shape"]) != shape:
            raise DamagedError(
                f"{self.path}: column {name} is {found}, expected {np.dtype(dtype).name} {shape}. {REPACK}"
            )
        first: int = start + found["data_offsets"][0]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if found["data_offsets"][1] - found["data_offsets"][0] != size:
            raise DamagedError(
                f"{self.path}: column {name} lies at {found['data_offsets']}, expected {size} bytes. {REPACK}"
            )
        column: np.ndarray = np.memmap(self.path, dtype=np.dtype(dtype), mode="r", offset=first, shape=shape)
        return column


class Pack:
    """A complete pack, its manifest checked; `open_pack` is the way to one."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.id = f"sha256-{manifest['sha256']}"
        """content id: the manifest covers every shard"""
        plan = manifest["plan"]
        self.key: str = manifest["key"]
        self.store_id: str = plan["store"]
        self.model: dict[str, Any] = plan["model"]
        self.split: str = plan["split"]
        self.seed: int = plan["seed"]
        self.d_model: int = plan["d_model"]
        self.points: tuple[Point, ...] = tuple(plan["points"])
        """the points that are columns"""
        self.targets: Targets = plan.get("targets", "stored")  # packs of before had no other
        self.weights: dict[str, str] = plan.get("weights", {})
        """site -> file of its MLP, with recomputed targets"""
        self.steps: tuple[int, ...] = tuple(plan["steps"])
        self.sites: tuple[Site, ...] = tuple(Site.parse(name) for name in plan["sites"])
        self.dtype: Any = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[plan["dtype"]]
        self.files: dict[str, dict[str, Any]] = manifest["files"]

    @property
    def recomputed(self) -> bool:
        """Whether mlp_out is no column, but to be computed from mlp_in and `weights_file`."""
        return self.targets == "recomputed"

    def require(self, site: Site, *points: Point) -> None:
        """`UsageError`, naming what there is, unless the pack has `points` of `site`, as columns or to be recomputed."""
        if site not in self.sites:
            raise UsageError(f"{self.path} has no site {site}; it has {', '.join(map(str, self.sites))}")
        missing = [point for point in points if point not in self.points]
        if missing and not self.recomputed:
            raise UsageError(
                f"{self.path} has no {', '.join(missing)}; it has {', '.join(self.points)}: "
                f"pack again with --points {','.join(points)}"
            )

    def require_stored(self, *points: str) -> None:
        """`UsageError` for what has no column and no mean here."""
        missing = [point for point in points if point not in self.points]
        if missing:
            why = "; its targets are to be recomputed from mlp_in, as train does" if self.recomputed else ""
            raise UsageError(f"{self.path} has no column {', '.join(missing)}; it has {', '.join(self.points)}{why}")

    def shard_rows(self, stream: Stream) -> tuple[int, ...]:
        """Rows of each shard, the same at every site of a stream."""
        return tuple(self.manifest["streams"][stream]["shards"])

    def rows(self, site: Site) -> int:
        """Rows of a site."""
        return sum(self.shard_rows(site.stream))

    def groups(self, site: Site) -> tuple[Group, ...]:
        """The groups of rows that figures are given for: `all` first, then each kind of token.

        A joint pack that was made before its kinds were told apart has `all` alone.
        """
        told_apart = site.stream != "joint" or "strata" in self.manifest["plan"]
        return GROUPS[site.stream] if told_apart else GROUPS[site.stream][:1]

    def group_rows(self, site: Site) -> dict[Group, int]:
        """How many rows of a site are real tokens, padding and image tokens, where they are told apart."""
        content = self.manifest["streams"][site.stream]
        found: dict[Group, int] = {
            group: int(content[f"{group}_rows"]) for group in self.groups(site)[1:] if f"{group}_rows" in content
        }
        if site.stream == "txt" and found:
            found["padding"] = self.rows(site) - found["real"]
        return found

    def shards(self, site: Site) -> tuple[Shard, ...]:
        """The shards of a site, in order."""
        self.require(site)
        return tuple(Shard(self, site, index) for index in range(len(self.shard_rows(site.stream))))

    def mean(self, site: Site, step: int, point: Point, group: Group = "all") -> np.ndarray | None:
        """The float64 mean (d_model,) over this split's rows of a step; None when the group has no row there.

        Those of `groups(site)` beside `all` are over such tokens alone.
        """
        self.require(site)
        self.require_stored(point)
        return self._means(site).get(mean_name(point, step, group))

    def _means(self, site: Site) -> dict[str, np.ndarray]:
        if site not in self._loaded:
            header, start = self._header(means_file(site))
            data = self._checked(means_file(site))
            self._loaded[site] = {
                name: np.frombuffer(data, np.float64, self.d_model, start + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        return self._loaded[site]

    @cached_property
    def _loaded(self) -> dict[Site, dict[str, np.ndarray]]:
        return {}

    def weights_file(self, site: Site) -> bytes | None:
        """The MLP of a site as a safetensors file; None unless targets are recomputed.  `DamagedError` names the file."""
        self.require(site)
        if not self.recomputed:
            return None
        self.check_weights(site)
        return self._checked(weights_name(self.weights[str(site)]))

    def check_weights(self, site: Site) -> None:
        """`DamagedError`, naming the file, unless the MLP of a site is there, long enough and with a readable header."""
        if self.recomputed:
            self._header(weights_name(self.weights[str(site)]))

    def _header(self, name: str) -> tuple[dict[str, Any], int]:
        return read_header(self.path / name, self.files[name]["bytes"])

    def _checked(self, name: str) -> bytes:
        """A small file, whole, and equal to its checksum."""
        data = (self.path / name).read_bytes()
        if crc32c_hex(data) != self.files[name]["crc32c"]:
            raise DamagedError(f"{self.path / name} differs from the checksum in {MANIFEST}. {REPACK}")
        return data

    def verify(self) -> None:
        """Read every byte; `DamagedError` names the first file that differs from the manifest."""
        for name, entry in self.files.items():
            path = self.path / name
            read_header(path, entry["bytes"])
            if crc32c_of(path) != entry["crc32c"]:
                raise DamagedError(f"{path} differs from the checksum in {MANIFEST}. {REPACK}")


def is_pack(path: str | Path) -> bool:
    """Whether a pack lies at a path on this machine, be it unfinished or damaged, and not a store."""
    folder = Path(path)
    if (folder / ROOT).exists():
        return False
    return (folder / MANIFEST).exists() or _is_begun(folder) or _is_remnant(folder)


def _is_begun(folder: Path) -> bool:
    """Whether the making of a pack left its plan there."""
    return (folder / UNFINISHED / PLAN).exists() or (folder / JOURNAL).exists()


def _is_remnant(folder: Path) -> bool:
    """Whether a folder without manifest holds what is left of a pack: shards, or what a push says of it."""
    if any(folder.glob("*_*/shard-*.safetensors")):
        return True
    try:
        about = json.loads((folder / LIST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("kind") == "pack"


def open_pack(path: str | Path) -> Pack:
    """The pack at `path`; its manifest is checked now, each shard when it is mapped.

    Errors: `UsageError` (no such folder), `UnfinishedError`, `ForeignError` (not ours, other version), `DamagedError`.
    """
    path = Path(path)
    if not path.is_dir():
        if re.match(r"\w+:/", str(path)):
            raise UsageError(f"{path}: a pack is mapped into memory, so it must lie on this machine: pull it first")
        raise UsageError(f"there is no pack at {path}: make one with python -m store pack STORE --out {path}")
    if not (path / MANIFEST).exists():
        if _is_begun(path):
            raise UnfinishedError(
                f"{path} is not finished: run the same python -m store pack again, it goes on where it was"
            )
        if (path / ROOT).exists():
            raise UsageError(f"{path} is a store: make a pack of it with python -m store pack {path} --out PACK")
        if _is_remnant(path):
            raise DamagedError(f"{path} is a pack that lost its {MANIFEST}: nothing vouches for its shards. {REPACK}")
        raise ForeignError(f"{path} is no pack: it has no {MANIFEST}")
    if (path / MANIFEST).is_dir():
        raise DamagedError(f"{path / MANIFEST} is a folder, expected the manifest of a pack. {REPACK}")
    manifest = read_self_checked(path / MANIFEST, REPACK)
    if manifest.get("format") != FORMAT or manifest.get("format_version") not in READABLE:
        found = f"format {manifest.get('format')!r} version {manifest.get('format_version')!r}"
        raise ForeignError(
            f"{path} has {found}; this Granary reads {FORMAT} versions {READABLE[0]} and {READABLE[-1]}. "
            "Make it again with: python -m store pack"
        )
    return Pack(path, manifest)


def read_header(path: Path, expected: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file of `expected` bytes and where its data begins; `DamagedError` otherwise."""
    try:
        length = path.stat().st_size
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {REPACK}") from None
    if length != expected:
        raise DamagedError(f"{path} has {length} bytes where the manifest names {expected}. {REPACK}")
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size)) if size < length else None
            if not isinstance(header, dict):
                raise ValueError("no header")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
        except (struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
            raise DamagedError(f"{path} has no readable safetensors header ({error}). {REPACK}") from None
    if 8 + size + max(ends, default=0) != length:
        raise DamagedError(
            f"{path} is {length} bytes long, its header promises {8 + size + max(ends, default=0)}. {REPACK}"
        )
    return header, 8 + size
