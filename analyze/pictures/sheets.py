"""Contact sheets: a feature's top images with its heat over them, or for text features the prompts with their tokens highlighted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.pictures.heat import Heat, heats
from analyze.pictures.overlay import heat_scale, overlay, token_grid
from analyze.pictures.settings import SheetSettings
from analyze.pictures.words import Piece, highlighted, percent
from analyze.prompts import prompt_texts
from store import Store
from store.errors import UsageError
from store.files import write_bytes
from store.sites import Stream, parse_numbers

INK, MUTED, PAPER, HOT = (24, 24, 27), (95, 95, 105), (255, 255, 255), (246, 150, 60)
CELL = 168
COLUMNS = 4
GAP = 14
MARGIN = 22
TEXT_WIDTH = 920


@dataclass(frozen=True)
class Example:
    """One top image of a feature, with all that a sheet shows of it."""

    heat: Heat
    score: float
    prompt: str
    pieces: tuple[Piece, ...] | None
    """the prompt's tokens with their heat, for text features of a store that knows its tokens' texts"""


def run(settings: SheetSettings) -> list[Path]:
    """Write `OUT/sheets/NAME/step.K/feature-N.png` for the chosen features; the paths written."""
    analysis = open_analysis(settings)
    check_top(check_output(analysis)["top"], settings.top)
    refuse_without_pictures(analysis, analysis.subjects)
    rounds = [
        (subject, step, _features(analysis, subject, step, settings))
        for subject in analysis.subjects
        for step in analysis.steps
    ]
    if not any(features for _, _, features in rounds):
        raise UsageError("no feature is alive at these sites and steps: there is nothing to draw")
    written = []
    for subject, step, features in tqdm(rounds, desc="sheets", unit="step", mininterval=0.5):
        table = analysis.matrix(subject, step).features()
        for feature, examples in gather_examples(analysis, subject, step, table, features, settings.top).items():
            path = analysis.out / "sheets" / subject.name / f"step.{step}" / f"feature-{feature}.png"
            write_bytes(path, png_bytes(sheet(analysis, subject, step, feature_row(table, feature), examples)))
            written.append(path)
    print(f"sheets: {len(written)} contact sheets -> {analysis.out / 'sheets'}")
    return written


def check_top(kept: int, top: int) -> None:
    """`UsageError` when more images are asked for than the analysis kept with each feature."""
    if top > kept:
        raise UsageError(
            f"--top is {top}, but this analysis keeps {kept} top images of each feature: compute scores with --top {top}"
        )


def refuse_without_pictures(analysis: Analysis, subjects: Sequence[Subject]) -> None:
    """`UsageError` for image features of a store that kept no pictures; text features need none."""
    if any(subject.site.stream != "txt" for subject in subjects) and analysis.store.meta.pictures == "none":
        raise UsageError(
            "this store holds no pictures to draw on: python -m analyze scores works without them; for sheets and the report harvest "
            "with --pictures webp, or choose text sites (--sites), where the store has any"
        )


def _features(analysis: Analysis, subject: Subject, step: int, settings: SheetSettings) -> list[int]:
    matrix = analysis.matrix(subject, step)
    if settings.features is not None:
        return list(parse_numbers(settings.features, matrix.n_features, "feature"))
    table = matrix.features()
    order = table.filter(table["alive"]).sort_by([("interest", "descending"), ("feature", "ascending")])
    return [int(feature) for feature in order["feature"].to_pylist()[: settings.best]]


def feature_row(table: pa.Table, feature: int) -> dict[str, Any]:
    """One row of a feature table."""
    return dict(table.slice(feature, 1).to_pylist()[0])


def gather_examples(
    analysis: Analysis, subject: Subject, step: int, table: pa.Table, features: Sequence[int], top: int
) -> dict[int, list[Example]]:
    """The top images of each feature, one a prompt, with their heat; `table` is the feature table of the subject and step."""
    wanted: dict[int, Sequence[int]] = {feature: table["unique_image"][feature].as_py()[:top] for feature in features}
    prompts = analysis.store.prompts()
    texts = prompt_texts(analysis.store)
    pieces = prompts["text_pieces"] if "text_pieces" in prompts.column_names and subject.site.stream == "txt" else None
    found = {}
    for feature, group in heats(analysis, subject, step, wanted).items():
        scores = table["unique_score"][feature].as_py()
        scale = heat_scale([heat.values for heat in group])
        found[feature] = [
            Example(
                heat,
                float(score),
                texts[heat.image],
                None if pieces is None else tuple(highlighted(pieces[heat.image].as_py(), heat, scale)),
            )
            for heat, score in zip(group, scores, strict=False)
        ]
    return found


def pictures_with_heat(
    store: Store, stream: Stream, examples: Sequence[Example], side: int
) -> list[tuple[Image.Image, Image.Image]]:
    """Each example's picture, its longer side scaled to `side` pixels, and the same with the heat over it, all on one scale."""
    first = store.meta.max_sequence_length if stream == "joint" else 0  # the joint stream starts with the text
    scale = heat_scale([example.heat.values for example in examples])
    pairs = []
    for example in examples:
        picture = store.picture(example.heat.image)
        if picture is None:
            raise UsageError(f"the store holds no picture of image {example.heat.image}: harvest with --pictures webp")
        shown = example.heat.positions >= first
        heat = token_grid(example.heat.values[shown], example.heat.positions[shown] - first, store.meta.grid)
        shown_picture = fitted(picture, side)
        pairs.append((shown_picture, overlay(shown_picture, heat, scale)))
    return pairs


def sheet(
    analysis: Analysis, subject: Subject, step: int, row: dict[str, Any], examples: Sequence[Example]
) -> Image.Image:
    """The contact sheet of the feature with this row of the feature table: title, figures, then its examples."""
    title = f"{subject.name}  ·  step {step}  ·  feature {row['feature']}"
    figures = (
        f"active on {percent(row['image_share'])} of the images and {percent(row['density'])} of the tokens,  "
        f"mean when active {row['mean_active']:.3g},  max {row['max']:.3g}"
    )
    if subject.site.stream == "txt":
        return _text_sheet(title, figures, examples)
    return _picture_sheet(
        title, figures, examples, pictures_with_heat(analysis.store, subject.site.stream, examples, CELL)
    )


def _picture_sheet(
    title: str, figures: str, examples: Sequence[Example], pairs: Sequence[tuple[Image.Image, Image.Image]]
) -> Image.Image:
    columns = max(1, min(COLUMNS, len(pairs)))
    height = max((picture.height for picture, _ in pairs), default=0)
    cell_width, cell_height = 2 * CELL + 4, height + 62
    rows = -(-len(pairs) // columns)
    size = (
        max(2 * MARGIN + columns * (cell_width + GAP) - GAP, 720),
        MARGIN + 70 + rows * (cell_height + GAP) + MARGIN - GAP,
    )
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    _header(draw, title, figures)
    for number, (example, (picture, heated)) in enumerate(zip(examples, pairs, strict=True)):
        x = MARGIN + number % columns * (cell_width + GAP)
        y = MARGIN + 70 + number // columns * (cell_height + GAP)
        image.paste(picture, (x, y))
        image.paste(heated, (x + CELL + 4, y))
        draw.text((x, y + height + 7), f"{example.score:.3g}", INK, _font(14, True))
        for line, text in enumerate(_wrapped(example.prompt, cell_width - 58, _font(13), 3)):
            draw.text((x + 58, y + height + 7 + 17 * line), text, MUTED, _font(13))
    return image


def _text_sheet(title: str, figures: str, examples: Sequence[Example]) -> Image.Image:
    lines = [_flow(example, TEXT_WIDTH - 80) for example in examples]
    height = MARGIN + 70 + sum(12 + 26 * len(flow) for flow in lines) + MARGIN
    image = Image.new("RGB", (TEXT_WIDTH + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(image)
    _header(draw, title, figures)
    y = MARGIN + 70
    for example, flow in zip(examples, lines, strict=True):
        draw.text((MARGIN, y + 3), f"{example.score:.3g}", INK, _font(14, True))
        for line in flow:
            for x, piece in line:
                left = MARGIN + 80 + x
                width = _font(15).getlength(piece.text)
                colour = tuple(round(p + (h - p) * piece.heat) for p, h in zip(PAPER, HOT, strict=True))
                draw.rounded_rectangle((left - 2, y, left + width + 2, y + 22), 4, colour)
                draw.text((left, y + 2), piece.text, INK, _font(15))
            y += 26
        y += 12
    return image


def _flow(example: Example, width: int) -> list[list[tuple[float, Piece]]]:
    """The pieces of a prompt in lines no wider than `width`, each with its x."""
    pieces = example.pieces or tuple(Piece(word, 0.0, place > 0) for place, word in enumerate(example.prompt.split()))
    lines: list[list[tuple[float, Piece]]] = [[]]
    x = 0.0
    for piece in pieces:
        step = 7.0 if piece.space else 1.0
        length = _font(15).getlength(piece.text)
        if lines[-1] and x + step + length > width:
            lines.append([])
            x = 0.0
        x += step if lines[-1] else 0.0
        lines[-1].append((x, piece))
        x += length
    return lines


def _header(draw: ImageDraw.ImageDraw, title: str, figures: str) -> None:
    draw.text((MARGIN, MARGIN - 4), title, INK, _font(22, True))
    draw.text((MARGIN, MARGIN + 29), figures, MUTED, _font(14))


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """Lines no wider than `width`, at most `most`; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    for number, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 2:
            line = line.removesuffix(" …").removesuffix("…")[:-1] + "…"
        lines[number] = line
    return lines


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture scaled so that its longer side has `side` pixels."""
    ratio = side / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    return picture.resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as PNG, without a time in it."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
