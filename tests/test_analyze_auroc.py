"""AUROC against counting every pair, F1 against trying every threshold, and choosing without looking at what is scored."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import sparse

from analyze.truth.auroc import auroc
from analyze.truth.choosing import choose_columns
from analyze.truth.probes import ALPHAS, best_channel, ridge_probe
from analyze.truth.thresholds import best_f1, best_threshold, f1_of
from store.errors import NonFiniteError


def naive(values: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive value exceeds a negative one, counted pair by pair."""
    a, b = values[positive], values[~positive]
    if not len(a) or not len(b):
        return float("nan")
    return float(sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b)))


tables = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        arrays.arrays(np.float32, (n, 3), elements=st.sampled_from([-2.5, -1.0, 0.0, 0.0, 1e-20, 0.5, 0.5, 3.0])),
        arrays.arrays(np.bool_, (n, 2)),
    )
)


@settings(max_examples=60, deadline=None)
@given(tables)
def test_auroc_counts_every_pair_with_ties_half(table: tuple[np.ndarray, np.ndarray]) -> None:
    values, positive = table
    expected = np.asarray([[naive(values[:, f], positive[:, a]) for f in range(3)] for a in range(2)])
    np.testing.assert_allclose(auroc(values, positive), expected, atol=1e-12)
    np.testing.assert_allclose(auroc(sparse.csr_array(values), positive), expected, atol=1e-12)


def test_columns_are_ranked_some_at_a_time_so_that_memory_does_not_grow_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    values, shown = rng.choice([-1.0, 0.5, 2.0], (30, 7)).astype(np.float32), rng.random((30, 2)) < 0.5
    at_once = auroc(values, shown)
    monkeypatch.setattr("analyze.truth.auroc.DENSE_VALUES", 61)
    np.testing.assert_array_equal(auroc(values, shown), at_once)
    monkeypatch.setattr("analyze.truth.auroc.DENSE_VALUES", 2**14)
    wide, peaks = rng.standard_normal((2000, 400)).astype(np.float32), []
    for columns in (40, 400):
        tracemalloc.start()
        auroc(wide[:, :columns], rng.random((2000, 1)) < 0.5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_best_channel_of_points_one_after_another_is_that_of_all() -> None:
    rng = np.random.default_rng(7)
    shown, part = rng.random((90, 3)) < 0.5, np.repeat([0, 1, 2], 30)
    x = rng.standard_normal((90, 12)).astype(np.float32)
    x[:, 8] -= shown[:, 1]
    x[:, 9] = x[:, 2]  # the first of equals
    apart, whole = best_channel([x[:, :5], x[:, 5:]], shown, part), best_channel([x], shown, part)
    for field in ("column", "selection", "scored", "threshold", "f1"):
        np.testing.assert_array_equal(getattr(apart, field), getattr(whole, field))


def test_auroc_of_an_infinity_or_a_nan_is_refused() -> None:
    for bad in (np.nan, np.inf):
        values = np.asarray([[1.0], [bad]], np.float32)
        with pytest.raises(NonFiniteError, match="NaN or an infinity"):
            auroc(values, np.asarray([[True], [False]]))


def test_a_column_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    rng = np.random.default_rng(0)
    shown = rng.random((400, 1)) < 0.5
    choose = np.arange(400) < 200
    values = rng.random((400, 50)).astype(np.float32)
    values[:, 7] += np.where(
        choose, shown[:, 0], ~shown[:, 0]
    )  # tells the truth on the first half and lies on the second
    choice = choose_columns(values, shown, choose)
    assert choice.column[0] == 7
    assert choice.selection[0] > 0.99
    assert choice.scored[0] < 0.01


def test_a_label_with_too_few_rows_is_not_judged() -> None:
    shown = np.zeros((40, 2), bool)
    shown[:2, 0] = True
    shown[::2, 1] = True
    choice = choose_columns(np.random.default_rng(0).random((40, 3)).astype(np.float32), shown, np.arange(40) < 20)
    assert np.isnan(choice.selection[0])
    assert np.isnan(choice.scored[0])
    assert not np.isnan(choice.scored[1])


def test_the_ridge_probe_reads_a_direction_that_no_channel_holds() -> None:
    rng = np.random.default_rng(1)
    direction = rng.choice([-1.0, 1.0], 24) / 24**0.5
    shown = rng.random((900, 1)) < 0.5
    x = (rng.standard_normal((900, 24)) + np.outer(4 * (shown[:, 0] - 0.5), direction)).astype(np.float32)
    part = np.repeat([0, 1, 2], 300)
    probe, channel = ridge_probe(x, shown, part), best_channel([x[:, :10], x[:, 10:]], shown, part)
    assert probe.scored[0] > 0.95
    assert 0.5 < channel.scored[0] < 0.8


def test_the_best_channel_may_be_of_either_sign() -> None:
    shown = np.random.default_rng(2).random((60, 1)) < 0.5
    x = np.where(shown, -3.0, 3.0).astype(np.float32)
    assert best_channel([x], shown, np.repeat([0, 1, 2], 20)).scored[0] == 1.0


def naive_f1(values: np.ndarray, positive: np.ndarray, threshold: float) -> float:
    said = values >= threshold
    hits = int((said & positive).sum())
    return 2 * hits / max(int(said.sum()) + int(positive.sum()), 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(
            arrays.arrays(np.float32, (n, 2), elements=st.sampled_from([-1.5, 0.0, 0.0, 0.5, 0.5, 3.0])),
            arrays.arrays(np.bool_, (n, 2)),
        )
    )
)
def test_no_threshold_has_a_higher_f1_than_the_chosen_one(table: tuple[np.ndarray, np.ndarray]) -> None:
    values, positive = table
    threshold = best_threshold(values, positive)
    found = f1_of(values, positive, threshold)
    for column in range(2):
        tried = [naive_f1(values[:, column], positive[:, column], t) for t in np.unique(values[:, column])]
        own = naive_f1(values[:, column], positive[:, column], threshold[column])
        assert found.f1[column] == own == max(tried)


def test_a_threshold_is_chosen_on_one_half_and_scored_on_the_other_midway_between_values() -> None:
    values = np.asarray([[0.0], [0.0], [2.0], [4.0], [0.0], [2.9], [3.1], [9.0]], np.float32)
    shown = np.asarray([[0], [0], [0], [1], [0], [1], [1], [0]], bool)
    cut = best_f1(values, shown, np.arange(8) < 4)
    assert cut.threshold[0] == 3.0
    assert cut.f1[0] == 2 * 1 / (2 + 2)


def test_the_ridge_probe_is_the_same_by_rows_and_by_channels() -> None:
    rng = np.random.default_rng(4)
    shown = rng.random((90, 2)) < 0.5
    wide = (rng.standard_normal((90, 140)) + shown[:, :1]).astype(np.float32)  # fewer rows than channels
    part = np.repeat([0, 1, 2], 30)
    by_rows = ridge_probe(wide, shown, part)
    inside, outside = wide[part < 2].astype(np.float64), wide[part == 2].astype(np.float64)
    mean, deviation = inside.mean(axis=0), inside.std(axis=0) + 1e-6
    inside, outside = (inside - mean) / deviation, (outside - mean) / deviation
    target, found = shown[part < 2] - shown[part < 2].mean(axis=0), []
    for alpha in ALPHAS:
        weight = np.linalg.solve(inside.T @ inside / 60 + alpha * np.eye(140), inside.T @ target / 60)
        found.append(np.diagonal(auroc((outside @ weight).astype(np.float32), shown[part == 2])))
    for label in range(2):
        assert min(abs(by_rows.scored[label] - one[label]) for one in found) < 0.01


def test_a_probe_that_has_nothing_to_be_judged_on_says_nothing() -> None:
    shown = (np.arange(40) % 2 == 0)[:, None]
    x = np.random.default_rng(5).random((40, 3)).astype(np.float32)
    assert np.isnan(ridge_probe(x, shown, np.repeat([1, 2], 20)).scored[0])  # no rows in part 0
    assert not np.isnan(ridge_probe(x, shown, np.repeat([0, 1, 2, 2], 10)).scored[0])
