"""The contact sheet of one feature: its title and figures, and its top images with its heat, or prompts with their tokens marked."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from analyze.counted import are_lower_bounds
from analyze.inputs import Analysis, Subject
from analyze.labels.book import LabelBook, name_of
from analyze.pictures.drawing import (
    INK,
    below,
    beside,
    key_to_colours,
    lines_of,
    page,
    plain_pieces,
    prompt_with_heat,
    written,
)
from analyze.pictures.examples import Example, Scales, peak_of, pictures_with_heat, scales_of, strata_of
from analyze.pictures.overlay import PLAIN, Look
from analyze.pictures.words import percent
from store import Store
from store.sites import Stream
from store.strata import Group

CELL = 168
COLUMNS = 4
TEXT_WIDTH = 840
SCORE_WIDTH = 72
KINDS: dict[Group, str] = {"image": "image tokens", "real": "text tokens", "padding": "padding"}


def sheet(
    analysis: Analysis,
    subject: Subject,
    step: int,
    row: dict[str, Any],
    examples: Sequence[Example],
    book: LabelBook | None = None,
    look: Look = PLAIN,
    side: int = CELL,
) -> Image.Image:
    """The contact sheet of the feature with this row of the feature table: title, figures, then its examples."""
    stream = subject.site.stream
    title = f"{name_of(subject, int(row['feature']), book)}, step {step}"
    notes: list[str | Image.Image] = [figures(row), *by_kind(row), *cautions(analysis, subject, step)]
    if examples:
        scales = scales_of(analysis.store, stream, (example.heat for example in examples), look)
        notes += keys(scales, stream, look)
    else:
        notes.append("active on none of the images")
    if stream == "txt":
        return page(title, notes, [prompt_line(example, f"{example.score:.3g}") for example in examples])
    pairs = pictures_with_heat(analysis.store, stream, examples, side, look)
    cells = [
        below([beside(pair), _caption(analysis.store, stream, example, 2 * side + 4)], 7)
        for example, pair in zip(examples, pairs, strict=True)
    ]
    return page(title, notes, lines_of(cells, max(1, min(COLUMNS, COLUMNS * CELL // side))))


def keys(scales: Scales, stream: Stream, look: Look = PLAIN) -> list[str | Image.Image]:
    """What the colours of a sheet stand for: one key, of a joint site one for its image tokens and one for its text tokens."""
    if stream != "joint":
        return [key_to_colours(scales.picture, look.clip_percentile, "words" if stream == "txt" else "picture")]
    found: list[str | Image.Image] = []
    for kind, name, scale, active in (
        ("picture", "image tokens", scales.picture, scales.on_picture),
        ("words", "text tokens", scales.words, scales.on_words),
    ):
        key = key_to_colours(scale, look.clip_percentile, kind, f"{name}: ")  # type: ignore[arg-type]
        found.append(key if active else f"{name}: not active on those shown")
    return found


def figures(row: dict[str, Any]) -> str:
    """How often and how strongly a feature is active, from its row of the feature table."""
    return (
        f"active on {percent(row['image_share'])} of the images and {percent(row['density'])} of the tokens, "
        f"mean when active {row['mean_active']:.3g}, max {row['max']:.3g}"
    )


def by_kind(row: dict[str, Any]) -> list[str]:
    """The same of each kind of token of a joint site, in a line; nothing where kinds are not told apart."""
    there = [(kind, name) for kind, name in KINDS.items() if f"density_{kind}" in row]
    words = [
        f"{percent(row[f'density_{kind}'])} of the {name}"
        + (f" (max {row[f'max_{kind}']:.3g})" if row[f"max_{kind}"] else "")
        for kind, name in there
    ]
    return ["active on " + ", ".join(words)] if words else []


def cautions(analysis: Analysis, subject: Subject, step: int) -> list[str]:
    """What a reader of a sheet must know of what is not on it."""
    store, stream = analysis.store, subject.site.stream
    found = []
    if are_lower_bounds(store, stream, padding=False):
        policy = store.meta.tokens[stream]
        found.append(f"the store keeps {policy.kept} of {policy.total} tokens: the others are drawn cold")
    if stream != "img" and analysis.matrix(subject, step).attributes.get("padding_counted"):
        found.append("padding tokens count in the scores and have no words to be shown on")
    if stream != "img" and "text_pieces" not in store.prompts().column_names:
        found.append("the store does not know the texts of its tokens: prompts are shown without their heat")
    return found


def prompt_line(example: Example, score: str, width: int = TEXT_WIDTH) -> Image.Image:
    """One prompt with its tokens marked, its score before it."""
    pieces = example.pieces or plain_pieces(example.prompt)
    return beside([written(score, SCORE_WIDTH, 14, INK, 1, bold=True), prompt_with_heat(pieces, width)])


def _caption(store: Store, stream: Stream, example: Example, width: int) -> Image.Image:
    if stream == "joint":
        image, text = (peak_of(part) for part in strata_of(store, stream, example.heat))
        words = written(f"{image:.3g} on image tokens, {text:.3g} on text tokens", width, 13, INK, 1, bold=True)
        return below([words, prompt_with_heat(example.pieces or plain_pieces(example.prompt), width)], 2)
    score = written(f"{example.score:.3g}", 54, 14, INK, 1, bold=True)
    return beside([score, written(example.prompt, width - 58)])
