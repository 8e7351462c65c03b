"""The figures of a scan are those of slow loops, and what they are called is so."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from analyze.inputs import open_analysis
from analyze.scan.contrast import contrast_figures, contrast_of, sentence
from analyze.scan.figures import Figures, best_finds
from analyze.scan.images import Catalogue
from analyze.scan.kinds import temporal_figures
from analyze.scan.replicates import Replicates, most_open
from analyze.settings import Inputs
from tests.small_scans import PLAN, SEEDS, scan, where


def slow_spatial(folder: Path, images: list[int], inside: np.ndarray, step: int) -> np.ndarray:
    """Mean inside less mean outside of every feature, image by image, in float64."""
    analysis = open_analysis(Inputs(**where(folder, sites="img_0")))
    subject = analysis.subjects[0]
    weight = subject.dictionary.encoder.weight.detach().numpy().astype(np.float64)
    bias = subject.dictionary.encoder.bias.detach().numpy().astype(np.float64)
    found = []
    for image in images:
        x = analysis.store.read(subject.site, step, "mlp_in", image, image + 1)[0].astype(np.float64)
        z = np.maximum(x @ weight.T + bias, 0)
        found.append(z[inside].mean(axis=0) - z[~inside].mean(axis=0))
    return np.asarray(found)


def test_spatial_figures_are_those_of_plain_loops(planted_scan: Path) -> None:
    images = list(range(3, 30, 2))
    inside = np.zeros(PLAN.grid, bool)
    inside[1:4, 2:8] = True
    rows = scan(
        planted_scan,
        kind="spatial",
        region="2-4:3-8",
        images=",".join(map(str, images)),
        sites="img_0",
        steps="1",
        best=48,
    )
    slow = slow_spatial(planted_scan, images, inside.ravel(), 1)
    prompts = [image // SEEDS for image in images]
    means = np.asarray([slow[[p == prompt for p in prompts]].mean(axis=0) for prompt in dict.fromkeys(prompts)])
    for row in rows:
        own = slow[:, row["feature"]]
        assert row["difference"] == pytest.approx(means[:, row["feature"]].mean(), rel=1e-4, abs=1e-6)
        within = [own[[p == prompt for p in prompts]] for prompt in dict.fromkeys(prompts)]
        left = sum(((part - part.mean()) ** 2).sum() for part in within)
        assert row["deviation"] == pytest.approx((left / (len(own) - len(within))) ** 0.5, rel=1e-3, abs=1e-6)
        assert row["image"] == images[int(np.argmax(own))]


def chance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b]))


@pytest.mark.parametrize("matched", [True, False])
def test_contrast_figures_are_those_of_plain_loops(matched: bool) -> None:
    rng = np.random.default_rng(3)
    prompts = tuple(f"p{image // 3}" for image in range(18))
    seeds = np.arange(18) % 3 if matched else np.arange(18)
    known = Catalogue(prompts, prompts, seeds.astype(np.int64), True)
    pairs = [
        (np.arange(0, 3), np.arange(3, 5)),
        (np.arange(6, 9), np.arange(9, 12)),
        (np.arange(6, 9), np.arange(15, 18)),
    ]
    x = rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], (18, 7)).astype(np.float32)
    contrast = contrast_of(known, pairs)
    found = contrast_figures(x[contrast.images], contrast, 0, "difference", "both", 0.0)
    x = x.astype(np.float64)
    for f in range(7):
        if matched:
            each = [[float(x[i, f] - x[j, f]) for i in a for j in b if seeds[i] == seeds[j]] for a, b in pairs]
            units = [d for pair in each for d in pair]
            spread, n = np.std(units, ddof=1), len(units)
            within = (sum(np.var(d) * len(d) for d in each) / (n - 3)) ** 0.5
            mean = np.mean([np.mean(d) for d in each])
            pairs_used = [(a[np.isin(seeds[a], seeds[b])], b) for a, b in pairs]
        else:
            pairs_used = pairs
            mean = np.mean([x[a, f].mean() - x[b, f].mean() for a, b in pairs])
            parts = [x[side, f].astype(np.float64) for pair in pairs for side in pair]
            n = sum(map(len, parts))
            within = (sum(np.var(part) * len(part) for part in parts) / (n - len(parts))) ** 0.5
            spread = within
        a, b = (np.concatenate([pair[side] for pair in pairs_used]) for side in (0, 1))
        assert found.columns["difference"][f] == pytest.approx(mean, abs=1e-12)
        assert found.columns["deviation"][f] == pytest.approx(within, abs=1e-12)
        assert found.columns["n"][f] == n
        assert found.columns["auroc"][f] == pytest.approx(chance(x[a, f], x[b, f]), abs=1e-12)
        if spread > 0:
            assert found.columns["effect"][f] == pytest.approx(mean / spread, abs=1e-9)
        side = a if mean >= 0 else b
        assert x[found.image[f], f] == x[side, f].max()


def known_images(prompts: list[int], seeds: list[int]) -> Catalogue:
    names = tuple(f"p{prompt}" for prompt in prompts)
    return Catalogue(names, names, np.asarray(seeds, np.int64), True)


def test_a_seed_that_two_sides_share_by_chance_does_not_throw_the_others_away() -> None:
    seeds = list(range(40))
    seeds[30] = 7
    known, pairs = known_images(list(range(40)), seeds), [(np.arange(20), np.arange(20, 40))]
    contrast = contrast_of(known, pairs)
    assert contrast.differences is None
    assert len(contrast.images) == 40
    said = sentence(contrast, pairs)
    assert "not matched: the seeds on both sides cover 1 of the 20 images of the smaller side, less than half" in said
    forced = contrast_of(known, pairs, "seed")
    assert forced.differences is not None
    assert forced.images.tolist() == [7, 30]
    half = known_images(list(range(40)), [*range(20), *range(10), *range(50, 60)])
    assert contrast_of(half, pairs).differences is not None
    left = contrast_of(half, pairs, "none")
    assert left.differences is None
    assert left.unmatched == "--match none"
    # one pair of several with too few is enough, and the smaller side counts
    two = known_images([0] * 12, [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 3, 4])
    assert contrast_of(two, [(np.arange(4), np.arange(4, 6))]).differences is not None
    assert contrast_of(two, [(np.arange(4), np.arange(4, 6)), (np.arange(6, 9), np.arange(9, 12))]).differences is None


def test_a_deviation_over_seeds_is_given_only_where_nothing_but_the_seed_differs() -> None:
    x = np.asarray([1, 5, 9, 0, 0, 0], np.float32)[:, None]
    pairs = [(np.arange(3), np.arange(3, 6))]
    for prompts, deviation, said in (
        ([0, 1, 2, 3, 4, 5], np.nan, "the images of different seeds are of different prompts: no deviation over seeds"),
        ([0, 0, 0, 1, 2, 3], np.nan, "the images of different seeds are of different prompts: no deviation over seeds"),
        ([0, 0, 0, 1, 1, 1], 4.0, "matched by seed: 3 differences of images"),
    ):
        known = known_images(prompts, [0, 1, 2, 0, 1, 2])
        contrast = contrast_of(known, pairs)
        found = contrast_figures(x, contrast, 0, "difference", "a", 0.0)
        np.testing.assert_allclose(found.columns["deviation"], [deviation])
        np.testing.assert_allclose(found.columns["effect"], [5 / 4])
        assert sentence(contrast, pairs).splitlines()[-1].startswith(said)


def test_the_prompts_that_wait_for_images_of_later_chunks_are_counted() -> None:
    assert most_open(np.arange(12) // 3, np.arange(12) // 6) == 0
    assert most_open(np.arange(12) // 3, np.arange(12) // 4) == 1
    assert most_open(np.arange(12) % 4, np.arange(12) // 4) == 4


@example_settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 10**6))
def test_replicates_added_in_any_pieces_are_those_of_plain_loops(labels: list[int], size: int, seed: int) -> None:
    groups = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    x = np.random.default_rng(seed).integers(0, 4, (len(groups), 2)).astype(np.float32)
    found = Replicates(groups, 2)
    for start in range(0, len(groups), size):
        rows = np.arange(start, min(start + size, len(groups)))
        found.add(rows, x[rows])
    spread, n = found.result(), len(groups)
    parts = [x[groups == group].astype(np.float64) for group in range(int(groups.max()) + 1)]
    np.testing.assert_allclose(spread.mean, np.mean([part.mean(axis=0) for part in parts], axis=0), atol=1e-12)
    within = sum(((part - part.mean(axis=0)) ** 2).sum(axis=0) for part in parts)
    expected = np.sqrt(within / (n - len(parts))) if n > len(parts) else np.full(2, np.nan)
    np.testing.assert_allclose(spread.deviation, expected, atol=1e-9)
    over = x.astype(np.float64).std(axis=0, ddof=1) if n > 1 else np.full(2, np.nan)
    np.testing.assert_allclose(spread.over_images, over, atol=1e-9)


def test_patterns_over_the_steps_are_told_apart() -> None:
    #                    rises     falls     only 1    peaks 1   dips 1    level     dead
    means = np.asarray([[1, 2, 3], [3, 2, 1], [0, 2, 0], [1, 3, 1], [3, 1, 3], [2, 2, 2], [0, 0, 0]], np.float32).T
    values = [np.stack([row, row]) for row in means]
    images, groups = np.asarray([4, 9]), np.zeros(2, np.int64)
    found = temporal_figures(values, (0, 2, 3), images, groups, "any", 0.0)
    assert found.columns["pattern"].tolist() == [
        "rises", "falls", "only step 2", "peaks at 2", "dips at 2", "level", "level",
    ]  # fmt: skip
    assert np.isnan(found.score[5:]).all()
    assert found.step.tolist()[:4] == [3, 0, 2, 2]
    rising = temporal_figures(values, (0, 2, 3), images, groups, "rise", 0.0)
    assert np.flatnonzero(~np.isnan(rising.score)).tolist() == [0]
    only = temporal_figures(values, (0, 2, 3), images, groups, "only", 0.0)
    assert np.flatnonzero(~np.isnan(only.score)).tolist() == [2]
    assert only.score[2] == 2


def test_a_dip_or_a_peak_lies_between_the_first_and_the_last_step() -> None:
    means = np.asarray([[3, 1, 2, 0], [0, 2, 1, 3], [3, 1, 2.5, 2], [0, 2, 1, 1.5], [1, 3, 2, 3]], np.float32).T
    found = temporal_figures(
        [row[None] for row in means], (0, 1, 2, 3), np.asarray([0]), np.zeros(1, np.int64), "any", 0.0
    )
    assert found.columns["pattern"].tolist() == [
        "mostly falls",
        "mostly rises",
        "dips at 1",
        "peaks at 1",
        "mostly rises",
    ]


def test_ties_go_to_the_earlier_step_then_to_the_lower_feature(planted_scan: Path) -> None:
    subject = open_analysis(Inputs(**where(planted_scan))).subjects[0]
    nothing = np.zeros(4, np.int64)
    steps = [
        Figures(np.asarray(score), nothing + step, nothing, nothing, {})
        for step, score in enumerate(([1.0, 2.0, np.nan, 1.0], [1.0, 2.0, 3.0, 2.0]))
    ]
    found = best_finds(subject, steps, 4, every_step=False)
    assert [(find.feature, find.step) for find in found] == [(2, 1), (1, 0), (3, 1), (0, 0)]
    every = best_finds(subject, steps, 9, every_step=True)
    assert [(find.feature, find.step) for find in every] == [(2, 1), (1, 0), (1, 1), (3, 1), (0, 0), (3, 0), (0, 1)]
