"""What a scan says about every feature of a dictionary, and the best of them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from analyze.inputs import Subject


@dataclass(frozen=True)
class Figures:
    """One figure a feature in every array."""

    score: Float[np.ndarray, " feature"]
    """higher is better; NaN or -inf: not to be listed"""
    step: Int[np.ndarray, " feature"]
    """where to look for it"""
    image: Int[np.ndarray, " feature"]
    token: Int[np.ndarray, " feature"] | None
    """None: to be looked up in the score matrix"""
    columns: dict[str, np.ndarray]
    """the other columns of the table, in their order"""

    def __len__(self) -> int:
        return len(self.score)

    def take(self, features: Int[np.ndarray, " chosen"]) -> "Figures":
        """Those of some features."""
        token = None if self.token is None else self.token[features]
        columns = {name: values[features] for name, values in self.columns.items()}
        return Figures(self.score[features], self.step[features], self.image[features], token, columns)


def joined(blocks: list[Figures]) -> Figures:
    """The figures of consecutive blocks of features as one."""
    first = blocks[0]
    token = None if first.token is None else np.concatenate([b.token for b in blocks if b.token is not None])
    columns = {name: np.concatenate([b.columns[name] for b in blocks]) for name in first.columns}
    score, step, image = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("score", "step", "image"))
    return Figures(score, step, image, token, columns)


@dataclass(frozen=True)
class Find:
    """One feature that a scan lists."""

    subject: Subject
    feature: int
    score: float
    step: int
    image: int
    token: int | None
    columns: dict[str, float | int | str | None]


def best_finds(subject: Subject, figures: list[Figures], best: int, every_step: bool) -> list[Find]:
    """The best features of one dictionary, from the figures of its steps; a feature once, at its best step, unless `every_step`.

    Ties go to the earlier step, then to the lower feature.
    """
    scores = np.stack([np.where(np.isnan(f.score), -np.inf, f.score) for f in figures])
    if not every_step:
        step = np.argmax(scores, axis=0)
        scores = np.where(np.arange(len(figures))[:, None] == step, scores, -np.inf)
    flat = scores.ravel()
    there = np.flatnonzero(flat > -np.inf)
    chosen = there[np.argsort(-flat[there], kind="stable")][:best]
    places = [divmod(int(place), scores.shape[1]) for place in chosen]
    return [_find(subject, figures[place].take(np.asarray([feature])), feature) for place, feature in places]


def _find(subject: Subject, one: Figures, feature: int) -> Find:
    columns = {name: values[0].item() for name, values in one.columns.items()}
    token = None if one.token is None else int(one.token[0])
    return Find(subject, feature, float(one.score[0]), int(one.step[0]), int(one.image[0]), token, columns)


def merged(finds: list[Find], best: int) -> list[Find]:
    """The best of all dictionaries; ties go to the dictionary that came first, then step and feature as they came."""
    return sorted(finds, key=lambda find: -find.score)[:best]
