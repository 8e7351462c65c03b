"""Contact sheets of features, single overlays on chosen images, and sheets over the denoising steps: the command `sheet`.

    OUT/sheets/NAME/step.K/feature-N.png             the feature's top images, one a prompt, with its heat over them
    OUT/sheets/NAME/step.K/feature-N-image-I.png     --images: one image, whatever its rank, in the colours of the contact sheet
    OUT/sheets/NAME/over-steps/feature-N.png         --over-steps: see analyze.pictures.over_steps

Text features show prompts with their tokens marked; features of joint sites show both.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.labels.book import LabelBook, name_of
from analyze.pictures import over_steps
from analyze.pictures.contact import CELL, cautions, keys, prompt_line, sheet
from analyze.pictures.drawing import fitted, page, png_bytes
from analyze.pictures.examples import (
    Example,
    Scales,
    check_top,
    chosen_features,
    chosen_images,
    example_of,
    feature_row,
    gather_examples,
    heated,
    picture_of,
    refuse_without_pictures,
    scales_of,
)
from analyze.pictures.heat import heats
from analyze.pictures.settings import SheetSettings
from store.errors import UsageError
from store.files import write_bytes

TOGETHER = 64
"""features whose heat is held at once"""

Drawing = tuple[str, Image.Image]
"""where it goes below OUT/sheets, and the picture"""


def run(settings: SheetSettings) -> list[Path]:
    """Write the pictures that `settings` ask for; the paths written."""
    analysis = open_analysis(settings)
    kept = check_output(analysis)["top"]
    if settings.images is None:
        check_top(kept, settings.top)
    refuse_without_pictures(analysis, analysis.subjects)
    drawings, total = over_steps.drawings(analysis, settings) if settings.over_steps else _drawings(analysis, settings)
    if not total:
        raise UsageError("no feature is alive at these sites and steps: there is nothing to draw")
    paths = []
    for name, picture in tqdm(drawings, total=total, desc="sheets", unit="picture", mininterval=0.5):
        path = analysis.out / "sheets" / name
        write_bytes(path, png_bytes(picture))
        paths.append(path)
    what = "sheets over steps" if settings.over_steps else "contact sheets" if settings.images is None else "overlays"
    print(f"sheets: {len(paths)} {what} written now -> {analysis.out / 'sheets'}")
    return paths


def _drawings(analysis: Analysis, settings: SheetSettings) -> tuple[Iterator[Drawing], int]:
    """Contact sheets or single overlays of every dictionary and step, and how many there will be."""
    rounds = []
    for subject in analysis.subjects:
        for step in analysis.steps:
            table = analysis.matrix(subject, step).features()
            rounds.append((subject, step, chosen_features(table, settings.features, settings.best)))
    images = None if settings.images is None else chosen_images(analysis.store, settings.images)
    total = sum(len(features) for _, _, features in rounds) * (1 if images is None else len(images))
    return _each(analysis, settings, rounds, images), total


def _each(
    analysis: Analysis,
    settings: SheetSettings,
    rounds: Sequence[tuple[Subject, int, list[int]]],
    images: list[int] | None,
) -> Iterator[Drawing]:
    for subject, step, features in rounds:
        book = LabelBook.of(subject)
        for start in range(0, len(features), TOGETHER):
            some = features[start : start + TOGETHER]
            if images is None:
                yield from _contact_sheets(analysis, subject, step, some, settings, book)
            else:
                yield from _overlays(analysis, subject, step, some, images, settings, book)


def _contact_sheets(
    analysis: Analysis,
    subject: Subject,
    step: int,
    features: Sequence[int],
    settings: SheetSettings,
    book: LabelBook,
) -> Iterator[Drawing]:
    table = analysis.matrix(subject, step).features()
    found = gather_examples(analysis, subject, step, table, features, settings.top, settings.look)
    for feature, examples in found.items():
        row = feature_row(table, feature)
        picture = sheet(analysis, subject, step, row, examples, book, settings.look, settings.side or CELL)
        yield f"{subject.name}/step.{step}/feature-{feature}.png", picture


def _overlays(
    analysis: Analysis,
    subject: Subject,
    step: int,
    features: Sequence[int],
    images: Sequence[int],
    settings: SheetSettings,
    book: LabelBook,
) -> Iterator[Drawing]:
    """One picture for each feature and image, on the scale of the feature's contact sheet, so that colours mean the same there."""
    matrix = analysis.matrix(subject, step)
    table = matrix.features()
    top = {feature: table["unique_image"][feature].as_py()[: settings.top] for feature in features}
    wanted = {feature: list(dict.fromkeys([*top[feature], *images])) for feature in features}
    for feature, group in heats(analysis, subject, step, wanted).items():
        of_image = {heat.image: heat for heat in group}
        shown = [of_image[image] for image in top[feature]] or group
        scales = scales_of(analysis.store, subject.site.stream, shown, settings.look)
        scores = matrix.scores(feature)
        for image in images:
            name = f"{subject.name}/step.{step}/feature-{feature}-image-{image}.png"
            example = example_of(analysis.store, subject, of_image[image], float(scores[image]), scales.words)
            yield name, _single(analysis, subject, step, feature, example, scales, settings, book)


def _single(
    analysis: Analysis,
    subject: Subject,
    step: int,
    feature: int,
    example: Example,
    scales: Scales,
    settings: SheetSettings,
    book: LabelBook,
) -> Image.Image:
    """The picture alone with its heat; for text features a page with the prompt, since words need a key to their colours."""
    store, stream, look = analysis.store, subject.site.stream, settings.look
    if stream == "txt":
        title = f"{name_of(subject, feature, book)}, step {step}, image {example.heat.image}"
        notes: list[str | Image.Image] = [*cautions(analysis, subject, step)]
        notes += keys(scales, stream, look)
        return page(title, notes, [prompt_line(example, f"{example.score:.3g}")])
    picture = picture_of(store, example.heat.image)
    if settings.side is not None:
        picture = fitted(picture, settings.side)
    return heated(store, stream, picture, example.heat, scales.picture, look)
