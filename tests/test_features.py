"""The list of features: ranks and filters against plain Python, profiles over steps, examples without a picture twice, and its files."""

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyze.features import coherence, ranking
from analyze.features.listing import sparkline
from analyze.features.selection import globally_unique
from analyze.features.settings import CoherenceSettings, FeaturesSettings, parse_categories
from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from store.errors import UsageError
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

PLAN = Plan(n_images=24, chunk_images=8, seeds_per_prompt=2)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small planted store with its dictionaries, scores and coherence; only labels are added to it."""
    folder = tmp_path_factory.mktemp("features")
    planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    found = {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out"}
    scores.run(ScoresSettings(**found, top=8))
    np.save(folder / "given.npy", np.random.default_rng(0).normal(size=(PLAN.n_images, 4)))
    coherence.run(CoherenceSettings(**found, embeddings=str(folder / "given.npy"), top_m=4))
    return found


def table_of(where: dict[str, Any], name: str = "img_0", step: int = 0) -> list[dict[str, Any]]:
    """The feature table of a dictionary and step with its coherence, as plain rows."""
    rows = pq.read_table(where["out"] / name / f"step.{step}" / "features.parquet").to_pylist()
    known = {
        row["feature"]: row["coherence"]
        for row in pq.read_table(where["out"] / name / "coherence.parquet").to_pylist()
        if row["step"] == step
    }
    return [{**row, "coherence": known[row["feature"]]} for row in rows]


def found(table: pa.Table, name: str = "img_0", step: int = 0) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if (row["dictionary"], row["step"]) == (name, step)]


@pytest.mark.parametrize("rank", ["interest", "max", "density", "share", "coherence"])
def test_the_best_of_each_rank_come_first(where: dict[str, Any], rank: Any) -> None:
    column = {"share": "image_share"}.get(rank, rank)
    rows = [row for row in table_of(where) if row["alive"] and row[column] is not None]
    expected = [row["feature"] for row in sorted(rows, key=lambda row: (-row[column], row["feature"]))]
    table = ranking.run(FeaturesSettings(**where, rank=rank, best=7))
    listed = found(table)
    assert [row["feature"] for row in listed] == expected[:7]
    assert [row["rank"] for row in listed] == list(range(1, 8))
    assert table.num_rows == 7 * 4  # two sites, two steps


FILTERS: list[dict[str, Any]] = [
    {"category": "common"}, {"category": "rare,very-common"}, {"image_category": "very common"}, {"category": "dead"},
    {"min_density": 0.05}, {"max_density": 0.03}, {"min_density": 0.01, "max_density": 0.2, "image_category": "common,very-common"},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_leave_what_they_say(where: dict[str, Any], filters: dict[str, Any]) -> None:
    def passes(row: dict[str, Any]) -> bool:
        share, images = row["density"], row["image_share"]
        word = lambda x: "dead" if x < 1e-4 else "rare" if x < 0.01 else "common" if x < 0.1 else "very common"  # noqa: E731
        rows = filters.get("category", "all").replace("-", " ").split(",")
        of_images = filters.get("image_category", "all").replace("-", " ").split(",")
        return (
            (rows == ["all"] or word(share) in rows)
            and (of_images == ["all"] or word(images) in of_images)
            and filters.get("min_density", 0) <= share <= filters.get("max_density", 1)
            and (row["alive"] or "dead" in rows)
        )

    listed = {row["feature"] for row in found(ranking.run(FeaturesSettings(**where, **filters, best=99)))}
    assert listed == {row["feature"] for row in table_of(where) if passes(row)}


def test_the_profile_is_what_the_tables_of_all_steps_say(where: dict[str, Any]) -> None:
    analysis = open_analysis(Inputs(**where))
    profile = ranking.step_profile(analysis, analysis.subjects[0])
    for name in ("density", "mean_active"):
        assert profile[name].shape == (2, 48)
        for step in (0, 1):
            assert profile[name][step].tolist() == [row[name] for row in table_of(where, step=step)]
    row = found(ranking.run(FeaturesSettings(**where, best=1)), step=1)[0]
    assert row["profile_density"] == profile["density"][:, row["feature"]].tolist()
    assert row["profile_mean_active"][1] == row["mean_active"]


def test_one_line_of_the_list_says_what_the_row_holds(
    where: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = open_analysis(Inputs(**where))
    best = found(ranking.run(FeaturesSettings(**where, best=1, examples=3)), "txt_0")[0]
    capsys.readouterr()
    book = LabelBook.of(analysis.subjects[1])
    book.set(best["feature"], "red words", "ada", datetime(2026, 1, 2, tzinfo=UTC))
    book.save()
    again = found(ranking.run(FeaturesSettings(**where, best=1, examples=3)), "txt_0")[0]
    said = capsys.readouterr().out
    assert (best["label"], again["label"]) == (None, "red words")
    section = said.split("txt_0 step 0")[1].split("img_0 step")[0].split("txt_0 step")[0]
    (line,) = [line for line in section.splitlines() if f"txt_0/{best['feature']} · red words" in line]
    words = [
        f"{best['interest']:.2f}",
        f"{best['density']:.2%}",
        best["density_category"],
        f"{best['image_share']:.2%}",
    ]
    words += [
        f"{best['coherence']:.3f}",
        " ".join(map(str, best["unique_image"][:3])),
        sparkline(best["profile_density"]),
    ]
    words += [f"“{piece.strip('▁')}”" for piece in best["word"][:2]]
    assert all(word in line for word in words), line
    alive = sum(row["alive"] for row in table_of(where, "txt_0"))
    assert f"txt_0 step 0: {alive} of 48 features alive" in said
    assert f"1 of the {alive} that match, by interest" in said


def test_the_files_hold_the_table_that_is_returned(where: dict[str, Any], tmp_path: Path) -> None:
    files = {"csv": tmp_path / "new" / "f.csv", "parquet": tmp_path / "f.parquet"}
    table = ranking.run(FeaturesSettings(**where, **files, best=3))
    assert pq.read_table(files["parquet"]).equals(table.replace_schema_metadata(None))
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(rows) == table.num_rows
    for row, expected in zip(rows, table.to_pylist(), strict=True):
        assert (row["dictionary"], int(row["feature"])) == (expected["dictionary"], expected["feature"])
        assert [int(image) for image in row["top_image"].split()] == expected["top_image"]
        assert float(row["interest"]) == pytest.approx(expected["interest"])
    before = files["csv"].read_bytes()
    ranking.run(FeaturesSettings(**where, **files, best=3))
    assert files["csv"].read_bytes() == before


def test_no_image_is_an_example_of_two_features_when_that_is_asked(where: dict[str, Any]) -> None:
    plain = found(ranking.run(FeaturesSettings(**where, best=20, examples=3)))
    unique = found(ranking.run(FeaturesSettings(**where, best=20, examples=3, unique_examples=True)))
    shown = [image for row in unique for image in row["example_images"]]
    assert len(shown) == len(set(shown)) > 3
    assert len({image for row in plain for image in row["example_images"]}) < sum(
        len(r["example_images"]) for r in plain
    )
    assert unique[0]["example_images"] == plain[0]["example_images"] == unique[0]["unique_image"][:3]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6), st.integers(1, 3), st.integers(1, 4))
def test_examples_are_globally_unique_and_greedy_by_rank(candidates: list[list[int]], each: int, most: int) -> None:
    expected: list[tuple[int, list[int]]] = []
    for place, images in enumerate(candidates):
        shown = [image for _, mine in expected for image in mine]
        free = [image for number, image in enumerate(images) if image not in shown and image not in images[:number]]
        if len(free) >= each and len(expected) < most:
            expected.append((place, free[:each]))
    assert globally_unique(candidates, each, most) == expected


def test_what_cannot_be_listed_is_refused(where: dict[str, Any], tmp_path: Path) -> None:
    for changes, words in (
        ({"best": 0}, "at least 1 feature"), ({"examples": 0}, "at least 1 image"), ({"min_density": 1.5}, "between 0 and 1"),
        ({"min_density": 0.2, "max_density": 0.1}, "no feature is between"), ({"category": "odd"}, "'odd' is no category"),
        ({"image_category": ""}, "is no category"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            FeaturesSettings(**where, **changes)
    with pytest.raises(UsageError, match="keeps 8 top images of each feature: compute scores with --top 9"):
        ranking.run(FeaturesSettings(**where, examples=9))
    fresh = {**where, "out": tmp_path / "out"}
    with pytest.raises(UsageError, match="run python -m analyze scores"):
        ranking.run(FeaturesSettings(**fresh))
    scores.run(ScoresSettings(**fresh, sites="img_0", steps="0"))
    only = {"sites": "img_0", "steps": "0"}
    with pytest.raises(UsageError, match="no coherence of img_0 step 0: run python -m analyze coherence"):
        ranking.run(FeaturesSettings(**fresh, **only, rank="coherence"))
    table = ranking.run(FeaturesSettings(**fresh, **only, best=2))
    assert table["coherence"].null_count == 2
    assert table["word"].to_pylist() == [[], []]


def test_categories_are_named_with_or_without_a_hyphen() -> None:
    assert parse_categories("very-common, rare", "") == ("rare", "very common")
    assert parse_categories("all", "") == ("dead", "rare", "common", "very common")


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([0.0, 1.0, 2.0, 4.0]) == "▁▃▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
