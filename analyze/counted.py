"""Which stored rows count towards a figure: real text tokens by default, every kept image token, never an empty slot."""

import numpy as np
from jaxtyping import Bool, Int

from store import Store
from store.sites import Stream


def text_lengths(store: Store) -> Int[np.ndarray, " image"]:
    """How many tokens of each prompt are real; positions from there on are padding."""
    return np.asarray(store.prompts()["text_length"].to_numpy(), np.int64)


def counted_rows(
    positions: Int[np.ndarray, "image token"],
    stream: Stream,
    lengths: Int[np.ndarray, " image"],
    text_total: int,
    padding: bool,
) -> Bool[np.ndarray, "image token"]:
    """True for rows that count.  `text_total` is the length of the padded text, which the `joint` stream starts with."""
    kept = positions >= 0
    if padding or stream == "img":
        return kept
    real = positions < lengths[:, None]
    return kept & (real | (positions >= text_total) if stream == "joint" else real)


def are_lower_bounds(store: Store, stream: Stream, padding: bool) -> bool:
    """Whether a maximum over the counted tokens may miss some, because the store keeps a sample of them."""
    policy = store.meta.tokens[stream]
    if policy.all_kept:
        return False
    return padding or stream != "txt" or not policy.policy.startswith("real")
