"""The columns that circuit-tracer draws: pseudo-tokens that name stream, place and step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WITHOUT_TOKEN = "const"
"""column of what has no token: biases, dropped edges"""


@dataclass(frozen=True)
class Columns:
    """The sequence of pseudo-tokens of one graph, and where each of its nodes stands in it."""

    tokens: list[str]
    number: Mapping[tuple[str, int], int]
    """the column of (stream, token)"""
    places: Mapping[tuple[str, int], str]
    """what that token is called"""
    biases: Mapping[tuple[int, str, str], int]
    """a number below -3 of each (layer, stream, term)"""
    target: int
    """the column of the first target that has a token"""
    top: int
    """the layer of outputs, above all others"""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> "Columns":
        """The columns of the nodes of a graph: what has no token, then text, then image tokens, ascending.

        Of the facts `step`, `grid` (rows, columns of image tokens), `pieces` (of the text) and `targets` are used where they are there.
        """
        members = [
            (member["site"].partition("_")[0], member["token"])
            for target in facts.get("targets") or []
            for member in target.get("members") or [target]
            if member.get("token") is not None and member.get("site")
        ]
        stood = {(row["stream"], row["token"]) for row in rows if row["token"] is not None} | set(members)
        order = sorted(stood, key=lambda place: (place[0] != "txt", place))
        number = {place: column for column, place in enumerate(order, start=1)}
        places = {(stream, token): place_of(stream, token, facts) for stream, token in order}
        step = facts.get("step")
        end = "" if step is None else f" @{step}"
        biases = sorted({(row["layer"], row["stream"], row["term"]) for row in rows if row["kind"] == "bias"})
        asked = [(row["stream"], row["token"]) for row in rows if row["target"] and row["token"] is not None] + members
        return cls(
            tokens=[WITHOUT_TOKEN + end, *(places[place] + end for place in order)] + ["" for _ in range(not order)],
            number=number,
            places=places,
            biases={bias: -4 - count for count, bias in enumerate(biases)},
            target=number[asked[0]] if asked else 0,
            top=max((row["layer"] for row in rows if row["layer"] is not None), default=0) + 1,
        )

    def of_node(self, row: Mapping[str, Any]) -> int:
        """The column in which a node stands."""
        if row["kind"] == "supernode":
            return self.target
        return 0 if row["token"] is None else self.number[row["stream"], row["token"]]

    def place(self, row: Mapping[str, Any]) -> str:
        """What a node's token is called: `img 2,5` or `txt 3`."""
        return self.places[row["stream"], row["token"]]

    def bias_number(self, row: Mapping[str, Any]) -> int:
        """A number of its own for each bias."""
        return self.biases[row["layer"], row["stream"], row["term"]]


def place_of(stream: str, token: int, facts: Mapping[str, Any]) -> str:
    """What a token is called: `img 2,5` (row, column, from 1) where the grid is known; `txt 3`, with its piece of the text where known."""
    grid, pieces = facts.get("grid"), facts.get("pieces")
    if stream == "img" and grid:
        return f"img {token // grid[1] + 1},{token % grid[1] + 1}"
    if stream == "txt" and pieces and token < len(pieces):
        return f"txt {token} {pieces[token]!r}"
    return f"{stream} {token}"
