"""The order of a pack's rows is a bijection with an exact inverse, well mixed, and the one that FORMAT.md describes."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.shuffle import Permutation, round_keys

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 40_000), st.integers(0, 140).map(lambda n: n * n + 1))


@settings(max_examples=60, deadline=None)
@given(rows=SIZES, seed=st.integers(0, 2**40), stream=st.sampled_from(["img", "txt", "joint"]))
def test_the_order_is_a_bijection_and_its_inverse_is_exact(rows: int, seed: int, stream: str) -> None:
    order = Permutation(rows, round_keys(seed, "train", stream))
    numbers = np.arange(rows)
    places = order(numbers)
    assert np.array_equal(np.sort(places), numbers)
    assert np.array_equal(order.inverse(places), numbers)


@pytest.mark.parametrize("rows", [2**31 - 1, 10**12, 2**62])
def test_it_needs_no_memory_for_rows_that_are_not_asked_for(rows: int) -> None:
    order = Permutation(rows, round_keys(3, "val", "img"))
    numbers = np.random.default_rng(0).integers(0, rows, 20_000)
    places = order(numbers)
    assert places.min() >= 0 and places.max() < rows and len(np.unique(places)) == len(np.unique(numbers))
    assert np.array_equal(order.inverse(places), numbers)


def as_described(rows: int, seed: int, split: str, stream: str, x: int) -> int:
    """FORMAT.md in whole numbers of Python."""
    side = math.isqrt(rows - 1) + 1
    keys = [
        int.from_bytes(hashlib.sha256(f"granary-pack-2:{seed}:{split}:{stream}:{i}".encode()).digest()[:8], "little")
        for i in range(8)
    ]
    while True:
        left, right = divmod(x, side)
        for key in keys:
            z = (right + key) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            left, right = right, (left + ((z >> 32) * side >> 32)) % side
        x = left * side + right
        if x < rows:
            return x


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 1000, 10**9 + 7])
def test_it_is_the_order_that_the_format_describes(rows: int) -> None:
    numbers = np.unique(np.linspace(0, rows - 1, 40).astype(np.int64))
    found = Permutation(rows, round_keys(5, "train", "txt"))(numbers)
    assert found.tolist() == [as_described(rows, 5, "train", "txt", int(x)) for x in numbers]


@pytest.mark.parametrize(("images", "tokens"), [(64, 256), (1000, 16), (37, 411)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_an_image_are_spread_evenly_over_the_pack(images: int, tokens: int, seed: int) -> None:
    rows = images * tokens
    image = Permutation(rows, round_keys(seed, "train", "img")).inverse(np.arange(rows)) // tokens
    batches = min(tokens, 64)
    size = rows // batches
    counts = np.array([np.bincount(image[b * size : (b + 1) * size], minlength=images) for b in range(batches)])
    expected = size * tokens / rows
    freedom = (batches - 1) * (images - 1)
    statistic = ((counts - expected) ** 2 / expected).sum()  # chi-square, but for the rows after the last batch
    assert abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)
    together = (image[:-1] == image[1:]).sum()  # neighbours in the pack that are of one image
    by_chance = tokens - 1
    assert abs(together - by_chance) < 6 * math.sqrt(by_chance)


def test_neighbours_go_to_places_that_have_nothing_to_do_with_each_other() -> None:
    rows = 100_003
    places = Permutation(rows, round_keys(0, "train", "img"))(np.arange(rows))
    for apart in (1, 2, 317, 1024):  # 317 is the side of the square
        steps = (places[apart:] - places[:-apart]) % rows
        counts = np.bincount(steps * 50 // rows, minlength=50)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 49 + 6 * math.sqrt(2 * 49)


def test_seed_split_and_stream_each_give_another_order() -> None:
    keys = [("train", "img", 0), ("train", "img", 1), ("val", "img", 0), ("train", "txt", 0)]
    places = [Permutation(5000, round_keys(seed, split, stream))(np.arange(5000)) for split, stream, seed in keys]
    same = [(a == b).mean() for i, a in enumerate(places) for b in places[:i]]
    assert max(same) < 0.002
