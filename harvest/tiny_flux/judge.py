"""What a picture shows, read without any model: the judge that `tiny-flux` answers to.

1. The background is the family of shades nearest to the border's median; a plane fitted to it takes away the soft light.
2. What differs from it falls apart into connected pieces, each cut out again at half its own contrast.
3. Every piece gets the template (shape, radius, centre) of the renderer with the best overlap.
4. `judge` compares that reading with what the scene says, attribute by attribute.

It never sees the prompt while it reads, so it cannot be kind.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harvest.tiny_flux.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    OFFSETS,
    PIXELS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Masks,
    Picture,
    Scene,
    coverage,
    shade_range,
    shaded,
)

Floats = NDArray[np.float64]

CONTRAST = 30.0
"""RGB distance from the background that makes a pixel part of something; the nearest legal pair is 45 away."""
SMALLEST = 12
"""Pieces of fewer pixels are specks, not objects; the smallest legal object, a small cross, covers 45 or more."""
OVERLAP = 0.7
"""A piece is an object when its best template reaches this intersection over union."""


def _family(name: str, background: bool) -> Floats:
    low, high = shade_range(name, background)
    colour = BACKGROUNDS[name] if background else COLOURS[name]
    return np.stack([shaded(colour, factor) for factor in np.linspace(low, high, 9)])


_BACKGROUNDS = {name: _family(name, True) for name in BACKGROUNDS}
_COLOURS = {name: _family(name, False) for name in COLOURS}
_AT: Floats = np.arange(PIXELS, dtype=np.float64) * 2 + 1
"""Pixel centres in canvas units."""
_RING = np.ones((PIXELS, PIXELS), bool)
_RING[2:-2, 2:-2] = False


@dataclass(frozen=True)
class Seen:
    """One object as the picture shows it; centre and radius in canvas units (128 a side)."""

    shape: str | None
    colour: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    overlap: float
    mask: Masks


@dataclass(frozen=True)
class Reading:
    """What a picture shows, said without knowing its prompt."""

    background: str
    objects: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what a scene says, per attribute; objects are matched to the scene's in its order.

    `masks` (object of the scene, 64, 64) are what the picture really shows; all false where an object is missing.
    """

    background: bool
    count: bool
    shape: bool
    colour: bool
    size: bool
    position: bool
    masks: Masks

    @property
    def right(self) -> bool:
        """Everything right."""
        return self.background and self.count and self.shape and self.colour and self.size and self.position


ATTRIBUTES = ("background", "count", "shape", "colour", "size", "position")


def _nearest(colour: Floats, families: dict[str, Floats]) -> str:
    return min(families, key=lambda name: float(((families[name] - colour) ** 2).sum(1).min()))


def _plane(picture: Floats) -> Floats:
    """The background everywhere: a plane through the pixels near the border's median, refitted once."""
    x = (_AT - CANVAS / 2) / (CANVAS / 2)
    design = np.stack([np.ones((PIXELS, PIXELS)), *np.meshgrid(x, x)], axis=-1)
    plane = np.broadcast_to(np.median(picture[_RING], axis=0), picture.shape)
    for tolerance in (45.0, CONTRAST):
        near = ((picture - plane) ** 2).sum(-1) < tolerance**2
        if near.sum() < 200:
            break
        weights, *_ = np.linalg.lstsq(design[near], picture[near], rcond=None)
        plane = design @ weights
    return plane


def _pieces(mask: Masks) -> list[Masks]:
    """The 4-connected pieces of a mask that are no specks, by union of runs."""
    labels = np.zeros(mask.shape, np.int32)
    parent = [0]

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    padded = np.zeros((PIXELS, PIXELS + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.diff(padded, axis=1)
    for row in np.flatnonzero(mask.any(1)).tolist():
        starts, ends = np.flatnonzero(edges[row] == 1).tolist(), np.flatnonzero(edges[row] == -1).tolist()
        for start, end in zip(starts, ends, strict=True):
            above = {root(i) for i in set(labels[row - 1, start:end].tolist()) - {0}} if row else set()
            label = min(above, default=len(parent))
            if not above:
                parent.append(label)
            for other in above:
                parent[other] = label
            labels[row, start:end] = label
    joined = np.array([root(i) for i in range(len(parent))])[labels]
    found = [joined == i for i in set(joined[mask].tolist())]
    return [piece for piece in found if piece.sum() >= SMALLEST]


def _cut(piece: Masks, picture: Floats, plane: Floats) -> tuple[Masks, Floats]:
    """The piece cut out again at half its contrast, and its colour (the median of its most contrasting half)."""
    away = ((picture - plane) ** 2).sum(-1)
    core = piece & (away >= np.median(away[piece]))
    colour = np.median(picture[core], axis=0)
    direction = colour - np.median(plane[core], axis=0)
    share = ((picture - plane) @ direction) / max(float(direction @ direction), 1.0)
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    box = np.zeros_like(piece)
    box[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2] = True
    return (share >= 0.5) & box, colour


def _template(shape: str, radius: float, x: float, y: float) -> Masks:
    return coverage(shape, radius, _AT[None, :] - x, _AT[:, None] - y)


def _overlap(a: Masks, b: Masks) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _fit(mask: Masks) -> tuple[float, str, float, float, float]:
    """(overlap, shape, radius, x, y) of the best template: all shapes at the box's centre, then the best two refined."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = 2.0 * rows[0], 2.0 * rows[-1] + 2, 2.0 * columns[0], 2.0 * columns[-1] + 2
    x, y, half = (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4
    tries = []
    for shape in SHAPES:
        radius = half / {"square": 0.92, "triangle": 0.9625}.get(shape, 1.0)
        down = y + 0.075 * radius if shape == "triangle" else y
        tries.append((_overlap(mask, _template(shape, radius, x, down)), shape, radius, x, down))
    tries.sort(reverse=True)
    best = tries[0]
    for _, shape, radius, x, y in tries[:2]:
        for r in (radius - 1.2, radius, radius + 1.2):
            for dx, dy in ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)):
                overlap = _overlap(mask, _template(shape, r, x + dx, y + dy))
                best = max(best, (overlap, shape, r, x + dx, y + dy))
    return best


def read(picture: Picture) -> Reading:
    """What the picture (64, 64, 3) uint8 shows; about 4 ms."""
    pixels = picture.astype(np.float64)
    plane = _plane(pixels)
    seen = []
    for piece in _pieces(((pixels - plane) ** 2).sum(-1) > CONTRAST**2):
        mask, colour = _cut(piece, pixels, plane)
        if mask.sum() < SMALLEST:
            continue
        overlap, shape, radius, x, y = _fit(mask)
        size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
        dx, dy = ((v - CANVAS / 2) / OFFSETS[size] for v in (x, y))
        position = min(POSITIONS, key=lambda name: (POSITIONS[name][0] - dx) ** 2 + (POSITIONS[name][1] - dy) ** 2)
        fitted = _template(shape, radius, x, y)
        named = shape if overlap >= OVERLAP else None
        seen.append(Seen(named, _nearest(colour, _COLOURS), size, position, x, y, radius, overlap, fitted))
    return Reading(_nearest(np.median(plane[_RING], axis=0), _BACKGROUNDS), tuple(seen))


def judge(picture: Picture, scene: Scene) -> Verdict:
    """The verdict on a picture of a scene; two objects are told apart along the axis of their relation."""
    reading = read(picture)
    objects, placed = list(reading.objects), True
    if scene.relation is not None:
        dx, dy = RELATIONS[scene.relation]
        objects.sort(key=lambda one: -(one.x * dx + one.y * dy))
        if len(objects) == 2:
            across = (objects[0].x - objects[1].x, objects[0].y - objects[1].y)
            along = across[0] * dx + across[1] * dy
            placed = bool(along > 2 * abs(across[0] * dy + across[1] * dx))
    pairs = list(zip(scene.objects, objects, strict=False))
    masks = np.zeros((len(scene.objects), PIXELS, PIXELS), bool)
    for i, (_, one) in enumerate(pairs):
        masks[i] = one.mask
    matched = len(objects) == len(scene.objects)
    single = scene.relation is None
    return Verdict(
        background=reading.background == scene.background,
        count=matched,
        shape=matched and all(said.shape == one.shape for said, one in pairs),
        colour=matched and all(said.colour == one.colour for said, one in pairs),
        size=matched and (not single or all(said.size == one.size for said, one in pairs)),
        position=matched and (placed if not single else all(said.position == one.position for said, one in pairs)),
        masks=masks,
    )
