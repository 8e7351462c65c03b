"""What is kept of a stream's tokens, and which tokens of a stream are told apart.

Text is real tokens, then padding: FLUX masks none of it, and about 90 % of it is padding.  A single-stream block reads one
joint sequence, text tokens first, then image tokens, which behave like three populations.  So every figure of text is given
for real tokens and padding apart, and every figure of a joint sequence for image tokens as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa

from store.sites import Stream

EMPTY_TOKEN = -1
STRATA = "strata"
"""the policy of a joint sequence of which not every token is kept"""
STRATA_STREAMS: tuple[Stream, Stream] = ("txt", "img")
"""whose tokens a joint sequence holds, in its order"""

Group = Literal["all", "real", "padding", "image"]
GROUPS: dict[Stream, tuple[Group, ...]] = {"img": ("all",), "txt": ("all", "real", "padding"), "joint": get_args(Group)}
"""which rows of a stream: all of them, and where tokens are told apart each kind alone"""
CODES: Mapping[Group, int] = {"padding": 0, "real": 1, "image": 2}
"""how a pack's column `real` (txt) or `stratum` (joint) writes them"""
CODE_COLUMNS: Mapping[Stream, str] = {"txt": "real", "joint": "stratum"}
OPTIONAL_COLUMNS = ("text_padding",)
TEXT_COLUMNS = ("text_length", *OPTIONAL_COLUMNS)
"""of the table of prompts: what says which text tokens are real; the second is there only where the first does not say it all"""


@dataclass(frozen=True)
class StreamTokens:
    """Which tokens of a stream are kept: `policy` in words, `kept` slots of `total` positions an image and step."""

    policy: str
    kept: int
    total: int
    strata: "tuple[StreamTokens, StreamTokens] | None" = None
    """of a joint sequence with policy `strata`: what is kept of its text tokens, then of its image tokens"""

    @property
    def all_kept(self) -> bool:
        return self.policy == "all"

    @property
    def text(self) -> str:
        """`64 of 1024 (sample)`; of a joint sequence what is kept of its text and of its image tokens."""
        found = f"{self.kept} of {self.total} ({self.policy})"
        if self.strata is None:
            return found
        parts = " and ".join(f"{name} {part.text}" for name, part in zip(("text", "image"), self.strata, strict=True))
        return f"{self.kept} of {self.total}: {parts}"

    def attributes(self) -> dict[str, Any]:
        """As JSON carries it: `strata` is there only where there are any."""
        plain: dict[str, Any] = {"policy": self.policy, "kept": self.kept, "total": self.total}
        if self.strata is not None:
            plain[STRATA] = dict(zip(STRATA_STREAMS, (each.attributes() for each in self.strata), strict=True))
        return plain

    @classmethod
    def of(cls, found: dict[str, Any]) -> "StreamTokens":
        """The inverse of `attributes`; `TypeError`, `AttributeError`, `KeyError` or `ValueError` for what is none."""
        if STRATA not in found:
            return cls(**found)
        parts = found[STRATA]
        if set(parts) != set(STRATA_STREAMS) or any(STRATA in parts[stream] for stream in STRATA_STREAMS):
            raise ValueError(f"the strata are {parts!r}")
        text, image = (cls.of(parts[stream]) for stream in STRATA_STREAMS)
        if (text.kept + image.kept, text.total + image.total) != (found["kept"], found["total"]):
            raise ValueError(f"{found['kept']} of {found['total']} tokens are kept, and the strata are {parts!r}")
        return cls(**{**found, STRATA: (text, image)})


def kinds_of(stream: Stream) -> tuple[Group, ...]:
    """The kinds of tokens that a stream is made of, without overlap: `all` where none are told apart."""
    return GROUPS[stream][1:] or GROUPS[stream]


@dataclass(frozen=True)
class RealText:
    """Which text tokens of some images are real: those before `length`, but for the padding among them."""

    length: np.ndarray
    """(image,) int32"""
    gaps: np.ndarray | None = None
    """(image, place) bool, padding before `length`, the last place never; None where there is none: of all models but SD3"""

    @classmethod
    def of(cls, prompts: pa.Table) -> "RealText":
        """As the table of prompts says, or those of its columns that are `TEXT_COLUMNS`."""
        length = np.asarray(prompts["text_length"].to_numpy(), np.int32)
        if "text_padding" not in prompts.column_names or not _are_positions(prompts["text_padding"].type):
            return cls(length)  # a column of this name may be a prompt file's own, of before it meant anything
        lists = cast(pa.ListArray, prompts["text_padding"].combine_chunks())
        image = np.repeat(np.arange(len(length)), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        place = lists.flatten().fill_null(-1).to_numpy(zero_copy_only=False)
        inside = (place >= 0) & (place < length[image])
        gaps = np.zeros((len(length), int(place[inside].max(initial=-1)) + 2), bool)
        gaps[image[inside], place[inside]] = True
        return cls(length, gaps if inside.any() else None)

    def __getitem__(self, images: slice | np.ndarray) -> "RealText":
        """That of some of the images."""
        return RealText(self.length[images], None if self.gaps is None else self.gaps[images])

    def at(self, image: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Whether the token at each position of each image is real, bool; the two broadcast against one another."""
        real = np.asarray(position < self.length[image])
        if self.gaps is None:
            return real
        return np.asarray(real & ~self.gaps[image, np.minimum(position, self.gaps.shape[1] - 1)])

    def count(self, total: int) -> np.ndarray:
        """(image,) int32: how many tokens are real, of a text of `total` places."""
        found = np.minimum(self.length, total)
        return np.asarray(found if self.gaps is None else found - self.gaps[:, :total].sum(axis=1), np.int32)

    def of_image(self, image: int) -> tuple[int, list[int]]:
        """One image's length, and the positions before it that hold padding."""
        padding = [] if self.gaps is None else np.flatnonzero(self.gaps[image]).tolist()
        return int(self.length[image]), padding

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.length.nbytes + (0 if self.gaps is None else self.gaps.nbytes)


def _are_positions(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) and pa.types.is_integer(type_.value_type))


def codes_of(stream: Stream, positions: np.ndarray, real: np.ndarray, text_total: int) -> np.ndarray:
    """The kind of each token, uint8 as `CODES`, of the shape of `positions`.

    `real`, of that shape, is what `RealText.at` says of them; `text_total` is where the image tokens of a joint sequence begin.
    Empty slots have a code too, which means nothing.
    """
    if stream == "img":
        return np.full(positions.shape, CODES["image"], np.uint8)
    codes = real.astype(np.uint8)
    if stream == "joint":
        codes[positions >= text_total] = CODES["image"]
    return codes
