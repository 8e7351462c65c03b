"""Which stored rows count towards a figure: real text tokens by default, every kept image token, never an empty slot."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from store import Store
from store.sites import Stream
from store.strata import Group, RealText, StreamTokens, kinds_of


def counted_rows(
    positions: Int[np.ndarray, "image token"],
    stream: Stream,
    text: RealText,
    text_total: int,
    padding: bool,
) -> Bool[np.ndarray, "image token"]:
    """True for rows that count; `text` is of these images; `text_total` is the length of the padded text, with which `joint` starts."""
    kept = positions >= 0
    if padding or stream == "img":
        return kept
    real = text.at(np.arange(len(positions))[:, None], positions)
    return kept & (real | (positions >= text_total) if stream == "joint" else real)


def counted_kinds(stream: Stream, padding: bool) -> tuple[Group, ...]:
    """The kinds of tokens that figures are given of apart: those of a joint site that count, in its order; else `all`."""
    if stream != "joint":
        return ("all",)
    return tuple(kind for kind in kinds_of(stream) if padding or kind != "padding")


@dataclass(frozen=True)
class CountedChunk:
    """The images of one chunk of a store, and which of their rows count."""

    start: int
    stop: int
    positions: Int[np.ndarray, "image token"]
    """of all images from `start` to `stop`"""
    counted: Bool[np.ndarray, "image token"]
    """none of images that were not asked for"""

    @cached_property
    def rows(self) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
        """Image (from `start`) and slot of every counted row."""
        image, slot = np.nonzero(self.counted)
        return image, slot

    @cached_property
    def row_positions(self) -> Int[np.ndarray, " row"]:
        """The position in the stream of every counted row."""
        return np.asarray(self.positions[self.rows], np.int64)


def counted_chunks(
    store: Store, stream: Stream, step: int, images: Int[np.ndarray, " image"], padding: bool
) -> Iterator[CountedChunk]:
    """The chunks that hold some of the images, in order; only positions are read."""
    text = RealText.of(store.prompts())
    for start in (np.unique(images // store.chunk_images) * store.chunk_images).tolist():
        stop = min(start + store.chunk_images, store.n_images)
        positions = store.tokens(stream, step, start, stop)
        counted = counted_rows(positions, stream, text[start:stop], store.meta.text_tokens, padding)
        counted[~np.isin(np.arange(start, stop), images)] = False
        yield CountedChunk(start, stop, positions, counted)


def are_lower_bounds(store: Store, stream: Stream, padding: bool) -> bool:
    """Whether a maximum over the counted tokens may miss some, because the store keeps a sample of them."""
    policy = store.meta.tokens[stream]
    if policy.strata is not None:
        text, image = policy.strata
        return not image.all_kept or _text_is_sampled(text, padding)
    return _text_is_sampled(policy, padding) if stream == "txt" else not policy.all_kept


def _text_is_sampled(text: StreamTokens, padding: bool) -> bool:
    return not text.all_kept and (padding or not text.policy.startswith("real"))
