"""Which tokens an edit touches: all, some positions, those above a share of the feature's maximum, or those under a mask.

Text forms, as on the command line and in experiment files:

    all              every token of the stream (of txt: padding too)
    3,7-9            positions, 0-based; of images row by row over the token grid
    above:0.5        per feature, image and step: tokens where the feature is active with at least half of its maximum there
    mask:FILE.png    image tokens at least half covered by what is bright (luminance of 128 and more) in a picture of any size
    grid:0110/1111   the same, from rows of 0 and 1, of any size

A mask covers the whole picture and is resampled to the token grid; a token is in where the mean over its area is 1/2 or more.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from store.errors import UsageError
from store.sites import parse_numbers, spans

BRIGHT = 128
COVERED = 0.5
"""least share of a token's area under the mask"""
FURTHEST = 1 << 20
"""beyond any token of any stream: what bounds positions while the stream is not known"""

Grid = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class TokenChoice:
    """Tokens of a stream; at most one of the fields is set, and with none it is every token.  `UsageError` for what chooses nothing."""

    positions: tuple[int, ...] | None = None
    """0-based, ascending or not, each once"""
    above: float | None = None
    """share of the feature's maximum over all tokens of the stream, of that image at that step: 0 < share <= 1"""
    mask: Grid | Path | None = None
    """rows of a grid over the picture, or a picture file; image tokens only"""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.positions, self.above, self.mask)) > 1:
            raise UsageError("choose tokens in one way: by positions, above a share of the maximum, or by a mask")
        if self.positions is not None:
            if not self.positions:
                raise UsageError("no token is chosen: name positions such as 3,7-9, or all")
            if min(self.positions) < 0 or len(set(self.positions)) < len(self.positions):
                raise UsageError(f"tokens {list(self.positions)} must be 0 or more, each once")
        if self.above is not None and not 0 < self.above <= 1:  # NaN is neither
            raise UsageError(f"tokens above:{self.above:g}: the share of the maximum must lie above 0 and be at most 1")
        if isinstance(self.mask, tuple):
            if not self.mask or len({len(row) for row in self.mask}) != 1 or not self.mask[0]:
                raise UsageError("the mask's rows must be of one length, and at least one token wide")
            if not any(map(any, self.mask)):
                raise UsageError("the mask covers nothing: there is no token to change")

    @classmethod
    def of_mask(cls, mask: "Sequence[Sequence[bool]] | np.ndarray") -> "TokenChoice":
        """The image tokens under a grid of booleans, such as an array (row, column)."""
        return cls(mask=tuple(tuple(bool(value) for value in row) for row in mask))

    @classmethod
    def parse(cls, text: str) -> "TokenChoice":
        """What the text form says; `UsageError` names the forms."""
        text = text.strip()
        word, colon, value = text.partition(":")
        if text == "all":
            return ALL
        if word == "above" and colon:
            try:
                return cls(above=float(value))
            except ValueError as error:
                if isinstance(error, UsageError):
                    raise
        elif word == "mask" and value.strip():
            return cls(mask=Path(value.strip()))
        elif word == "grid" and re.fullmatch(r"[01]+(/[01]+)*", value):
            return cls(mask=tuple(tuple(letter == "1" for letter in row) for row in value.split("/")))
        elif re.fullmatch(r"[\d,\-\s]+", text):
            return cls(positions=parse_numbers(text, FURTHEST, "token"))
        raise UsageError(
            f"{text!r} chooses no tokens: write all, positions such as 3,7-9, above:0.5, mask:FILE.png or grid:0110/1111"
        )

    def __str__(self) -> str:
        """The text form."""
        if self.positions is not None:
            return spans(sorted(self.positions))
        if self.above is not None:
            return f"above:{self.above!r}"
        if isinstance(self.mask, tuple):
            return "grid:" + "/".join("".join("01"[value] for value in row) for row in self.mask)
        return "all" if self.mask is None else f"mask:{self.mask}"

    def resolved(self, grid: tuple[int, int]) -> "TokenChoice":
        """The same without a mask: its positions on a token grid of (rows, columns).  `UsageError` for a mask that covers no token.

        What an experiment file keeps, so that it runs without the picture file.
        """
        if self.mask is None:
            return self
        positions = np.flatnonzero(mask_on_grid(self.mask, grid))
        if not len(positions):
            raise UsageError(
                f"{self}: no token of the {grid[0]} rows and {grid[1]} columns is half covered by the mask: there is nothing to change"
            )
        return TokenChoice(positions=tuple(map(int, positions)))


ALL = TokenChoice()
"""every token"""


def mask_on_grid(mask: Grid | Path, grid: tuple[int, int]) -> Bool[np.ndarray, "row column"]:
    """Which tokens of the grid a mask covers: those with a mean of 1/2 or more over their area, exactly weighted."""
    fine = np.array(mask, np.float64) if isinstance(mask, tuple) else _picture(mask)
    coarse = _shares(grid[0], fine.shape[0]) @ fine @ _shares(grid[1], fine.shape[1]).T
    covered: np.ndarray = coarse >= COVERED - 1e-9  # a half is a half after rounding
    return covered


def _shares(coarse: int, fine: int) -> np.ndarray:
    """(coarse, fine): what each fine cell contributes to the mean of each coarse cell along one side."""
    edges = np.arange(coarse + 1) * (fine / coarse)
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(fine)[None, :]
    overlap = np.minimum(high, cells + 1) - np.maximum(low, cells)
    shares: np.ndarray = np.clip(overlap, 0, None) * (coarse / fine)
    return shares


def _picture(file: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    if not file.is_file():
        raise UsageError(f"there is no mask {file}: give a picture file, bright where tokens are to be changed")
    try:
        with Image.open(file) as picture:
            grey = np.asarray(picture.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"the mask {file} is no picture that can be read: {str(error)[:120]}") from None
    assert grey.ndim == 2 and math.prod(grey.shape) > 0, grey.shape
    return (grey >= BRIGHT).astype(np.float64)
