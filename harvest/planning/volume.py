"""How many bytes and files a store takes: activations to the byte, everything else about.

A part is one chunk of every array, and a chunk is written whole, so the last part takes as much as any other.
Compression is not foreseen: with `--codec zstd` the activations take less than is said here.
"""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np

from harvest.staging import batch_of, slots_of, stored_in
from store.chunks import TRAILER
from store.format import StoreMeta, array_specs, metadata_files, numbered_files
from store.traces import TRACE_DTYPES, trace_shapes

Kind = Literal["activations", "tokens", "prompts", "pictures", "statistics", "commits", "metadata", "weights", "traces"]

PICTURE_BYTES_A_PIXEL = {"none": 0.0, "webp": 0.35, "png": 1.5}
TABLE_BYTES = 5_000
"""a Parquet file of no rows"""
PROMPT_BYTES = 150
"""a prompt's row beside its text: ids and pieces of its tokens, seed, sigmas; compressed"""
STATISTICS_BYTES = 900
"""of an array beside 16 bytes a channel: counts of norms, names"""
COMMIT_BYTES, COMMIT_SCALARS = 190, 240
"""a commit's words about a file, and about the statistics of an array"""
TRACE_HEADER = 80
"""what a trace's file says of a tensor; and a commit of a trace beside what it says of any file"""
DOCUMENT_BYTES = 760
"""the metadata of an array"""


@dataclass(frozen=True)
class Volume:
    """The files of a store: sizes of those of one part, and of those that are written once."""

    meta: StoreMeta
    text_bytes: float
    """an average prompt's text"""
    weights: tuple[int, ...]
    """sizes of the weights files that the store holds"""
    traced: tuple[int, ...] = ()
    """traced images of each part that is to be written, in their order: parts differ in nothing else"""

    def traces(self, images: int) -> dict[Kind, Counter[int]]:
        """{kind: {size of a file: how many}} of the traces of so many images, and what commits say of them."""
        traced = self.meta.traced
        if traced is None or not images:
            return {}
        count = images * len(traced.steps)
        sizes: Counter[int] = Counter()
        for block in traced.blocks:
            tensors = trace_shapes(self.meta, block)
            data = sum(TRACE_DTYPES[dtype].itemsize * prod(shape) for dtype, shape in tensors.values())
            sizes[data + TRACE_HEADER * (len(tensors) + 2)] += count
        return {"traces": sizes, "commits": _one((COMMIT_BYTES + TRACE_HEADER) * sizes.total())}

    @cached_property
    def part(self) -> dict[Kind, Counter[int]]:
        """{kind: {size of a file: how many}} of one part."""
        meta = self.meta
        found: dict[Kind, Counter[int]] = {"activations": Counter(), "tokens": Counter()}
        for spec in array_specs(meta):
            kind: Kind = "tokens" if spec.name.startswith("tokens/") else "activations"
            found[kind][prod(spec.chunk) * np.dtype(spec.dtype).itemsize + TRAILER] += 1
        arrays = len(meta.sites) * len(meta.steps) * len(meta.points)
        picture = PICTURE_BYTES_A_PIXEL[meta.pictures] * meta.height * meta.width
        found["prompts"] = _one(TABLE_BYTES + meta.chunk_images * (PROMPT_BYTES + self.text_bytes))
        if meta.pictures != "none":
            found["pictures"] = _one(TABLE_BYTES + meta.chunk_images * picture)
        found["statistics"] = _one(arrays * (16 * meta.d_model + STATISTICS_BYTES))
        found["commits"] = _one(COMMIT_BYTES * len(numbered_files(meta, 0)) + COMMIT_SCALARS * arrays)
        return found

    @cached_property
    def once(self) -> dict[Kind, Counter[int]]:
        """{kind: {size of a file: how many}} of what is written at creation; the seal as well."""
        documents = len(metadata_files(self.meta))
        record = COMMIT_BYTES * (documents + len(self.weights))
        small = Counter({DOCUMENT_BYTES: documents, record: 1}) + _one(100 * self.meta.n_parts)
        return {"metadata": small, "weights": Counter(self.weights)}

    def by_kind(self, parts: int, new: bool) -> dict[Kind, int]:
        """Bytes by kind of the first so many parts, with their traces; with `new` also of what is written once."""
        sums = Counter({kind: parts * _total(files) for kind, files in self.part.items()})
        for kind, files in self.traces(self.traced_in(parts)).items():
            sums[kind] += _total(files)
        return dict(sums) | {kind: _total(files) for kind, files in self.once.items() if new}

    def on_disk(self, parts: int, new: bool, block: int) -> int:
        """Bytes in whole blocks of the file system, which is what they take of it."""
        size = sum(_total(files, block) for files in self.part.values()) * parts
        size += sum(_total(files, block) for files in self.traces(self.traced_in(parts)).values())
        return size + (sum(_total(files, block) for files in self.once.values()) if new else 0)

    def files(self, parts: int, new: bool) -> int:
        """How many files that is, the seal among those that are written once."""
        traces = self.traces(self.traced_in(parts)).get("traces", Counter()).total()
        once = sum(c.total() for c in self.once.values()) if new else 0
        return parts * (len(numbered_files(self.meta, 0)) + 1) + traces + once

    @cached_property
    def folders(self) -> int:
        """How many folders a store has, its own included, and without those of traces."""
        names = [
            *numbered_files(self.meta, 0),
            *metadata_files(self.meta),
            "commits/x",
            *["weights/x"][: len(self.weights)],
        ]
        above = {"/".join(name.split("/")[:depth]) for name in names for depth in range(name.count("/") + 1)}
        return len(above)

    def traced_in(self, parts: int) -> int:
        """How many images of the first so many parts are traced."""
        return sum(self.traced[:parts])

    def trace_folders(self, parts: int) -> int:
        """How many folders their traces come in: one for all, one an image, one a step of each."""
        traced, images = self.meta.traced, self.traced_in(parts)
        return 0 if traced is None or not images else 1 + images * (1 + len(traced.steps))

    def parts_within(self, size: int, new: bool, block: int = 1) -> int:
        """The greatest number of parts that fit into so many bytes, not below 0; parts beyond the planned ones have no traces."""
        planned = len(self.traced)
        left = size - self.on_disk(planned, new, block)
        if left >= 0:
            return planned + left // sum(_total(files, block) for files in self.part.values())
        return max(bisect_right(range(planned), size, key=lambda parts: self.on_disk(parts, new, block)) - 1, 0)


def part_bytes(meta: StoreMeta) -> int:
    """Bytes of the activations of a part in memory, in the dtype that a reader hands out."""
    rows = meta.chunk_images * sum(meta.tokens[site.stream].kept for site in meta.site_objects) * len(meta.steps)
    return rows * len(meta.points) * meta.d_model * np.dtype(meta.carrier.logical).itemsize


def pinned_bytes(meta: StoreMeta) -> int:
    """Bytes of pinned memory that values land in on their way from a device: a buffer a slot, stream and point, in the store's dtype."""
    streams, size = Counter(site.stream for site in meta.site_objects), stored_in(meta).itemsize
    buffers = [sites * batch_of(meta) * meta.tokens[s].kept * meta.d_model * size for s, sites in streams.items()]
    return slots_of(meta) * len(meta.points) * sum(map(as_pinned, buffers))


def as_pinned(size: int) -> int:
    """Bytes that torch takes for a pinned buffer of so many: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _one(size: float | int) -> Counter[int]:
    return Counter({int(size): 1})


def _total(files: Counter[int], block: int = 1) -> int:
    return sum(-(-size // block) * block * count for size, count in files.items())
