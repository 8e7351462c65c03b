"""What the truth table is judged on: images, what they show, and the two halves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from analyze.inputs import Analysis
from analyze.prompts import prompt_texts
from analyze.truth.attributes import ATTRIBUTES, Attribute, Scene, image_labels, read_scenes
from analyze.truth.halves import Halves, halves_of
from analyze.truth.own import read_attributes
from analyze.truth.settings import TruthSettings
from store.errors import UsageError
from store.split import normalise

MIN_IMAGES = 20


@dataclass(frozen=True)
class Judges:
    """The images that the table is judged on, and what they show."""

    attributes: tuple[Attribute, ...]
    images: Int[np.ndarray, " row"]
    """ascending"""
    shown: Bool[np.ndarray, "row attribute"]
    defined: Bool[np.ndarray, "row attribute"]
    """whether it is known of the image"""
    halves: Halves
    left_out: int
    """Images that do not show what their prompt says, or have no picture"""
    scenes: tuple[Scene, ...] | None
    """what is where in the pictures; None for a user's own truth, which is about whole images"""

    def populations(self) -> list[tuple[Int[np.ndarray, " label"], Bool[np.ndarray, " row"]]]:
        """Attributes that are known of the same images, with those images."""
        patterns, which = np.unique(self.defined, axis=1, return_inverse=True)
        return [(np.flatnonzero(which.ravel() == number), patterns[:, number]) for number in range(patterns.shape[1])]


def choose_judges(analysis: Analysis, settings: TruthSettings) -> Judges:
    """The images to judge on; `UsageError` when there are too few to say anything."""
    return _own_judges(analysis, settings) if settings.attributes is not None else _shape_judges(analysis, settings)


def _shape_judges(analysis: Analysis, settings: TruthSettings) -> Judges:
    scenes = read_scenes(analysis.store)
    split = analysis.store.prompts()["split"].to_pylist()
    held_out = [scene for scene in scenes if settings.images == "all" or split[scene.image] == "val"]
    usable = [scene for scene in held_out if scene.drawn or settings.any_picture]
    if len(usable) < MIN_IMAGES:
        raise UsageError(_too_few(len(usable), held_out, settings))
    halves = halves_of([scene.said for scene in usable], settings.seed)
    shown, defined = image_labels(usable)
    images = np.asarray([scene.image for scene in usable], np.int64)
    return Judges(ATTRIBUTES, images, shown, defined, halves, len(held_out) - len(usable), tuple(usable))


def _own_judges(analysis: Analysis, settings: TruthSettings) -> Judges:
    assert settings.attributes is not None
    store = analysis.store
    attributes, shown, known = read_attributes(settings.attributes, store.n_images)
    split = np.asarray(store.prompts()["split"].to_pylist())
    told = known.any(axis=1)
    images = np.flatnonzero(told & ((split == "val") | (settings.images == "all")))
    if len(images) < MIN_IMAGES:
        which = "images of held-out prompts (split val)" if settings.images == "val" else "images"
        hint = "; use all of them with --images all" if settings.images == "val" and told.sum() >= MIN_IMAGES else ""
        raise UsageError(
            f"the truth table needs at least {MIN_IMAGES} {which} that {settings.attributes} says something about; it says "
            f"something about {len(images)}{hint}"
        )
    prompts = prompt_texts(store)
    halves = halves_of([normalise(prompts[image]) for image in images], settings.seed)
    return Judges(attributes, images, shown[images], known[images], halves, 0, None)


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
