"""The truth table: for each attribute that prompts ask for, the feature that stands for it, and how well.

1. Held-out images whose picture shows what the prompt says, in two halves by what was asked for, however it was worded.
2. Over images: the feature whose score S tells best (AUROC) whether the attribute is there, over all sites and steps of a
   stream, chosen on one half and scored on the other.
3. Over image tokens: the same for z at tokens of objects with the attribute against tokens of other objects, between a
   ceiling (ridge probe on mlp_in) and a floor (best raw channel), each chosen on the first half as well.

Nothing that is reported as a score was chosen on the images that it is computed on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.truth.attributes import ATTRIBUTES, Attribute, Scene, image_labels, read_scenes, token_labels
from analyze.truth.choosing import Choice, choose_features
from analyze.truth.halves import Halves, halves_of
from analyze.truth.settings import TruthSettings
from analyze.truth.table import Findings, found_rows, printed, summary
from analyze.truth.tokens import bounds, dictionary_truth, empty_choice, gather
from store.errors import UsageError
from store.files import write_json
from store.tables import write_table

MIN_IMAGES = 20


@dataclass(frozen=True)
class Judges:
    """The images that the table is judged on."""

    scenes: tuple[Scene, ...]
    halves: Halves
    left_out: int
    """Images that do not show what their prompt says, or have no picture"""


def run(settings: TruthSettings) -> dict[str, Any]:
    """Write `truth.parquet` (every dictionary, step and attribute) and `truth.json` (the table), print it and return it."""
    started = time.monotonic()
    analysis = open_analysis(settings)
    check_output(analysis)
    judges = choose_judges(analysis, settings)
    pairs = [(subject, step) for subject in analysis.subjects for step in analysis.steps]
    for subject, step in pairs:
        analysis.matrix(subject, step)  # complain about what is missing before anything is computed
    findings = _findings(analysis, judges, settings.seed)
    table = pa.Table.from_pylist(found_rows(findings))
    write_table(analysis.out / "truth.parquet", table)
    result = summary(findings, settings.threshold) | {
        "settings": {name: getattr(settings, name) for name in ("images", "any_picture", "seed", "threshold")},
        "store": analysis.store.id,
        "dictionaries": {subject.name: subject.identity for subject in analysis.subjects},
        "targets": analysis.store.meta.targets,
        "images": {
            "chosen_on": int(judges.halves.choose.sum()),
            "scored_on": int(judges.halves.score.sum()),
            "left_out": judges.left_out,
        },
    }
    write_json(analysis.out / "truth.json", result)
    print(printed(result))
    print(
        f"truth: {len(pairs)} dictionaries x steps in {time.monotonic() - started:.1f} s -> {analysis.out / 'truth.json'}"
    )
    return result


def choose_judges(analysis: Analysis, settings: TruthSettings) -> Judges:
    """The images to judge on; `UsageError` when there are too few to say anything."""
    scenes = read_scenes(analysis.store)
    split = analysis.store.prompts()["split"].to_pylist()
    held_out = [scene for scene in scenes if settings.images == "all" or split[scene.image] == "val"]
    usable = [scene for scene in held_out if scene.drawn or settings.any_picture]
    if len(usable) < MIN_IMAGES:
        raise UsageError(_too_few(len(usable), held_out, settings))
    halves = halves_of([scene.said for scene in usable], settings.seed)
    return Judges(tuple(usable), halves, len(held_out) - len(usable))


def _too_few(usable: int, held_out: Sequence[Scene], settings: TruthSettings) -> str:
    which = "images of held-out prompts (split val)" if settings.images == "val" else "images"
    text = f"the truth table needs at least {MIN_IMAGES} {which} that show what their prompt says; this store has {usable}."
    if any(scene.drawn is None for scene in held_out):
        text += " Some have no picture: harvest with --pictures webp, or allow them with --any-picture."
    elif len(held_out) > usable:
        text += f" {len(held_out) - usable} show something else: allow them with --any-picture."
    return text + (
        " Harvest more images, or use all of them with --images all."
        if settings.images == "val"
        else " Harvest more images."
    )


def _findings(analysis: Analysis, judges: Judges, seed: int) -> Findings:
    images = np.asarray([scene.image for scene in judges.scenes])
    labels = token_labels(judges.scenes, seed)
    findings = Findings(judges.scenes, judges.halves)
    sites = list(dict.fromkeys(subject.site for subject in analysis.subjects))
    with tqdm(total=len(sites) * len(analysis.steps), desc="truth", unit="step", mininterval=0.5) as progress:
        for site in sites:
            for step in analysis.steps:
                rows = gather(analysis.rows, site, step, judges.scenes, labels) if site.stream == "img" else None
                if rows is not None:
                    findings.bounds[site, step] = bounds(rows, judges.halves)
                for subject in [s for s in analysis.subjects if s.site == site]:
                    choice = _over_images(analysis, subject, step, judges, images)
                    findings.images[subject, step] = choice
                    if rows is not None:
                        findings.tokens[subject, step] = dictionary_truth(subject, rows, judges.halves, choice)
                progress.update()
    return findings


def _over_images(analysis: Analysis, subject: Subject, step: int, judges: Judges, images: np.ndarray) -> Choice:
    shown, defined = image_labels(judges.scenes)
    matrix = analysis.matrix(subject, step)
    result = empty_choice()
    for labels in _same_images(defined):
        rows = defined[:, labels[0]]
        if rows.any():
            found = choose_features(matrix, images[rows], shown[rows][:, labels], judges.halves.choose[rows])
            result.column[labels], result.selection[labels], result.scored[labels] = (
                found.column,
                found.selection,
                found.scored,
            )
    return result


def _same_images(defined: np.ndarray) -> list[np.ndarray]:
    """The attributes, grouped by the images on which they are defined: positions, and all others."""
    placed = np.asarray([attribute.group == "position" for attribute in ATTRIBUTES])
    return [np.flatnonzero(placed == group) for group in (False, True)]


__all__ = ["Attribute", "Judges", "choose_judges", "run"]
