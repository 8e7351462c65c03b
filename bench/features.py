"""Statistics and top images of all features: our stream of blocks against a loop over features.

2,000 images x 12,288 features of float32 scores in RAM.  Two alternatives, one feature at a time:

    partition  as the reference publishes it: frequency and maximum for all features at once, then for each the mean and the deviation
               where it is active, and its top images by argpartition and a sort of these    (the one that counts)
    argsort    as its method is described: alive, frequency, mean, deviation, argsort of all images, the first ones

Ours is what `scores` runs on each block of images as it is made, so the matrix need never be there as a whole; it also keeps the token
of each top image, and orders equal scores by image.

Least work: each score once through the memory, 98 MB; of the words, each active entry once.

The top words of text tokens have a comparison of their own: one pane of features, 512 images of 20 tokens, 5 % active, the pieces of the
tokens distributed as words are.  The alternative goes over the features with one `maximum.at` and one sort of all pieces.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from analyze.scoring.contenders import count_above
from analyze.scoring.encoding import PANE
from analyze.scoring.matrices import IMAGE_BLOCK
from analyze.scoring.top import TopImages, TopWords
from bench.lines import Line, Need, Peer, Size
from bench.timing import by_turns, cores

IMAGES, FEATURES, TOP, EPS = 2_000, 12_288, 16, 0.0
SIZES = {
    "tiny": (64, 128, 256, 32, 1), "quick": (IMAGES, FEATURES, 512 * 20, PANE, 3), "full": (IMAGES, FEATURES, 512 * 20, PANE, 5)
}  # fmt: skip
"""images, features, rows of text tokens, features of a pane, rounds"""
GOAL, ENTRY = 1 / 4, 20
"""an active entry is two int64 and a float32"""
SEEDS_PER_PROMPT = 2
Found = TypeVar("Found")


@dataclass(frozen=True)
class Scores:
    """Scores as dictionaries leave them: each feature active on its own share of the images, from 5 in 1,000 to all."""

    images: int = IMAGES
    features: int = FEATURES

    @cached_property
    def matrix(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        share = np.exp(rng.uniform(np.log(0.005), 0, self.features)).astype(np.float32)
        values = rng.standard_exponential((self.images, self.features), np.float32)
        values[rng.random((self.images, self.features), np.float32) > share] = 0
        return values

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(1).integers(0, 1024, (self.images, self.features), np.int32)

    @cached_property
    def groups(self) -> np.ndarray:
        """The prompt of each image, two images a prompt."""
        return np.arange(self.images) // SEEDS_PER_PROMPT

    def at_once(self, work: Callable[[slice], Found]) -> Iterator[Found]:
        """The work on each block of images, a thread for each core as `scores` has them, in order."""
        blocks = [slice(start, min(start + IMAGE_BLOCK, self.images)) for start in range(0, self.images, IMAGE_BLOCK)]
        with ThreadPoolExecutor(cores()) as pool:
            yield from pool.map(work, blocks)


def ours(scores: Scores) -> dict[str, np.ndarray]:
    """What a pass keeps of the scores, block after block, each found for itself and then merged: counts, sums, maxima, top images."""
    top = TopImages(scores.features, TOP)
    active, most = np.zeros(scores.features, np.int64), np.zeros(scores.features, np.float32)
    total, squares = np.zeros(scores.features), np.zeros(scores.features)
    for values, of_block in scores.at_once(partial(looked_at, scores)):
        active += values["active"]
        most = np.maximum(most, values["most"])
        total += values["total"]
        squares += values["squares"]
        top.merge(of_block)
    images, _, best = top.result()
    mean = total / np.maximum(active, 1)
    deviation = np.sqrt(np.maximum(squares / np.maximum(active, 1) - mean * mean, 0))
    return {
        "alive": most > EPS, "frequency": active / scores.images, "mean": mean, "deviation": deviation, "images": images, "best": best,
    }  # fmt: skip


def looked_at(scores: Scores, block: slice) -> tuple[dict[str, np.ndarray], TopImages]:
    """What is found out about one block."""
    values, top = scores.matrix[block], TopImages(scores.features, TOP)
    top.add(block.start, values, scores.tokens[block])
    counts = {
        "active": count_above(values, EPS), "most": values.max(axis=0), "total": values.sum(axis=0),
        "squares": np.einsum("if,if->f", values, values),
    }  # fmt: skip
    return counts, top


def partition(scores: Scores) -> dict[str, np.ndarray]:
    """Vectorised where the reference is, else one feature at a time."""
    matrix, count = scores.matrix, scores.features
    frequency, most = (matrix > EPS).mean(axis=0), matrix.max(axis=0)
    mean, deviation = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for feature in np.flatnonzero(most > EPS):
        column = matrix[:, feature]
        values = column[column > EPS]
        mean[feature], deviation[feature] = values.mean(), values.std()
    images, best = np.empty((TOP, count), np.int32), np.empty((TOP, count), np.float32)
    for feature in range(count):
        column = matrix[:, feature]
        some = np.argpartition(column, -TOP)[-TOP:]
        images[:, feature] = some[np.argsort(column[some])[::-1]]
        best[:, feature] = column[images[:, feature]]
    return {
        "alive": most > EPS,
        "frequency": frequency,
        "mean": mean,
        "deviation": deviation,
        "images": images,
        "best": best,
    }


def argsort(scores: Scores) -> dict[str, np.ndarray]:
    """Everything one feature at a time, all images sorted."""
    found: dict[str, list[Any]] = {name: [] for name in ("alive", "frequency", "mean", "deviation", "images", "best")}
    for feature in range(scores.features):
        column = scores.matrix[:, feature]
        active = column > EPS
        values = column[active]
        order = np.argsort(column)[::-1][:TOP]
        row = (
            active.any(),
            active.mean(),
            values.mean() if len(values) else 0.0,
            values.std() if len(values) else 0.0,
            order,
            column[order],
        )
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    return {name: np.stack(values, axis=-1) for name, values in found.items()}


def agree(mine: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    """Both found the same; where a feature is active on fewer images than asked for, ours lists no more, and the loop lists zeros."""
    assert (mine["alive"] == others["alive"]).all()
    for name, apart in (
        ("frequency", 1e-4),
        ("mean", 1e-4),
        ("deviation", 2e-3),
    ):  # the deviation of one value is the root of a rounding
        np.testing.assert_allclose(mine[name], others[name], rtol=1e-3, atol=apart)
    np.testing.assert_array_equal(np.maximum(mine["best"], 0), others["best"])


WORD_BLOCK, PIECES, ACTIVE = 64, 3000, 0.05


@dataclass(frozen=True)
class Words:
    """Active entries of text tokens, in the small blocks that a pass makes of them."""

    rows: int
    features: int

    @cached_property
    def blocks(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Features, pieces and values."""
        rng = np.random.default_rng(3)
        share = 1 / np.arange(1, PIECES + 1)
        piece = rng.choice(PIECES, self.rows, p=share / share.sum())
        found = []
        for first in range(0, self.rows, WORD_BLOCK):
            z = rng.standard_exponential((min(WORD_BLOCK, self.rows - first), self.features), np.float32)
            row, feature = np.nonzero(rng.random(z.shape) < ACTIVE)
            found.append((feature, piece[first + row], z[row, feature]))
        return found


def top_words(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Pieces and activations (rank, feature), as a pass finds them."""
    top = TopWords(words.features, TOP)
    for block in words.blocks:
        top.add(*block)
    return top.result()


def words_by_feature(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """The same, one feature at a time."""
    feature, piece, value = (np.concatenate(each) for each in zip(*words.blocks, strict=True))
    order = np.argsort(feature, kind="stable")
    ends = np.searchsorted(feature[order], np.arange(words.features + 1))
    pieces, scores = np.full((TOP, words.features), -1), np.full((TOP, words.features), -1, np.float32)
    for number in range(words.features):
        mine = order[ends[number] : ends[number + 1]]
        best = np.zeros(PIECES, np.float32)
        np.maximum.at(best, piece[mine], value[mine])
        some = np.argsort(-best, kind="stable")[:TOP]
        some = some[best[some] > 0]
        pieces[: len(some), number], scores[: len(some), number] = some, best[some]
    return pieces, scores


def words_line(words: Words, rounds: int) -> Line:
    """One pane of features on a block of images, after both were seen to agree."""
    for mine, other in zip(top_words(words), words_by_feature(words), strict=True):
        np.testing.assert_array_equal(mine, other)
    ours, its = by_turns(partial(top_words, words), partial(words_by_feature, words), rounds=rounds)
    entries = sum(len(value) for _, _, value in words.blocks)
    return Line(
        f"text, top {TOP} words: {words.rows:,} x {words.features:,}", ours, (Peer("a loop: maximum.at, argsort", its, GOAL),),
        (Need("copy", ENTRY * entries),), f"{entries / 1e6:.2f} M active entries",
    )  # fmt: skip


def lines(size: Size) -> Iterator[Line]:
    """Words, then statistics, after all ways were seen to agree."""
    images, features, word_rows, word_features, rounds = SIZES[size]
    yield words_line(Words(word_rows, word_features), rounds)
    scores = Scores(images, features)
    mine, work = ours(scores), partial(ours, scores)
    others = {"loops, mean and argpartition": partition, "a loop over features, argsort": argsort}
    for other in others.values():
        agree(mine, other(scores))
    seconds, *its = by_turns(work, *(partial(other, scores) for other in others.values()), rounds=rounds)
    first, *more = (Peer(name, times) for name, times in zip(others, its, strict=True))
    yield Line(
        f"statistics, top {TOP}: {images:,} x {features:,}", seconds, (replace(first, goal=GOAL), *more),
        (Need("copy", scores.matrix.nbytes),),
    )  # fmt: skip
