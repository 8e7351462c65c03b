"""Format version 1 in code: what FORMAT.md says in words.  A test holds the two together.

zarr.json                          the group; its attribute `granary` is a StoreMeta
README.md                          the dataset card
activations/double.06/img/step.2/mlp_in         (image, token, d_model)
activations/double.06/img/step.2/mlp_in_scale   (image, token), only for fp8-e4m3
tokens/img/step.2                  (image, token) int32 kept positions, -1 where a slot is empty
prompts/part-00000.parquet         one row an image
images/part-00000.parquet          the pictures
statistics/part-00000.safetensors  float64 sums of a part
traces/image-00000017/step.2/double.06.safetensors     what circuits are computed from (`store.traces`)
weights/sha256-….safetensors       the MLP matrices of a site, with `--weights copy`; the attention's of a traced block
commits/store.json                 checksums of everything written at creation
commits/part-00000.json            a sealed part, written last
seal.json                          the hash of every commit
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from store.errors import ForeignError, UsageError
from store.files import json_bytes, sha256_bytes
from store.sites import POINTS, Point, Site, Stream
from store.strata import EMPTY_TOKEN as EMPTY_TOKEN
from store.strata import STRATA
from store.strata import StreamTokens as StreamTokens
from store.traces import Traced, check_traced, trace_files

FORMAT_VERSION = 1
CHUNK_BYTES = 24 * 2**20
CHUNK_IMAGES_MIN, CHUNK_IMAGES_MAX = 4, 64

StoreDtype = Literal["bfloat16", "float16", "float32", "fp8-e4m3"]
Codec = Literal["none", "zstd"]
Targets = Literal["stored", "recomputed"]
Pictures = Literal["none", "webp", "png"]
WHOLE_NUMBERS = ("max_sequence_length", "seed", "seeds_per_prompt", "batch_size", "threads")
WEIGHTS_NAME = re.compile(r"sha256-[0-9a-z-]{1,80}\.safetensors")
MOST_PARTS, MOST_CHUNK_BYTES, MOST_TOKENS, MOST_LAYERS = 10**7, 2**40, 10**8, 9999
"""far beyond any store: metadata that claim more are not believed, rather than memory asked for it"""


@dataclass(frozen=True)
class Carrier:
    """How a store dtype lies in Zarr: zarr-python 3.1 has no bfloat16 and no float8, so their bits travel as integers."""

    logical: DTypeLike
    """what a reader hands out"""
    stored: str
    """Zarr's data type"""
    fill: int | str
    """a NaN, so that a chunk that was never written does not read as zeros"""
    scaled: bool = False
    """whether each row has a scale, in an array of its own"""


CARRIERS: dict[StoreDtype, Carrier] = {
    "bfloat16": Carrier(ml_dtypes.bfloat16, "uint16", 0x7FC0),
    "float16": Carrier(np.float16, "float16", "NaN"),
    "float32": Carrier(np.float32, "float32", "NaN"),
    "fp8-e4m3": Carrier(ml_dtypes.bfloat16, "uint8", 0x7F, scaled=True),
}
SCALE_BYTES = 4


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
    codec: Codec
    targets: Targets
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
    pictures: Pictures
    model: dict[str, Any]
    scheduler: dict[str, Any]
    prompts: dict[str, Any]
    weights: dict[str, Any]
    versions: dict[str, str]
    parent: dict[str, Any] | None = None
    format_version: int = field(default=FORMAT_VERSION)
    traces: dict[str, Any] | None = None
    """what is traced (`store.traces.Traced.attributes`); absent from the JSON of a store without traces"""

    @cached_property
    def traced(self) -> Traced | None:
        """What is traced; None where nothing is."""
        return None if self.traces is None else Traced.of(self.traces)

    @cached_property
    def traced_images(self) -> frozenset[int]:
        """The images of which there are traces."""
        return frozenset() if self.traced is None else frozenset(self.traced.images)

    @property
    def weights_held(self) -> list[str]:
        """The files in `weights/`, each once: MLP matrices with policy `copy`, matrices of traced blocks."""
        copied = self.weights["files"].values() if self.weights.get("policy") == "copy" else ()
        return sorted({*copied, *(self.traced.weights if self.traced is not None else ())})

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
    def text_tokens(self) -> int:
        """Positions of the text, padding included, which joint image tokens follow; of img alone T5's, without CLIP's."""
        if "joint" in self.tokens:
            return self.tokens["joint"].total - math.prod(self.grid)
        return self.tokens["txt"].total if "txt" in self.tokens else self.max_sequence_length

    @property
    def carrier(self) -> Carrier:
        return carrier_of(self.store_dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row, its scale included, before compression."""
        return self.d_model * np.dtype(self.carrier.stored).itemsize + SCALE_BYTES * self.carrier.scaled

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

    @cached_property
    def origin(self) -> str:
        """SHA-256 of everything that decides a part, which is all but how many images there are: every commit carries it.

        A store that is extended keeps its origin; a commit of another run is told by it.
        """
        of_length = ("n_images", "prompts")
        fixed = {name: value for name, value in self.attributes().items() if name not in of_length}
        fixed["prompts"] = {name: self.prompts[name] for name in self.prompts if name not in ("sha256", "count")}
        return sha256_bytes(json_bytes(fixed))

    def attributes(self) -> dict[str, Any]:
        """As JSON carries it."""
        found = {name: value for name, value in asdict(self).items() if name != "traces" or value is not None}
        return found | {"tokens": {stream: tokens.attributes() for stream, tokens in self.tokens.items()}}

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
        if set(found) | {"traces"} != expected:
            odd = sorted((expected ^ set(found)) - {"traces"})
            raise ForeignError(
                f"{where}: the attribute 'granary' does not have version 1's keys; missing or unknown: {odd}"
            )
        try:
            values = dict(found)
            values["tokens"] = {stream: StreamTokens.of(tokens) for stream, tokens in found["tokens"].items()}
            for name in ("sites", "points", "steps"):
                values[name] = tuple(found[name])
            meta = cls(**values)
            _check_values(meta)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ForeignError(f"{where}: the attribute 'granary' is malformed: {error}") from None
        return meta


def _check_values(meta: StoreMeta) -> None:
    """`UsageError`, `TypeError` or `KeyError` for values that no store has."""
    counts = ("n_images", "chunk_images", "d_model", "height", "width", "pixels_per_token", "num_inference_steps")
    for name in counts:
        value = getattr(meta, name)
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} is {value!r}")
    for name, kind in (("dtype", str), ("device", str), ("cycle", bool), *dict.fromkeys(WHOLE_NUMBERS, int).items()):
        if type(getattr(meta, name)) is not kind:
            raise UsageError(f"{name} is {getattr(meta, name)!r}")
    if type(meta.guidance) not in (int, float):
        raise UsageError(f"guidance is {meta.guidance!r}")
    if not meta.sites or not meta.steps or not meta.points:
        raise UsageError("it has no sites, steps or points")
    if any(type(step) is not int or not 0 <= step < meta.num_inference_steps for step in meta.steps):
        raise UsageError(f"steps are {meta.steps!r} of {meta.num_inference_steps}")
    if any(len(set(each)) < len(each) for each in (meta.sites, meta.steps, meta.points)):
        raise UsageError("a site, step or point is there twice")
    if any(site.layer > MOST_LAYERS for site in meta.site_objects):
        raise UsageError(f"sites are {meta.sites!r}")
    for name, choices in (("codec", Codec), ("targets", Targets), ("pictures", Pictures)):
        if getattr(meta, name) not in get_args(choices):
            raise UsageError(f"{name} is {getattr(meta, name)!r}, which is not one of {', '.join(get_args(choices))}")
    if any(point not in POINTS for point in meta.points) or set(meta.tokens) != set(meta.streams):
        raise UsageError(f"points are {meta.points!r}, token policies {sorted(meta.tokens)!r}")
    policies = [(1, stream == "joint", whole) for stream, whole in meta.tokens.items()]
    parts = [(0, False, part) for *_, whole in policies for part in whole.strata or ()]
    for least, mixed, tokens in [*policies, *parts]:
        whole_numbers = type(tokens.kept) is int and type(tokens.total) is int
        if not whole_numbers or not least <= tokens.kept <= tokens.total < MOST_TOKENS:
            raise UsageError(f"{tokens.kept!r} of {tokens.total!r} tokens are kept")
        if type(tokens.policy) is not str or (tokens.all_kept and tokens.kept != tokens.total):
            raise UsageError(f"{tokens.kept!r} of {tokens.total!r} tokens are kept by policy {tokens.policy!r}")
        if (tokens.policy == STRATA) != (tokens.strata is not None) or (tokens.policy == STRATA and not mixed):
            raise UsageError(f"the policy of tokens is {tokens.policy!r}, their strata {tokens.strata!r}")
    joint = meta.tokens.get("joint")
    if joint is not None:
        texts = {meta.text_tokens} | {
            t.total for t in (meta.tokens.get("txt"), *(joint.strata or ())[:1]) if t is not None
        }
        if len(texts) > 1 or meta.text_tokens < 0:
            raise UsageError(f"the text has {' and '.join(map(str, sorted(texts)))} tokens in one joint sequence")
    for name in ("model", "scheduler", "prompts", "weights", "versions"):
        if not isinstance(getattr(meta, name), dict):
            raise UsageError(f"{name} is {getattr(meta, name)!r}")
    if meta.parent is not None and not isinstance(meta.parent, dict):
        raise UsageError(f"parent is {meta.parent!r}")
    _check_weights(meta)
    check_traced(meta, WEIGHTS_NAME)
    largest = max(tokens.kept for tokens in meta.tokens.values()) * meta.row_bytes * meta.chunk_images
    if meta.n_parts > MOST_PARTS or largest > MOST_CHUNK_BYTES:
        raise UsageError(f"it has {meta.n_parts} parts and chunks of {largest} bytes")
    _ = meta.bytes_per_image, meta.origin  # which JSON must be able to carry


def _check_weights(meta: StoreMeta) -> None:
    """`UsageError` unless `weights` names one file of the store for each site, where there are any, and fits the targets."""
    policy, files = meta.weights.get("policy"), meta.weights.get("files", {})
    if policy not in ("none", "ref", "copy") or not isinstance(files, dict):
        raise UsageError(f"weights is {meta.weights!r}")
    if policy != "none" and set(files) != set(meta.sites):
        raise UsageError(f"weights names files of {sorted(files)}, and the sites are {sorted(meta.sites)}")
    odd = [name for name in files.values() if not WEIGHTS_NAME.fullmatch(str(name))]
    if odd:
        raise UsageError(f"weights names the file {odd[0]!r}")
    if meta.targets == "recomputed" and (tuple(meta.points) != ("mlp_in",) or policy != "copy"):
        raise UsageError(f"targets are recomputed, but points are {meta.points!r} and the weights policy is {policy!r}")


def array_path(site: Site, step: int, point: Point) -> str:
    """`activations/double.06/img/step.2/mlp_in`."""
    return f"activations/{site.path}/step.{step}/{point}"


def scale_path(site: Site, step: int, point: Point) -> str:
    """`activations/double.06/img/step.2/mlp_in_scale`, the scale of each row; only for fp8-e4m3."""
    return f"{array_path(site, step, point)}_scale"


def tokens_path(stream: Stream, step: int) -> str:
    """`tokens/img/step.2`."""
    return f"tokens/{stream}/step.{step}"


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def chunk_file(array: str, chunk: int) -> str:
    """The file of one chunk: flat keys, one chunk over all tokens and channels."""
    flat = array.startswith("tokens/") or array.endswith("_scale")
    return f"{array}/c.{chunk}.0" if flat else f"{array}/c.{chunk}.0.0"


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: what Zarr is told about it."""

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: int | str
    codec: Codec
    attributes: dict[str, Any]


def array_specs(meta: StoreMeta) -> Iterator[ArraySpec]:
    """Every array of a store: activations, scales of rows, kept tokens."""
    carrier, chunk = meta.carrier, meta.chunk_images
    for site in meta.site_objects:
        kept = meta.tokens[site.stream].kept
        for step in meta.steps:
            for point in meta.points:
                about = {"site": str(site), "step": step, "point": point}
                yield ArraySpec(
                    array_path(site, step, point), (meta.n_images, kept, meta.d_model), (chunk, kept, meta.d_model),
                    carrier.stored, carrier.fill, meta.codec, {"logical_dtype": meta.store_dtype, **about},
                )  # fmt: skip
                if carrier.scaled:
                    name = scale_path(site, step, point)
                    yield ArraySpec(name, (meta.n_images, kept), (chunk, kept), "float32", "NaN", "none", about)
    for stream in meta.streams:
        kept = meta.tokens[stream].kept
        if not meta.tokens[stream].all_kept:
            for step in meta.steps:
                about = {"stream": stream, "step": step}
                name = tokens_path(stream, step)
                yield ArraySpec(name, (meta.n_images, kept), (chunk, kept), "int32", EMPTY_TOKEN, "none", about)


def part_tables(meta: StoreMeta, part: int) -> tuple[str, ...]:
    """The files of a part that are not chunks: prompts, pictures, statistics."""
    names = [f"prompts/{part_name(part)}.parquet", f"statistics/{part_name(part)}.safetensors"]
    return (*names, f"images/{part_name(part)}.parquet") if meta.pictures != "none" else tuple(names)


def numbered_files(meta: StoreMeta, part: int) -> tuple[str, ...]:
    """The files that every part has, under its number: chunks and tables."""
    return (*(chunk_file(spec.name, part) for spec in array_specs(meta)), *part_tables(meta, part))


def part_files(meta: StoreMeta, part: int) -> tuple[str, ...]:
    """Every file that a part consists of, its commit aside: known without listing a folder."""
    return (*numbered_files(meta, part), *trace_files(meta, meta.part_images(part)))


def metadata_files(meta: StoreMeta) -> tuple[str, ...]:
    """Every file that creation writes, the record of it aside; weights come on top."""
    names = [spec.name for spec in array_specs(meta)]
    groups = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    return ("zarr.json", "README.md", *(f"{name}/zarr.json" for name in sorted({*groups, *names})))


def from_carrier(values: np.ndarray, meta: StoreMeta) -> np.ndarray:
    """Values as they lie in Zarr as the logical dtype; no copy."""
    return values.view(ml_dtypes.bfloat16) if meta.store_dtype == "bfloat16" else values


def to_float32(values: np.ndarray) -> np.ndarray:
    """The same numbers in float32; bfloat16 is widened by its bits, ten times as fast as by `astype`."""
    if values.dtype == ml_dtypes.bfloat16:
        return np.left_shift(bits := values.view(np.uint16).astype(np.uint32), 16, out=bits).view(np.float32)
    return values.astype(np.float32, copy=False)
