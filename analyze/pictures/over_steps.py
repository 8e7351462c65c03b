"""The same images at every denoising step side by side: where a feature is active, and how strongly, while the picture is made.

    OUT/sheets/NAME/over-steps/feature-N.png            one feature at all steps, on one scale of colours
    OUT/sheets/NAME/over-steps/feature-N-matched.png    --matched: at each other step the feature that fires most like it

With `--matched` the reference is the step at which the feature is active on most images; at every other step stands the feature whose
scores over all images correlate most with the reference's, each on its own scale.  What is active on too few images is not matched,
and a correlation below LEAST_CORRELATION is no match: the best of a thousand is above 0 whatever the features are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from analyze.compare.coactivation import correlations_with
from analyze.inputs import Analysis, Subject, sigmas
from analyze.labels.book import LabelBook, name_of
from analyze.pictures.contact import CELL, TEXT_WIDTH, cautions, keys, prompt_line
from analyze.pictures.drawing import INK, below, beside, fitted, lines_of, page, written
from analyze.pictures.examples import (
    Scales,
    chosen_features,
    chosen_images,
    example_of,
    heated,
    peak_of,
    picture_of,
    scales_of,
    strata_of,
)
from analyze.pictures.heat import Heat, heats
from analyze.pictures.settings import MIN_IMAGES, SheetSettings
from analyze.prompts import prompt_text, prompt_texts
from store.errors import UsageError
from store.split import normalise

PER_LINE = 8
"""overlays in a line, the picture among them"""
LEAST_CORRELATION = 0.3
"""of a match"""
Tables = Mapping[int, pa.Table]
"""the feature table of every step"""


@dataclass(frozen=True)
class Shown:
    """What a sheet shows at one step."""

    step: int
    feature: int
    note: str = ""
    """how it was found"""
    reference: bool = True
    """whether it is what the others are matched with; so is every step of a sheet without matching"""


def drawings(analysis: Analysis, settings: SheetSettings) -> tuple[Iterator[tuple[str, Image.Image]], int]:
    """The sheets, each with its place below OUT/sheets, and how many there will be."""
    if len(analysis.steps) < 2:
        raise UsageError(
            f"--over-steps shows steps side by side, and there is only step {analysis.steps[0]}: choose more with --steps, "
            "or analyze a store that has more"
        )
    rounds = []
    for subject in analysis.subjects:
        tables = {step: analysis.matrix(subject, step).features() for step in analysis.steps}
        rounds.append((subject, _features(tables, settings)))
    images = None if settings.images is None else chosen_images(analysis.store, settings.images)
    return _each(analysis, settings, rounds, images), sum(len(features) for _, features in rounds)


def _features(tables: Tables, settings: SheetSettings) -> list[int]:
    """The named features, or those that are most interesting at any step."""
    first = next(iter(tables.values()))
    if settings.features is not None:
        return chosen_features(first, settings.features, settings.best)
    interest = np.stack([np.where(table["alive"], table["interest"], -np.inf) for table in tables.values()]).max(axis=0)
    order = np.argsort(-interest, kind="stable")[: settings.best]
    return [int(feature) for feature in order if np.isfinite(interest[feature])]


def _each(
    analysis: Analysis,
    settings: SheetSettings,
    rounds: Sequence[tuple[Subject, list[int]]],
    images: list[int] | None,
) -> Iterator[tuple[str, Image.Image]]:
    for subject, features in rounds:
        tables = {step: analysis.matrix(subject, step).features() for step in analysis.steps}
        book = LabelBook.of(subject)
        columns = {
            feature: columns_of(analysis, subject, tables, feature, settings.matched, settings.min_images)
            for feature in features
        }
        chosen = {feature: images or _images(analysis, tables, columns[feature], settings.top) for feature in features}
        found = _heats(analysis, subject, columns, chosen)
        for feature in features:
            name = f"{subject.name}/over-steps/feature-{feature}{'-matched' if settings.matched else ''}.png"
            yield name, _sheet(analysis, subject, columns[feature], chosen[feature], found, settings, book)


def columns_of(
    analysis: Analysis, subject: Subject, tables: Tables, feature: int, matched: bool, min_images: int = MIN_IMAGES
) -> list[Shown]:
    """What a sheet shows at each step: the feature itself, or its match; both are active on `min_images` images or more."""
    if not matched:
        return [Shown(step, feature) for step in analysis.steps]
    active = {step: int(table["images_active"][feature].as_py()) for step, table in tables.items()}
    reference = max(analysis.steps, key=lambda step: (active[step], -step))
    if active[reference] < min_images:
        few = (
            f"active on {active[reference]} images, too few to be matched" if active[reference] else "active at no step"
        )
        return [
            Shown(step, feature, few if step == reference else "the same feature", step == reference)
            for step in analysis.steps
        ]
    scores = analysis.matrix(subject, reference).scores(feature)
    shown = []
    for step in analysis.steps:
        if step == reference:
            shown.append(Shown(step, feature, "the reference"))
            continue
        correlations = correlations_with(analysis.matrix(subject, step), scores)
        correlations = np.where(tables[step]["images_active"].to_numpy() >= min_images, correlations, -np.inf)
        best = int(np.argmax(correlations))
        if correlations[best] >= LEAST_CORRELATION:
            shown.append(Shown(step, best, f"correlation {correlations[best]:.2f} over all images", False))
        else:
            none = (
                f"no feature active on {min_images} images correlates at {LEAST_CORRELATION} or more: the same feature"
            )
            shown.append(Shown(step, feature, none, False))
    return shown


def _images(analysis: Analysis, tables: Tables, columns: Sequence[Shown], top: int) -> list[int]:
    """The images on which what is shown is strongest at any step, one a prompt; of matched features, on which the reference is."""
    texts = prompt_texts(analysis.store)
    best: dict[int, float] = {}
    for column in columns:
        if column.reference:
            row = tables[column.step].slice(column.feature, 1)
            for image, score in zip(row["unique_image"][0].as_py(), row["unique_score"][0].as_py(), strict=True):
                best[image] = max(best.get(image, 0.0), score)
    chosen: dict[str, int] = {}
    for image in sorted(best, key=lambda image: (-best[image], image)):
        chosen.setdefault(normalise(texts[image]), image)
    return list(chosen.values())[:top]


def _heats(
    analysis: Analysis,
    subject: Subject,
    columns: Mapping[int, Sequence[Shown]],
    images: Mapping[int, Sequence[int]],
) -> dict[tuple[int, int, int], tuple[Heat, float]]:
    """Heat and score by step, feature and image: each step is read once for all sheets."""
    found = {}
    for step in analysis.steps:
        wanted: dict[int, dict[int, None]] = {}
        for feature, shown in columns.items():
            for column in shown:
                if column.step == step:
                    wanted.setdefault(column.feature, {}).update(dict.fromkeys(images[feature]))
        matrix = analysis.matrix(subject, step)
        for feature, group in heats(analysis, subject, step, {f: list(i) for f, i in wanted.items()}).items():
            scores = matrix.scores(feature)
            found.update({(step, feature, heat.image): (heat, float(scores[heat.image])) for heat in group})
    return found


def _sheet(
    analysis: Analysis,
    subject: Subject,
    columns: Sequence[Shown],
    images: Sequence[int],
    found: Mapping[tuple[int, int, int], tuple[Heat, float]],
    settings: SheetSettings,
    book: LabelBook,
) -> Image.Image:
    matched, look = settings.matched, settings.look
    sigma = {step: float(np.mean(sigmas(analysis.store, step))) for step in analysis.steps}
    steps = ", ".join(f"step {step}: sigma {value:.3f}" for step, value in sigma.items())
    notes: list[str | Image.Image] = [steps, *cautions(analysis, subject, analysis.steps[0])]
    heat = {column: [found[column.step, column.feature, image][0] for image in images] for column in columns}
    store, stream = analysis.store, subject.site.stream
    scales = {column: scales_of(store, stream, group, look) for column, group in heat.items()}
    if matched:
        notes += [f"step {c.step}: {name_of(subject, c.feature, book)}, {c.note}" for c in columns]
        notes.append("each feature on its own scale of colours")
    else:
        whole = scales_of(store, stream, (one for group in heat.values() for one in group), look)
        scales = dict.fromkeys(columns, whole)
        notes += keys(whole, stream, look)
    if not images:
        notes.append("active on none of the images at any step")
    reference = next(column for column in columns if column.reference)
    title = f"{name_of(subject, reference.feature, book)} over {len(columns)} steps" + (", matched" if matched else "")
    lines = [_line(analysis, subject, columns, image, found, scales, settings) for image in images]
    return page(title, notes, lines)


def _line(
    analysis: Analysis,
    subject: Subject,
    columns: Sequence[Shown],
    image: int,
    found: Mapping[tuple[int, int, int], tuple[Heat, float]],
    scales: Mapping[Shown, Scales],
    settings: SheetSettings,
) -> Image.Image:
    """One image: its picture, the overlays of all steps, and below them its prompt, or the prompt at each step where it is read."""
    store, stream = analysis.store, subject.site.stream
    joint = (
        stream == "joint"
    )  # whose image tokens and text tokens have their own figures, as they have their own scales
    parts, lines = [], []
    picture = None if stream == "txt" else fitted(picture_of(store, image), settings.side or CELL)
    if picture is not None:
        parts.append(below([picture, written(f"image {image}", picture.width, 12)]))
    for column in columns:
        heat, score = found[column.step, column.feature, image]
        on_image, on_text = (peak_of(part) for part in strata_of(store, stream, heat))
        what = f"step {column.step}" + (f" · {column.feature}" if settings.matched else "")
        if picture is not None:
            over = heated(store, stream, picture, heat, scales[column].picture, settings.look)
            parts.append(below([over, _named(what, on_image if joint else score, picture.width)]))
        if stream != "img":
            example = example_of(store, subject, heat, on_text if joint else score, scales[column].words)
            lines.append(
                beside([written(what, 120, 12), prompt_line(example, f"{example.score:.3g}", TEXT_WIDTH - 124)])
            )
    if stream == "img":
        lines.append(written(prompt_text(store, image), min(len(parts), PER_LINE) * (parts[0].width + 4), 13))
    elif picture is None:
        lines.insert(0, written(f"image {image}", TEXT_WIDTH, 12))
    return below([*lines_of(parts, PER_LINE, 4), *lines], 3)


def _named(what: str, score: float, width: int) -> Image.Image:
    """What an overlay shows, and the score there."""
    return below([written(what, width, 12), written(f"{score:.3g}", width, 13, INK, 1, bold=True)], 0)
