"""Two matched features side by side on the same images: half of them where the one is strongest, half where the other is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from PIL import Image

from analyze.compare.coactivation import MEASURES, Matches, Side
from analyze.compare.settings import CompareSettings
from analyze.inputs import Analysis
from analyze.labels.book import LabelBook, name_of
from analyze.pictures.contact import CELL, TEXT_WIDTH, by_kind, cautions, figures, prompt_line
from analyze.pictures.drawing import GAP, INK, below, beside, fitted, lines_of, page, written
from analyze.pictures.examples import Example, example_of, feature_row, heated, picture_of, scales_of, strata_of
from analyze.pictures.heat import heats
from analyze.prompts import prompt_text, prompt_texts
from store.split import normalise

COLUMNS = 2
BESIDE_WIDTH = 430


@dataclass(frozen=True)
class Pair:
    """A feature of the one side, one of the other, and how well they match."""

    of: int
    other: int
    values: tuple[float, ...]
    """cosine, correlation and Jaccard index"""
    mutual: bool

    @classmethod
    def of_row(cls, matches: Matches, by: int, row: int) -> "Pair":
        """The best match, by the measure numbered `by`, of the feature in this row."""
        values = tuple(round(float(value), 6) for value in matches.values[by, row, 0])
        return cls(int(matches.features[row]), int(matches.match[by, row, 0]), values, bool(matches.mutual[by, row, 0]))

    def figures(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "feature": self.of,
            "match": self.other,
            "mutual": self.mutual,
            **dict(zip(MEASURES, self.values, strict=True)),
        }

    def words(self) -> str:
        """`cosine 0.22, correlation 0.93, jaccard 0.81`"""
        return ", ".join(f"{name} {value:.2f}" for name, value in zip(MEASURES, self.values, strict=True))


@dataclass(frozen=True)
class _Column:
    """One of the two features on all images of a sheet."""

    side: Side
    feature: int
    examples: dict[int, Example]
    scale: float
    """the heat that is drawn hottest over pictures"""


def pair_sheet(
    analysis: Analysis,
    sides: tuple[Side, Side],
    pair: Pair,
    settings: CompareSettings,
    books: tuple[LabelBook, LabelBook],
) -> Image.Image:
    """The sheet of a pair: each image once, with the heat of both features, each on its own scale of colours."""
    features = pair.of, pair.other
    images = shared_images(analysis, sides, features, settings.top)
    columns = [
        _column(analysis, side, feature, images, settings) for side, feature in zip(sides, features, strict=True)
    ]
    names = [name_of(side.subject, feature, book) for side, feature, book in zip(sides, features, books, strict=True)]
    title = " and ".join(f"{name}, step {side.step}" for name, side in zip(names, sides, strict=True))
    notes: list[str | Image.Image] = [pair.words() + ("" if pair.mutual else ", not mutual")]
    for side, feature in zip(sides, features, strict=True):
        row = feature_row(side.matrix.features(), feature)
        notes += [f"{side.subject.name}/{feature}: {figures(row)}", *by_kind(row)]
        notes += [text for text in cautions(analysis, side.subject, side.step) if text not in notes]
    notes += [side.note for side in sides if side.note]
    notes.append(
        "images where the one is strongest and where the other is, in turn; each feature on its own scale of colours"
    )
    cells = [_cell(analysis, columns, image, settings) for image in images]
    return page(title, notes, lines_of(cells, COLUMNS if columns_are_pictures(sides) else 1))


def columns_are_pictures(sides: Sequence[Side]) -> bool:
    """Whether both sides are drawn over pictures alone, with no prompts beside them."""
    return all(side.stream == "img" for side in sides)


def shared_images(analysis: Analysis, sides: Sequence[Side], features: Sequence[int], top: int) -> list[int]:
    """The top images of the two features in turn, one a prompt, `top` of them, by the tokens that count."""
    texts = prompt_texts(analysis.store)
    lists = [_top_images(side, feature, texts, top) for side, feature in zip(sides, features, strict=True)]
    chosen: dict[str, int] = {}
    for image in chain.from_iterable(zip_longest(*lists)):
        if image is not None:
            chosen.setdefault(normalise(texts[image]), image)
    return list(chosen.values())[:top]


def _top_images(side: Side, feature: int, texts: Sequence[str], top: int) -> list[int]:
    """The images on which a feature is strongest, one a prompt, best first; the table may know other ones."""
    if side.kinds == ("all",):
        return list(side.matrix.features()["unique_image"][feature].as_py())
    scores = np.asarray(side.scores(feature))
    chosen: dict[str, int] = {}
    for image in np.lexsort((np.arange(len(scores)), -scores)).tolist():
        if len(chosen) == top or scores[image] <= 0:
            break
        chosen.setdefault(normalise(texts[image]), image)
    return list(chosen.values())


def _column(analysis: Analysis, side: Side, feature: int, images: Sequence[int], settings: CompareSettings) -> _Column:
    store, stream = analysis.store, side.subject.site.stream
    found = heats(analysis, side.subject, side.step, {feature: images})[feature]
    if stream == "joint" and side.stream != "joint":  # heat of tokens that do not count is not shown
        found = [strata_of(store, stream, heat)[0 if side.stream == "img" else 1] for heat in found]
    scores = np.asarray(side.scores(feature))
    scales = scales_of(store, stream, found, settings.look)
    examples = {
        heat.image: example_of(store, side.subject, heat, float(scores[heat.image]), scales.words) for heat in found
    }
    return _Column(side, feature, examples, scales.picture)


def _cell(analysis: Analysis, columns: Sequence[_Column], image: int, settings: CompareSettings) -> Image.Image:
    """One image: picture and overlays in a row; beside them, or alone, the prompt as the features see it; else the prompt below."""
    store = analysis.store
    read = any(column.side.stream != "img" for column in columns)
    drawn = any(column.side.stream != "txt" for column in columns)
    width = BESIDE_WIDTH if drawn else TEXT_WIDTH
    picture = fitted(picture_of(store, image), settings.side or CELL) if drawn else None
    parts, lines = [], [written(f"image {image}", width, 12)] if picture is None else []
    if picture is not None:
        parts.append(below([picture, written(f"image {image}", picture.width, 12)]))
    for column in columns:
        example, stream = column.examples[image], column.side.stream
        what, score = f"{column.side.name} · {column.feature}", f"{example.score:.3g}"
        if picture is not None and stream != "txt":
            over = heated(store, column.side.subject.site.stream, picture, example.heat, column.scale, settings.look)
            number = written(score, picture.width, 13, INK, 1, bold=True)
            parts.append(below([over, below([written(what, picture.width, 12), number], 0)]))
        if stream != "img":
            lines.append(below([written(what, width, 12), prompt_line(example, score, width)], 1))
    if not read:
        return below([beside(parts), written(prompt_text(store, image), beside(parts).width, 13, most=2)])
    return beside([beside(parts), below(lines, 8)], GAP) if parts else below(lines)
