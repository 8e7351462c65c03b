"""The k best images, and the k best words, of every feature: exact, from a stream of blocks of any sizes, in bounded memory.

What is kept is one 64-bit key an entry: the bits of the score (positive float32s sort as integers) above the image's number
counted from the greatest.  So the greater key has the higher score, and among equal scores the lower image.

With groups (images of one prompt) a group stands for its best image.  That is exact although forgotten images are never seen
again: a group that fell out of the list had k better ones before it, and those only get better.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from analyze.scoring.contenders import LOW, NONE, Images, contend, join, without_rivals
from store.split import normalise

COLUMNS = 1024
"""features that are worked on at once, so that what is made of a block stays small"""
POOL = 1 << 18
"""activations that wait to be ranked, at least"""
SCORE, SCORE_BITS = 31, (1 << 31) - 1
CODE = 63 - SCORE
"""bits that are left for feature and piece beside a score"""


def prompt_groups(prompts: Sequence[str]) -> Int[np.ndarray, " image"]:
    """A number for each image, equal for equal prompts (normalised as the split normalises them)."""
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(normalise(prompt), len(numbers)) for prompt in prompts], np.int64)


class TopImages:
    """The images with the highest scores of each feature; `groups`: at most one of a group.

    Only scores above `above` count.  Among equal scores the lower image comes first.
    """

    def __init__(
        self, n_features: int, k: int, groups: Int[np.ndarray, " image"] | None = None, above: float = 0.0
    ) -> None:
        self.k, self.above, self.groups = k, above, groups
        self.keys = np.full((n_features, k), NONE, np.int64)
        """(feature, rank), descending"""
        self.where = np.full((n_features, k), -1, np.int32)
        """the token of each"""

    def add(
        self,
        first_image: int,
        scores: Float[np.ndarray, "image feature"],
        tokens: Int[np.ndarray, "image feature"],
    ) -> None:
        """Look at the images from `first_image` on, and the tokens of their maxima."""
        images = Images(first_image, len(scores), self.groups)
        contend(self.keys, self.where, images, scores, tokens, self.above)

    def merge(self, other: "TopImages") -> None:
        """Take in what was found among other images."""
        join(self.keys, self.where, other.keys, other.where, self.groups)

    def result(
        self,
    ) -> tuple[Int[np.ndarray, "k feature"], Int[np.ndarray, "k feature"], Float[np.ndarray, "k feature"]]:
        """Images, tokens and scores, best first; -1 where a feature is active on fewer images."""
        images, scores = _opened(self.keys)
        return images.T, self.where.T, scores.T


class TopWords:
    """The text pieces with the highest activations of each feature, each piece once; among equals the lower piece first.

    Activations that reach the k-th best so far wait in a pool.  It is ranked by sorting plain 64-bit integers, which a processor does
    several at a time: feature, piece and score in one number for the best of each piece, feature, score and piece for the k best.
    """

    def __init__(self, n_features: int, k: int) -> None:
        self.k = k
        self.keys = np.full((n_features, k), NONE, np.int64)
        """(feature, rank), descending"""
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count, self._most = 0, max(POOL, n_features * k)
        self._least = np.zeros(n_features, np.float32)
        """what an activation has to be at least"""

    def add(
        self, feature: Int[np.ndarray, " entry"], piece: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"]
    ) -> None:
        """Look at activations (positive) of features on tokens, whose pieces are given by number."""
        good = np.flatnonzero(value >= self._least[feature])  # equal ones too, for the lower piece is preferred
        self._waiting.append((feature[good], piece[good], value[good]))
        self._count += len(good)
        if self._count > self._most:
            self.settle()

    def settle(self) -> None:
        """Rank what is waiting: the best of each (feature, piece), then the k best of each feature."""
        if not self._count:
            return
        known, rank = np.nonzero(self.keys != NONE)
        pieces, scores = _opened(self.keys[known, rank])
        feature, piece, score = (
            np.concatenate(each) for each in zip((known, pieces, scores), *self._waiting, strict=True)
        )
        self._waiting, self._count = [], 0
        self.keys[:] = NONE
        most = int(piece.max()) + 1
        width = max((1 << CODE) // most, 1)  # features whose codes fit into 64 bits: nearly always all of them
        for first in range(0, len(self.keys), width):
            lists = self.keys[first : first + width]
            mine = slice(None) if len(lists) == len(self.keys) else (feature >= first) & (feature < first + width)
            _rank(lists, feature[mine] - first, most - 1 - piece[mine].astype(np.int64), score[mine], most)
        self._raise_the_bar()

    def merge(self, other: "TopWords") -> None:
        """Take in what was found on other tokens."""
        self.settle()
        other.settle()
        if (self.keys[:, 0] == NONE).all():
            self.keys[:] = other.keys
            self._raise_the_bar()
            return
        for first in range(0, len(self.keys), COLUMNS):
            columns = slice(first, first + COLUMNS)
            here, there = without_rivals(
                self.keys[columns], other.keys[columns], self._pieces(columns), other._pieces(columns)
            )
            self.keys[columns] = _greatest(np.concatenate((here, there), axis=1), self.k)[0]
        self._raise_the_bar()

    def _raise_the_bar(self) -> None:
        self._least[:] = _opened(self.keys[:, -1])[1].clip(0)

    def _pieces(self, columns: slice) -> Int[np.ndarray, "feature rank"]:
        return _opened(self.keys[columns])[0]

    def result(self) -> tuple[Int[np.ndarray, "k feature"], Float[np.ndarray, "k feature"]]:
        """Pieces by number and their activations, best first; -1 where a feature is active on fewer."""
        self.settle()
        pieces, scores = _opened(self.keys)
        return pieces.T, scores.T


def _rank(
    lists: Int[np.ndarray, "feature rank"],
    feature: Int[np.ndarray, " entry"],
    place: Int[np.ndarray, " entry"],
    score: Float[np.ndarray, " entry"],
    most: int,
) -> None:
    """Fill lists with the keys of the best entries of each feature, one of a place; places (0 to `most` - 1) fall as pieces rise."""
    bits = (
        np.ascontiguousarray(score, np.float32).view(np.int32).astype(np.int64)
    )  # 31 of them, for scores are positive
    code = ((feature * most + place) << SCORE) | bits
    code.sort()
    owner = code >> SCORE
    last = np.concatenate((owner[1:] != owner[:-1], [True])) if len(code) else np.zeros(0, bool)
    owner, bits = owner[last], code[last] & SCORE_BITS
    feature, place = np.divmod(owner, most)
    code = ((feature << SCORE) | bits) * most + place
    code.sort()
    feature_score, place = np.divmod(code, most)
    feature, bits = feature_score >> SCORE, feature_score & SCORE_BITS
    rank = np.searchsorted(feature, feature, side="right") - 1 - np.arange(len(feature))
    chosen = rank < lists.shape[1]
    lists[feature[chosen], rank[chosen]] = ((bits << 32) | (LOW - (most - 1 - place)))[chosen]


def _opened(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores of keys, -1 where there is none."""
    scores = (keys >> 32).astype(np.int32).view(np.float32)
    missing = keys == NONE
    return np.where(missing, -1, LOW - (keys & LOW)), np.where(missing, np.float32(-1), scores)


def _greatest(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest of each row (fewer where it has fewer), descending, and their places."""
    found = torch.topk(torch.from_numpy(keys), min(k, keys.shape[1]), dim=1, sorted=True)
    return found.values.numpy(), found.indices.numpy()
