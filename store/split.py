"""Which split a prompt belongs to: a pure function of its text, the same in every store, for ever.

1. Normalise: drop Midjourney-style flags (`--ar 16:9`), fold case and white space (Unicode NFC).
2. Hash `SALT + normalised` with SHA-256, read the first 8 bytes as a big-endian number in [0, 2**64).
3. `val` when that number is below 5 % of 2**64, else `train`.

So two spellings of one prompt never stand on both sides, and a dictionary trained on any store is
validated on prompts that no store ever trained on.  FORMAT.md fixes salt and share.
"""

import hashlib
import re
import unicodedata
from typing import Literal

Split = Literal["train", "val"]

SALT = "granary-split-1:"
VAL_SHARE = 0.05
FLAG = re.compile(r"(?:^|\s)--?[a-z][a-z-]*(?:\s+[\d.:/]+)?(?=\s|$)")


def normalise(prompt: str) -> str:
    """The prompt without flags, case and superfluous white space: what the split is decided on."""
    text = " ".join(unicodedata.normalize("NFC", prompt).casefold().split())
    return " ".join(FLAG.sub(" ", text).split())


def split_of(prompt: str) -> Split:
    """`"train"` or `"val"` for a prompt; depends on nothing but its normalised text."""
    digest = hashlib.sha256((SALT + normalise(prompt)).encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < int(VAL_SHARE * 2**64) else "train"
