"""Feature discovery: features that tell two sides apart, light up in a region, change over the steps, or are strongest.

After DifFRACT's feature scanner (arXiv:2606.15796, modes contrastive, spatial, temporal, top activation), from a store instead
of a running model, and at every step:

1. The images are chosen, and those that share a prompt are replicates of it that differ in their seed.
2. Where the maximum over an image is enough (contrastive, temporal, top), the score matrices are read, block by block of
   features; where tokens matter (a region, chosen tokens), the store's rows, once for all dictionaries of a site.
3. Every feature gets its figures, averaged over seeds, and the best are ranked over all dictionaries, a feature at its best step.
4. Each is named with the image, step and token where it says most, which is what an attribution graph wants as its target.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from analyze.inputs import Subject
from analyze.labels.book import LabelBook
from analyze.scan.contrast import contrast_figures
from analyze.scan.each import each_image
from analyze.scan.figures import Figures, Find, best_finds, joined, merged
from analyze.scan.kinds import Inside, Strongest, temporal_figures, top_figures
from analyze.scan.passes import countable, token_pass
from analyze.scan.question import Question, ask, asked, plan_line, record
from analyze.scan.settings import ScanSettings
from analyze.scan.table import FIRST, printed, rows_of, write_csv, write_record
from analyze.scan.tokens import place_of
from analyze.scoring.matrices import FEATURE_BLOCK
from store.errors import NonFiniteError, UsageError
from store.sites import Stream

BLOCK_VALUES = 2**21
PLACES = 3
"""how many of the tokens of its maxima a feature is listed with"""


def run(settings: ScanSettings) -> list[dict[str, Any]]:
    """The table, best feature first, also written to OUT/scan/NAME.csv with NAME.json beside it; empty with --plan."""
    started = time.monotonic()
    question = ask(settings)
    analysis = question.analysis
    print(asked(question))
    print(plan_line(question))
    if settings.plan:
        return []
    books = {subject.name: LabelBook.of(subject) for subject in question.subjects}
    finds = [located(question, find) for find in search(question)]
    rows = rows_of(analysis, finds, question.known, settings.kind, books)
    folder = analysis.out / "scan"
    more = list(finds[0].columns) if finds else []
    write_csv(folder / f"{settings.title}.csv", [*FIRST, *more], rows)
    write_record(folder / f"{settings.title}.json", record(question, len(rows)))
    if settings.per_image:
        columns, each = each_image(analysis, finds, question)
        write_csv(folder / f"{settings.title}.images.csv", columns, each)
    print(printed(finds, rows, books))
    for note in analysis.notes():
        print(note)
    print(f"scan: {len(rows)} features in {time.monotonic() - started:.1f} s -> {folder / settings.title}.csv")
    return rows


def search(question: Question) -> list[Find]:
    """The best features of all dictionaries."""
    best, every = question.settings.best, question.settings.every_step
    finds: list[Find] = []
    work = _from_matrices(question) if question.choices is None else _from_rows(question)
    for subject, figures in work:
        finds = merged([*finds, *best_finds(subject, figures, best, every)], best)
    return finds


def _from_matrices(question: Question) -> Iterator[tuple[Subject, list[Figures]]]:
    """Every dictionary with the figures of its steps (temporal: of all steps at once)."""
    settings, steps = question.settings, question.analysis.steps
    groups = question.groups
    with tqdm(total=len(question.subjects) * len(steps), desc="scan", unit="matrix", mininterval=0.5) as progress:
        for subject in question.subjects:
            if settings.kind == "temporal":
                blocks = question.analysis.matrix(subject, steps[0]).blocks(
                    block_size(len(question.images) * len(steps))
                )
                figures = [
                    temporal_figures(
                        [scores_of(question, subject, step, block) for step in steps],
                        steps, question.images, groups, settings.pattern, question.above,
                    )
                    for block in blocks
                ]  # fmt: skip
                yield subject, [joined(figures)]
                progress.update(len(steps))
                continue
            found = []
            for step in steps:
                blocks = question.analysis.matrix(subject, step).blocks(block_size(len(question.images)))
                found.append(joined([_block(question, subject, step, block, groups) for block in blocks]))
                progress.update()
            yield subject, found


def block_size(rows: int) -> int:
    """How many features to look at at once: whole chunks, with at most `BLOCK_VALUES` scores where there are several."""
    return max(FEATURE_BLOCK, BLOCK_VALUES // max(rows, 1) // FEATURE_BLOCK * FEATURE_BLOCK)


def _block(question: Question, subject: Subject, step: int, block: slice, groups: np.ndarray) -> Figures:
    settings, scores = question.settings, scores_of(question, subject, step, block)
    if question.contrast is None:
        return top_figures(scores, question.images, groups, step, question.above)
    return contrast_figures(scores, question.contrast, step, settings.ranked_by, settings.direction, question.above)


def scores_of(question: Question, subject: Subject, step: int, features: slice) -> np.ndarray:
    """S (image, feature) of the images of the scan, float32; `NonFiniteError` for what is no number."""
    matrix = question.analysis.matrix(subject, step)
    scores: np.ndarray = np.asarray(matrix.scores(features), np.float32)[question.images]
    if not np.isfinite(scores).all():
        raise NonFiniteError(
            f"{matrix.folder} holds a NaN or an infinite score: delete that folder and run python -m analyze scores again"
        )
    return scores


def _from_rows(question: Question) -> Iterator[tuple[Subject, list[Figures]]]:
    """Every dictionary with the figures of its steps, all dictionaries of a site from one read of its rows."""
    assert question.choices is not None
    settings, analysis = question.settings, question.analysis
    sites = [(site, list(of)) for site, of in groupby(question.subjects, key=lambda subject: subject.site)]
    with tqdm(total=len(sites) * len(analysis.steps), desc="scan", unit="step", mininterval=0.5) as progress:
        for site, subjects in sites:
            choice, found = question.choices[site.stream], [[] for _ in subjects]  # type: ignore[var-annotated]
            for step in analysis.steps:
                images = kept_images(question, site.stream, subjects[0], step)
                groups = question.known.groups(images)
                sums = [_sums_of(question, images, groups, subject.n_features) for subject in subjects]
                for place, chunk in token_pass(analysis, site, subjects, step, images, choice, question.padding):
                    sums[place].add(chunk)
                for figures, one in zip(found, sums, strict=True):
                    figures.append(one.figures(step, settings.ranked_by))
                progress.update()
            yield from zip(subjects, found, strict=True)


def _sums_of(question: Question, images: np.ndarray, groups: np.ndarray, n_features: int) -> Inside | Strongest:
    if question.settings.kind == "spatial":
        return Inside(images, groups, n_features, question.above, question.settings.min_images)
    return Strongest(images, groups, n_features, question.above)


def kept_images(question: Question, stream: Stream, subject: Subject, step: int) -> np.ndarray:
    """The images of which the store kept tokens to look at; `UsageError` when there are none."""
    assert question.choices is not None
    images = countable(
        question.analysis, subject.site, step, question.images, question.choices[stream], question.padding
    )
    if not len(images):
        both = " inside and outside" if question.settings.kind == "spatial" else ""
        raise UsageError(
            f"none of the {len(question.images)} images has kept tokens{both} among those chosen in {subject.site} at step {step}: "
            "choose other tokens, or images whose prompts have them"
        )
    return images


def located(question: Question, find: Find) -> Find:
    """The find with the token of its maximum, and the tokens of its maxima over all images, from the score matrix.

    A scan that looked at tokens knows them already.  In a contrast only images of the side that the feature prefers count.
    """
    if find.token is not None:
        return find
    matrix, images = question.analysis.matrix(find.subject, find.step), question.images
    if question.contrast is not None:
        difference = find.columns["difference"]
        images = images[np.unique(question.contrast.sides[isinstance(difference, float) and difference < 0])]
    tokens, scores = matrix.tokens(find.feature), matrix.scores(find.feature)
    stream = find.subject.site.stream
    active = images[scores[images] > question.above].tolist()
    places = Counter(place_of(question.analysis, stream, image, int(tokens[image])) for image in active)
    said = "; ".join(f"{place} x {count}" for place, count in places.most_common(PLACES))
    return replace(find, token=int(tokens[find.image]), columns=find.columns | {"tokens": said})
