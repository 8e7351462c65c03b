"""Prompts and their tokens as people read them, and short names of things, the same in pictures, tables and the report."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analyze.pictures.heat import Heat
from analyze.truth.attributes import Attribute

WORD_START = "▁"
END = "</s>"


@dataclass(frozen=True)
class Piece:
    """A token as text, with the heat of a feature on it: 0 cold, 1 hottest."""

    text: str
    heat: float
    space: bool
    """Whether a space stands before it."""


def highlighted(pieces: Sequence[str], heat: Heat, scale: float, padding: Collection[int] = ()) -> list[Piece]:
    """The real tokens of a prompt with the heat on each; tokens that the store did not keep are cold.

    `padding` are the places of `pieces` that hold none.
    """
    values: Float[np.ndarray, " token"] = np.zeros(len(pieces), np.float32)
    real = heat.positions < len(pieces)
    values[heat.positions[real]] = heat.values[real]
    return [
        Piece(
            _readable(piece),
            float(np.clip(value / scale, 0, 1)),
            place > 0 and (piece == END or piece.startswith(WORD_START)),
        )
        for place, (piece, value) in enumerate(zip(pieces, values, strict=True))
        if place not in padding
    ]


def _readable(piece: str) -> str:
    if piece == END:
        return "⟨end⟩"
    return piece.removeprefix(WORD_START).replace(WORD_START, " ")


PLURAL_SHAPES = {"cross": "crosses"}


def fires_on(attribute: Attribute, stream: str) -> str:
    """What a feature that stands for the attribute does: "fires on red patches"."""
    value = attribute.value
    if stream == "txt":
        what = {
            "colour": f"something {value}",
            "shape": f"a {value}",
            "position": f"an object at the {value}" if value != "centre" else "an object in the centre",
            "background": f"a {value} background",
        }[attribute.group]
        return f"fires on prompts that ask for {what}"
    return {
        "colour": f"fires on {value} patches",
        "shape": f"fires on {PLURAL_SHAPES.get(value, value + 's')}",
        "position": f"fires on an object at the {value}" if value != "centre" else "fires on an object in the centre",
        "background": f"fires on {value} backgrounds",
    }[attribute.group]


def percent(value: float) -> str:
    """`2.1 %`, with as many digits as say something: `0.03 %`, `38 %`, `0 %`."""
    share = 100 * value
    digits = 0 if share >= 10 or share == 0 else 1 if share >= 1 else 2
    return f"{share:.{digits}f} %"
