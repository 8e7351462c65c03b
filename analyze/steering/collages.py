"""Pictures side by side with their names: shots below one another, what was done to them beside one another.

Cells are readable whatever the pictures measure: small ones are enlarged by a whole factor without smoothing, large ones scaled down.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from analyze.pictures.drawing import GAP, INK, MUTED, PAPER, below, font, page
from store.errors import UsageError

SIDE = 160
"""pixels that the longer side of a small picture is enlarged to, or as near as a whole factor comes"""
LARGE = 256
"""pixels that the longer side of a larger picture is scaled down to"""
LABEL_WIDTH = 190
CLOSE = 6
EMPTY = (240, 240, 243)
LINES = 5
CAPTION_SIZE = 11
BREAK_AFTER = ",:+/=_-|"
"""where a label without spaces, such as a list of features, may go on in the next line"""
FULL = 96
"""mean difference of the three channels (of 255) that is drawn hottest: half of it is plain to see"""

Row = Sequence[Image.Image | None]


def grid(
    rows: Sequence[Row],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    notes: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    difference: bool = False,
    side: int | None = None,
) -> Image.Image:
    """One picture: a line of cells for each of `rows`, its label before it, the names of the columns above.

    None leaves a cell empty.  `captions`: a short text below each cell.  `difference`: below every row another that shows where its
    cells differ from its first one.  `side`: pixels of a cell's longer side.  `UsageError` when labels and cells do not match.
    """
    _check(rows, row_labels, column_labels, captions)
    shown = next((cell for row in rows for cell in row if cell is not None), None)
    width, height = cell_size(shown.size if shown is not None else (SIDE, SIDE), side)
    lines = [_head(column_labels, width)]
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        below_cells = captions[number] if captions is not None else None
        parts = [_line(row, label, (width, height), below_cells)]
        if difference:
            parts.append(_line(differences(row), "difference from the first", (width, height), None, quiet=True))
        lines.append(below(parts, CLOSE))
    if not title:
        return below(lines, GAP)
    return page(title, list(notes), [below(lines, GAP)])


def differences(row: Row) -> list[Image.Image | None]:
    """Where each picture of a row differs from its first: mean absolute difference of the channels, dark for none, hot from 96 of 255 on.

    The first cell, and those that cannot be compared (absent, of another size), are None.
    """
    first = row[0] if row else None
    return [None if place == 0 else _difference(first, cell) for place, cell in enumerate(row)]


def cell_size(picture: tuple[int, int], side: int | None = None) -> tuple[int, int]:
    """(width, height) at which pictures of this size are shown; non-square ones keep their proportions."""
    longer = max(picture)
    enlarged = side is None and longer <= LARGE
    factor = float(max(1, round(SIDE / longer))) if enlarged else (side or LARGE) / longer  # 64 -> 128: pixels stay
    return max(1, round(picture[0] * factor)), max(1, round(picture[1] * factor))


def broken(text: str, width: int, size: int, bold: bool = False, most: int = LINES) -> list[str]:
    """Lines no wider than `width`, broken at spaces and inside long words after a sign; beyond `most` lines ends an ellipsis."""
    face, lines = font(size, bold), [""]
    for piece in _pieces(text):
        longer = lines[-1] + piece
        if face.getlength(longer.rstrip()) <= width:
            lines[-1] = longer
            continue
        if lines[-1].strip():
            lines.append("")
        for letter in piece.lstrip() if not lines[-1] else piece:
            if lines[-1] and face.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line.strip() for line in lines if line.strip()] or [""]
    if len(lines) > most:
        last = lines[most - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


def label(
    text: str, width: int, size: int = 13, bold: bool = False, most: int = LINES, colour: tuple[int, int, int] = INK
) -> Image.Image:
    """Text in a picture of exactly `width`, wrapped by `broken`."""
    lines, height = broken(text, width, size, bold, most), round(1.35 * size)
    image = Image.new("RGB", (width, height * len(lines)), PAPER)
    draw, face = ImageDraw.Draw(image), font(size, bold)
    for number, line in enumerate(lines):
        draw.text((0, height * number), line, colour, face)
    return image


def _pieces(text: str) -> list[str]:
    """The text in parts that stay together: each ends before a space or after a sign."""
    found = [""]
    for letter in text:
        if letter == " " and found[-1].strip():
            found.append("")
        found[-1] += letter
        if letter in BREAK_AFTER:
            found.append("")
    return [piece for piece in found if piece]


def _check(
    rows: Sequence[Row],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
) -> None:
    if not rows or not column_labels:
        raise UsageError("a grid shows at least one row and one column of pictures: there are none")
    if len(rows) != len(row_labels):
        raise UsageError(f"a grid of {len(rows)} rows needs as many labels, found {len(row_labels)}")
    for row, name in zip(rows, row_labels, strict=True):
        if len(row) != len(column_labels):
            raise UsageError(f"row {name!r} has {len(row)} pictures, and there are {len(column_labels)} columns")
    if captions is not None and [len(each) for each in captions] != [len(row) for row in rows]:
        raise UsageError("captions and pictures do not match: give one text (or '') for every cell")


def _head(names: Sequence[str], width: int) -> Image.Image:
    """The names of the columns, standing on the cells below them."""
    texts = [label(name, width, 13, bold=True) for name in names]
    height = max(text.height for text in texts)
    image = Image.new("RGB", (_left() + len(names) * (width + CLOSE) - CLOSE, height), PAPER)
    for place, text in enumerate(texts):
        image.paste(text, (_left() + place * (width + CLOSE), height - text.height))
    return image


def _left() -> int:
    return LABEL_WIDTH + GAP


def _line(
    row: Row, name: str, size: tuple[int, int], captions: Sequence[str] | None, quiet: bool = False
) -> Image.Image:
    """A label and its cells; `quiet`: the label in grey."""
    width, height = size
    lines = max(2, height // round(1.35 * 13))
    text = label(name, LABEL_WIDTH, 13, most=lines, colour=MUTED if quiet else INK)
    notes = None if captions is None else [label(note, width, CAPTION_SIZE, most=3, colour=MUTED) for note in captions]
    tall = max(text.height, height + (0 if notes is None else 3 + max(note.height for note in notes)))
    image = Image.new("RGB", (_left() + len(row) * (width + CLOSE) - CLOSE, tall), PAPER)
    image.paste(text, (0, 0))
    for place, cell in enumerate(row):
        x = _left() + place * (width + CLOSE)
        if cell is not None:
            image.paste(_scaled(cell, size), (x, 0))
        elif not quiet:
            image.paste(EMPTY, (x, 0, x + width, height))
        if notes is not None:
            image.paste(notes[place], (x, height + 3))
    return image


def _scaled(cell: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at this size, its own proportions kept, on paper where they differ."""
    ratio = min(size[0] / cell.width, size[1] / cell.height)
    fitting = max(1, round(cell.width * ratio)), max(1, round(cell.height * ratio))
    smooth = Image.Resampling.NEAREST if ratio >= 1 and ratio == round(ratio) else Image.Resampling.LANCZOS
    scaled = cell.convert("RGB").resize(fitting, smooth)
    if fitting == size:
        return scaled
    image = Image.new("RGB", size, PAPER)
    image.paste(scaled, ((size[0] - fitting[0]) // 2, (size[1] - fitting[1]) // 2))
    return image


def _difference(first: Image.Image | None, cell: Image.Image | None) -> Image.Image | None:
    if first is None or cell is None or first.size != cell.size:
        return None
    one, other = (np.asarray(picture.convert("RGB"), np.float32) for picture in (first, cell))
    strength = np.clip(np.abs(one - other).mean(2) / FULL, 0, 1)
    colours = np.asarray(matplotlib.colormaps["magma"](strength))[..., :3]
    return Image.fromarray(np.round(colours * 255).astype(np.uint8))
