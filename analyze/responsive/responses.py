"""How each candidate responds: drawn plain and with every strength, measured, and put in order.

Plain and changed pictures of a feature are drawn in the same batches, so that a change that does nothing leaves every bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from tqdm import tqdm

from analyze.features.clip import Clip
from analyze.responsive.concept import Concepts
from analyze.responsive.question import Question, Search
from analyze.responsive.settings import Rank
from analyze.steering.distances import NEARER_IS_GREATER, distances
from analyze.steering.drawing import Painter, shots_of


@dataclass(frozen=True)
class Responses:
    """What one feature's candidates did."""

    search: Search
    plain: list[Image.Image]
    changed: list[list[Image.Image]]
    """(strength, candidate)"""
    measured: dict[str, Float[np.ndarray, "strength candidate"]]
    """column -> values; the columns of `distances`, then perhaps `concept`"""
    response: Float[np.ndarray, " candidate"]
    """the mean over strengths of how much changed, by the column that is ranked by; greater is more"""
    order: Int[np.ndarray, " candidate"]
    """places of the candidates, the strongest response first"""


def respond(question: Question, searches: Sequence[Search], painter: Painter, clip: Clip | None) -> Iterator[Responses]:
    """The responses of these features, drawn one feature after the other; a bar counts the runs of the transformer."""
    concepts = None
    if clip is not None and question.analysis.store.meta.pictures != "none":
        concepts = Concepts(question.analysis.store, clip)
    with tqdm(total=question.forwards_of(searches), desc="responsive", unit="run", mininterval=0.5) as progress:

        def step_ended(_first: int, _step: int, _captured: object) -> None:
            progress.update(painter.forwards - before - progress.n)

        before = painter.forwards
        for search in searches:
            progress.set_postfix_str(search.place, refresh=False)
            shots = shots_of(question.analysis.store, [candidate.image for candidate in search.candidates])
            plain = painter.draw(shots, on_step=step_ended)
            drawn = [painter.draw(shots, intervention, on_step=step_ended) for intervention in search.interventions]
            assert plain.pictures is not None
            changed = [each.pictures or [] for each in drawn]
            found = [
                distances(plain.pictures, pictures, plain.latents, each.latents, clip)
                for pictures, each in zip(changed, drawn, strict=True)
            ]
            if concepts is not None and search.best_images:
                direction = concepts.direction(search.best_images)
                for columns, pictures in zip(found, changed, strict=True):
                    columns["concept"] = concepts.changes(direction, plain.pictures, pictures)
            measured = {name: np.stack([columns[name] for columns in found]) for name in found[0]}
            response = response_of(measured, question.settings.rank, search)
            images = np.array([candidate.image for candidate in search.candidates])
            yield Responses(search, plain.pictures, changed, measured, response, np.lexsort((images, -response)))


def response_of(
    measured: dict[str, Float[np.ndarray, "strength candidate"]], rank: Rank, search: Search
) -> Float[np.ndarray, " candidate"]:
    """How much each candidate changed, greater for more, a mean over strengths.

    Distances count as they are, similarities as what is missing to 1, PSNR as its negative, and the concept towards the side to
    which the intervention pushes: up for more of the feature, down for less.
    """
    values = measured[rank]
    if rank == "psnr":
        values = -values
    elif rank in NEARER_IS_GREATER:
        values = 1 - values
    elif rank == "concept":
        values = values * np.array([pushes(search, place) for place in range(len(values))])
    return np.asarray(values.mean(0))


def pushes(search: Search, strength: int) -> Float[np.ndarray, " candidate"]:
    """1 for each candidate to which an intervention gives more of the feature, -1 where it takes from it."""
    edit, scores = search.interventions[strength].edits[0], np.array([each.score for each in search.candidates])
    peak = search.peak if edit.unit == "peak" else 1.0
    more: Any = {
        "zero": False,
        "amplify": edit.strength > 1,
        "invert": edit.strength < -1,
        "set": edit.strength * peak > scores,
        "add": edit.strength > 0,
    }[edit.mode]
    return np.where(np.broadcast_to(more, scores.shape), 1.0, -1.0)
