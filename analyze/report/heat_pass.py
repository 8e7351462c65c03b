"""One pass over a site's activations for the heat of every chosen feature on its top images, packed as it is read."""

from collections.abc import Mapping, Sequence

import numpy as np

from analyze.inputs import Analysis
from analyze.pictures.heat import Heat, each_heat
from analyze.report.chosen import Round
from analyze.report.packing import packed_heat
from analyze.report.spool import Spool
from analyze.truth.attributes import ATTRIBUTES, Attribute, Scene


def stream_tokens(analysis: Analysis, stream: str) -> int:
    """Tokens of a stream: what a packed heat covers."""
    meta = analysis.store.meta
    image, text = meta.grid[0] * meta.grid[1], meta.text_tokens
    return {"img": image, "txt": text, "joint": text + image}[stream]


class HeatInside:
    """Share of a feature's heat that lies where its attribute is, over its top images, weighted by how much of a token is covered.

    For a background that is whatever no object covers; on other images than those with the attribute all heat is outside.
    Where a user's own attributes lie in a picture nobody knows.  Of a joint site only the heat of its image tokens counts.
    """

    def __init__(
        self, scenes: Sequence[Scene] | None, attributes: Mapping[int, Sequence[Attribute]], first: int = 0
    ) -> None:
        """`first` is the position of the first image token: how many text tokens come before it."""
        self._scenes, self._first = scenes, first
        self._attributes = {f: [a for a in group if a in ATTRIBUTES] for f, group in attributes.items()}
        self._sums: dict[tuple[int, Attribute], list[float]] = {}

    def add(self, feature: int, image: int, positions: np.ndarray, values: np.ndarray) -> None:
        """Count the heat of a feature on one image."""
        if self._scenes is None:
            return
        shown = positions >= self._first
        positions, values = positions[shown] - self._first, values[shown]
        for attribute in self._attributes.get(feature, ()):
            sums = self._sums.setdefault((feature, attribute), [0.0, 0.0])
            sums[0] += float((values * covered(self._scenes[image], attribute)[positions]).sum())
            sums[1] += float(values.sum())

    def share(self, feature: int, attribute: Attribute) -> float | None:
        """The share; None where there was no heat."""
        inside, total = self._sums.get((feature, attribute), (0.0, 0.0))
        return inside / total if total > 0 else None


def covered(scene: Scene, attribute: Attribute) -> np.ndarray:
    """How much of each image token shows the attribute, from 0 to 1."""
    share = np.zeros(len(scene.things[0].coverage), np.float32)
    if attribute.group == "background":
        if scene.background == attribute.value:
            share = 1 - np.clip(np.sum([thing.coverage for thing in scene.things], axis=0), 0, 1)
        return np.asarray(share, np.float32)
    for thing in scene.things:
        if getattr(thing, attribute.group) == attribute.value:
            share = np.maximum(share, thing.coverage)
    return share


def spooled(heat: Heat, total: int, first: int) -> str:
    """`PEAK LEVELS` of all tokens; of a joint site (`first` > 0: its text tokens) of the image tokens, then of the text tokens.

    Each kind has levels of its own peak: beside a strong word a weak picture would be rounded to nothing.
    """
    shown = heat.positions >= first
    parts = [packed_heat(heat.values[shown], heat.positions[shown] - first, total - first)]
    if first:
        parts.append(packed_heat(heat.values[~shown], heat.positions[~shown], first))
    return " ".join(f"{peak:.6g} {levels}" for peak, levels in parts)


def spool_heat(analysis: Analysis, this: Round, spool: Spool, inside: HeatInside) -> dict[int, int]:
    """Pack the heat of the round's chosen features into the spool; the spool's row of each feature."""
    rows = {int(feature): row for row, feature in enumerate(this.heated)}
    total = stream_tokens(analysis, this.subject.site.stream)
    first = analysis.store.meta.text_tokens if this.subject.site.stream == "joint" else 0
    images = {feature: [int(i) for i in this.columns.images[feature] if i >= 0] for feature in rows}
    column = {(feature, image): place for feature, group in images.items() for place, image in enumerate(group)}
    for feature, heat in each_heat(analysis, this.subject, this.step, images):
        spool.add(rows[feature], column[feature, heat.image], spooled(heat, total, first))
        inside.add(feature, heat.image, heat.positions, heat.values)
    return rows
