"""The table of features as the page loads it: one script a dictionary and step, a packed array a column.

49,152 features with 8 top images are 2 MB.  What the page can compute is not there: categories follow from the shares, the
text to be searched from labels, words and the prompts of the top images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from analyze.pictures.contact import KINDS
from analyze.pictures.words import END, WORD_START
from analyze.report.packing import packed
from store.strata import Group

NUMBERS = ("interest", "density", "image_share", "mean_active", "deviation_active", "max")
OF_KIND = ("density", "images_active", "mean_active", "max")
"""figures of each kind of token"""
SMALL = 65_535
"""image numbers below it are kept in two bytes, and it stands for none"""


@dataclass(frozen=True)
class FeatureColumns:
    """The feature table of one dictionary and step, as arrays."""

    numbers: dict[str, Float[np.ndarray, " feature"]]
    images_active: Int[np.ndarray, " feature"]
    images: Int[np.ndarray, "feature example"]
    """top images with different prompts, -1 where there are no more"""
    tokens: Int[np.ndarray, "feature example"]
    scores: Float[np.ndarray, "feature example"]
    histogram: Int[np.ndarray, "feature bin"] | None
    edges: list[float | None]
    """edges of the histogram's bins; the first and the last are open (None)"""
    words: list[list[str]]
    """of text: the pieces with the highest activations"""
    word_scores: list[list[float]]
    kinds: dict[Group, dict[str, Float[np.ndarray, " feature"]]]
    """of a joint site, `OF_KIND` for each kind of its tokens that was counted (image, real, padding); otherwise empty"""

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return len(self.images_active)

    @classmethod
    def of(cls, table: pa.Table, top: int) -> "FeatureColumns":
        """The columns of a `features.parquet`, the first `top` images of each feature."""
        names = table.column_names
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        histogram = None
        if "histogram" in names and table.num_rows:
            width = len(table["histogram"][0])
            histogram = padded(table["histogram"], width, np.int64, 0)
        words = "word" in names
        return cls(
            {name: table[name].to_numpy().astype(np.float64) for name in NUMBERS},
            table["images_active"].to_numpy(),
            padded(table["unique_image"], top, np.int64, -1),
            padded(table["unique_token"], top, np.int64, -1),
            padded(table["unique_score"], top, np.float64, 0),
            histogram,
            histogram_edges(metadata.get("histogram_edges", "[]")),
            [[readable(word).strip() for word in group] for group in table["word"].to_pylist()] if words else [],
            table["word_score"].to_pylist() if words else [],
            {
                kind: {name: table[f"{name}_{kind}"].to_numpy().astype(np.float64) for name in OF_KIND}
                for kind in KINDS
                if f"density_{kind}" in names
            },
        )


def histogram_edges(text: str) -> list[float | None]:
    """The edges that a feature table's metadata name, in JSON; infinite ones are None."""
    return [None if edge is None or not np.isfinite(edge) else float(edge) for edge in json.loads(text)]


def readable(piece: str) -> str:
    """A text token as people read it; a space before it says that a word begins."""
    if piece == END:
        return " ⟨end⟩"
    return (" " if piece.startswith(WORD_START) else "") + piece.removeprefix(WORD_START).replace(WORD_START, " ")


def padded(column: pa.ChunkedArray, width: int, dtype: type, fill: int) -> np.ndarray:
    """A column of lists as an array (row, width): what is longer is cut, what is shorter filled."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    offsets, values = array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=False)
    there = np.arange(width) < np.diff(offsets)[:, None]
    rows: np.ndarray = np.full((len(array), width), fill, dtype)
    index = (offsets[:-1, None] + np.arange(width))[there]
    rows[there] = values[index]
    return rows


def table_script(
    columns: FeatureColumns,
    n_images: int,
    coherence: Float[np.ndarray, " feature"] | None,
    stands_for: Mapping[int, str],
) -> dict[str, Any]:
    """What the page's table of one dictionary and step is made of; `stands_for`: attributes of features, where the truth is known."""
    form, none = ("u2", SMALL) if n_images < SMALL else ("i4", -1)
    value: dict[str, Any] = {
        "features": columns.n_features,
        "numbers": {name: packed(each, "f4") for name, each in columns.numbers.items()},
        "alive": packed(columns.images_active > 0, "u1"),
        "images": {
            "form": form,
            "width": columns.images.shape[1],
            "data": packed(np.where(columns.images < 0, none, columns.images), form),
        },
        "stands_for": {str(feature): text for feature, text in sorted(stands_for.items())},
    }
    if coherence is not None:
        value["numbers"]["coherence"] = packed(coherence, "f4")
    if columns.words:
        value["words"] = _packed_words(columns.words)
    return value


def _packed_words(words: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Every word once, and for each feature the numbers of its words, -1 where it has no more."""
    vocabulary = sorted({word for group in words for word in group})
    number = {word: place for place, word in enumerate(vocabulary)}
    width = max((len(group) for group in words), default=0)
    of = np.full((len(words), width), -1, np.int32)
    for row, group in enumerate(words):
        of[row, : len(group)] = [number[word] for word in group]
    return {"vocabulary": vocabulary, "width": width, "data": packed(of, "i4")}
