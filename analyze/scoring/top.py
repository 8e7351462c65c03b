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

from analyze.scoring.contenders import LOW, NONE, Images, contend, join
from store.split import normalise

COLUMNS = 1024
"""features that are worked on at once, so that what is made of a block stays small"""
POOL = 1 << 18
"""activations that wait to be ranked, at least"""


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
    """The text pieces with the highest activations of each feature, each piece once; among equals the lower piece first."""

    def __init__(self, n_features: int, k: int) -> None:
        self.k = k
        self.keys = np.full((n_features, k), NONE, np.int64)
        """(feature, rank), descending"""
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count, self._most = 0, max(POOL, n_features * k)

    def add(
        self, feature: Int[np.ndarray, " entry"], piece: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"]
    ) -> None:
        """Look at activations (positive) of features on tokens, whose pieces are given by number."""
        keys = _keys(value, LOW - piece.astype(np.int64))
        better = keys > self.keys[feature, -1]
        self._waiting.append((feature[better], keys[better]))
        self._count += len(self._waiting[-1][0])
        if self._count > self._most:
            self.settle()

    def settle(self) -> None:
        """Rank what is waiting: the best of each (feature, piece), then the k best of each feature."""
        if not self._count:
            return
        known, rank = np.nonzero(self.keys != NONE)
        feature = np.concatenate([known, *(each for each, _ in self._waiting)])
        keys = np.concatenate([self.keys[known, rank], *(each for _, each in self._waiting)])
        self._waiting, self._count = [], 0
        order = np.lexsort((keys, (feature << 32) | (LOW - (keys & LOW))))
        feature, keys = feature[order], keys[order]
        last = np.concatenate((np.diff(feature) != 0, [True])) | np.concatenate((np.diff(keys & LOW) != 0, [True]))
        feature, keys = feature[last], keys[last]
        order = np.lexsort((-keys, feature))
        feature, keys = feature[order], keys[order]
        starts = np.searchsorted(feature, np.arange(len(self.keys)))
        place = np.arange(len(feature)) - starts[feature]
        chosen = place < self.k
        self.keys[:] = NONE
        self.keys[feature[chosen], place[chosen]] = keys[chosen]

    def merge(self, other: "TopWords") -> None:
        """Take in what was found on other tokens."""
        self.settle()
        other.settle()
        for first in range(0, len(self.keys), COLUMNS):
            columns = slice(first, first + COLUMNS)
            here, there = self.keys[columns], other.keys[columns]
            here, there = _one_of_each(here, here & LOW, there, there & LOW)
            self.keys[columns] = _greatest(np.concatenate((here, there), axis=1), self.k)[0]

    def result(self) -> tuple[Int[np.ndarray, "k feature"], Float[np.ndarray, "k feature"]]:
        """Pieces by number and their activations, best first; -1 where a feature is active on fewer."""
        self.settle()
        pieces, scores = _opened(self.keys)
        return pieces.T, scores.T


def _keys(score: np.ndarray, low: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(score, np.float32).view(np.int32).astype(np.int64)
    return np.asarray((bits << 32) | low)


def _opened(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores of keys, -1 where there is none."""
    scores = (keys >> 32).astype(np.int32).view(np.float32)
    missing = keys == NONE
    return np.where(missing, -1, LOW - (keys & LOW)), np.where(missing, np.float32(-1), scores)


def _greatest(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest of each row (fewer where it has fewer), descending, and their places."""
    found = torch.topk(torch.from_numpy(keys), min(k, keys.shape[1]), dim=1, sorted=True)
    return found.values.numpy(), found.indices.numpy()


def _one_of_each(
    here: np.ndarray, here_group: np.ndarray, there: np.ndarray, there_group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same keys, without the lesser of two that are of one group."""
    here, there = here.copy(), there.copy()
    for rank in range(there.shape[1]):
        key = there[:, rank : rank + 1]
        same = (here_group == there_group[:, rank : rank + 1]) & (here != NONE) & (key != NONE)
        worse = (same & (here > key)).any(axis=1)
        here[same & (here <= key)] = NONE
        there[worse, rank] = NONE
    return here, there
