"""Matches, neighbours and projections equal slow oracles whatever the blocks; `compare` finds what was planted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.compare import coactivation, comparing, directions, mapping
from analyze.compare.coactivation import (
    MEASURES,
    Matches,
    Side,
    best_by_chance,
    block_sizes,
    correlations_with,
    match,
)
from analyze.compare.ranked import best_first, columns_of, packed, rounded, values_of
from analyze.compare.settings import CompareSettings, DirectionsSettings
from analyze.inputs import open_analysis
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from store.errors import GranaryError, UsageError
from tests.analyze_planted import ATTRIBUTES, Plan, planted_dictionaries, planted_store, reading_dictionary
from train.dictionaries.dictionary import build


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_keys_rank_values_and_among_equal_ones_the_lower_column(rows: int, columns: int, most: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (rows, columns)) / 4.0).float()
    values[0, 0] = -torch.inf
    keys, place = best_first(packed(rounded(values), torch.arange(columns)), most)
    for row, found in enumerate(columns_of(keys).tolist()):
        order = sorted(range(columns), key=lambda column: (-float(values[row, column]), column))[:most]
        assert found == [-1 if torch.isinf(values[row, column]) else column for column in order]
        assert place[row].tolist() == order
    kept = columns_of(keys) >= 0
    assert torch.equal(values_of(keys)[kept], values.gather(1, place)[kept])


@pytest.mark.parametrize("block", [5, 7, 2048])
def test_nearest_directions_equal_those_of_the_whole_cosine_matrix(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "BLOCK", block)
    dictionary = reading_dictionary("img_0", d_model=6, n_features=23)
    with torch.no_grad():
        dictionary.decoder.weight[:, 9] = dictionary.decoder.weight[:, 4]  # two of one direction
        dictionary.decoder.weight[:, 11] = 0
    index, cosine = directions.nearest(dictionary, 5)
    unit = dictionary.decoder.weight.detach().double().numpy()
    unit = unit / np.maximum(np.linalg.norm(unit, axis=0), 1e-12)
    whole = unit.T @ unit
    np.fill_diagonal(whole, -np.inf)
    for feature in range(23):
        order = sorted(
            (other for other in range(23) if other != feature), key=lambda o: (-round(whole[feature, o], 5), o)
        )
        assert index[feature].tolist() == order[:5]
    np.testing.assert_allclose(cosine, np.take_along_axis(whole, index.astype(np.int64), 1), atol=2e-6)
    assert index[4, 0] == 9
    assert np.all(cosine[11] == 0)


def test_more_neighbours_than_there_are_other_features_are_refused() -> None:
    with pytest.raises(UsageError, match="has 22 others: 23 nearest"):
        directions.nearest(reading_dictionary("img_0", d_model=6, n_features=23), 23)


def test_the_projection_is_that_of_a_singular_value_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "BLOCK", 16)
    columns = torch.randn(9, 50, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 10)[:, None]
    found = directions.projected(columns)
    centred = (columns - columns.mean(dim=1, keepdim=True)).double().numpy().T
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    np.testing.assert_allclose(np.abs(found.places), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(found.explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-6)
    assert directions.projected(columns[:1]).explained[1] == 0  # a line has no second axis


def test_chance_is_what_random_directions_show() -> None:
    generator = np.random.default_rng(0)
    unit = generator.standard_normal((400, 24))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    whole = unit @ unit.T
    np.fill_diagonal(whole, -1)
    assert directions.chance_cosine(400, 24) == pytest.approx(float(np.median(whole.max(axis=1))), abs=0.01)
    assert directions.chance_cosine(2, 8) == 0.0


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("compare")
    plan = Plan(n_images=60, steps=2)
    planted_store(folder / "store", plan)
    inputs = Inputs(
        store=folder / "store", dictionaries=planted_dictionaries(folder / "dictionaries", plan), out=folder / "out"
    )
    scores.run(ScoresSettings(**vars(inputs)))
    return inputs


def sides_of(scored: Inputs, of: str, other: str) -> tuple[Side, Side]:
    pairs = comparing.chosen_pairs(open_analysis(scored), CompareSettings(**vars(scored), of=of, other=other))
    return pairs[0]


def whole_measures(of: Side, other: Side) -> np.ndarray:
    """Cosine, correlation and Jaccard index of all pairs in float64, (measure, alive, alive)."""
    s, t = (side.matrix.scores().astype(np.float64)[:, side.features] for side in (of, other))
    d, e = (side.subject.dictionary.decoder.weight.detach().double().numpy()[:, side.features] for side in (of, other))
    cosine = (d / np.linalg.norm(d, axis=0)).T @ (e / np.linalg.norm(e, axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(s.T, t.T)[: s.shape[1], s.shape[1] :])
    a, b = (s > 0)[:, :, None], (t > 0)[:, None, :]
    jaccard = (a & b).sum(axis=0) / (a | b).sum(axis=0)
    whole = np.stack([cosine, correlation, jaccard])
    if of.name == other.name:
        whole[:, of.features[:, None] == other.features] = -np.inf
    return whole


@pytest.mark.parametrize(("of", "other"), [("img_0@0", "txt_0@1"), ("img_0@0", "img_0@1"), ("img_0@1", "img_0@1")])
def test_matches_equal_a_slow_oracle_whatever_the_blocks(
    scored: Inputs, of: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sides_of(scored, of, other)
    found = match(one, two, 6, 0.0, 10**9)
    whole = whole_measures(one, two)
    for measure in range(3):
        place = np.searchsorted(two.features, found.match[measure])
        assert all(len(set(row)) == 6 for row in place)
        values = np.take_along_axis(whole[measure], place, axis=1)
        np.testing.assert_allclose(values, -np.sort(-whole[measure], axis=1)[:, :6], atol=3e-6)  # up to what is a tie
        beside = np.stack([np.take_along_axis(each, place, axis=1) for each in whole], axis=-1)
        np.testing.assert_allclose(found.values[measure], beside, atol=1e-5)
        back = np.searchsorted(one.features, found.best_of_other[measure])
        np.testing.assert_allclose(whole[measure][back, np.arange(len(back))], whole[measure].max(axis=0), atol=3e-6)
    monkeypatch.setattr(coactivation, "LARGEST", (17, 13))
    monkeypatch.setattr(coactivation, "LEAST", 1)
    monkeypatch.setattr(coactivation, "READ", 19)
    again = match(one, two, 6, 0.0, 10**9)
    np.testing.assert_array_equal(again.match, found.match)
    np.testing.assert_array_equal(again.mutual, found.mutual)


def test_a_match_is_mutual_where_each_is_the_best_of_the_other() -> None:
    matches = Matches(
        features=np.asarray([2, 5]), match=np.asarray([[[7, -1], [9, 7]]] * 3, np.int32), values=np.zeros((3, 2, 2, 3), np.float32),
        others=np.asarray([7, 9]), best_of_other=np.asarray([[2, 2]] * 3, np.int32), value_of_other=np.zeros((3, 2), np.float32),
    )  # fmt: skip
    assert matches.mutual[0].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(("of", "other"), [("img_0@0", "txt_0@1"), ("img_0@1", "img_0@0")])
def test_chance_is_the_best_match_after_images_of_one_side_were_put_in_another_order(
    scored: Inputs, of: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sides_of(scored, of, other)
    found = best_by_chance(one, two, 0.0, 10**9)
    order = np.random.default_rng(0).permutation(one.matrix.n_images)
    s, t = (side.matrix.scores().astype(np.float64)[:, side.features] for side in (one, two))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.nan_to_num(np.corrcoef(s[order].T, t.T)[: s.shape[1], s.shape[1] :])
    a, b = (s[order] > 0)[:, :, None], (t > 0)[:, None, :]
    assert found["correlation"] == pytest.approx(np.median(correlation.max(axis=1)), abs=3e-6)
    jaccard = (a & b).sum(axis=0) / (a | b).sum(axis=0)
    assert found["jaccard"] == pytest.approx(np.median(jaccard.max(axis=1)), abs=3e-6)
    assert found["cosine"] == directions.chance_cosine(len(two.features) + 1, 32)
    monkeypatch.setattr(coactivation, "LARGEST", (17, 13))
    monkeypatch.setattr(coactivation, "LEAST", 1)
    assert best_by_chance(one, two, 0.0, 10**9) == pytest.approx(found, abs=1e-6)
    monkeypatch.setattr(coactivation, "CHANCE_FEATURES", 1)
    some = best_by_chance(one, two, 0.0, 10**9)["correlation"]  # of one feature
    assert np.abs(correlation.max(axis=1) - some).min() < 1e-5


def test_matches_of_one_number_are_told_apart_from_features_that_were_found(scored: Inputs) -> None:
    one, two = sides_of(scored, "img_0@0", "txt_0@0")  # both dictionaries have the same decoder
    chance = (dict.fromkeys(MEASURES, 0.0),) * 2
    summary = comparing.summarised(one, two, match(one, two, 1, 0.0, 10**9), chance)
    same, mutual = summary["mutual_by_cosine_of_one_number"], summary["measures"]["cosine"]["mutual"]
    assert same == mutual > 20
    assert f"{same} of {mutual} mutual matches by cosine have the same number in both" in summary["notes"][-1]
    other = build(two.subject.dictionary.config)
    other.load_state_dict(two.subject.dictionary.state_dict())
    with torch.no_grad():
        other.decoder.weight.copy_(other.decoder.weight.roll(5, dims=1))
    renumbered = replace(two, subject=replace(two.subject, outline=other, identity="another"))
    summary = comparing.summarised(one, renumbered, match(one, renumbered, 1, 0.0, 10**9), chance)
    assert summary["measures"]["cosine"]["mutual"] > 20
    assert summary["mutual_by_cosine_of_one_number"] == 0
    assert not any("same number" in note for note in summary["notes"])


def test_one_dictionary_at_two_steps_is_not_compared_by_cosine(
    scored: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**vars(scored), "sites": "img_0"}
    (found,) = comparing.run(CompareSettings(**options, best=0))
    assert found.summary["measures"]["cosine"]["median_best"] is None
    assert "the same decoder: cosine says nothing" in found.summary["notes"]
    assert set(found.table["by"].to_pylist()) == {"correlation", "jaccard"}
    rows = pq.read_table(scored.out / "compare" / "pairs.parquet").to_pylist()
    assert {row["by"] for row in rows if row["median_best"] is None} == {"cosine"}
    printed = capsys.readouterr().out
    assert "note: the same decoder: cosine says nothing" in printed
    assert "best by cosine" not in printed
    chance = found.summary["measures"]["correlation"]["median_by_chance"]
    assert f"(by chance {chance:.2f})" in printed
    assert "1 comparison, 0 matched pairs drawn now" in printed
    with pytest.raises(UsageError, match="have the same decoder"):
        comparing.run(CompareSettings(**options, by="cosine"))


def test_correlations_with_one_column_equal_numpys(scored: Inputs) -> None:
    side, _ = sides_of(scored, "img_0@0", "img_0@1")
    whole = side.matrix.scores().astype(np.float64)
    found = correlations_with(side.matrix, side.matrix.scores(1))
    for feature in side.features:
        if whole[:, feature].std() > 0:
            assert found[feature] == pytest.approx(np.corrcoef(whole[:, 1], whole[:, feature])[0, 1], abs=1e-6)


@given(st.integers(1, 10**7), st.integers(10**6, 10**11))
def test_blocks_stay_within_the_memory_or_are_refused(images: int, memory: int) -> None:
    try:
        rows, columns = block_sizes(images, memory)
    except UsageError as error:
        assert "--memory" in str(error)
        return
    assert min(rows, columns) >= coactivation.LEAST
    assert (rows + columns) * images * coactivation.COLUMN_BYTES + rows * columns * coactivation.TILE_BYTES <= memory


def test_compare_finds_the_feature_of_the_other_stream_that_stands_for_the_same(scored: Inputs) -> None:
    (found,) = comparing.run(CompareSettings(**vars(scored), of="img_0@0", other="txt_0@0", best=1, min_images=3))
    best = {
        row["feature"]: row["match"]
        for row in found.table.to_pylist()
        if row["by"] == "correlation" and row["rank"] == 0
    }
    colours = [number for number, attribute in enumerate(ATTRIBUTES) if attribute.group in ("colour", "shape")]
    assert sum(best[feature] == feature for feature in colours) >= len(colours) - 1
    assert pq.read_table(found.folder / "matches.parquet").equals(found.table)
    assert json.loads((found.folder / "summary.json").read_bytes()) == found.summary
    assert found.summary["measures"]["cosine"]["median_best"] == pytest.approx(1.0)  # both read the same channels
    (sheet,) = found.sheets
    with Image.open(sheet) as image:
        assert min(image.size) > 200


def test_compare_writes_equal_bytes_again_and_draws_named_features(
    scored: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**vars(scored), "of": "img_0@0", "other": "img_0@1", "features": "1,3", "patches": True, "top": 2}
    (first,) = comparing.run(CompareSettings(**options))
    assert [path.name.split("-")[1] for path in first.sheets] == ["1", "3"]
    before = {path: path.read_bytes() for path in sorted(first.folder.iterdir())}
    assert len(before) == 4
    comparing.run(CompareSettings(**options))
    assert {path: path.read_bytes() for path in sorted(first.folder.iterdir())} == before
    assert "img_0/1  and  img_0/" in capsys.readouterr().out


def test_all_pairs_of_sides_give_a_map_that_reads_both_ways(scored: Inputs) -> None:
    found = comparing.run(CompareSettings(**vars(scored)))
    assert len(found) == 6  # of two dictionaries at two steps
    assert not any(comparison.sheets for comparison in found)
    table = pq.read_table(scored.out / "compare" / "pairs.parquet").to_pylist()
    assert len(table) == 6 * 2 * len(MEASURES)
    one = {(row["of"], row["with"]): row["median_best"] for row in table if row["by"] == "correlation"}
    of, other = sides_of(scored, "img_0@0", "txt_0@1")
    there, back = (np.median(match(a, b, 1, 0.0, 10**9).values[1, :, 0, 1]) for a, b in ((of, other), (other, of)))
    assert one["img_0@0", "txt_0@1"] == pytest.approx(there, abs=1e-5)
    assert one["txt_0@1", "img_0@0"] == pytest.approx(back, abs=1e-5)
    assert (scored.out / "compare" / "pairs.png").read_bytes().startswith(b"\x89PNG")
    whole = (scored.out / "compare" / "pairs.parquet").read_bytes()
    named = comparing.run(CompareSettings(**{**vars(scored), "steps": "0"}, of="img_0@0", best=0))
    assert (scored.out / "compare" / "pairs.parquet").read_bytes() == whole
    assert len(pq.read_table(scored.out / "compare" / "img_0@0" / "pairs.parquet")) == 2 * len(MEASURES)
    assert [comparison.other for comparison in named] == ["txt_0@0"]


@pytest.mark.slow
def test_directions_are_drawn_the_same_every_time(scored: Inputs) -> None:
    options = {**vars(scored), "best": 9, "neighbours": 3, "sites": "img_0"}
    found = mapping.run(DirectionsSettings(**options))
    assert [each.name for each in found] == ["img_0"]
    before = {path: path.read_bytes() for each in found for path in sorted(each.folder.iterdir())}
    assert len(before) == 5
    mapping.run(DirectionsSettings(**options))
    assert {path: path.read_bytes() for path in before} == before


def test_directions_are_tabled(scored: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("cosine_map", "neighbour_histogram", "projection_plot"):
        monkeypatch.setattr(mapping, plot, lambda *_: b"")
    found = mapping.run(DirectionsSettings(**vars(scored) | {"best": 9, "neighbours": 3, "sites": "img_0"}))
    index, cosine = directions.nearest(open_analysis(scored).subjects[0].dictionary, 3)
    table = found[0].table
    assert table["nearest"].to_pylist() == index.tolist()
    np.testing.assert_allclose(table["cosine"].to_pylist(), cosine)
    summary = found[0].summary
    assert sum(summary["nearest"]["histogram"]) == 48
    assert len(summary["map"]["features"]) == 9
    assert np.diag(summary["map"]["cosines"]) == pytest.approx(1.0)


def test_similar_features_stand_together_on_the_map() -> None:
    cosines = np.asarray([[1, 0, 0.9, 0], [0, 1, 0, 0.8], [0.9, 0, 1, 0], [0, 0.8, 0, 1]], np.float32)
    ordered = mapping.similar_together(np.asarray([10, 11, 12, 13]), cosines).tolist()
    assert abs(ordered.index(10) - ordered.index(12)) == 1
    assert abs(ordered.index(11) - ordered.index(13)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "img_0"}, "names no side: write DICTIONARY@STEP, such as img_0@0"),
        ({"of": "img_7@0", "other": "img_0@0"}, "has no img_7; it has img_0, txt_0"),
        ({"of": "img_7@0"}, "no dictionary img_7 .*: img_0, txt_0"),
        ({"of": "img_0@9", "other": "img_0@0"}, "no step 9 .*: 0, 1"),
        ({"sites": "img_0", "steps": "1"}, "only img_0@1 to compare"),
        ({"of": "img_0@0", "other": "img_0@1", "features": "99"}, "no feature 99"),
        ({"of": "img_0@0", "other": "img_0@1", "top": 99}, "keeps 16 top images"),
        ({"patches": True, "top": 4}, "--patches and --top would change nothing"),
        ({"of": "img_0@0", "other": "img_0@1", "best": 0, "side": 90}, "--side would change nothing"),
        ({"of": "img_0@0", "clip_percentile": 90.0}, "--clip-percentile would change nothing"),
        ({"of": "img_0@0", "other": "img_0@1", "memory": "10kB"}, "--memory 10 KB is too little"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(scored: Inputs, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        comparing.run(CompareSettings(**{**vars(scored), **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CompareSettings, {"other": "img_0@0"}), (CompareSettings, {"matches": 0}), (CompareSettings, {"memory": "much"}),
        (CompareSettings, {"of": "img_0@0", "features": "3"}),
        (CompareSettings, {"of": "img_0@0", "other": "img_0@1", "features": "3", "min_images": 2}),
        (CompareSettings, {"clip_percentile": 0.0}),
        (DirectionsSettings, {"best": 0}), (DirectionsSettings, {"best": 1000}), (DirectionsSettings, {"neighbours": 0}),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(kind: type, options: dict[str, object]) -> None:
    with pytest.raises(GranaryError):
        kind(store=Path("s"), dictionaries=Path("d"), out=Path("o"), **options)


def test_directions_of_unknown_or_too_many_features_are_refused(scored: Inputs) -> None:
    with pytest.raises(UsageError, match="no feature 48"):
        mapping.run(DirectionsSettings(**vars(scored), features="48"))
    with pytest.raises(UsageError, match="has 48 features: --neighbours is 48"):
        mapping.run(DirectionsSettings(**vars(scored), neighbours=48))
