"""Regions of the picture as sets of image tokens: a rectangle in tokens or shares, or a mask of any size."""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, UnidentifiedImageError

from store.errors import UsageError

NAMED = {
    "centre": "0.25-0.75:0.25-0.75", "top": "0.0-0.5:0.0-1.0", "bottom": "0.5-1.0:0.0-1.0",
    "left": "0.0-1.0:0.0-0.5", "right": "0.0-1.0:0.5-1.0",
}  # fmt: skip
"""Regions that have a name, in shares of the picture"""
BRIGHT = 127 / 255
"""a pixel of a mask is inside above this share of full brightness"""
RANGES = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "I": 65535}
"""full brightness by mode, where it is not 255; 16-bit PNGs may be read as 32-bit integers"""
ASPECT = 0.05
"""a mask whose sides differ in proportion from the picture's by more than this share is stretched visibly"""


def rectangle(text: str, grid: tuple[int, int]) -> Float[np.ndarray, " token"]:
    """How much of every token of the grid (rows, columns) `3-6:1-4`, `0.25-0.75:0.0-0.5` or a name covers, row by row.

    Rows and columns of tokens count from 1, and their ranges include the last one; ranges of shares run from edge to edge.
    `UsageError` for anything else.
    """
    parts = NAMED.get(text.strip(), text).split(":")
    if len(parts) != 2:
        raise UsageError(
            f"--region {text!r} is no region: write rows:columns, 3-6:1-4 in tokens, 0.25-0.75:0.0-0.5 in shares of the picture, "
            f"or {', '.join(NAMED)}"
        )
    shares = "." in text or text.strip() in NAMED
    sides = [_side(part, size, shares, text) for part, size in zip(parts, grid, strict=True)]
    return np.asarray(np.outer(*sides).ravel())


def _side(part: str, size: int, shares: bool, text: str) -> Float[np.ndarray, " place"]:
    """The covered share of each of `size` places along one side."""
    number = r"(\d*\.?\d+)" if shares else r"(\d+)"
    match = re.fullmatch(rf"\s*{number}(?:-{number})?\s*", part)
    if match is None or (shares and match[2] is None):
        kind = "shares of the picture such as 0.25-0.75" if shares else "tokens such as 2-5 or 3"
        raise UsageError(f"{part!r} in --region {text!r} is no range of {kind}")
    low = float(match[1]) * size if shares else float(match[1]) - 1
    high = float(match[2]) * size if shares else float(match[2] or match[1])
    if high <= low:
        raise UsageError(f"{part!r} in --region {text!r} is empty: its end must lie beyond its beginning")
    if low < 0 or high > size * (1 + 1e-9):
        what = "0.0 to 1.0" if shares else f"tokens 1 to {size}"
        raise UsageError(f"{part!r} in --region {text!r} leaves the picture, which has {what} there")
    edges = np.arange(size + 1)
    return np.asarray(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1))


def mask_cover(path: Path, grid: tuple[int, int]) -> Float[np.ndarray, " token"]:
    """How much of every token the bright pixels of a mask cover, whatever its size; transparent pixels are dark.

    `UsageError` when it is no picture, or none that has a bright half.
    """
    try:
        with Image.open(path) as picture:
            inside = (_brightness(picture, path) > BRIGHT).astype(np.float64)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"--mask {path} cannot be read as a picture: {error}") from None
    rows, columns = (_share(size, cells) for size, cells in zip(inside.shape, grid, strict=True))
    return np.asarray((rows @ inside @ columns.T).ravel())


def _brightness(picture: Image.Image, path: Path) -> Float[np.ndarray, "row column"]:
    """Brightness as a share of what the mode can hold, times opacity."""
    if picture.mode == "F":
        raise UsageError(
            f"--mask {path} has pixels of 32-bit floats, which have no full brightness: save it as 0 and 255"
        )
    full = RANGES.get(picture.mode, 255)
    values = np.asarray(picture if picture.mode in RANGES else picture.convert("L"), np.float64)
    highest = values.max(initial=0)
    if 0 < highest <= BRIGHT * full:
        raise UsageError(f"--mask {path}: its brightest pixel is {highest:g} of {full}: save it as 0 and {full}")
    opaque = (
        np.asarray(picture.convert("RGBA"), np.float64)[..., 3] / 255
        if full == 255 and picture.has_transparency_data
        else 1.0
    )
    return np.asarray(values / full * opaque)


def stretched(path: Path, grid: tuple[int, int]) -> str | None:
    """That a mask has other proportions than the picture, which its tokens fill as squares; None when it has the same."""
    with Image.open(path) as picture:
        width, height = picture.size
    if abs(np.log(width * grid[0] / (height * grid[1]))) <= ASPECT:
        return None
    return f"the mask of {width} x {height} pixels is stretched over the picture, which is {grid[1]} : {grid[0]} wide to high"


def _share(pixels: int, cells: int) -> Float[np.ndarray, "cell pixel"]:
    """The share of each cell that each pixel makes up along one side; every row sums to 1."""
    pixel, cell = np.arange(pixels + 1) * cells, np.arange(cells + 1) * pixels  # both in 1 / (pixels * cells)
    overlap = np.minimum(pixel[None, 1:], cell[1:, None]) - np.maximum(pixel[None, :-1], cell[:-1, None])
    return np.asarray(np.clip(overlap, 0, None) / pixels, np.float64)


def inside_of(cover: Float[np.ndarray, " token"], covered: float, what: str) -> Bool[np.ndarray, " token"]:
    """Which tokens lie inside; `UsageError` when none or all do, for then there is nothing to compare."""
    inside = cover >= covered - 1e-9
    if not inside.any():
        raise UsageError(
            f"{what} covers no token by {covered:g} or more (the most is {cover.max():.2f}): make it larger, "
            "or lower --covered"
        )
    return inside
