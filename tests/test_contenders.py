"""The lists of the best images against a sort of every column: any blocks, any order, prompts apart or mixed, ties, short lists."""

import inspect
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._compile import _disable_dynamo

from analyze.scoring import top as top_module
from analyze.scoring.contenders import count_above
from analyze.scoring.encoding import Encoder
from analyze.scoring.top import TopImages, TopWords
from store import Site
from tests.toy_dictionaries import random_dictionary
from train.dictionaries.activations import keep_top
from train.learning import kernels


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


def best_words(
    entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]], count: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces and scores (k, feature) by a dictionary of maxima for each feature."""
    best: list[dict[int, float]] = [{} for _ in range(count)]
    for feature, piece, value in entries:
        for f, p, v in zip(feature.tolist(), piece.tolist(), value.tolist(), strict=True):
            best[f][p] = max(best[f].get(p, 0.0), v)
    pieces, scores = np.full((k, count), -1), np.full((k, count), -1, np.float32)
    for f, known in enumerate(best):
        for rank, (p, v) in enumerate(sorted(known.items(), key=lambda each: (-each[1], each[0]))[:k]):
            pieces[rank, f], scores[rank, f] = p, v
    return pieces, scores


@pytest.mark.parametrize("merged", [False, True], ids=["one list", "a list a block"])
def test_the_best_words_are_those_of_a_walk(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for trial in range(30):
        count, k, vocabulary = int(rng.integers(1, 30)), int(rng.integers(1, 12)), int(rng.choice([3, 40, 250_000]))
        monkeypatch.setattr(top_module, "POOL", int(rng.integers(1, 400)))  # ranked again and again
        monkeypatch.setattr(
            top_module, "CODE", 32 if trial % 2 else (vocabulary * 3).bit_length()
        )  # few features at once
        entries = []
        for size in rng.integers(0, 300, 5):
            value = rng.standard_exponential(size).astype(np.float32) + np.float32(1e-9)
            value = np.ceil(2 * value) / 2 if trial % 3 == 0 else value  # many equal ones
            entries.append((rng.integers(0, count, size), rng.integers(0, vocabulary, size).astype(np.int32), value))
        top = TopWords(count, k)
        for entry in entries:
            into = TopWords(count, k) if merged else top
            into.add(*entry)
            if merged:
                top.merge(into)
        for found, expected in zip(top.result(), best_words(entries, count, k), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_long_lists_with_rivals_take_memory_in_proportion() -> None:
    """All pairs of two lists of 400 of 512 features would be masks of 82 MB each."""
    rng, n, k, count = np.random.default_rng(2), 1600, 400, 512
    groups = np.arange(n) % (n // 2)  # every prompt again in the other half
    tokens = np.zeros((n, count), np.int32)
    scores = rng.standard_exponential((n, count), np.float32)
    halves = [TopImages(count, k, groups) for _ in range(2)]
    for first, half in zip((0, n // 2), halves, strict=True):
        half.add(first, scores[first : first + n // 2], tokens[first : first + n // 2])
    tracemalloc.start()
    halves[0].merge(halves[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * count * k * 8, f"{peak / 1e6:.0f} MB"
    some = [0, 100, 511]
    expected = slow(scores[:, some], tokens[:, some], groups, k, 0)
    np.testing.assert_array_equal(halves[0].result()[0][:, some], expected[0])


def test_topk_is_encoded_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = random_dictionary(site=Site.parse("img_0"), d_model=8, n_features=96, activation="topk", k=5)
    encoder, x = (
        Encoder(dictionary, torch.device("cpu")),
        torch.from_numpy(np.random.default_rng(0).normal(size=(40, 8))),
    )
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it fails
    with pytest.raises(ImportError):
        _disable_dynamo(lambda: None)()
    monkeypatch.setattr(
        inspect.unwrap(kernels._encode), "__dynamo_disable", None, raising=False
    )  # as if it had never been called
    with torch.inference_mode():
        row, feature, value = encoder.greatest(x.float())
        expected = keep_top(torch.relu(x.float() @ dictionary.encoder.weight.T + dictionary.encoder.bias), 5)
    found = torch.zeros_like(expected)
    found[row, feature] = value
    torch.testing.assert_close(found, expected)
    assert len(value) == 40 * 5


@pytest.mark.slow
def test_a_process_that_encodes_topk_never_imports_the_compiler_and_has_the_figures_of_training() -> None:
    code = """
import sys, torch
from analyze.scoring.encoding import Encoder
from store import Site
from tests.toy_dictionaries import random_dictionary
from train.learning.kernels import encode_topk
dictionary = random_dictionary(site=Site.parse("img_0"), d_model=8, n_features=96, activation="topk", k=5)
encoder, x = Encoder(dictionary, torch.device("cpu")), torch.randn(40, 8)
with torch.inference_mode():
    row, feature, value = encoder.greatest(x)
    assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
    same = encode_topk(x, dictionary.encoder.weight, dictionary.encoder.bias, 5)
assert torch.equal(feature, same.features) and torch.equal(value, same.values) and row.tolist() == sorted([*range(40)] * 5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
