"""Whether a picture still shows what the plain one shows, as tiny-flux's judge reads both."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from analyze.steering.judging import readings, verdicts
from harvest.tiny_flux.judge import Reading
from harvest.tiny_flux.scenes import PIXELS
from store import Store

KEPT = ("kept_colour", "kept_shape", "kept_position", "kept_background")
"""of the columns of `analyze.steering.judging.VERDICTS`"""


def can_judge(store: Store) -> bool:
    """Whether the judge knows the pictures of a store: those of --prompts builtin:shapes, in the size that it reads."""
    return "truth" in store.prompts().column_names and (store.meta.height, store.meta.width) == (PIXELS, PIXELS)


def kept(plain: Sequence[Reading], changed: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """`kept_colour` and so on, a number an image: 1 where the judge reads what it read in the plain picture, else 0."""
    found = verdicts(list(plain), readings(changed))
    return {name: np.asarray(found[name].to_pylist(), np.float64) for name in KEPT}
