"""The rows of a stream in one split: how many there are, where each goes, where each came from.

A row is a kept (image of the split, step, slot); its number is its rank in that order.  A keyed permutation sends it to its
place in the pack, and its inverse says where a place's row came from.  Where every image keeps as many tokens nothing is
held for that; else one prefix count an (image, step).
"""

from functools import cached_property

import numpy as np

from store.errors import DamagedError, UsageError
from store.reader import Store
from store.shuffle import Permutation, round_keys
from store.sites import Stream
from store.split import Split
from store.strata import CODE_COLUMNS, CODES, TEXT_COLUMNS, Group, RealText, codes_of, kinds_of


class Rows:
    """The rows of a stream, without their activations."""

    def __init__(self, store: Store, stream: Stream, split: Split, seed: int) -> None:
        table = store.prompt_columns("split", "sigma", *TEXT_COLUMNS)
        chosen = np.array([found == split for found in table.column("split").to_pylist()], dtype=bool)
        self.store, self.stream, self.steps = store, stream, store.steps
        self.image = np.flatnonzero(chosen).astype(np.int32)
        """the images of the split, ascending; a *place* is an index into it"""
        sigma = np.array(table.column("sigma").combine_chunks().flatten(), np.float32)
        self.sigma = sigma.reshape(len(chosen), -1)[chosen][:, list(self.steps)]
        self.text = RealText.of(table)[chosen]
        self.kept, self.text_total = store.meta.tokens[stream].kept, store.meta.text_tokens
        self.starts: np.ndarray | None = None
        """(place * steps + step) -> the rank of its first row, and at the end how many rows there are; None where all slots are kept"""
        self.kinds = kinds_of(stream)
        self.of_kind = np.zeros((len(self.image), len(self.steps), len(self.kinds)), np.int32)
        """(place, step, kind) -> its rows; nothing of img, where no kinds are told apart"""
        if store.meta.tokens[stream].policy != "all" and stream != "img":
            self._count()
        elif stream != "img":
            text = min(self.text_total, self.kept)
            real = self.text.count(text)
            every = {"real": real, "padding": text - real, "image": np.full_like(real, self.kept - text)}
            self.of_kind[:] = np.stack([every[kind] for kind in self.kinds], axis=1)[:, None]
        slots = len(self.image) * len(self.steps)
        self.rows = slots * self.kept if self.starts is None else int(self.starts[-1])
        if not self.rows:
            raise UsageError(
                f"{store.path} has no row of stream {stream} in the split {split!r}: its policy kept no token of those "
                f"images; leave the stream out of --sites"
            )
        self.permutation = Permutation(self.rows, round_keys(seed, split, stream))

    def _count(self) -> None:
        """Count the tokens of each kind of each (image, step), a chunk of the store at a time."""
        for chunk in range(self.store.meta.n_parts):
            first, last = self.places(chunk)
            for index in range(len(self.steps) if first < last else 0):
                self.of_kind[first:last, index] = self._by_kind(first, self._slots(chunk, index))
        counts = self.of_kind.sum(axis=2, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(counts.reshape(-1))])

    def _by_kind(self, first: int, tokens: np.ndarray) -> np.ndarray:
        """Tokens (place, slot) of the places from `first` on, counted by kind, (place, kind)."""
        codes = np.where(tokens >= 0, self._slot_codes(first, tokens), len(CODES))
        return np.stack([(codes == CODES[kind]).sum(axis=1) for kind in self.kinds], axis=1)

    def _slot_codes(self, first: int, tokens: np.ndarray) -> np.ndarray:
        return self._codes(np.arange(first, first + len(tokens))[:, None], tokens)

    def _codes(self, place: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return codes_of(self.stream, tokens, self.text.at(place, tokens), self.text_total)

    def places(self, chunk: int) -> tuple[int, int]:
        """First and last + 1 of the places that a chunk of images holds."""
        images = self.store.meta.part_images(chunk)
        first, last = np.searchsorted(self.image, [images.start, images.stop])
        return int(first), int(last)

    def _slots(self, chunk: int, step_index: int) -> np.ndarray:
        """Tokens (place of the chunk, slot), int32."""
        images = self.store.meta.part_images(chunk)
        tokens = self.store.tokens(self.stream, self.steps[step_index], images.start, images.stop)
        first, last = self.places(chunk)
        return np.asarray(tokens[self.image[first:last] - images.start])

    @cached_property
    def unit_rows(self) -> np.ndarray:
        """(chunk, step) -> how many rows it has."""
        meta = self.store.meta
        bounds = np.searchsorted(self.image, np.arange(meta.n_parts + 1) * meta.chunk_images)
        if self.starts is None:
            return np.repeat(np.diff(bounds)[:, None] * self.kept, len(self.steps), axis=1)
        counts = np.diff(self.starts).reshape(-1, len(self.steps))
        upto = np.concatenate([np.zeros((1, len(self.steps)), np.int64), np.cumsum(counts, axis=0)])
        return np.asarray(np.diff(upto[bounds], axis=0))

    def unit(self, chunk: int, step_index: int) -> "Unit":
        """The rows of a chunk of images at a step."""
        first, last = self.places(chunk)
        tokens = self._slots(chunk, step_index)
        kept = tokens >= 0
        flat = np.arange(first, last) * len(self.steps) + step_index
        starts = flat * self.kept if self.starts is None else self.starts[flat]
        counts = kept.sum(axis=1)
        expected = self.kept if self.starts is None else self.starts[flat + 1] - starts
        if np.any(counts != expected):
            raise DamagedError(
                f"{self.store.path}: the kept tokens of stream {self.stream}, step {self.steps[step_index]}, chunk {chunk} "
                f"are not as many as they should be. Say what else is damaged: python -m store verify {self.store.path}"
            )
        within = np.arange(kept.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ranks = np.repeat(starts, counts) + within
        codes = self._slot_codes(first, tokens)[kept] if self.stream != "img" else None
        return Unit(first, kept, tokens[kept], self.permutation(ranks), codes)

    def provenance(self, first: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The columns that say where the rows at `first` and following come from; `tokens` (row,) are known of them."""
        ranks = self.permutation.inverse(np.arange(first, first + len(tokens)))
        flat = ranks // self.kept if self.starts is None else np.searchsorted(self.starts, ranks, side="right") - 1
        place, step = np.divmod(flat, len(self.steps))
        columns = {
            "sigma": self.sigma[place, step],
            "image": self.image[place],
            "step": np.array(self.steps, np.int16)[step],
            "token": tokens.astype(np.int32, copy=False),
        }
        if self.stream in CODE_COLUMNS:
            columns[CODE_COLUMNS[self.stream]] = self._codes(place, tokens)
        return columns

    def count(self, step_index: int, group: Group) -> int:
        """How many rows of a step are in a group."""
        if group != "all":
            return int(self.of_kind[:, step_index, self.kinds.index(group)].sum())
        if self.starts is None:
            every = len(self.image) * self.kept
        else:
            every = int(np.diff(self.starts).reshape(-1, len(self.steps))[:, step_index].sum())
        return every

    def rows_of(self, group: Group) -> int:
        """How many rows of all steps are in a group."""
        return sum(self.count(index, group) for index in range(len(self.steps)))

    @cached_property
    def nbytes(self) -> int:
        """Bytes that are held for the length of the packing."""
        arrays = (self.image, self.sigma, self.of_kind, self.starts, self.unit_rows)
        return self.text.nbytes + sum(array.nbytes for array in arrays if array is not None)


class Unit:
    """The rows of one chunk of images at one step, in the order of their ranks."""

    def __init__(
        self, first: int, kept: np.ndarray, tokens: np.ndarray, destinations: np.ndarray, codes: np.ndarray | None
    ) -> None:
        self.first, self.kept, self.tokens, self.destinations, self.codes = first, kept, tokens, destinations, codes
        """place of the first image; (place, slot) mask; (row,) int32; (row,) int64; (row,) kinds as `CODES`, None of img"""

    def row_at(self, row: int) -> tuple[int, int]:
        """Place and token of a row."""
        place, _ = np.argwhere(self.kept)[row]
        return self.first + int(place), int(self.tokens[row])
