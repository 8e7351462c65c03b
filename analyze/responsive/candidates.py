"""Which images are tried: those on which a feature is active but not saturated, of different prompts.

1. The score of an image is the feature's greatest activation over its tokens and over the steps of the analysis.
2. Active images are ranked by it; image number i of n (from 0, ascending) stands at the percentile 100 (i + 1/2) / n.
3. Candidates lie above `low` and at most at `high`; of each prompt the first in the order of the images.
4. Of more than are wanted, some are taken evenly over the ranks, so that weak and strong ones are both tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analyze.inputs import Analysis, Subject
from analyze.scoring.statistics import ACTIVE_ABOVE
from store.errors import UsageError
from store.sizes import many


@dataclass(frozen=True)
class Candidate:
    """An image on which a feature is tried."""

    image: int
    score: float
    percentile: float
    """where it stands among the images on which the feature is active"""


def scores_of(analysis: Analysis, subject: Subject, feature: int) -> Float[np.ndarray, " image"]:
    """The greatest activation of a feature on each image, over all steps of the analysis."""
    return np.asarray(np.max([analysis.matrix(subject, step).scores(feature) for step in analysis.steps], axis=0))


def candidates_of(
    scores: Float[np.ndarray, " image"],
    prompts: Sequence[str],
    low: float,
    high: float,
    count: int,
    active_above: float = ACTIVE_ABOVE,
    what: str = "the feature",
) -> list[Candidate]:
    """At most `count` candidates, by rising score.  `UsageError` where the feature is active nowhere or the band holds no image."""
    active = np.flatnonzero(scores > active_above)
    if not len(active):
        raise UsageError(f"{what} is active on none of the {len(scores)} images: choose one that is alive")
    order = active[np.argsort(scores[active], kind="stable")]
    percentiles = 100 * (np.arange(len(order)) + 0.5) / len(order)
    inside = (percentiles > low) & (percentiles <= high)
    if not inside.any():
        raise UsageError(
            f"{what} is active on {many(len(order), 'image')}, and none lies between the percentiles {low:g} and {high:g}: "
            "widen them with --low and --high"
        )
    placed = dict(zip(order[inside].tolist(), percentiles[inside].tolist(), strict=True))
    seen: dict[str, int] = {}
    for image in sorted(placed):
        seen.setdefault(prompts[image], image)
    chosen = sorted(seen.values(), key=lambda image: placed[image])
    if len(chosen) > count:
        chosen = [chosen[place] for place in evenly(len(chosen), count)]
    return [Candidate(image, float(scores[image]), placed[image]) for image in chosen]


def best_images(scores: Float[np.ndarray, " image"], prompts: Sequence[str], count: int) -> list[int]:
    """The images with the highest scores, one a prompt, best first."""
    found: dict[str, int] = {}
    for image in np.argsort(-scores, kind="stable").tolist():
        if scores[image] > 0:
            found.setdefault(prompts[image], image)
        if len(found) == count:
            break
    return list(found.values())


def evenly(there: int, count: int) -> list[int]:
    """`count` places out of `there`, evenly spread, each in the middle of its share; all of them where there are no more."""
    if there <= count:
        return list(range(there))
    return [(2 * place + 1) * there // (2 * count) for place in range(count)]
