"""What a picture of coloured shapes shows, in words: tiny-flux's judge reads it without any model; nothing for other models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from analyze.explore.studio import Studio
from analyze.steering.canvas import TINY_FLUX


def readable(studio: Studio, height: int, width: int) -> bool:
    """Whether the judge can read pictures of this size: those of tiny-flux, in its own."""
    from harvest.tiny_flux.scenes import PIXELS

    return studio.canvas.model_name == TINY_FLUX and (height, width) == (PIXELS, PIXELS)


def readings(studio: Studio, pictures: Sequence[Image.Image]) -> list[str]:
    """A line for each picture, `large white cross, bottom left, on green`; none where it cannot read them."""
    if not all(readable(studio, each.height, each.width) for each in pictures):
        return []
    from harvest.tiny_flux.judge import read

    return [_told(read(np.asarray(picture.convert("RGB")))) for picture in pictures]


def _told(reading: Any) -> str:
    objects = [f"{seen.size} {seen.colour} {seen.shape or 'thing'}, {seen.position}" for seen in reading.objects]
    return f"shows {' and '.join(objects) or 'nothing'}, on {reading.background}"
