"""The attributes that prompts of `builtin:shapes` ask for, and which images and tokens show them.

28 attributes in four groups.  Over images: an image shows a value when any of its objects has it; positions are defined for
scenes of one object.  Over tokens there are three populations, so that each attribute is told from its own kind:

    object      tokens of which one object covers at least half: its colour and its shape against those of other objects
    placed      the same in scenes of one object: tokens of an object in that place against those in other places
    background  tokens that no object touches, a few of each image: this background against the others
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from store import Store
from store.card import has_prompts
from store.errors import ForeignError, UsageError

Group = Literal["colour", "shape", "position", "background"]
Population = Literal["object", "placed", "background"]
SHAPES = "builtin:shapes"
"""the source whose prompts say what is in the picture"""

VALUES: dict[Group, tuple[str, ...]] = {
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple", "pink", "white"),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "position": (
        "centre", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right",
    ),
    "background": ("light grey", "white", "black", "blue", "yellow", "green"),
}  # fmt: skip
POPULATIONS: dict[Group, Population] = {
    "colour": "object",
    "shape": "object",
    "position": "placed",
    "background": "background",
}
COVERED = 0.5
BACKGROUND_TOKENS = 8


@dataclass(frozen=True, order=True)
class Attribute:
    """One value of one group, such as colour red; groups beyond the four are those of a user's own truth."""

    group: str
    value: str

    def __str__(self) -> str:
        return f"{self.group} {self.value}"


ATTRIBUTES: tuple[Attribute, ...] = tuple(
    Attribute(group, value) for group, values in VALUES.items() for value in values
)


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its attributes, and the share of each image token that it covers."""

    colour: str
    shape: str
    position: str | None
    coverage: Float[np.ndarray, " token"]


@dataclass(frozen=True)
class Scene:
    """What one picture shows, as far as its prompt and the fitted masks say."""

    image: int
    background: str
    drawn: bool | None
    things: tuple[Thing, ...]
    said: str
    """what was asked for, the same for every wording of it"""

    def shows(self, attribute: Attribute) -> bool | None:
        """Whether the attribute is there; None where it is not defined (positions in scenes of two objects)."""
        match attribute.group:
            case "background":
                return self.background == attribute.value
            case "position":
                return self.things[0].position == attribute.value if len(self.things) == 1 else None
            case "colour":
                return any(thing.colour == attribute.value for thing in self.things)
            case "shape":
                return any(thing.shape == attribute.value for thing in self.things)
            case _:
                return None


def why_unknown(store: Store) -> str:
    """Why a store without the column `truth` has none: another source of prompts, or pictures of another size than the judge reads."""
    meta, only = store.meta, f"stores of --prompts {SHAPES}"
    if meta.prompts.get("source") != SHAPES or not has_prompts(meta):
        return f"what is in the pictures is known only in {only}"
    size = f"{meta.width} wide and {meta.height} high"
    return f"what is in the pictures is known only in {only} at tiny-flux's own size, 64 x 64 pixels; these are {size}"


def read_scenes(store: Store) -> list[Scene]:
    """The scene of every image; `UsageError` for a store without the column `truth`, `ForeignError` for a malformed one."""
    table = store.prompts()
    if "truth" not in table.column_names:
        raise UsageError(
            f"this store does not know what its pictures show: {why_unknown(store)}; or give a truth of your own: --attributes FILE.csv"
        )
    rows, columns = store.meta.grid
    return [_scene(image, text, rows * columns) for image, text in enumerate(table["truth"].to_pylist())]


def _scene(image: int, text: str, n_tokens: int) -> Scene:
    try:
        found: dict[str, Any] = json.loads(text)
        things = tuple(
            Thing(thing["colour"], thing["shape"], thing["position"], np.asarray(thing["coverage"], np.float32))
            for thing in found["objects"]
        )
        objects = [{key: value for key, value in thing.items() if key != "coverage"} for thing in found["objects"]]
        said = json.dumps([found["background"], found.get("relation"), objects], sort_keys=True)
        scene = Scene(image, found["background"], found["drawn"], things, said)
    except (TypeError, KeyError, ValueError) as error:
        raise ForeignError(f"the truth of image {image} is malformed ({error!r}): harvest the store again") from None
    for thing in things:
        if thing.coverage.shape != (n_tokens,):
            raise ForeignError(
                f"the truth of image {image} covers {len(thing.coverage)} tokens, its picture has {n_tokens}: harvest the store again"
            )
    return scene


def image_labels(
    scenes: Sequence[Scene],
) -> tuple[Bool[np.ndarray, "image attribute"], Bool[np.ndarray, "image attribute"]]:
    """For every image and attribute: whether it is shown, and whether it is defined."""
    shown = [[scene.shows(attribute) for attribute in ATTRIBUTES] for scene in scenes]
    defined = np.asarray([[value is not None for value in row] for row in shown], bool).reshape(-1, len(ATTRIBUTES))
    return np.asarray([[bool(value) for value in row] for row in shown], bool).reshape(-1, len(ATTRIBUTES)), defined


@dataclass(frozen=True)
class TokenLabels:
    """Labelled image tokens, rows sorted by image."""

    scene: Int[np.ndarray, " row"]
    """index into the scenes that were asked about"""
    token: Int[np.ndarray, " row"]
    """position in the stream: that of the image, unless it was moved"""
    shown: Bool[np.ndarray, "row attribute"]
    population: dict[Population, Bool[np.ndarray, " row"]]
    """which rows belong to it; `placed` lies within `object`"""

    def keep(self, rows: Bool[np.ndarray, " row"]) -> "TokenLabels":
        """Only the given rows."""
        population = {name: member[rows] for name, member in self.population.items()}
        return TokenLabels(self.scene[rows], self.token[rows], self.shown[rows], population)

    def moved(self, by: int) -> "TokenLabels":
        """The same tokens in a joint sequence, where `by` text tokens come before them."""
        return replace(self, token=self.token + by)


def token_labels(scenes: Sequence[Scene], seed: int) -> TokenLabels:
    """Every object token of the scenes, and up to 8 untouched tokens of each, drawn by a seed of their own image."""
    scene_index: list[int] = []
    tokens: list[int] = []
    shown: list[list[bool]] = []
    kinds: list[tuple[bool, bool, bool]] = []
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            labels = [_thing_shows(thing, attribute) for attribute in ATTRIBUTES]
            for token in np.flatnonzero(thing.coverage >= COVERED):
                scene_index.append(index)
                tokens.append(int(token))
                shown.append(labels)
                kinds.append((True, len(scene.things) == 1, False))
        labels = [attribute == Attribute("background", scene.background) for attribute in ATTRIBUTES]
        for token in _untouched(scene, seed):
            scene_index.append(index)
            tokens.append(int(token))
            shown.append(labels)
            kinds.append((False, False, True))
    member = np.asarray(kinds, bool).reshape(-1, 3)
    return TokenLabels(
        np.asarray(scene_index, np.int64),
        np.asarray(tokens, np.int64),
        np.asarray(shown, bool).reshape(-1, len(ATTRIBUTES)),
        {"object": member[:, 0], "placed": member[:, 1], "background": member[:, 2]},
    )


def _thing_shows(thing: Thing, attribute: Attribute) -> bool:
    return attribute.value == {"colour": thing.colour, "shape": thing.shape, "position": thing.position}.get(
        attribute.group
    )


def _untouched(scene: Scene, seed: int) -> Int[np.ndarray, " token"]:
    touched = np.sum([thing.coverage for thing in scene.things], axis=0)
    free = np.flatnonzero(touched <= 0)
    draw = np.random.default_rng((seed, scene.image)).permutation(len(free))[:BACKGROUND_TOKENS]
    return np.sort(free[draw])
