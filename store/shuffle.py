"""The order of a pack's rows: a keyed permutation of [0, rows) that is computed, never stored, in either direction.

1. A number x below `rows` is a pair (l, r) = (x // side, x % side) of numbers below side, the least with side^2 >= rows.
2. Eight rounds of a Feistel network: (l, r) becomes (r, (l + F(r)) mod side), where F scales the upper half of a mixed
   64-bit word to a number below side.
3. The result is l * side + r.  Where that is not below `rows`, the network is applied again (cycle walking), which
   happens to about 2 / side of all numbers.

The round keys come from SHA-256, the mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014;
Stafford's thirteenth variant).  FORMAT.md says all of it exactly.  About 0.15 µs a row, and no memory but a block's.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np

SCHEME = "granary-pack-2"
ROUNDS = 8
BLOCK = 1 << 14
"""rows at once: the dozen arrays of one block stay in the processor's cache"""
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def round_keys(seed: int, split: str, stream: str) -> np.ndarray:
    """Eight 64-bit keys: the first 8 bytes, little endian, of SHA-256 of `granary-pack-2:<seed>:<split>:<stream>:<round>`."""
    texts = (f"{SCHEME}:{seed}:{split}:{stream}:{number}" for number in range(ROUNDS))
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts], np.uint64)


class Permutation:
    """A bijection of [0, rows) and its inverse."""

    def __init__(self, rows: int, keys: np.ndarray) -> None:
        self.rows, self.keys = rows, keys
        self.side = math.isqrt(max(rows - 1, 0)) + 1
        assert self.side < 2**32, "a half must fit into 32 bits, for F to be scaled within 64"

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Where the rows `numbers`, int64, go."""
        return self._blockwise(numbers, self._forward)

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """Which rows, int64, come to `places`."""
        return self._blockwise(places, self._backward)

    def _blockwise(self, numbers: np.ndarray, once: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        result = np.empty(len(numbers), np.int64)
        for first in range(0, len(numbers), BLOCK):
            found = once(numbers[first : first + BLOCK].astype(np.uint64))
            while len(outside := np.flatnonzero(found >= self.rows)):
                found[outside] = once(found[outside])
            result[first : first + BLOCK] = found
        return result

    def _forward(self, numbers: np.ndarray) -> np.ndarray:
        side = np.uint64(self.side)
        left, right = np.divmod(numbers, side)
        for key in self.keys:
            total = left + self._scaled(right, key)
            left, right = right, np.minimum(total, total - side)  # below 0 it wraps to something huge
        return np.asarray(left * side + right)

    def _backward(self, places: np.ndarray) -> np.ndarray:
        side = np.uint64(self.side)
        left, right = np.divmod(places, side)
        for key in self.keys[::-1]:
            total = right + side - self._scaled(left, key)
            left, right = np.minimum(total, total - side), left
        return np.asarray(left * side + right)

    def _scaled(self, half: np.ndarray, key: np.uint64) -> np.ndarray:
        """F: a number below side for each half; sums and products are modulo 2^64."""
        word = half + key
        for shift, factor in ((np.uint64(30), _FIRST), (np.uint64(27), _SECOND)):
            word ^= word >> shift
            word *= factor
        word ^= word >> np.uint64(31)
        word >>= np.uint64(32)
        word *= np.uint64(self.side)
        word >>= np.uint64(32)
        return np.asarray(word)
