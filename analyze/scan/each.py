"""What a scan found, image by image: the figure of every listed feature on each image that was looked at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from analyze.inputs import Analysis
from analyze.scan.figures import Find
from analyze.scan.passes import token_pass
from analyze.scan.question import Question

COLUMNS = ("rank", "dictionary", "feature", "step", "image", "seed", "figure", "prompt")


def each_image(
    analysis: Analysis, finds: Sequence[Find], question: Question
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows, by rank, step and image; a temporal scan has a row for every step.

    The figure is the activation on the image, and for a region the mean inside less the mean outside.
    """
    rows, figures = [], _from_rows(analysis, finds, question)
    for rank, find in enumerate(finds, start=1):
        for step in analysis.steps if question.settings.kind == "temporal" else (find.step,):
            if question.choices is None:
                values = np.asarray(analysis.matrix(find.subject, step).scores(find.feature), np.float32)[
                    question.images
                ]
            else:
                values = figures[find.subject.name, step, find.feature]
            for image, value in zip(question.images.tolist(), values.tolist(), strict=True):
                rows.append(
                    {
                        "rank": rank, "dictionary": find.subject.name, "feature": find.feature, "step": step, "image": image,
                        "seed": question.known.seed(image), "figure": value, "prompt": question.known.prompts[image],
                    }
                )  # fmt: skip
    return COLUMNS, rows


def _from_rows(
    analysis: Analysis, finds: Sequence[Find], question: Question
) -> dict[tuple[str, int, int], Float[np.ndarray, " image"]]:
    """The figures by dictionary, step and feature, where tokens matter; each dictionary and step that found something is read again."""
    found: dict[tuple[str, int, int], np.ndarray] = {}
    for subject, step in dict.fromkeys((find.subject, find.step) for find in finds if question.choices is not None):
        assert question.choices is not None
        features = [find.feature for find in finds if (find.subject, find.step) == (subject, step)]
        choice, parts = question.choices[subject.site.stream], []
        for _, chunk in token_pass(analysis, subject.site, [subject], step, question.images, choice, question.padding):
            n_in, n_out = chunk.tokens_in[:, None], chunk.tokens_out[:, None]
            with np.errstate(invalid="ignore", divide="ignore"):
                inside, outside = chunk.sum_in[:, features] / n_in, chunk.sum_out[:, features] / n_out
            values = chunk.max_in[:, features] if choice.outside is None else inside - outside
            parts.append(np.where(n_in > 0, values, np.nan))
        found |= {
            (subject.name, step, feature): column
            for feature, column in zip(features, np.concatenate(parts).T, strict=True)
        }
    return found
