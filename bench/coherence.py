"""Coherence of all features over their top 10 images with unique prompts: ours against loops over features.

2,000 images x 12,288 features, float32 embeddings of 512.  Two alternatives, one feature at a time: argsort of all images, a walk over
them with a set of the prompts seen until there are 10, then

    products   their embeddings times themselves, 10 x 10, and the mean over the upper triangle, as the reference publishes it (the one
               that counts)
    pairs      one dot product a pair

Ours takes the list of unique images that `scores` keeps while it streams, so the selection is timed with it, and then once apart.
It sums in float64.

Least work: each score once through the memory (98 MB), and the 512 numbers of each of the 122,880 images listed.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np

from analyze.features.coherence import mean_pairwise_cosine
from analyze.scoring.top import TopImages
from bench.features import FEATURES, IMAGES, Scores
from bench.lines import Line, Need, Peer, Size
from bench.timing import by_turns

DIM, TOP_M = 512, 10
SIZES = {"tiny": (64, 128, 1, 1), "quick": (IMAGES, FEATURES, 3, 1), "full": (IMAGES, FEATURES, 5, 2)}
"""images, features, rounds, how many of the loops"""
GOAL = 1 / 8


def embeddings(images: int) -> np.ndarray:
    """Unit vectors with something in common, as pictures have."""
    values = np.random.default_rng(2).normal(size=(images, DIM)) + 0.5
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def selected(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The lists of unique images, as offsets and values: what the pass of `scores` leaves in the feature table."""
    top = TopImages(scores.features, TOP_M, scores.groups)

    def looked_at(block: slice) -> TopImages:
        found = TopImages(scores.features, TOP_M, scores.groups)
        found.add(block.start, scores.matrix[block], scores.tokens[block])
        return found

    for of_block in scores.at_once(looked_at):
        top.merge(of_block)
    images = top.result()[0].T
    return np.concatenate(([0], np.cumsum((images >= 0).sum(axis=1)))), images[images >= 0]


def ours(scores: Scores, vectors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Selection and coherence, as the product runs them."""
    return mean_pairwise_cosine(vectors, *selected(scores), lengths)


def walked(scores: Scores, feature: int) -> list[int]:
    """The best images of a feature, one a prompt, by a walk over all of them in order."""
    seen: set[int] = set()
    chosen: list[int] = []
    for image in np.argsort(scores.matrix[:, feature])[::-1]:
        prompt = int(scores.groups[image])
        if prompt not in seen:
            seen.add(prompt)
            chosen.append(int(image))
            if len(chosen) == TOP_M:
                break
    return chosen


def products(scores: Scores, vectors: np.ndarray) -> np.ndarray:
    """One k x k product a feature."""
    return np.asarray([_off_diagonal(vectors[walked(scores, feature)]) for feature in range(scores.features)])


def _off_diagonal(chosen: np.ndarray) -> float:
    if len(chosen) < 2:
        return float("nan")
    return float((chosen @ chosen.T)[np.triu_indices(len(chosen), k=1)].mean())


def pairs(scores: Scores, vectors: np.ndarray) -> np.ndarray:
    """One dot product a pair."""
    found = np.empty(scores.features)
    for feature in range(scores.features):
        found[feature] = np.mean([a @ b for a, b in combinations(vectors[walked(scores, feature)], 2)])
    return found


def given(vectors: np.ndarray, offsets: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The loop over lists that are there already: one k x k product a feature."""
    return np.asarray([_off_diagonal(vectors[images[a:b]]) for a, b in pairwise(offsets)])


def lines(size: Size) -> Iterator[Line]:
    """Both questions, after all were seen to agree: on features active on enough prompts, for the loops go on to images without."""
    images, features, rounds, loops = SIZES[size]
    scores = Scores(images, features)
    vectors = embeddings(images).astype(np.float32)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    lists = selected(scores)
    enough = np.diff(lists[0]) == TOP_M
    np.testing.assert_allclose(ours(scores, vectors, lengths)[enough], products(scores, vectors)[enough], atol=1e-5)
    listed = Need("copy", len(lists[1]) * DIM * 4)
    others = {"a loop: walk, k x k product": products, "a loop: walk, a product a pair": pairs}
    chosen = dict(list(others.items())[:loops])
    seconds, *its = by_turns(
        partial(ours, scores, vectors, lengths),
        *(partial(other, scores, vectors) for other in chosen.values()),
        rounds=rounds,
    )
    first, *more = (Peer(name, times) for name, times in zip(chosen, its, strict=True))
    yield Line(
        f"unique prompts: {images:,} x {features:,}", seconds, (replace(first, goal=GOAL), *more),
        (Need("copy", scores.matrix.nbytes), listed),
    )  # fmt: skip
    alone, looped = by_turns(
        partial(mean_pairwise_cosine, vectors, *lists, lengths), partial(given, vectors, *lists), rounds=rounds
    )
    yield Line("images listed, cosines alone", alone, (Peer("a loop: k x k product", looped),), (listed,))
