"""What the pass over a store has to know of its images: text lengths, sigmas, equal prompts, text pieces; some 100 bytes an image."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from analyze.scoring.top import prompt_groups
from store import Store
from store.strata import TEXT_COLUMNS, RealText


class Pieces:
    """The text pieces of all prompts, numbered in the order of their texts; a position without a piece has number -1."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        texts = pc.list_flatten(lists).dictionary_encode()
        if isinstance(texts, pa.ChunkedArray):
            texts = texts.combine_chunks()
        words = texts.dictionary.to_pylist()
        order = np.asarray(sorted(range(len(words)), key=words.__getitem__), np.int64)
        number = np.empty(len(words), np.int32)
        number[order] = np.arange(len(words), dtype=np.int32)
        self.words = tuple(str(words[place]) for place in order)
        self._numbers = number[texts.indices.to_numpy(zero_copy_only=False)]
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def at(
        self, image: Int[np.ndarray, " row"], position: Int[np.ndarray, " row"], text: RealText
    ) -> Int[np.ndarray, " row"]:
        """The piece at each position of each image; -1 for padding, and where the text has none."""
        start, stop = self._starts[image], self._starts[image + 1]
        there = (position < stop - start) & text.at(image, position)
        place = np.where(there, start + position, 0)
        return np.where(there, self._numbers[place] if len(self._numbers) else -1, -1).astype(np.int32)


class ImageFacts:
    """The facts of one store; the tables of its parts are read once, and their texts not kept."""

    def __init__(self, store: Store) -> None:
        names = (*TEXT_COLUMNS, "sigma", "prompt", "text_pieces")
        table = store.prompt_columns(*names, if_there=True)
        self.text = RealText.of(table)
        """which tokens of each prompt are real"""
        self.sigmas = {
            step: np.asarray(pc.list_element(table["sigma"], step).to_numpy(), np.float32) for step in store.steps
        }
        """step -> sigma of each image, as the transformer received it"""
        self.groups = np.arange(len(table), dtype=np.int64)
        """equal numbers for images of equal prompts; all different where the store has no prompts"""
        if "prompt" in table.column_names:
            self.groups = prompt_groups(table["prompt"].to_pylist())
        self.pieces = Pieces(table["text_pieces"]) if "text_pieces" in table.column_names else None
        """the text pieces, None where the store knows none"""
