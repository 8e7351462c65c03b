"""Which tokens of an image and step are kept.

The draw is a pure function of (store seed, image, step, stream), the same for every layer, so that a
row of one layer has its counterpart in every other:

1. SHA-256 of `granary-tokens-1:seed:image:step:stream` keys a Philox generator.
2. Its raw 64-bit output, one number a position, ranks the positions; NumPy guarantees that stream for
   ever, which it does not for `choice` or `permutation`.
3. The lowest `n` are kept, in ascending order of position.

Without replacement, unbiased, and independent of how many other images or steps there are.

A joint sequence is text tokens, then image tokens.  It keeps what the streams `txt` and `img` of the same policies keep, so
that a row of a single-stream block is the same token as a row of the double-stream blocks: no draw is keyed `joint`.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from store.errors import UsageError
from store.sites import Stream
from store.strata import EMPTY_TOKEN, STRATA, StreamTokens


def image_policy(text: str, total: int) -> StreamTokens:
    """`all`, or a number of image tokens to draw; `UsageError` when there are fewer."""
    if text == "all":
        return StreamTokens("all", total, total)
    if not text.isdecimal() or not 1 <= int(text) <= total:
        raise UsageError(
            f"--tokens {text!r}: write all, or a number from 1 to {total} (the image tokens at this resolution)"
        )
    return StreamTokens("sample", int(text), total)


def text_policy(text: str, total: int, longest: int) -> StreamTokens:
    """`all`, `real` or `real+N`; `longest` is the greatest number of real tokens of the prompts at hand."""
    if text == "all":
        return StreamTokens("all", total, total)
    match = re.fullmatch(r"real(?:\+(\d+))?", text)
    if match is None:
        raise UsageError(f"--text-tokens {text!r}: write all, real, or real+N (N padding tokens beside the real ones)")
    extra = int(match[1] or 0)
    return StreamTokens(f"real+{extra}", min(longest + extra, total), total)


def joint_policy(text: StreamTokens, image: StreamTokens) -> StreamTokens:
    """What the joint sequence keeps: the text tokens that `text` keeps, then the image tokens that `image` keeps."""
    kept, total = text.kept + image.kept, text.total + image.total
    if text.all_kept and image.all_kept:
        return StreamTokens("all", total, total)
    return StreamTokens(STRATA, kept, total, (text, image))


def kept_positions(
    policy: StreamTokens,
    seed: int,
    image: int,
    step: int,
    stream: Stream,
    text_length: int,
    text_padding: Sequence[int] = (),
) -> np.ndarray:
    """The kept positions, int32, ascending, `policy.kept` slots; unused slots are -1, and last of their stratum.

    Slots stay empty only for text, where prompts differ in length: at the end, or in the middle of a joint sequence.
    `text_padding` are the positions before `text_length` that hold padding.
    """
    slots = np.full(policy.kept, EMPTY_TOKEN, dtype=np.int32)
    if policy.policy == "all":
        return np.arange(policy.total, dtype=np.int32)
    if policy.strata is not None:
        text, image_tokens = policy.strata
        slots[: text.kept] = kept_positions(text, seed, image, step, "txt", text_length, text_padding)
        slots[text.kept :] = text.total + kept_positions(image_tokens, seed, image, step, "img", text_length)
        return slots
    if policy.policy == "sample":
        slots[:] = _draw(policy.total, policy.kept, seed, image, step, stream)
        return slots
    is_real = np.arange(policy.total) < text_length
    is_real[list(text_padding)] = False
    padding = np.flatnonzero(~is_real)
    extra = min(int(policy.policy.removeprefix("real+")), len(padding))
    is_kept = is_real
    is_kept[padding[_draw(len(padding), extra, seed, image, step, stream)]] = True
    slots[: is_kept.sum()] = np.flatnonzero(is_kept)
    return slots


def _draw(total: int, count: int, seed: int, image: int, step: int, stream: Stream) -> np.ndarray:
    digest = hashlib.sha256(f"granary-tokens-1:{seed}:{image}:{step}:{stream}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(total)
    return np.sort(np.argsort(raw, kind="stable")[:count]).astype(np.int32)
