"""The world that `tiny-flux` draws: coloured shapes whose every attribute is known.

A `Scene` is what a caption says; `render` draws one picture of it and the mask of each object.  What a caption leaves
open (exact place, radius, shade of each colour, a soft light across the background) is drawn from a random generator,
so that two seeds of one prompt have something to differ in.

Lengths are in units of a 128 x 128 canvas; pictures are that canvas halved to 64 x 64 pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from store.errors import UsageError
from store.split import split_of

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "yellow": (250, 212, 40),
    "green": (48, 160, 70),
    "cyan": (40, 200, 220),
    "blue": (40, 80, 215),
    "purple": (130, 60, 185),
    "pink": (245, 130, 180),
    "white": (250, 250, 250),
}
UNNAMED = "light grey"
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    UNNAMED: (188, 188, 192),
    "white": COLOURS["white"],
    "black": (22, 22, 26),
    "blue": COLOURS["blue"],
    "yellow": COLOURS["yellow"],
    "green": COLOURS["green"],
}
SIZES: dict[str, float] = {"small": 22.0, "medium": 30.0, "large": 39.0}
POSITIONS: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
OFFSETS: dict[str, float] = {"small": 35.0, "medium": 29.0, "large": 21.0}
"""How far from the middle a named position lies: further for smaller objects, so that all stay inside."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PAIR_RADIUS, PAIR_OFFSET = 24.0, 32.0
"""Radius and distance from the middle of each of two objects."""
HELD_OUT_PAIRS = frozenset(
    {("circle", "purple"), ("square", "cyan"), ("triangle", "pink"), ("cross", "yellow"), ("ring", "green")}
)
"""(shape, colour) pairs that no training picture shows and no training caption names: they test composition."""

CANVAS, PIXELS, TOKEN = 128, 64, 8
SplitName = Literal["all", "train", "val"]
Picture = NDArray[np.uint8]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Object:
    """One object; `position` is a key of POSITIONS, or None where the scene's relation places it."""

    shape: str
    colour: str
    size: str = "medium"
    position: str | None = "centre"


@dataclass(frozen=True)
class Scene:
    """What a caption says: `relation` is None for one object, else where the first stands as seen from the second."""

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Jitter:
    """How far a picture may depart from the nominal one, all uniform."""

    place: float = 5.0
    """Centre, in canvas units along each axis: 5 of 128 is 2.5 pixels."""
    radius: float = 2.0
    """Radius, in canvas units (1.5 of it where there are two objects)."""
    shade: float = 1.0
    """Share of the range of shades (`shade_range`) that a background or an object may take."""
    light: float = 0.06
    """A linear gradient over the background: brightness changes by up to this share to either side."""


WIDE = Jitter()


def shade_range(name: str, background: bool) -> tuple[float, float]:
    """(darkest, lightest) factors: below 1 towards black, above 1 towards white by the excess over 1.

    Chosen so that no two families come nearer than the judge can tell: white stays lighter than light grey.
    """
    if name == "white":
        return 0.92, 1.0
    if name == UNNAMED:
        return 0.78, 1.04
    if name == "black":
        return 1.0, 1.2
    return (0.72, 1.18) if background else (0.84, 1.1)


def shaded(colour: tuple[int, int, int], factor: float) -> NDArray[np.float64]:
    """A colour made darker (factor < 1) or lighter (factor > 1)."""
    base = np.asarray(colour, np.float64)
    return base * factor if factor <= 1 else base + (255 - base) * (factor - 1)


def coverage(shape: str, radius: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points (x, y), given from the object's centre, lie inside the shape; arrays broadcast."""
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "ring":
        square = x * x + y * y
        return (square <= radius * radius) & (square >= (0.55 * radius) ** 2)
    if shape == "square":
        return (np.abs(x) <= 0.92 * radius) & (np.abs(y) <= 0.92 * radius)
    if shape == "triangle":
        return (y <= 0.85 * radius) & (y >= 2 * 0.925 * np.abs(x) - radius)
    arm = 0.32 * radius
    inside = (np.abs(x) <= radius) & (np.abs(y) <= radius)
    return inside & ((np.abs(x) <= arm) | (np.abs(y) <= arm))


_GRID = np.arange(CANVAS, dtype=np.float64) + 0.5
_ACROSS = (np.arange(PIXELS) + 0.5) / (PIXELS / 2) - 1


def places(scene: Scene) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each object in canvas units, without jitter."""
    middle = CANVAS / 2
    if scene.relation is None:
        (one,) = scene.objects
        dx, dy = POSITIONS[one.position or "centre"]
        return [(middle + dx * OFFSETS[one.size], middle + dy * OFFSETS[one.size], SIZES[one.size])]
    dx, dy = RELATIONS[scene.relation]
    return [(middle + s * dx * PAIR_OFFSET, middle + s * dy * PAIR_OFFSET, PAIR_RADIUS) for s in (1, -1)]


def _shade(name: str, background: bool, jitter: Jitter, rng: np.random.Generator) -> NDArray[np.float64]:
    low, high = shade_range(name, background)
    factor = 1 + jitter.shade * (rng.uniform(low, high) - 1)
    return shaded((BACKGROUNDS if background else COLOURS)[name], factor)


def render(scene: Scene, rng: np.random.Generator | None = None, jitter: Jitter = WIDE) -> tuple[Picture, Masks]:
    """The picture (64, 64, 3) uint8 and the mask of each object (object, 64, 64); nominal when `rng` is None."""
    back = np.asarray(BACKGROUNDS[scene.background], np.float64)
    tilt = np.zeros((PIXELS, PIXELS, 1))
    if rng is not None:
        back = _shade(scene.background, True, jitter, rng)
        slope = rng.uniform(-jitter.light, jitter.light, size=2)
        tilt = (slope[0] * _ACROSS[None, :] + slope[1] * _ACROSS[:, None])[..., None]
    picture = back * (1 + tilt) + 40 * tilt
    masks = []
    for one, (x, y, radius) in zip(scene.objects, places(scene), strict=True):
        colour = np.asarray(COLOURS[one.colour], np.float64)
        if rng is not None:
            radius += (1.0 if scene.relation is None else 0.75) * rng.uniform(-jitter.radius, jitter.radius)
            x, y = np.clip(np.add((x, y), rng.uniform(-jitter.place, jitter.place, size=2)), radius + 2, 126 - radius)
            colour = _shade(one.colour, False, jitter, rng)
        inside = coverage(one.shape, radius, _GRID[None, :] - x, _GRID[:, None] - y)
        share = inside.reshape(PIXELS, 2, PIXELS, 2).mean(axis=(1, 3))
        picture += share[..., None] * (colour - picture)
        masks.append(share >= 0.5)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), np.stack(masks)


def captions(scene: Scene) -> list[str]:
    """The different wordings of a scene, 3 to 5; no two scenes share one.

    The longest is 15 T5 tokens with its end mark, so that `max_sequence_length` 16 holds every caption.
    """
    named = "" if scene.background == UNNAMED else scene.background
    on = f" on a {named} background" if named else ""
    behind = f"a {named} background with " if named else ""
    tail = f", {named} background" if named else ""
    if scene.relation is None:
        (one,) = scene.objects
        size = "" if one.size == "medium" else f"{one.size} "
        said = f"{one.size} "
        thing = f"{one.colour} {one.shape}"
        place = "" if one.position == "centre" else one.position
        at = f" at the {place}" if place else ""
        words = [
            f"a {size}{thing}{at}{on}",
            f"a {size}{thing}{on}" + (f", {place}" if place else ""),
            f"{behind}a {said}{thing}{at}",
            (f"{place}: " if place else "") + f"{size}{thing}{tail}",
            f"picture of a {said}{thing}{at}" + (f" against {named}" if named else ""),
        ]
    else:
        first, second = (f"{one.colour} {one.shape}" for one in scene.objects)
        seen = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
        words = [
            f"a {first} {scene.relation} a {second}{on}",
            f"{behind}a {first} {scene.relation} a {second}",
            f"{first} {scene.relation} {second}{tail}",
            f"a {first} with a {second} {seen[INVERSE[scene.relation]]}{on}",
        ]
    return list(dict.fromkeys(words))


@cache
def scenes(kind: Literal["one", "two"], held_out_pairs: bool = False) -> tuple[Scene, ...]:
    """Every scene of a kind: without held-out (shape, colour) pairs, or with nothing but them."""
    pairs = [p for p in product(SHAPES, COLOURS) if (p in HELD_OUT_PAIRS) == held_out_pairs]
    if kind == "one":
        return tuple(
            Scene(back, (Object(shape, colour, size, place),))
            for back, (shape, colour), size, place in product(BACKGROUNDS, pairs, SIZES, POSITIONS)
            if colour != back
        )
    return tuple(
        Scene(back, (Object(*first, position=None), Object(*second, position=None)), relation)
        for back, first, second, relation in product(BACKGROUNDS, pairs, pairs, RELATIONS)
        if first != second and back not in (first[1], second[1])
    )


WORDINGS = 5


def _listed(
    kind: Literal["one", "two"], held_out_pairs: bool, split: SplitName, seed: int
) -> Iterator[tuple[str, Scene]]:
    world = scenes(kind, held_out_pairs)
    order = np.random.default_rng([seed, kind == "two", held_out_pairs]).permutation(len(world) * WORDINGS)
    for index in order.tolist():
        scene = world[index // WORDINGS]
        words = captions(scene)
        if index % WORDINGS < len(words):
            prompt = words[index % WORDINGS]
            if split == "all" or split_of(prompt) == split:
                yield prompt, scene


@cache
def prompt_count(kind: Literal["one", "two"], split: SplitName = "all", held_out_pairs: bool = False) -> int:
    """How many distinct prompts there are of one kind in a split."""
    return sum(1 for _ in _listed(kind, held_out_pairs, split, 0))


def prompts(
    n: int, seed: int, split: SplitName = "all", two_share: float = 1 / 3, held_out_pairs: bool = False
) -> list[tuple[str, Scene]]:
    """The first `n` of the prompt set `builtin:shapes`: distinct (prompt, scene) pairs, a function of the arguments.

    The first k of n prompts are the same whatever n is.  Every stretch of prompts holds `two_share` of two-object
    scenes.  With `held_out_pairs` every object is of a (shape, colour) pair that no training picture shows, without it
    none is.  Raises UsageError when there are fewer than `n`.
    """
    if not 0 <= two_share <= 1:
        raise UsageError(f"the share of two-object prompts is {two_share}, expected a number from 0 to 1")
    ones, twos = (_listed(kind, held_out_pairs, split, seed) for kind in ("one", "two"))
    found: list[tuple[str, Scene]] = []
    for i in range(n):
        is_two = int((i + 1) * two_share + 1e-9) > int(i * two_share + 1e-9)
        item = next(twos if is_two else ones, None)
        if item is None:
            raise UsageError(
                f"builtin:shapes has {i} prompts in split {split!r} at two_share {two_share:.3g}, but {n} were asked "
                f"for: ask for at most {i}, or repeat prompts under several seeds"
            )
        found.append(item)
    return found


def truth(scene: Scene, masks: Masks | None, drawn: bool | None, token: int = TOKEN) -> dict[str, Any]:
    """What a picture shows, ready for JSON; `coverage` is the share of each token's pixels that belong to the object.

    `masks` (object, 64, 64) are those of the picture that was really drawn; None takes the nominal ones.  `drawn` says
    whether the picture shows what the prompt says, None that no picture was made.  `token` is a token's side in pixels.
    """
    if masks is None:
        masks = render(scene)[1]
    side = masks.shape[-1] // token
    shares = masks.reshape(len(masks), side, token, side, token).mean(axis=(2, 4)).reshape(len(masks), -1)
    return {
        "kind": "one" if scene.relation is None else "two",
        "background": scene.background,
        "relation": scene.relation,
        "drawn": drawn,
        "objects": [
            {
                "shape": one.shape,
                "colour": one.colour,
                "size": one.size,
                "position": one.position,
                "coverage": [round(float(share), 3) for share in row],
            }
            for one, row in zip(scene.objects, shares, strict=True)
        ],
    }
