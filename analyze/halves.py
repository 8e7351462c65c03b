"""Two halves of the images, by prompt, so that what is chosen on one is scored on prompts that it never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from analyze.features import prompt_groups

INNER_SHARE = 0.75


@dataclass(frozen=True)
class Halves:
    """Which image belongs where: `fit` + `check` = the half to choose on, `score` = the other."""

    part: Int[np.ndarray, " image"]
    """0 fit, 1 check (choices that a fit must not see), 2 score"""

    @property
    def choose(self) -> Bool[np.ndarray, " image"]:
        """The half that features are chosen on."""
        return np.asarray(self.part < 2)

    @property
    def score(self) -> Bool[np.ndarray, " image"]:
        """The half that they are scored on."""
        return np.asarray(self.part == 2)


def halves_of(prompts: Sequence[str], seed: int) -> Halves:
    """Halves of the images from a seed; images of one prompt stay together."""
    groups = prompt_groups(prompts)
    count = int(groups.max(initial=-1)) + 1
    order = np.random.default_rng(seed).permutation(count)
    part_of_group = np.full(count, 2)
    half = (count + 1) // 2
    part_of_group[order[:half]] = 1
    part_of_group[order[: int(np.ceil(half * INNER_SHARE))]] = 0
    return Halves(part_of_group[groups])
