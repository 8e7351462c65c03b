"""What the truth table is judged on: images, what they show, and the two halves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from analyze.inputs import Analysis
from analyze.prompts import prompt_texts
from analyze.truth.attributes import ATTRIBUTES, Attribute, Scene, image_labels, read_scenes
from analyze.truth.halves import Halves, halves_of
from analyze.truth.own import OwnTruth, read_attributes
from analyze.truth.settings import TruthSettings
from store.errors import UsageError
from store.split import normalise

MIN_IMAGES = 20
MIN_GROUPS = 4


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
    own = read_attributes(settings.attributes, store.n_images)
    split = np.asarray(store.prompts()["split"].to_pylist())
    told = own.known.any(axis=1)
    images = np.flatnonzero(told & ((split == "val") | (settings.images == "all")))
    if len(images) < MIN_IMAGES:
        which = "images of held-out prompts (split val)" if settings.images == "val" else "images"
        hint = "; use all of them with --images all" if settings.images == "val" and told.sum() >= MIN_IMAGES else ""
        raise UsageError(
            f"the truth table needs at least {MIN_IMAGES} {which} that {settings.attributes} says something about; it says "
            f"something about {len(images)}{hint}"
        )
    halves = halves_of(_together(analysis, settings, own, images), settings.seed)
    return Judges(own.attributes, images, own.shown[images], own.known[images], halves, 0, None)


def _together(analysis: Analysis, settings: TruthSettings, own: OwnTruth, images: Int[np.ndarray, " row"]) -> list[str]:
    """A text for each image, equal for those that must not stand in different halves: of one prompt, or of one group of the file."""
    store = analysis.store
    prompts = [normalise(text) for text in prompt_texts(store)]
    if own.groups is None:
        if "prompt" not in store.prompts().column_names:
            raise UsageError(
                "the prompts were left out of this store, so that images of one prompt could be chosen on and scored on, and every "
                f"figure be too good: add a column group to {settings.attributes}, equal for images that belong together"
            )
        return [prompts[image] for image in images]
    without = [int(image) for image in images if int(image) not in own.groups]
    if without:
        raise UsageError(
            f"{settings.attributes} has a column group, and it is empty for image {without[0]}: give every image one"
        )
    named = {name: number for number, name in enumerate(dict.fromkeys(own.groups[int(image)] for image in images))}
    said = {text: len(named) + number for number, text in enumerate(dict.fromkeys(prompts[image] for image in images))}
    ends = [named[own.groups[int(image)]] for image in images], [said[prompts[image]] for image in images]
    links = sparse.coo_array((np.ones(len(images)), ends), shape=(len(named) + len(said),) * 2)
    count, part = connected_components(links, directed=False)
    if count < MIN_GROUPS:
        raise UsageError(
            f"the column group of {settings.attributes} leaves too few lots of images ({count}) that belong together, by it or by prompt: "
            f"two halves, one of them in two quarters, need at least {MIN_GROUPS}"
        )
    return [str(part[end]) for end in ends[0]]


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
