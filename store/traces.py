"""What circuits are computed from: which images, steps and blocks of a store are traced, and what lies in which file.

    traces/image-00000017/step.2/double.06.safetensors    one image at one step in one block, written as soon as it was captured
    weights/sha256-….safetensors                          the value and output matrices of a traced block

A trace of a block holds, with the suffix `.txt` or `.img` for the stream:

    resid, attn, mlp_in, mlp_out      (token, d_model) in the trace dtype: the residual entering the block, the attention's
                                      output before its gate, the MLP's input and output.  mlp_in and mlp_out are left out
                                      where the store keeps all tokens of the site in the same dtype: they lie there
    q, k (no suffix)                  (token, head, d_head) in the trace dtype, as attention multiplies them (normalised and
                                      rotated), the text's tokens first
    r1, r2                            (token,) float32: the inverse standard deviations of norm1 and norm2
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp     (d_model,) float32
    resid_out                         (token, d_model) in the trace dtype: what leaves the last traced block

Blocks are double blocks, traced from block 0 without a gap, because a graph goes back to the residual that enters block 0.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import ml_dtypes
import numpy as np

from store.errors import UsageError
from store.sites import Point, Site, Stream, spans

if TYPE_CHECKING:
    from store.format import StoreMeta

TraceDtype = Literal["float32", "bfloat16"]
TRACE_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TRACE_FORMAT, TRACE_VERSION = "granary trace", 1
TRACE_STREAMS: tuple[Stream, ...] = ("txt", "img")
"""in the order in which attention joins them"""
MODULATIONS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
MATRICES = ("to_v", "add_v_proj", "to_out.0", "to_add_out")
"""of a block's attention, `.weight` and `.bias` of each: what a trace needs of the model"""
REPLAYED = ("attn", "mlp_in", "resid")
"""what is computed again from a trace when it is written: the attention's output, the MLP's input, the residual that leaves"""
MOST_TRACED, MOST_BLOCKS = 10**6, 9999
"""images and blocks: metadata that claim more are not believed"""

MOST_FILES, MOST_FILES_A_PART = 10**8, 10**6
"""traces of a store, and of a part, whose names are held together"""

_IMAGES = re.compile(r"\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*")
_FILE = re.compile(r"traces/image-(\d{8,})/step\.(\d+)/double\.(\d{2,})\.safetensors")


@dataclass(frozen=True)
class Traced:
    """Of what a store holds traces: every one of these images at every one of these steps in every one of these blocks."""

    images: tuple[int, ...]
    steps: tuple[int, ...]
    blocks: tuple[int, ...]
    """0 to L - 1"""
    dtype: TraceDtype
    weights: tuple[str, ...] = ()
    """the file of each block's matrices in `weights/`"""

    def text(self) -> str:
        """`images 0-9 at steps 1,3, blocks 0-15, bfloat16`"""
        numbered = {"image": self.images, "step": self.steps, "block": self.blocks}
        images, steps, blocks = (f"{what}{'s' * (len(n) > 1)} {spans(n)}" for what, n in numbered.items())
        return f"{images} at {steps}, {blocks}, {self.dtype}"

    def attributes(self) -> dict[str, Any]:
        """As the metadata carry it: the key `traces`."""
        return {
            "images": spans(self.images),
            "steps": list(self.steps),
            "blocks": list(self.blocks),
            "dtype": self.dtype,
            "weights": list(self.weights),
        }

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Traced":
        """The inverse of `attributes`; `UsageError` for what it never gives."""
        if set(found) != {"images", "steps", "blocks", "dtype", "weights"}:
            raise UsageError(f"traces has the keys {sorted(found)}")
        images = tuple(_images(found["images"]))
        if spans(images) != found["images"]:
            raise UsageError(f"the images of traces are {found['images']!r}")
        for name in ("steps", "blocks"):
            if not isinstance(found[name], list | tuple) or any(type(each) is not int for each in found[name]):
                raise UsageError(f"the {name} of traces are {found[name]!r}")
        steps, blocks = tuple(found["steps"]), tuple(found["blocks"])
        if not images or not steps or list(steps) != sorted(set(steps)):
            raise UsageError(f"traces are of images {found['images']!r} at steps {found['steps']!r}")
        if not blocks or len(blocks) > MOST_BLOCKS or blocks != tuple(range(len(blocks))):
            raise UsageError("the blocks of traces do not run from 0 without a gap")
        if found["dtype"] not in get_args(TraceDtype):
            raise UsageError(f"the dtype of traces is {found['dtype']!r}")
        weights = found["weights"]
        if not isinstance(weights, list | tuple) or any(type(each) is not str for each in weights):
            raise UsageError(f"the weights of traces are {weights!r}")
        return cls(images, steps, blocks, found["dtype"], tuple(weights))


def _images(text: object) -> Iterator[int]:
    """The ascending numbers of `0-3,7`; never more than a store can have traced."""
    if not isinstance(text, str) or _IMAGES.fullmatch(text) is None:
        raise UsageError(f"the images of traces are {text!r}")
    before, count = -1, 0
    for word in text.split(","):
        first, _, last = word.partition("-")
        low, high = int(first), int(last or first)
        count += high - low + 1
        if low <= before or high < low or count > MOST_TRACED:
            raise UsageError(f"the images of traces are {text!r}")
        before = high
        yield from range(low, high + 1)


def trace_file(image: int, step: int, block: int) -> str:
    """`traces/image-00000017/step.2/double.06.safetensors`"""
    return f"traces/image-{image:08d}/step.{step}/double.{block:02d}.safetensors"


def parse_trace_file(name: str) -> tuple[int, int, int] | None:
    """(image, step, block) of a trace's file; None for any other name."""
    match = _FILE.fullmatch(name)
    if match is None:
        return None
    image, step, block = (int(word) if len(word) < 10 else -1 for word in match.groups())
    return (image, step, block) if trace_file(image, step, block) == name else None


def part_of_trace(name: str, meta: "StoreMeta | None", spans_of_parts: Mapping[int, tuple[int, int]]) -> int | None:
    """The part that a trace's file belongs to; None for any other file, and for a trace that the store does not have.

    Without metadata it is the one, of those whose first and last image are known, that has the image, traced or not.
    """
    found = parse_trace_file(name)
    if found is None:
        return None
    image, step, block = found
    if meta is None:
        return next((part for part, (first, last) in spans_of_parts.items() if first <= image <= last), None)
    traced = meta.traced
    there = traced is not None and step in traced.steps and block in traced.blocks and image in meta.traced_images
    return image // meta.chunk_images if there else None


def trace_files(meta: "StoreMeta", images: range) -> list[str]:
    """The files of the traces of those of some images that are traced."""
    traced = meta.traced
    if traced is None:
        return []
    chosen = [image for image in images if image in meta.traced_images]
    return [trace_file(image, step, block) for image in chosen for step in traced.steps for block in traced.blocks]


def in_activations(meta: "StoreMeta", block: int, stream: Stream, point: Point) -> bool:
    """Whether traces leave a point out, because the store keeps all tokens of that site in the traces' dtype."""
    site, tokens = Site("double", block, stream), meta.tokens.get(stream)
    kept = tokens is not None and tokens.all_kept and site in meta.site_objects and point in meta.points
    return kept and meta.traced is not None and meta.store_dtype == meta.traced.dtype


def trace_shapes(meta: "StoreMeta", block: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor in a trace's file; of q and k, whose heads the metadata do not name, (token, d_model)."""
    traced = meta.traced
    assert traced is not None
    counts = {"txt": meta.max_sequence_length, "img": meta.grid[0] * meta.grid[1]}
    d_model, dtype = meta.d_model, traced.dtype
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (dtype, (sum(counts.values()), d_model)) for name in ("q", "k")
    }
    for stream in TRACE_STREAMS:
        rows = (counts[stream], d_model)
        found |= {f"{name}.{stream}": (dtype, rows) for name in ("resid", "attn")}
        points: tuple[Point, ...] = ("mlp_in", "mlp_out")
        found |= {f"{p}.{stream}": (dtype, rows) for p in points if not in_activations(meta, block, stream, p)}
        found |= {f"{name}.{stream}": ("float32", rows[:1]) for name in ("r1", "r2")}
        found |= {f"{name}.{stream}": ("float32", rows[1:]) for name in MODULATIONS}
        if block == traced.blocks[-1]:
            found[f"resid_out.{stream}"] = (dtype, rows)
    return found


def refuse_too_many(traced: Traced, chunk_images: int) -> None:
    """`UsageError` for more files than a store, or a part of so many images, may have."""
    an_image = len(traced.steps) * len(traced.blocks)
    images = len(traced.images)
    if an_image * images > MOST_FILES or an_image * min(images, chunk_images) > MOST_FILES_A_PART:
        raise UsageError(
            f"{images:,} images x {len(traced.steps):,} steps x {len(traced.blocks):,} blocks are too many to trace: a store "
            f"has at most {MOST_FILES:,} traces, and a part of it {MOST_FILES_A_PART:,}"
        )


def says_replay(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a commit says of a file what it must: of a trace a finite error, 0 or more, for each of `REPLAYED`."""
    if parse_trace_file(name) is None:
        return True
    replay = entry.get("replay")
    if not isinstance(replay, dict) or replay.keys() != set(REPLAYED):
        return False
    return all(type(each) in (int, float) and 0 <= each <= sys.float_info.max for each in replay.values())


def check_traced(meta: "StoreMeta", names: "re.Pattern[str]") -> None:
    """`UsageError` for traces that no store has."""
    if meta.traces is None:
        return
    if not isinstance(meta.traces, dict):
        raise UsageError(f"traces is {meta.traces!r}")
    traced = meta.traced
    assert traced is not None
    if traced.images[-1] >= meta.n_images or not set(traced.steps) <= set(meta.steps):
        raise UsageError(f"traces are of {traced.text()}, of {meta.n_images} images at steps {meta.steps!r}")
    refuse_too_many(traced, meta.chunk_images)
    if len(traced.weights) != len(traced.blocks) or not all(names.fullmatch(name) for name in traced.weights):
        raise UsageError(f"traces names the weights {traced.weights!r} of {len(traced.blocks)} blocks")
