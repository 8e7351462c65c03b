"""Format version 1 in code: what FORMAT.md says in words.  A test holds the two together.

zarr.json                          the group; its attribute `granary` is a StoreMeta
activations/double.06/img/step.2/mlp_in   (image, token, d_model)
tokens/img/step.2                  (image, token) int32 kept positions, -1 where a slot is empty
prompts/part-00000.parquet         one row an image
images/part-00000.parquet          the pictures
weights/sha256-….safetensors       MLP matrices, with `--weights copy`
commits/store.json                 checksums of everything written at creation
commits/part-00000.json            a sealed part, written last
seal.json                          the hash of every commit
"""

import math
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from store.errors import ForeignError, UsageError
from store.sites import Point, Site, Stream

FORMAT_VERSION = 1
CHUNK_BYTES = 24 * 2**20
CHUNK_IMAGES_MIN, CHUNK_IMAGES_MAX = 4, 64
EMPTY_TOKEN = -1

StoreDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Carrier:
    """How a logical dtype lies in Zarr: zarr-python 3.1 has no bfloat16, so its bits travel as uint16."""

    logical: DTypeLike
    stored: str
    fill: int | str


CARRIERS: dict[StoreDtype, Carrier] = {
    "bfloat16": Carrier(ml_dtypes.bfloat16, "uint16", 0x7FC0),
    "float16": Carrier(np.float16, "float16", "NaN"),
    "float32": Carrier(np.float32, "float32", "NaN"),
}


def carrier_of(dtype: StoreDtype) -> Carrier:
    """The carrier of a store dtype; `UsageError` names the dtypes there are."""
    if dtype not in CARRIERS:
        raise UsageError(f"store dtype {dtype!r} is not one of {', '.join(CARRIERS)}")
    return CARRIERS[dtype]


def chunk_images(largest_image_bytes: int) -> int:
    """Images a chunk: the power of two for which the largest array's chunk is nearest to 24 MiB, from 4 to 64."""
    exact = CHUNK_BYTES / largest_image_bytes
    nearest = 2 ** round(math.log2(exact))
    return int(min(max(nearest, CHUNK_IMAGES_MIN), CHUNK_IMAGES_MAX))


@dataclass(frozen=True)
class StreamTokens:
    """Which tokens of a stream are kept: `policy` in words, `kept` slots of `total` positions an image and step."""

    policy: str
    kept: int
    total: int

    @property
    def all_kept(self) -> bool:
        return self.policy == "all"


@dataclass(frozen=True)
class StoreMeta:
    """Everything that a store says about itself: the attribute `granary` of its root group.

    Nothing in it depends on the output path, the time, the host or the number of processes: two
    harvests with equal settings write equal bytes.
    """

    n_images: int
    chunk_images: int
    sites: tuple[str, ...]
    points: tuple[Point, ...]
    steps: tuple[int, ...]
    d_model: int
    store_dtype: StoreDtype
    tokens: dict[Stream, StreamTokens]
    height: int
    width: int
    pixels_per_token: int
    num_inference_steps: int
    max_sequence_length: int
    guidance: float
    seed: int
    seeds_per_prompt: int
    cycle: bool
    batch_size: int
    threads: int
    dtype: str
    device: str
    pictures: Literal["none", "webp", "png"]
    model: dict[str, Any]
    scheduler: dict[str, Any]
    prompts: dict[str, Any]
    weights: dict[str, Any]
    versions: dict[str, str]
    format_version: int = field(default=FORMAT_VERSION)

    @cached_property
    def site_objects(self) -> tuple[Site, ...]:
        return tuple(Site.parse(name) for name in self.sites)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return tuple(dict.fromkeys(site.stream for site in self.site_objects))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        return self.height // self.pixels_per_token, self.width // self.pixels_per_token

    @property
    def carrier(self) -> Carrier:
        return carrier_of(self.store_dtype)

    @property
    def row_bytes(self) -> int:
        return self.d_model * np.dtype(self.carrier.stored).itemsize

    @property
    def n_parts(self) -> int:
        return -(-self.n_images // self.chunk_images)

    def part_images(self, part: int) -> range:
        """The images of a part: one chunk of every array, so that no two parts share a file."""
        return range(part * self.chunk_images, min((part + 1) * self.chunk_images, self.n_images))

    @property
    def bytes_per_image(self) -> int:
        """Bytes of activations an image: every site, step and point."""
        per_step = sum(self.tokens[site.stream].kept for site in self.site_objects) * self.row_bytes
        return per_step * len(self.steps) * len(self.points)

    def attributes(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)

    @classmethod
    def from_attributes(cls, found: Any, where: str) -> "StoreMeta":
        """The inverse of `attributes`; `ForeignError` for what is not ours or of another version."""
        if not isinstance(found, dict) or "format_version" not in found:
            raise ForeignError(
                f"{where} is no Granary store: its zarr.json has no attribute 'granary' with a format_version"
            )
        if found["format_version"] != FORMAT_VERSION:
            raise ForeignError(
                f"{where} has format version {found['format_version']!r}; this Granary reads version {FORMAT_VERSION}. "
                "Use the version of Granary that wrote it."
            )
        expected = {f.name for f in fields(cls)}
        if set(found) != expected:
            odd = sorted(expected ^ set(found))
            raise ForeignError(
                f"{where}: the attribute 'granary' does not have version 1's keys; missing or unknown: {odd}"
            )
        try:
            values = dict(found)
            values["tokens"] = {stream: StreamTokens(**tokens) for stream, tokens in found["tokens"].items()}
            for name in ("sites", "points", "steps"):
                values[name] = tuple(found[name])
            meta = cls(**values)
            _ = meta.carrier, meta.site_objects, meta.bytes_per_image
        except (TypeError, KeyError, AttributeError, UsageError) as error:
            raise ForeignError(f"{where}: the attribute 'granary' is malformed: {error}") from None
        return meta


def array_path(site: Site, step: int, point: Point) -> str:
    """`activations/double.06/img/step.2/mlp_in`."""
    return f"activations/{site.path}/step.{step}/{point}"


def tokens_path(stream: Stream, step: int) -> str:
    """`tokens/img/step.2`."""
    return f"tokens/{stream}/step.{step}"


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def chunk_file(array: str, chunk: int) -> str:
    """The file of one chunk: flat keys, one chunk over all tokens and channels."""
    return f"{array}/c.{chunk}.0.0" if array.startswith("activations/") else f"{array}/c.{chunk}.0"


def part_files(meta: StoreMeta, part: int) -> tuple[str, ...]:
    """Every file that a part consists of, its commit aside: known without listing a folder."""
    arrays = [
        array_path(site, step, point) for site in meta.site_objects for step in meta.steps for point in meta.points
    ]
    arrays += [tokens_path(s, step) for s in meta.streams if not meta.tokens[s].all_kept for step in meta.steps]
    names = [chunk_file(array, part) for array in arrays]
    names.append(f"prompts/{part_name(part)}.parquet")
    if meta.pictures != "none":
        names.append(f"images/{part_name(part)}.parquet")
    return tuple(names)


def to_carrier(values: np.ndarray, meta: StoreMeta) -> np.ndarray:
    """Logical values as the dtype that lies in Zarr; no copy."""
    return values.view(np.uint16) if meta.store_dtype == "bfloat16" else values


def from_carrier(values: np.ndarray, meta: StoreMeta) -> np.ndarray:
    """The inverse of `to_carrier`."""
    return cast(np.ndarray, values.view(ml_dtypes.bfloat16)) if meta.store_dtype == "bfloat16" else values


def to_float32(values: np.ndarray) -> np.ndarray:
    """The same numbers in float32; bfloat16 is widened by its bits, ten times as fast as by `astype`."""
    if values.dtype == ml_dtypes.bfloat16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
