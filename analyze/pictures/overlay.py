"""Heat over pictures: where on the token grid a feature is active, drawn over the picture at any resolution and aspect.

1. The scale is shared by the pictures of a feature: 0 is cold, the 99th percentile of its positive heat (or another one) is hot and
   clipped there, so that one token does not darken all others.
2. The grid is enlarged to the picture's size, smoothly (bicubic, no ringing below 0) or token by token.
3. The picture is dimmed to grey where it is cold and the colour map is laid over it where it is hot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from store.errors import UsageError

CLIP_PERCENTILE = 99.0
COLOUR_MAP = "inferno"
COLDEST_SHOWN = 0.35
"""Part of the colour map that is left out at its dark end, where it could not be told from black."""
STRENGTH = 0.85


@dataclass(frozen=True)
class Look:
    """How heat is drawn."""

    patches: bool = False
    """token by token; otherwise smooth"""
    clip_percentile: float = CLIP_PERCENTILE
    """of the positive heat: what is drawn hottest"""


PLAIN = Look()


def heat_scale(heats: Sequence[Float[np.ndarray, "..."]], percentile: float = CLIP_PERCENTILE) -> float:
    """The heat that is drawn hottest: a percentile of the positive heat, 1 where nothing is active, so that nothing divides by zero."""
    positive = np.concatenate([heat[heat > 0].ravel() for heat in heats]) if len(heats) else np.zeros(0)
    return float(np.percentile(positive, percentile)) if len(positive) else 1.0


def token_grid(
    values: Float[np.ndarray, " token"], positions: Int[np.ndarray, " token"], grid: tuple[int, int]
) -> Float[np.ndarray, "row column"]:
    """Heat on the grid of image tokens, row by row; tokens that were not kept are cold."""
    flat = np.zeros(grid[0] * grid[1], np.float32)
    flat[positions] = values
    return flat.reshape(grid)


def enlarged(
    heat: Float[np.ndarray, "row column"], size: tuple[int, int], smooth: bool = True
) -> Float[np.ndarray, "y x"]:
    """The heat at every pixel of a picture of `size` (width, height); the grid covers the picture exactly.

    Not smooth, a pixel has the heat of the token that its middle lies in, whether or not tokens are whole pixels wide.
    """
    if smooth:
        image = Image.fromarray(np.ascontiguousarray(heat, np.float32)).resize(size, Image.Resampling.BICUBIC)
        return np.clip(np.asarray(image, np.float32), 0, None)
    (rows, columns), (width, height) = heat.shape, size
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    column = (2 * np.arange(width) + 1) * columns // (2 * width)
    return heat[np.ix_(row, column)]


def overlay(
    picture: Image.Image, heat: Float[np.ndarray, "row column"], scale: float, smooth: bool = True
) -> Image.Image:
    """The picture with heat over it, RGB in the picture's size; `scale` is the heat that is drawn hottest."""
    if not np.isfinite(heat).all():
        raise UsageError("the heat to be drawn holds a NaN or an infinity")
    strength = np.clip(enlarged(heat, picture.size, smooth) / scale, 0, 1)
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    cold = 0.12 * np.asarray(picture.convert("RGB"), np.float32) + 0.5 * grey
    colours = _colours(strength)
    weight = (STRENGTH * strength**0.7)[..., None]
    return Image.fromarray(np.round(cold * (1 - weight) + colours * weight).astype(np.uint8))


def colour_bar(width: int, height: int) -> Image.Image:
    """All colours of an overlay from cold to hot, over middle grey."""
    grey = Image.new("RGB", (width, height), (128, 128, 128))
    return overlay(grey, np.linspace(0, 1, width, dtype=np.float32)[None], 1.0, smooth=False)


def _colours(strength: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x 3"]:
    table = np.asarray(matplotlib.colormaps[COLOUR_MAP](np.linspace(COLDEST_SHOWN, 1, 256)))[:, :3] * 255
    index: UInt8[np.ndarray, "y x"] = np.round(strength * 255).astype(np.uint8)
    return np.asarray(table[index], np.float32)
