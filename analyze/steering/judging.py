"""What an intervention did to a picture, as tiny-flux's judge reads it: which attributes changed and which stayed.

The measure is what the judge reads in the plain picture, not what the prompt says: a picture that tiny-flux drew wrong is not held
against the intervention.  Objects of the two pictures are paired so that they lie as near to one another as can be.  Where their
number differs none is paired: an object was lost or born, and then nothing about objects counts as kept, and none as changed.

    changed      every object that had the value in the plain picture is there and has another now
    kept_shape   every object has the shape that it had; likewise kept_position, kept_size, kept_colour, kept_background, kept_count;
                 of the attribute that is to be changed, kept_… asks only the objects that had another value
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from store.errors import UsageError

if TYPE_CHECKING:
    from harvest.tiny_flux.judge import Reading, Seen

OF_OBJECTS = ("shape", "colour", "size", "position")
ATTRIBUTES = ("background", "count", *OF_OBJECTS)
"""what is compared"""
CHANGEABLE = ("background", *OF_OBJECTS)
"""what can be asked to change"""
MOST_PAIRED = 6
"""objects up to which every pairing is tried; tiny-flux draws two at most"""
READ = pa.list_(pa.string())
VERDICTS = pa.schema(
    [
        pa.field("asked", pa.bool_(), nullable=False),  # whether the judge reads the value in the plain picture
        ("changed", pa.bool_()),  # null where nothing was to be changed, or the plain picture does not show it
        pa.field("lost", pa.bool_(), nullable=False),  # the number of objects differs
        *(pa.field(f"kept_{name}", pa.bool_(), nullable=False) for name in ATTRIBUTES),
        *(
            pa.field(f"plain_{name}", READ, nullable=False) for name in CHANGEABLE
        ),  # an entry an object, in the plain picture's
        *(pa.field(f"read_{name}", READ, nullable=False) for name in CHANGEABLE),  # order where they are paired
    ]
)


@dataclass(frozen=True)
class Rate:
    """A share of pictures, with the interval that holds the true one with 95 % (Wilson's)."""

    count: int
    n: int

    @property
    def share(self) -> float:
        """`count / n`; NaN of no pictures."""
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest share that agree with the count; (0, 1) of no pictures."""
        if not self.n:
            return 0.0, 1.0
        z, p = 1.96, self.share
        centre, spread = p + z * z / (2 * self.n), z * math.sqrt(p * (1 - p) / self.n + z * z / (4 * self.n**2))
        scale = 1 + z * z / self.n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    def __str__(self) -> str:
        """`94 %`"""
        return "-" if not self.n else f"{100 * self.share:.0f} %"


def readings(pictures: Sequence[Image.Image]) -> "list[Reading]":
    """What each picture shows, read without its prompt, about 4 ms each; `UsageError` for pictures of another size than tiny-flux's."""
    from harvest.tiny_flux.judge import read
    from harvest.tiny_flux.scenes import PIXELS

    for picture in pictures:
        if picture.size != (PIXELS, PIXELS):
            raise UsageError(
                f"the judge reads tiny-flux's pictures of {PIXELS}x{PIXELS} pixels, this one has {picture.size[0]}x{picture.size[1]}: "
                "leave the judge out"
            )
    return [read(np.asarray(picture.convert("RGB"))) for picture in pictures]


def check_asked(attribute: str | None, values: Sequence[str | None]) -> None:
    """`UsageError` for an attribute or a value of it that the judge does not know."""
    if attribute is None:
        return
    if attribute not in CHANGEABLE:
        raise UsageError(f"the judge reads no {attribute!r}; it reads {', '.join(CHANGEABLE)}")
    known = values_of(attribute)
    unknown = [value for value in values if value is not None and value not in known]
    if unknown:
        raise UsageError(f"there is no {attribute} {unknown[0]!r}; there are {', '.join(known)}")


def values_of(attribute: str) -> tuple[str, ...]:
    """The values of an attribute that tiny-flux draws and its judge tells apart."""
    from harvest.tiny_flux.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

    named = {"background": BACKGROUNDS, "colour": COLOURS, "shape": SHAPES, "size": SIZES, "position": POSITIONS}
    return tuple(named[attribute])


def verdicts(
    plain: "Sequence[Reading]", changed: "Sequence[Reading]", attribute: str | None = None, value: str | None = None
) -> pa.Table:
    """A row a picture: what the judge reads before and after, what was kept, and whether the value changed; columns as in `VERDICTS`.

    `attribute` and `value`: what was to be changed, such as colour and red; value None: whatever the plain picture shows.
    """
    if len(plain) != len(changed):
        raise UsageError(f"{len(plain)} plain pictures and {len(changed)} changed ones: give one for each")
    check_asked(attribute, [value])
    rows = [_verdict(before, after, attribute, value) for before, after in zip(plain, changed, strict=True)]
    return pa.Table.from_pylist(rows, schema=VERDICTS)


def rates(found: pa.Table) -> dict[str, Rate]:
    """`changed`, `lost` and every `kept_…` as shares of the pictures that were asked about, in the order of the columns."""
    asked = found.filter(found["asked"])
    names = [name for name in VERDICTS.names if name in ("changed", "lost") or name.startswith("kept_")]
    counted = {name: [held for held in asked[name].to_pylist() if held is not None] for name in names}
    return {name: Rate(sum(held), len(held)) for name, held in counted.items()}


def _verdict(before: "Reading", after: "Reading", attribute: str | None, value: str | None) -> dict[str, Any]:
    pairs = paired(before, after)
    there = after.objects if pairs is None else tuple(two for _, two in pairs)
    row: dict[str, Any] = {"lost": pairs is None, "kept_count": pairs is not None}
    row["kept_background"] = after.background == before.background
    row |= {"plain_background": [before.background], "read_background": [after.background]}
    for name in OF_OBJECTS:
        spared = value if name == attribute else None
        row[f"kept_{name}"] = pairs is not None and all(_kept(one, two, name, spared) for one, two in pairs)
        row[f"plain_{name}"] = [_said(one, name) for one in before.objects]
        row[f"read_{name}"] = [_said(one, name) for one in there]
    row["asked"] = attribute is None or (
        bool(row[f"plain_{attribute}"]) if value is None else value in row[f"plain_{attribute}"]
    )
    row["changed"] = _changed(row, attribute, value) if attribute is not None and row["asked"] else None
    return row


def _changed(row: dict[str, Any], attribute: str, value: str | None) -> bool:
    """Whether everything that had the value has another one now."""
    if attribute != "background" and row["lost"]:
        return False
    both = zip(row[f"plain_{attribute}"], row[f"read_{attribute}"], strict=True)
    return all(now != was for was, now in both if value in (None, was))


def _kept(one: "Seen", two: "Seen", name: str, spared: str | None) -> bool:
    was, now = _said(one, name), _said(two, name)
    return was == spared or (was == now and was != "unclear")


def _said(one: "Seen", name: str) -> str:
    """What the judge says of an object; `unclear` for a piece that no shape fits."""
    said = getattr(one, name)
    return "unclear" if said is None else str(said)


def paired(before: "Reading", after: "Reading") -> "list[tuple[Seen, Seen]] | None":
    """Each object of the plain picture with the one of the changed picture that it became; None when their number differs."""
    if len(before.objects) != len(after.objects):
        return None
    if len(before.objects) > MOST_PAIRED:  # no scene of tiny-flux; specks, say
        return list(zip(before.objects, after.objects, strict=True))

    def apart(order: "Iterable[Seen]") -> float:
        both = zip(before.objects, order, strict=True)
        return sum((one.x - two.x) ** 2 + (one.y - two.y) ** 2 for one, two in both)

    return list(zip(before.objects, min(permutations(after.objects), key=apart), strict=True))


def told(found: pa.Table) -> Iterator[str]:
    """For each picture what became of its objects, such as `red -> green`, or `2 objects -> 1`."""
    for row in found.to_pylist():
        if row["lost"]:
            yield f"{len(row['plain_shape'])} objects -> {len(row['read_shape'])}"
            continue
        parts = [
            f"{was} -> {now}" if was != now else was
            for name in ("colour", "shape", "position")
            for was, now in zip(row[f"plain_{name}"], row[f"read_{name}"], strict=True)
            if was != now or name == "colour"
        ]
        yield ", ".join(parts)
