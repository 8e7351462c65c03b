"""Each kind of scan finds the planted feature first; its figures are those of slow loops; what cannot be asked is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from PIL import Image

from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.scan.contrast import contrast_figures, contrast_of, sentence
from analyze.scan.discovery import run
from analyze.scan.figures import Figures, best_finds
from analyze.scan.images import Catalogue
from analyze.scan.kinds import temporal_figures
from analyze.scan.region import mask_cover, rectangle
from analyze.scan.replicates import Replicates, most_open
from analyze.scan.settings import ScanSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from analyze.truth.attributes import ATTRIBUTES, Attribute, Scene, read_scenes
from store import Store, open_store
from store.errors import DamagedError, NonFiniteError, UsageError
from store.format import StreamTokens
from tests import analyze_planted
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

SEEDS = 3
PLAN = Plan(n_images=120, seeds_per_prompt=SEEDS, grid=(6, 9), steps=2, chunk_images=16, pictures=False)


def where(folder: Path, **more: Any) -> dict[str, Any]:
    return {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out", **more}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted store whose prompts all have the same three seeds, its dictionaries and their scores."""
    folder, as_planted = tmp_path_factory.mktemp("scan"), analyze_planted._prompts

    def same_seeds(plan: Plan, images: range, *rest: Any) -> pa.Table:
        table = as_planted(plan, images, *rest)
        seeds = pa.array([7 + image % SEEDS for image in images], pa.int64())
        return table.set_column(table.column_names.index("seed"), "seed", seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze_planted, "_prompts", same_seeds)
        planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    scores.run(ScoresSettings(**where(folder)))
    return folder


@pytest.fixture(scope="module")
def scenes(planted: Path) -> list[Scene]:
    return read_scenes(open_store(planted / "store"))


def number(group: str, value: str) -> int:
    return ATTRIBUTES.index(Attribute(group, value))  # type: ignore[arg-type]


def scan(folder: Path, **more: Any) -> list[dict[str, Any]]:
    return run(ScanSettings(**where(folder, **more)))


# ---- each kind finds what was planted


@pytest.mark.parametrize("site", ["img_0", "txt_0"])
def test_a_contrast_of_prompts_finds_the_colour_that_they_differ_in(planted: Path, site: str) -> None:
    rows = scan(planted, kind="contrastive", positive="^a red", negative="^a blue", sites=site, direction="both")
    assert {rows[0]["feature"], rows[1]["feature"]} == {number("colour", "red"), number("colour", "blue")}
    for row in rows[:2]:
        prefers_a = row["feature"] == number("colour", "red")
        assert (row["difference"] > 0) == prefers_a
        assert ("red" in row["prompt"]) == prefers_a  # shown where it is active
        assert row["step"] == 0  # where the signal is strongest
        assert abs(row["auroc"] - 0.5) > 0.49
        assert row["n"] == SEEDS  # matched by seed
        assert row["agree"] == 1
        if site == "txt_0":
            assert row["tokens"].split(" x")[0] == ("red" if prefers_a else "blue")  # where it is active


def test_pairs_of_prompts_are_compared_pair_by_pair_and_seed_by_seed(
    planted: Path, scenes: list[Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = open_store(planted / "store").prompts()["prompt"].to_pylist()
    shapes = {"circle": [], "square": []}  # type: ignore[var-annotated]
    for scene in scenes[::SEEDS]:
        if scene.things[0].shape in shapes:
            shapes[scene.things[0].shape].append(prompts[scene.image])
    pairs = list(zip(shapes["circle"], shapes["square"], strict=False))
    assert len(pairs) >= 3
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt_a", "prompt_b"), *((a.upper(), b) for a, b in pairs)])
    rows = scan(planted, kind="contrastive", pairs=tmp_path / "pairs.csv", best=5, name="shapes")
    assert rows[0]["feature"] == number("shape", "circle")
    assert rows[0]["n"] == SEEDS * len(pairs)
    assert f"{len(pairs)} pairs, matched by seed" in capsys.readouterr().out


def test_a_spatial_scan_finds_the_feature_of_objects_in_that_place(planted: Path, scenes: list[Scene]) -> None:
    places = [scene.things[0].position for scene in scenes[::SEEDS]]
    place = max(sorted(set(map(str, places))), key=places.count)
    images = [scene.image for scene in scenes if scene.things[0].position == place]
    object_tokens = np.flatnonzero(scenes[images[0]].things[0].coverage > 0.5)
    r, c = np.unravel_index(object_tokens, PLAN.grid)
    region = f"{r.min()}-{r.max()}:{c.min()}-{c.max()}"
    chosen = ",".join(map(str, images))
    rows = scan(planted, kind="spatial", region=region, images=chosen, per_image=True)
    assert rows[0]["feature"] == number("position", place)
    assert rows[0]["site"] == "img_0"  # text has no places
    assert rows[0]["token"] in object_tokens
    assert rows[0]["share"] > 0.9
    assert rows[0]["n"] == len(images)
    by_share = scan(planted, kind="spatial", region=region, images=chosen, rank="share", name="by-share")
    assert [row["share"] for row in by_share] == sorted((row["share"] for row in by_share), reverse=True)
    outside = scan(planted, kind="spatial", region=region, images=str(images[0]), name="one")
    ground = number("background", scenes[images[0]].background)
    assert ground not in [row["feature"] for row in outside]


def test_a_mask_of_another_size_says_the_same_as_the_rectangle(planted: Path, tmp_path: Path) -> None:
    mask = np.zeros((60, 180), np.uint8)
    mask[20:40, 60:120] = 255  # rows 2 and 3 of 6, columns 3 to 5 of 9
    Image.fromarray(mask).save(tmp_path / "mask.png")
    by_mask = scan(planted, kind="spatial", mask=tmp_path / "mask.png", images="0-30")
    by_tokens = scan(planted, kind="spatial", region="2-3:3-5", images="0-30")
    by_share = scan(planted, kind="spatial", region="0.334-0.666:0.334-0.666", images="0-30")
    assert by_mask == by_tokens == by_share
    assert by_mask


def test_a_temporal_scan_finds_features_that_fall_as_the_planted_signal_does(planted: Path) -> None:
    rows = scan(planted, kind="temporal", pattern="fall", sites="img_0", prompts="^a red", best=1)
    assert rows[0]["feature"] == number("colour", "red")
    assert rows[0]["pattern"] in ("falls", "only step 0")
    assert rows[0]["step"] == 0
    assert rows[0]["change"] < 0
    assert rows[0]["step_0"] > rows[0]["step_1"]
    assert not [row for row in scan(planted, kind="temporal", pattern="rise", sites="img_0") if row["score"] > 1]
    with pytest.raises(UsageError, match="only step 1 is chosen"):
        scan(planted, kind="temporal", steps="1")


def test_a_top_scan_of_one_prompt_finds_what_it_shows(planted: Path, scenes: list[Scene]) -> None:
    thing = scenes[0].things[0]
    said = [("colour", thing.colour), ("shape", thing.shape), ("position", thing.position)]
    shown = {number(group, str(value)) for group, value in said} | {number("background", scenes[0].background)}
    rows = scan(planted, kind="top", images="0-2", sites="img_0", best=4)
    assert {row["feature"] for row in rows} == shown
    assert all(row["n"] == SEEDS and row["deviation"] > 0 for row in rows)
    on_object = scan(planted, kind="top", images="0-2", sites="img_0", tokens=_object_tokens(scenes[0]), best=3)
    assert {row["feature"] for row in on_object} == shown - {number("background", scenes[0].background)}


def _object_tokens(scene: Scene) -> str:
    return ",".join(map(str, np.flatnonzero(scene.things[0].coverage > 0.5)))


def test_a_top_scan_of_words_looks_at_their_tokens_only(planted: Path) -> None:
    rows = scan(planted, kind="top", words="^red$", prompts="^a red", best=1)
    assert rows[0]["feature"] == number("colour", "red")
    assert rows[0]["site"] == "txt_0"
    assert rows[0]["at"] == "red"
    assert rows[0]["token"] == 1  # a red …


# ---- the table


def test_the_table_begins_with_what_graph_targets_takes_and_names_labels(planted: Path) -> None:
    analysis = open_analysis(Inputs(**where(planted)))
    subject = next(subject for subject in analysis.subjects if subject.name == "img_0")
    file = Path(str(subject.place)) / "labels.json"
    try:
        book = LabelBook.of(subject)
        book.set(number("colour", "red"), "ripe tomatoes", "ada", _moment())
        book.save()
        scan(planted, kind="contrastive", positive="^a red", name="labelled", sites="img_0")
    finally:
        file.unlink(missing_ok=True)
    with (planted / "out" / "scan" / "labelled.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0])[:5] == ["image", "step", "site", "token", "feature"]
    assert rows[0]["label"] == "ripe tomatoes"
    matrix = analysis.matrix(subject, int(rows[0]["step"]))
    assert int(rows[0]["token"]) == matrix.tokens(int(rows[0]["feature"]))[int(rows[0]["image"])]
    record = json.loads((planted / "out" / "scan" / "labelled.json").read_text())
    assert record["kind"] == "contrastive"
    assert record["matched_by_seed"]
    assert str(planted) not in json.dumps(record)


def _moment() -> Any:
    from datetime import UTC, datetime

    return datetime(2026, 1, 1, tzinfo=UTC)


def test_equal_questions_give_equal_bytes(planted: Path) -> None:
    asked = {"kind": "spatial", "region": "top", "images": "0-20", "per_image": True, "every_step": True, "best": 5}
    scan(planted, **asked)
    names = ("spatial.csv", "spatial.json", "spatial.images.csv")
    first = {name: (planted / "out" / "scan" / name).read_bytes() for name in names}
    scan(planted, **asked)
    assert first == {name: (planted / "out" / "scan" / name).read_bytes() for name in names}


def test_a_feature_stands_once_at_its_best_step_unless_every_step_is_asked_for(planted: Path) -> None:
    once = scan(planted, kind="top", sites="img_0", best=10)
    assert len({row["feature"] for row in once}) == 10
    every = scan(planted, kind="top", sites="img_0", best=40, every_step=True, name="every")
    places = [(row["feature"], row["step"]) for row in every]
    assert len(set(places)) == len(places)
    assert len({feature for feature, _ in places}) < len(places)


def test_figures_of_single_images_average_to_the_listed_one(planted: Path) -> None:
    rows = scan(planted, kind="spatial", region="centre", images="0-11", per_image=True, best=3, name="each")
    with (planted / "out" / "scan" / "each.images.csv").open() as lines:
        each = list(csv.DictReader(lines))
    assert len(each) == 3 * 12
    for row in rows:
        own = [float(one["figure"]) for one in each if int(one["rank"]) == row["rank"]]
        assert np.mean(own) == pytest.approx(row["difference"], rel=1e-4)


def test_a_plan_says_what_would_be_read_and_writes_nothing(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan(planted, kind="spatial", region="top", name="never", plan=True) == []
    assert "reads rows of 1 sites x 2 steps, 8 chunks of 16 images" in capsys.readouterr().out
    assert scan(planted, kind="top", name="never", plan=True) == []
    assert "reads 4 score matrices" in capsys.readouterr().out
    assert not (planted / "out" / "scan" / "never.csv").exists()


# ---- figures against slow loops


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


def test_spatial_figures_are_those_of_plain_loops(planted: Path) -> None:
    images = list(range(3, 30, 2))
    inside = np.zeros(PLAN.grid, bool)
    inside[1:4, 2:8] = True
    rows = scan(
        planted, kind="spatial", region="1-3:2-7", images=",".join(map(str, images)), sites="img_0", steps="1", best=48
    )
    slow = slow_spatial(planted, images, inside.ravel(), 1)
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


def test_seeds_that_are_not_known_are_never_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_planted = analyze_planted._prompts

    def some_seeds(plan: Plan, images: range, *rest: Any) -> pa.Table:
        table = as_planted(plan, images, *rest)
        seeds = pa.array([5 if image in (0, 3) else None for image in images], pa.int64())
        return table.set_column(table.column_names.index("seed"), "seed", seeds)

    plan = Plan(n_images=8, steps=1, sites=("img_0",), pictures=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze_planted, "_prompts", some_seeds)
        planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    asked = {"kind": "contrastive", "images": "0-2", "against": "3-5", "per_image": True}
    rows = scan(tmp_path, **asked)
    out = capsys.readouterr().out
    assert "not matched: the seed of 4 of the images is not known, image 1 the first" in out
    assert {row["image"]: row["seed"] for row in rows}.items() <= {0: 5, 1: None, 2: None}.items()
    with (tmp_path / "out" / "scan" / "contrastive.images.csv").open() as lines:
        assert {row["image"]: row["seed"] for row in csv.DictReader(lines)} == {
            "0": "5", "1": "", "2": "", "3": "5", "4": "", "5": "",
        }  # fmt: skip
    with pytest.raises(UsageError, match="--match seed: the seed of 4 of the images is not known"):
        scan(tmp_path, **asked, match="seed")
    scan(tmp_path, kind="contrastive", images="0", against="3", plan=True)
    assert "matched by seed: 1 differences" in capsys.readouterr().out


def test_a_share_counts_where_a_feature_is_active_on_enough_images(planted: Path) -> None:
    asked = {"kind": "spatial", "region": "0-1:0-4", "sites": "img_0", "best": 96, "every_step": True, "rank": "share"}
    few, more = scan(planted, **asked, min_images=1), scan(planted, **asked, min_images=30)
    assert 0 < len(more) < len(few)
    assert more == [
        row | {"rank": place} for place, row in enumerate((r for r in few if r["images_active"] >= 30), start=1)
    ]
    assert all(row["share_base"] == pytest.approx(10 / 54) for row in few)
    matrix = open_store(planted / "store")
    row = few[0]
    subject = open_analysis(Inputs(**where(planted, sites="img_0"))).subjects[0]
    weight = subject.dictionary.encoder.weight.detach().numpy().astype(np.float64)[row["feature"]]
    bias = float(subject.dictionary.encoder.bias[row["feature"]])
    x = matrix.read(subject.site, row["step"], "mlp_in", 0, 120).astype(np.float64).reshape(120, *PLAN.grid, -1)
    assert row["images_active"] == ((x[:, :2, :5] @ weight + bias).max(axis=(1, 2)) > 0).sum()


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


def test_ties_go_to_the_earlier_step_then_to_the_lower_feature(planted: Path) -> None:
    subject = open_analysis(Inputs(**where(planted))).subjects[0]
    nothing = np.zeros(4, np.int64)
    steps = [
        Figures(np.asarray(score), nothing + step, nothing, nothing, {})
        for step, score in enumerate(([1.0, 2.0, np.nan, 1.0], [1.0, 2.0, 3.0, 2.0]))
    ]
    found = best_finds(subject, steps, 4, every_step=False)
    assert [(find.feature, find.step) for find in found] == [(2, 1), (1, 0), (3, 1), (0, 0)]
    every = best_finds(subject, steps, 9, every_step=True)
    assert [(find.feature, find.step) for find in every] == [(2, 1), (1, 0), (1, 1), (3, 1), (0, 0), (3, 0), (0, 1)]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (7, 5), (3, 2), (64, 48), (1, 1)])
def test_a_mask_is_resampled_by_area(tmp_path: Path, height: int, width: int) -> None:
    mask = np.random.default_rng(height).random((height, width)) < 0.5
    Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "m.png")
    grid = (4, 3)
    fine = np.kron(mask, np.ones((grid[0], grid[1])))  # every token is a whole number of these pixels
    expected = fine.reshape(grid[0], height, grid[1], width).mean(axis=(1, 3)).ravel()
    np.testing.assert_allclose(mask_cover(tmp_path / "m.png", grid), expected, atol=1e-12)


def test_the_bright_half_of_a_mask_is_that_of_its_mode_as_far_as_it_is_opaque(tmp_path: Path) -> None:
    top = np.arange(8)[:, None].repeat(8, 1) < 4
    pixels = {
        "deep": np.where(top, 65535, 200).astype(np.uint16),
        "clear": np.dstack([np.full((8, 8, 3), 255), np.where(top, 255, 0)]).astype(np.uint8),
        "plain": np.where(top, 200, 90).astype(np.uint8),
    }
    for name, values in pixels.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        assert (mask_cover(tmp_path / f"{name}.png", (8, 8)) > 0.5).tolist() == top.ravel().tolist(), name
    for name, values, said in (
        ("ones", top.astype(np.uint8), "its brightest pixel is 1 of 255: save it as 0 and 255"),
        ("bytes", (top * 255).astype(np.uint16), "its brightest pixel is 255 of 65535: save it as 0 and 65535"),
    ):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        with pytest.raises(UsageError, match=said):
            mask_cover(tmp_path / f"{name}.png", (8, 8))
    Image.fromarray(top.astype(np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(UsageError, match="32-bit floats"):
        mask_cover(tmp_path / "floats.tiff", (8, 8))


def test_a_mask_of_other_proportions_than_the_picture_is_noted(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, noted in (((90, 60), False), ((60, 60), True)):
        Image.fromarray(np.tri(size[1], size[0], dtype=np.uint8) * 255).save(tmp_path / "m.png")
        scan(planted, kind="spatial", mask=tmp_path / "m.png", plan=True)
        assert ("is stretched over the picture, which is 9 : 6 wide to high" in capsys.readouterr().out) == noted


def test_rectangles_in_tokens_shares_and_names() -> None:
    assert rectangle("1-2:0", (4, 3)).reshape(4, 3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert rectangle("0.0-0.5:0.5-1.0", (2, 3)).reshape(2, 3).tolist() == [[0, 0.5, 1], [0, 0, 0]]
    np.testing.assert_array_equal(rectangle("top", (4, 2)), rectangle("0-1:0-1", (4, 2)))


def test_a_store_of_sampled_tokens_is_looked_at_where_they_were_kept(tmp_path: Path) -> None:
    plan = Plan(n_images=20, steps=1, sites=("img_0",), pictures=False, tokens={"img": StreamTokens("sample", 9, 54)})
    store = planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    rows = scan(tmp_path, kind="spatial", region="0-1:0-4", best=48)
    subject = open_analysis(Inputs(**where(tmp_path))).subjects[0]
    weight = subject.dictionary.encoder.weight.detach().numpy().astype(np.float64)
    slow: dict[str, list[np.ndarray]] = {}  # by prompt
    prompts = store.prompts()["prompt"].to_pylist()
    for image in range(20):
        x = store.read(subject.site, 0, "mlp_in", image, image + 1)[0].astype(np.float64)
        position = store.tokens("img", 0, image, image + 1)[0]
        inside = (position // 9 < 2) & (position % 9 < 5)
        z = np.maximum(x @ weight.T - 1, 0)
        if inside.any():
            slow.setdefault(prompts[image], []).append(z[inside].mean(axis=0) - z[~inside].mean(axis=0))
    n = sum(map(len, slow.values()))
    assert 0 < n < 20
    assert rows
    mean = np.mean([np.mean(one, axis=0) for one in slow.values()], axis=0)
    for row in rows:
        assert row["n"] == n
        assert row["difference"] == pytest.approx(mean[row["feature"]], rel=1e-4)
        assert row["token"] in [r * 9 + c for r in range(2) for c in range(5)]


def test_in_a_joint_stream_the_text_comes_first(tmp_path: Path) -> None:
    plan = Plan(n_images=20, steps=1, sites=("joint_0",), pictures=False, tokens={"joint": StreamTokens("all", 78, 78)})
    planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    rows = scan(tmp_path, kind="top", words="^(red|blue|green)$", best=1)
    assert rows[0]["at"] in ("red", "blue", "green")
    assert rows[0]["token"] < 24
    scan(tmp_path, kind="spatial", region="0:0-1", name="corner")
    record = json.loads((tmp_path / "out" / "scan" / "corner.json").read_text())
    assert record["inside"] == {"joint": [24, 25]}


# ---- what cannot be asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "spatial", "region": "moon"}, "is no region: write rows:columns"),
        ({"kind": "spatial", "region": "2-6:0-3"}, "leaves the picture, which has tokens 0 to 5"),
        ({"kind": "spatial", "region": "3-2:0-3"}, "is empty"),
        ({"kind": "spatial", "region": "0.2-1.4:0.0-1.0"}, "leaves the picture"),
        ({"kind": "spatial", "region": "0.0-1.0:0.0-1.0"}, "nothing is outside"),
        ({"kind": "spatial", "region": "0.40-0.42:0.0-0.1"}, r"covers no token by 0\.5 or more"),
        ({"kind": "spatial", "region": "top", "sites": "txt_0"}, "only txt dictionaries"),
        ({"kind": "spatial"}, "needs a region"),
        ({"kind": "spatial", "region": "top", "positive": "red"}, "belongs to contrastive"),
        ({"kind": "contrastive"}, "needs one choice of its sides"),
        ({"kind": "contrastive", "positive": "zebra"}, "no prompt of the store matches"),
        ({"kind": "contrastive", "positive": "a ["}, "is no regular expression"),
        ({"kind": "contrastive", "positive": "red", "negative": "a"}, "is on both sides"),
        ({"kind": "contrastive", "positive": "."}, "nothing to compare with"),
        ({"kind": "contrastive", "images": "0-3"}, "belong together"),
        ({"kind": "contrastive", "images": "0-3", "against": "500"}, "there is no image 500"),
        ({"kind": "contrastive", "images": "0", "against": "3", "rank": "effect"}, "too few to say"),
        ({"kind": "spatial", "region": "top", "images": "0", "rank": "effect"}, "too few to say"),
        ({"kind": "contrastive", "positive": "red", "rank": "share"}, "not for contrastive scans"),
        ({"kind": "top", "words": "zebra"}, "no piece of any prompt matches"),
        ({"kind": "top", "words": "red", "images": "0-2", "prompts": "zebra"}, "no prompt of the store matches"),
        ({"kind": "top", "tokens": "3", "words": "red"}, "both choose tokens"),
        ({"kind": "top", "tokens": "54", "sites": "img_0"}, "there is no token 54"),
        ({"kind": "top", "name": "../secret"}, "a file name of letters"),
        ({"kind": "top", "best": 0}, "at least 1 feature"),
        ({"kind": "top", "pattern": "rise"}, "belongs to temporal scans"),
        ({"kind": "top", "match": "seed"}, "belongs to contrastive scans"),
        ({"kind": "top", "covered": 0.3}, "--covered says how much of a token a region covers"),
        ({"kind": "temporal", "covered": 0.3}, "--covered says how much of a token a region covers"),
        ({"kind": "temporal", "every_step": True}, "--every-step has no effect on --kind temporal"),
        ({"kind": "spatial", "region": "top", "min_images": 3}, "--rank share"),
        ({"kind": "spatial", "region": "top", "rank": "share", "min_images": 0}, "at least 1 image"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_with_what_to_do(planted: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        scan(planted, **asked)


def test_images_whose_prompts_are_others_are_named_where_none_is_left(planted: Path) -> None:
    prompts = open_store(planted / "store").prompts()["prompt"].to_pylist()
    other = next(prompt for prompt in prompts if prompt != prompts[0])
    with pytest.raises(UsageError, match="none of the images 0-2 has a prompt that matches"):
        scan(planted, kind="top", images="0-2", prompts=f"^{other}$")


def test_pairs_that_the_store_has_not_are_refused_by_their_place(planted: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    prompt = open_store(planted / "store").prompts()["prompt"][0].as_py()
    for content, message in (
        (
            "prompt_a,prompt_b\n" + f"{prompt},a purple elephant\n",
            "pair 1: the store has no image of the prompt “a purple elephant”",
        ),
        ("prompt_a,prompt_b\n" + f"{prompt},\n", "pair 1: one of its sides is empty"),
        (f"prompt_a,prompt_b\n{prompt},{prompt}\n", "pair 1: image 0 is on both sides"),
        ("prompt_a,prompt_b\n", "no pairs"),
        ("left,right\n1,2\n", "has the columns left, right"),
        ("image_a,image_b\n0,3\n1,four\n", "pair 2: 'four'"),
    ):
        file.write_text(content)
        with pytest.raises(UsageError, match=message):
            scan(planted, kind="contrastive", pairs=file)
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        scan(planted, kind="contrastive", pairs=tmp_path / "none.csv")
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        scan(planted, kind="spatial", mask=tmp_path / "mask.png")
    Image.new("L", (9, 6)).save(tmp_path / "dark.png")
    with pytest.raises(UsageError, match="covers no token"):
        scan(planted, kind="spatial", mask=tmp_path / "dark.png")


def test_one_seed_has_no_deviation_and_says_so(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scan(planted, kind="top", images="0", sites="img_0", name="single")
    assert "one seed a prompt" in capsys.readouterr().out
    assert np.isnan(rows[0]["deviation"])
    with (planted / "out" / "scan" / "single.csv").open() as lines:
        assert next(csv.DictReader(lines))["deviation"] == ""


def test_a_store_without_prompts_is_not_said_to_have_one_seed_a_prompt(
    planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store.prompts
    lost = ("prompt", "truth", "text_ids", "text_pieces")
    monkeypatch.setattr(Store, "prompts", lambda self: whole(self).drop_columns(list(lost)))
    for asked in ({"kind": "top", "images": "0-5"}, {"kind": "contrastive", "images": "0-2", "against": "3-5"}):
        scan(planted, **asked, plan=True)
        out = capsys.readouterr().out
        assert "this store does not say its prompts, so not which images differ in seed alone" in out
        assert "one seed a prompt" not in out
        assert "of 6 prompts" not in out


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    plan = Plan(n_images=8, steps=1, sites=("img_0",), pictures=False)
    planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    array = zarr.open_array(tmp_path / "out" / "img_0" / "step.0" / "scores", mode="r+")
    for value, error, said in (
        (np.inf, NonFiniteError, r"step\.0 holds a NaN or an infinite score"),
        (np.nan, DamagedError, "it holds NaN"),
    ):
        array[2, 5] = value
        with pytest.raises(error, match=said):
            scan(tmp_path, kind="top")
    with pytest.raises(UsageError, match="run python -m analyze scores"):
        scan(tmp_path, kind="top", out=tmp_path / "elsewhere")
