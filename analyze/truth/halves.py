"""Two halves of the images, by scene, so that what is chosen on one is scored on scenes that it never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

INNER_SHARE = 0.5


@dataclass(frozen=True)
class Halves:
    """Which image belongs where: two quarters make the half to choose on, the rest is the half to score on."""

    part: Int[np.ndarray, " image"]
    """0 and 1: to choose on, each for checking what was fitted on the other; 2: to score on"""

    @property
    def choose(self) -> Bool[np.ndarray, " image"]:
        """The half that features are chosen on."""
        return np.asarray(self.part < 2)

    @property
    def score(self) -> Bool[np.ndarray, " image"]:
        """The half that they are scored on."""
        return np.asarray(self.part == 2)


def halves_of(scenes: Sequence[str], seed: int) -> Halves:
    """Halves of the images from a seed; images of one scene, whatever its wording, stay together."""
    numbers: dict[str, int] = {}
    groups = np.asarray([numbers.setdefault(scene, len(numbers)) for scene in scenes], np.int64)
    count = int(groups.max(initial=-1)) + 1
    order = np.random.default_rng(seed).permutation(count)
    part_of_group = np.full(count, 2)
    half = (count + 1) // 2
    part_of_group[order[:half]] = 1
    part_of_group[order[: int(np.ceil(half * INNER_SHARE))]] = 0
    return Halves(part_of_group[groups])
