"""The truth table: for each attribute, the feature that stands for it, and how well.

1. Held-out images whose picture shows what the prompt says (or of which a user's file says something), in two halves by what
   was asked for, however it was worded.
2. Over images: the feature whose score S tells best (AUROC) whether the attribute is there, for every dictionary and step,
   chosen on one half and scored on the other, with the best F1 of a threshold that is chosen likewise; beside a linear probe
   on the pooled activations (`ceiling` in the files, though a feature may beat it) and a floor (the best channel, pooled as S is).
   Of a joint site S, probe and floor are those of its image tokens alone: its text tokens hold the words that ask for the attribute.
3. Over image tokens, where it is known what is where: the same for z at tokens of objects with the attribute against tokens of
   other objects, beside a linear probe on mlp_in and a floor (best raw channel).

Nothing that is reported as a score was chosen on the images that it is computed on.  The store is read once a site and step.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.labels.book import LabelBook
from analyze.truth.attributes import Attribute, TokenLabels, token_labels
from analyze.truth.choosing import Choice, best_of, choose_columns, empty_choice
from analyze.truth.judges import Judges, choose_judges
from analyze.truth.raw import image_bounds, read_raw
from analyze.truth.settings import TruthSettings
from analyze.truth.summary import summary
from analyze.truth.table import Findings, found_rows
from analyze.truth.tokens import dictionary_truth, parts_of, token_bounds
from analyze.truth.writing import printed, write_truth
from store.errors import NonFiniteError, UsageError
from store.sites import Stream
from store.strata import Group


def run(settings: TruthSettings) -> dict[str, Any]:
    """The table.  Writes `truth.parquet` and `.csv` (every dictionary, step and attribute), `truth.json` and `.md` (the table).

    With --attributes they are called `attributes`.
    """
    started = time.monotonic()
    analysis = open_analysis(settings)
    made = check_output(analysis)
    judges = choose_judges(analysis, settings)
    for subject in analysis.subjects:
        for step in analysis.steps:
            matrix = analysis.matrix(subject, step)  # complain about what is missing before anything is computed
            if subject.site.stream == "joint" and "image" not in matrix.kinds:
                raise UsageError(
                    f"{matrix.folder} has the scores of image and text tokens only together, as an older Granary made them: delete that "
                    "folder and run python -m analyze scores again, or leave the site out with --sites"
                )
    findings = judge(analysis, judges, settings.seed, bool(made.get("padding", False)))
    rows = found_rows(findings)
    said = {name: getattr(settings, name) for name in ("images", "any_picture", "seed", "threshold")}
    result = summary(findings, rows, settings.threshold) | {
        "settings": said,
        "store": analysis.store.id,
        "dictionaries": {subject.name: subject.identity for subject in analysis.subjects},
        "targets": analysis.store.meta.targets,
        "images": {
            "chosen_on": int(judges.halves.choose.sum()),
            "scored_on": int(judges.halves.score.sum()),
            "left_out": judges.left_out,
        },
    }
    books = {subject.name: LabelBook.of(subject) for subject in analysis.subjects}
    write_truth(analysis.out, settings.title, rows, result, books)
    print(printed(result, books))
    pairs = len(analysis.subjects) * len(analysis.steps)
    print(
        f"{settings.title}: {pairs} dictionaries x steps in {time.monotonic() - started:.1f} s -> "
        f"{analysis.out / settings.title}.md, .json, .csv, .parquet"
    )
    return result


def judge(analysis: Analysis, judges: Judges, seed: int, padding: bool) -> Findings:
    """Everything that there is to find, site by site and step by step."""
    labels = None if judges.scenes is None else token_labels(judges.scenes, seed)
    findings = Findings(judges)
    sites = list(dict.fromkeys(subject.site for subject in analysis.subjects))
    with tqdm(total=len(sites) * len(analysis.steps), desc="truth", unit="step", mininterval=0.5) as progress:
        for site in sites:
            for step in analysis.steps:
                placed = None if labels is None else _placed(labels, site.stream, analysis.store.meta.text_tokens)
                images, tokens = read_raw(analysis, site, step, judges, placed, padding)
                findings.image_bounds[site, step] = image_bounds(images, judges)
                findings.channels[site, step] = images.channel
                parts = None if tokens is None else parts_of(tokens, judges.halves)
                if tokens is not None and parts is not None:
                    findings.token_bounds[site, step] = token_bounds(tokens, parts)
                for subject in [s for s in analysis.subjects if s.site == site]:
                    choice = over_images(analysis, subject, step, judges)
                    findings.images[subject, step] = choice
                    if tokens is not None and parts is not None:
                        findings.tokens[subject, step] = dictionary_truth(subject, tokens, parts, choice)
                progress.update()
    return findings


def _placed(labels: TokenLabels, stream: Stream, text_tokens: int) -> TokenLabels | None:
    """The labelled image tokens where a stream has them; None for text alone."""
    return None if stream == "txt" else labels.moved(text_tokens) if stream == "joint" else labels


def over_images(analysis: Analysis, subject: Subject, step: int, judges: Judges) -> Choice:
    """The best feature of one dictionary and step for every attribute, by its scores; the matrix is read once."""
    return best_of(_over_blocks(analysis, subject, step, judges))


def _over_blocks(analysis: Analysis, subject: Subject, step: int, judges: Judges) -> Iterator[Choice]:
    matrix, populations = analysis.matrix(subject, step), judges.populations()
    kind: Group = "image" if subject.site.stream == "joint" else "all"
    for block in matrix.blocks():
        scores = np.asarray(matrix.scores(block, kind), np.float32)[judges.images]
        if not np.isfinite(scores).all():
            raise NonFiniteError(
                f"{matrix.folder} holds a NaN or an infinite score: delete that folder and run python -m analyze scores again"
            )
        found = empty_choice(len(judges.attributes))
        for labels, known in populations:
            found.put(
                labels, choose_columns(scores[known], judges.shown[known][:, labels], judges.halves.choose[known])
            )
        yield found.moved(block.start)


__all__ = ["Attribute", "Judges", "choose_judges", "judge", "run"]
