"""Reads traces from a store: the part of `Store` that circuits are computed from."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from store import trust
from store.errors import UsageError
from store.format import StoreMeta
from store.places import Place
from store.sites import POINTS, Point, Site
from store.traces import (
    MATRICES,
    TRACE_FORMAT,
    TRACE_STREAMS,
    TRACE_VERSION,
    Traced,
    in_activations,
    trace_file,
    trace_files,
    trace_shapes,
)

SAFETENSORS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
"""what the files of traces and matrices hold; safetensors' own NumPy reader knows no bfloat16"""
BROKEN = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


class TraceReader(ABC):
    """Traces of a store that can read its files; `Store` is one."""

    meta: StoreMeta
    place: Place

    @property
    def traced(self) -> Traced | None:
        """Which images, steps and blocks are traced, and in which dtype; None where nothing is."""
        return self.meta.traced

    def trace_block(self, image: int, step: int, block: int) -> dict[str, np.ndarray]:
        """The trace of an image at a step in a block, as named in `store.traces`, mlp_in and mlp_out always among it.

        The arrays are read-only views of one buffer, about 38 MB for FLUX in bfloat16; what the store keeps as activations is
        read from there, which costs a chunk of images each.  Errors: `UsageError` for what is not traced, which names what is;
        `UnfinishedError` for a part that is not harvested yet; `DamagedError` naming the file and the remedy.
        """
        name, tensors, _ = self._trace(image, step, block)
        expected = trace_shapes(self.meta, block)
        found = {key: (str(each.dtype), _flat(each)) for key, each in tensors.items()}
        if found != expected:
            odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            raise trust.damaged(self.place, name, f"does not hold what a trace of this store does: {', '.join(odd)}")
        for stream in TRACE_STREAMS:
            for point in POINTS:
                if in_activations(self.meta, block, stream, point):
                    site = Site("double", block, stream)
                    tensors[f"{point}.{stream}"] = self.read(site, step, point, image, image + 1)[0]
        return dict(sorted(tensors.items()))

    def trace_facts(self, image: int, step: int, block: int) -> dict[str, Any]:
        """What a trace says of itself: `sigma`, and `replay`, the relative error of what was computed again when it was written."""
        return self._trace(image, step, block)[2]

    def trace_weights(self, block: int) -> dict[str, np.ndarray]:
        """The matrices of a traced block: `to_v.weight` (out, in), `to_v.bias`, and so on (`store.traces.MATRICES`), as the model has them.

        Errors: as for `trace_block`.
        """
        traced = self._traced_at(None, None, block)
        name = f"weights/{traced.weights[block]}"
        tensors = self._tensors(name, self._created_file(name))[0]
        if not {f"{matrix}.weight" for matrix in MATRICES} <= tensors.keys():
            raise trust.damaged(self.place, name, f"holds {', '.join(sorted(tensors))}, not the matrices of a block")
        return tensors

    def replay_errors(self) -> dict[str, float]:
        """The greatest relative error of each of `store.traces.REPLAYED` over the committed traces: what their commits say."""
        found: dict[str, float] = {}
        for entry in self._trace_entries():
            for name, error in entry["replay"].items():
                found[name] = max(error, found.get(name, 0.0))
        return found

    @property
    def trace_bytes(self) -> int:
        """Bytes of the committed traces."""
        return sum(entry["bytes"] for entry in self._trace_entries())

    def _trace_entries(self) -> Iterator[dict[str, Any]]:
        for part in self.committed_parts:
            files = self.commit(part)["files"]
            yield from (files[name] for name in trace_files(self.meta, self.meta.part_images(part)))

    def _trace(self, image: int, step: int, block: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
        """A trace's file, the tensors in it, and what it says of itself, which must be that trace."""
        self._traced_at(image, step, block)
        name = trace_file(image, step, block)
        tensors, facts = self._tensors(name, self._file(name, image // self.meta.chunk_images))
        there = tuple(facts.get(key) for key in ("format", "version", "image", "step", "block"))
        expected = TRACE_FORMAT, TRACE_VERSION, image + harvested_before(self.meta), step, block
        if there != expected:
            raise trust.damaged(self.place, name, f"says that it is {there}, and not {expected}")
        return name, tensors, facts

    def _traced_at(self, image: int | None, step: int | None, block: int) -> Traced:
        """What is traced; `UsageError` unless that is among it."""
        traced = self.traced
        if traced is None:
            raise UsageError(
                f"{self.place} has no traces: harvest them with --trace "
                f"(--trace-images {0 if image is None else image} --trace-steps {0 if step is None else step})"
            )
        lacks = [
            f"{what} {number}"
            for what, number, there in (
                ("image", image, self.meta.traced_images),
                ("step", step, traced.steps),
                ("block", block, traced.blocks),
            )
            if number is not None and number not in there
        ]
        if lacks:
            raise UsageError(f"{self.place} has no trace of {', '.join(lacks)}: its traces are of {traced.text()}")
        return traced

    def _tensors(self, name: str, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of a safetensors file, views of it, and what its key `granary` says."""
        try:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            facts = json.loads(header.pop("__metadata__", {}).get("granary", "{}"))
            return {key: _view(data, start, entry) for key, entry in sorted(header.items())}, dict(facts)
        except BROKEN as error:
            raise trust.damaged(self.place, name, f"is no safetensors file ({error})") from None

    @property
    @abstractmethod
    def committed_parts(self) -> tuple[int, ...]: ...

    @abstractmethod
    def commit(self, part: int) -> dict[str, Any]: ...

    @abstractmethod
    def read(self, site: Site, step: int, point: Point, start: int = 0, stop: int | None = None) -> np.ndarray: ...

    @abstractmethod
    def _file(self, name: str, part: int) -> bytes: ...

    @abstractmethod
    def _created_file(self, name: str) -> bytes: ...


def harvested_before(meta: StoreMeta) -> int:
    """How many images were left out before the first one, by all who took a part of a part: traces keep their first number."""
    left, parent = 0, meta.parent
    while isinstance(parent, dict):
        images = parent.get("images")
        if not isinstance(images, list | tuple) or not images or type(images[0]) is not int:
            break
        left, parent = left + images[0], parent.get("parent")
    return left


def _view(data: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    values = np.frombuffer(memoryview(data)[start + first : start + last], SAFETENSORS[entry["dtype"]])
    return values.reshape(entry["shape"])


def _flat(array: np.ndarray) -> tuple[int, ...]:
    """The shape, heads joined."""
    return (array.shape[0], array.shape[1] * array.shape[2]) if array.ndim == 3 else array.shape
