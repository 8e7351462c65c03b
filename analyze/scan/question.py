"""What a scan was asked, resolved against the store: images, sides, tokens and dictionaries; and how that is said and recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.scan.contrast import Contrast, contrast_of, sides_of
from analyze.scan.contrast import sentence as contrast_sentence
from analyze.scan.images import ONE_SEED, UNTOLD, Catalogue, catalogue, chosen_images
from analyze.scan.passes import TokenChoice
from analyze.scan.region import stretched
from analyze.scan.replicates import most_open
from analyze.scan.settings import ScanSettings
from analyze.scan.tokens import token_choices
from analyze.scoring.statistics import ACTIVE_ABOVE
from store.errors import UsageError
from store.sites import Point, Site, Stream
from store.sizes import human_size


@dataclass(frozen=True)
class Question:
    """What a scan was asked, resolved against the store."""

    settings: ScanSettings
    analysis: Analysis
    subjects: tuple[Subject, ...]
    known: Catalogue
    images: np.ndarray
    contrast: Contrast | None
    sides: list[tuple[np.ndarray, np.ndarray]]
    choices: dict[Stream, TokenChoice] | None
    above: float
    """active means z above this, as the scores were made with"""
    padding: bool

    @property
    def groups(self) -> np.ndarray:
        """Prompt numbers of the images."""
        return self.known.groups(self.images)


def ask(settings: ScanSettings) -> Question:
    """What is to be looked at; everything that cannot be is refused here, before anything is read."""
    analysis = open_analysis(settings)
    made = check_output(analysis)
    known = catalogue(analysis.store)
    contrast, sides = None, []
    if settings.kind == "contrastive":
        sides = sides_of(known, settings)
        contrast = contrast_of(known, sides, settings.match)
        images = contrast.images
    else:
        images = chosen_images(known, settings)
    if settings.kind == "temporal" and len(analysis.steps) < 2:
        raise UsageError(f"a temporal scan compares steps, and only step {analysis.steps[0]} is chosen: see --steps")
    choices = token_choices(analysis, settings)
    subjects = tuple(s for s in analysis.subjects if choices is None or s.site.stream in choices)
    above, padding = float(made.get("active_above", ACTIVE_ABOVE)), bool(made.get("padding", False))
    question = Question(settings, analysis, subjects, known, images, contrast, sides, choices, above, padding)
    if choices is None:
        for subject in subjects:
            for step in analysis.steps:
                analysis.matrix(subject, step)  # complains about what is missing before anything is computed
    freedom = len(images) - 1 if contrast is None else len(contrast.units.rows) - len(contrast.units.starts)
    if settings.ranked_by == "effect" and freedom < 1:
        raise UsageError(
            "--rank effect compares a difference with how much images differ by themselves, and there are too few to say: "
            "rank by difference, or choose images of more seeds or prompts"
        )
    return question


def asked(question: Question) -> str:
    """What is looked at, in a sentence or two."""
    settings, lines = question.settings, []
    prompts = len(np.unique(question.groups))
    if question.contrast is not None:
        lines.append(f"contrastive: {contrast_sentence(question.contrast, question.sides, question.known.told)}")
    else:
        of = f" of {prompts} prompts" if question.known.told else ""
        lines.append(f"{settings.kind}: {len(question.images)} images{of}")
        if prompts == len(question.images):
            lines.append(ONE_SEED if question.known.told else UNTOLD)
    left = [subject.name for subject in question.analysis.subjects if subject not in question.subjects]
    if left:
        lines.append(f"left out, for they have none of these tokens: {', '.join(left)}")
    if settings.mask is not None and (note := stretched(settings.mask, question.analysis.store.meta.grid)):
        lines.append(note)
    for stream, choice in (question.choices or {}).items():
        if choice.inside.ndim == 1:
            outside = "" if choice.outside is None else f" against {int(choice.outside.sum())}"
            lines.append(f"{stream}: {int(choice.inside.sum())} tokens{outside}")
    return "\n".join(lines)


def plan_line(question: Question) -> str:
    """What will be read."""
    meta, steps = question.analysis.store.meta, len(question.analysis.steps)
    if question.choices is None:
        pairs = [(subject, step) for subject in question.subjects for step in question.analysis.steps]
        size = sum(4 * subject.n_features * question.analysis.store.n_images for subject, _ in pairs)
        return f"reads {len(pairs)} score matrices, {human_size(size)} uncompressed"
    chunks = np.unique(question.images // meta.chunk_images)
    size, sites = 0, dict[Site, set[Point]]()
    for subject in question.subjects:
        sites.setdefault(subject.site, set()).add(subject.point)
    for site, points in sites.items():
        size += len(points) * meta.tokens[site.stream].kept
    size *= len(chunks) * meta.chunk_images * meta.d_model * np.dtype(meta.carrier.stored).itemsize * steps
    text = f"reads rows of {len(sites)} sites x {steps} steps, {len(chunks)} chunks of {meta.chunk_images} images: {human_size(size)}"
    held = most_open(question.groups, question.images // meta.chunk_images) * (
        3 if question.settings.kind == "spatial" else 1
    )
    features = max(sum(s.n_features for s in question.subjects if s.site == site) for site in sites)
    return text + (f"; holds up to {human_size(8 * held * features)} for prompts in several chunks" if held else "")


def record(question: Question, listed: int) -> dict[str, Any]:
    """What was asked, without paths: equal for equal questions."""
    settings, analysis = question.settings, question.analysis
    said = ("kind", "best", "every_step", "direction", "match", "pattern", "positive", "negative", "prompts", "region", "covered",
            "min_images", "tokens", "words")  # fmt: skip
    return {
        **{name: getattr(settings, name) for name in said},
        "rank": settings.ranked_by,
        "store": analysis.store.id,
        "dictionaries": {subject.name: subject.identity for subject in question.subjects},
        "steps": list(analysis.steps),
        "images": question.images.tolist(),
        "pairs": [[a.tolist(), b.tolist()] for a, b in question.sides],
        "matched_by_seed": question.contrast is not None and question.contrast.differences is not None,
        "inside": {s: _numbers(choice) for s, choice in (question.choices or {}).items()},
        "active_above": question.above,
        "padding_counted": question.padding,
        "listed": listed,
    }


def _numbers(choice: TokenChoice) -> Sequence[int] | None:
    """The tokens inside, where they are the same on every image."""
    return np.flatnonzero(choice.inside).tolist() if choice.inside.ndim == 1 else None
