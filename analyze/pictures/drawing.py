"""Pages made of pictures and words: everything is a picture, put beside or below others.

Words are set in DejaVu Sans, which comes with matplotlib, so a page is the same bytes on every machine with the same libraries.
"""

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from analyze.pictures.overlay import colour_bar
from analyze.pictures.words import Piece

Colour = tuple[int, int, int]
INK: Colour = (24, 24, 27)
MUTED: Colour = (95, 95, 105)
PAPER: Colour = (255, 255, 255)
HOT: Colour = (246, 150, 60)
GAP = 14
CLOSE = 4
MARGIN = 22
LEAST_PAGE = 720
PIECE_HEIGHT = 26


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of so many pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrapped(text: str, width: int, face: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """Lines no wider than `width`, at most `most`; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    for number, line in enumerate(lines):
        while face.getlength(line) > width and len(line) > 2:
            line = line.removesuffix(" …").removesuffix("…")[:-1] + "…"
        lines[number] = line
    return lines


def written(
    text: str, width: int, size: int = 13, colour: Colour = MUTED, most: int = 3, bold: bool = False
) -> Image.Image:
    """Text in a picture of exactly `width`, on at most `most` lines."""
    face, height = font(size, bold), round(1.32 * size)
    lines = wrapped(text, width, face, most)
    image = Image.new("RGB", (width, max(1, height * len(lines))), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, height * number), line, colour, face)
    return image


def beside(pictures: Sequence[Image.Image], gap: int = CLOSE) -> Image.Image:
    """The pictures in a row, their tops on one line."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


def below(pictures: Sequence[Image.Image], gap: int = CLOSE) -> Image.Image:
    """The pictures in a column, their left sides on one line."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    column = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        column.paste(picture, (0, y))
        y += picture.height + gap
    return column


def lines_of(cells: Sequence[Image.Image], columns: int, gap: int = GAP) -> list[Image.Image]:
    """The cells in rows of `columns`, every cell of a row as wide as the widest of all."""
    width = max((cell.width for cell in cells), default=0)
    even = [on_paper(cell, width, cell.height) for cell in cells]
    return [beside(even[start : start + columns], gap) for start in range(0, len(even), columns)]


def on_paper(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at the top left of a white one of at least this size."""
    size = max(width, picture.width), max(height, picture.height)
    if size == picture.size:
        return picture
    image = Image.new("RGB", size, PAPER)
    image.paste(picture, (0, 0))
    return image


def page(title: str, notes: Sequence[str | Image.Image], lines: Sequence[Image.Image]) -> Image.Image:
    """A page: its title, what is to be known of it (sentences and keys to colours), then the lines."""
    width = max([LEAST_PAGE, *(line.width for line in lines)])
    head = [written(title, width, 22, INK, 2, bold=True)]
    head += [written(note, width, 14, MUTED, 3) if isinstance(note, str) else note for note in notes]
    body = below([below(head, 6), *lines], GAP)
    image = Image.new("RGB", (width + 2 * MARGIN, body.height + 2 * MARGIN), PAPER)
    image.paste(body, (MARGIN, MARGIN))
    return image


def key_to_colours(scale: float, percentile: float, kind: Literal["picture", "words"], where: str = "") -> Image.Image:
    """The colours from cold to hot, and what the hottest stands for; `where` says before them on what they lie."""
    bar = colour_bar(140, 12) if kind == "picture" else _word_colours(140, 12)
    clipped = "the greatest" if percentile == 100 else f"the {ordinal(percentile)} percentile"
    texts = (f"{where}activation 0", f"{scale:.3g}: {clipped} of those above 0")
    face = font(12)
    image = Image.new("RGB", (sum(round(face.getlength(text)) for text in texts) + 140 + 24, 18), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), texts[0], MUTED, face)
    x = round(face.getlength(texts[0])) + 8
    image.paste(bar, (x, 2))
    draw.text((x + 140 + 8, 0), texts[1], MUTED, face)
    return image


def ordinal(number: float) -> str:
    """`99th`, `99.5th`, `91st`"""
    text = f"{number:g}"
    teens = number == int(number) and 11 <= int(number) % 100 <= 13
    return text + ("th" if teens or "." in text else {"1": "st", "2": "nd", "3": "rd"}.get(text[-1], "th"))


def _warmth(heat: float) -> Colour:
    """The colour behind a word: 0 cold, 1 hottest."""
    red, green, blue = (round(paper + (hot - paper) * heat) for paper, hot in zip(PAPER, HOT, strict=True))
    return red, green, blue


def _word_colours(width: int, height: int) -> Image.Image:
    bar = Image.new("RGB", (width, height))
    for x in range(width):
        bar.paste(_warmth(x / (width - 1)), (x, 0, x + 1, height))
    return bar


def prompt_with_heat(pieces: Sequence[Piece], width: int) -> Image.Image:
    """A prompt whose tokens are marked by their heat, in lines no wider than `width`."""
    lines = _flow(pieces, width)
    image = Image.new("RGB", (width, PIECE_HEIGHT * len(lines)), PAPER)
    draw, face = ImageDraw.Draw(image), font(15)
    for number, line in enumerate(lines):
        y = PIECE_HEIGHT * number
        for x, piece in line:
            if piece.heat > 0:
                box = (x, y, x + face.getlength(piece.text) + 4, y + 22)
                draw.rounded_rectangle(box, 4, _warmth(piece.heat))
            draw.text((x + 2, y + 2), piece.text, INK, face)
    return image


def plain_pieces(prompt: str) -> tuple[Piece, ...]:
    """A prompt as cold words, for stores that do not know the texts of its tokens."""
    return tuple(Piece(word, 0.0, place > 0) for place, word in enumerate(prompt.split()))


def _flow(pieces: Sequence[Piece], width: int) -> list[list[tuple[float, Piece]]]:
    """The pieces in lines, each with its x; a piece wider than a line has one of its own."""
    lines: list[list[tuple[float, Piece]]] = [[]]
    x = 0.0
    for piece in pieces:
        step = 7.0 if piece.space else 1.0
        length = font(15).getlength(piece.text) + 4
        if lines[-1] and x + step + length > width:
            lines.append([])
            x = 0.0
        x += step if lines[-1] else 0.0
        lines[-1].append((x, piece))
        x += length
    return lines


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture scaled so that its longer side has `side` pixels."""
    ratio = side / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def png_bytes(image: Image.Image, small: bool = True) -> bytes:
    """The picture as PNG, without a time in it; `small=False`: some percent larger, several times as fast."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=small)
    return buffer.getvalue()
