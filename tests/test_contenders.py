"""The lists of the best images against a sort of every column: any blocks, any order, prompts apart or mixed, ties, short lists."""

from itertools import pairwise

import numpy as np
import pytest

from analyze.scoring.contenders import count_above
from analyze.scoring.top import TopImages


def slow(
    scores: np.ndarray, tokens: np.ndarray, groups: np.ndarray | None, k: int, above: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, tokens and scores (k, feature), -1 where there are none, by a walk down each sorted column."""
    shape = (k, scores.shape[1])
    images, where, best = np.full(shape, -1), np.full(shape, -1), np.full(shape, -1, np.float32)
    for feature in range(scores.shape[1]):
        seen: set[int] = set()
        rank = 0
        for image in np.argsort(-scores[:, feature], kind="stable"):
            if scores[image, feature] <= above or rank == k:
                break
            if groups is None or int(groups[image]) not in seen:
                seen.add(-1 if groups is None else int(groups[image]))
                images[rank, feature], where[rank, feature] = image, tokens[image, feature]
                best[rank, feature] = scores[image, feature]
                rank += 1
    return images, where, best


@pytest.mark.parametrize("merged", [False, True], ids=["one list", "a list a block"])
@pytest.mark.parametrize("prompts", ["none", "neighbours", "mixed"])
def test_the_best_images_are_those_of_a_sort(prompts: str, merged: bool) -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        n, count, k = int(rng.integers(1, 400)), int(rng.integers(1, 24)), int(rng.integers(1, 20))
        above = float(rng.choice([0, 0.5]))
        scores = rng.standard_exponential((n, count), np.float32)
        scores = np.round(2 * scores) / 2 if trial % 3 == 0 else scores  # many equal scores
        scores[rng.random((n, count)) > rng.random(count)] = 0
        tokens = rng.integers(0, 99, (n, count)).astype(np.int32)
        groups = {"none": None, "neighbours": np.arange(n) // 3, "mixed": rng.integers(0, max(1, n // 2), n)}[prompts]
        cuts = np.unique([0, n, *rng.integers(0, n + 1, int(rng.integers(0, 5)))])
        blocks = [slice(int(a), int(b)) for a, b in pairwise(cuts)]
        if trial % 4 == 0:
            rng.shuffle(blocks)  # type: ignore[arg-type]
        top = TopImages(count, k, groups, above)
        for block in blocks:
            into = TopImages(count, k, groups, above) if merged else top
            into.add(block.start, scores[block], tokens[block])
            if merged:
                top.merge(into)
        for found, expected in zip(top.result(), slow(scores, tokens, groups, k, above), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_active_images_are_counted_over_more_than_a_byte_holds() -> None:
    scores = np.random.default_rng(0).normal(size=(700, 5)).astype(np.float32)
    scores[:, 0] = 1
    np.testing.assert_array_equal(count_above(scores, 0.25), (scores > 0.25).sum(axis=0))
