"""Each kind of scan finds the planted feature first, in a table that says where and of whom."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from analyze.truth.attributes import Scene, read_scenes
from store import open_store
from store.errors import UsageError
from store.format import StreamTokens
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.small_scans import PLAN, SEEDS, number, scan, where


@pytest.fixture(scope="module")
def scenes(planted_scan: Path) -> list[Scene]:
    return read_scenes(open_store(planted_scan / "store"))


@pytest.mark.parametrize("site", ["img_0", "txt_0"])
def test_a_contrast_of_prompts_finds_the_colour_that_they_differ_in(planted_scan: Path, site: str) -> None:
    rows = scan(planted_scan, kind="contrastive", positive="^a red", negative="^a blue", sites=site, direction="both")
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
    planted_scan: Path, scenes: list[Scene], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = open_store(planted_scan / "store").prompts()["prompt"].to_pylist()
    shapes = {"circle": [], "square": []}  # type: ignore[var-annotated]
    for scene in scenes[::SEEDS]:
        if scene.things[0].shape in shapes:
            shapes[scene.things[0].shape].append(prompts[scene.image])
    pairs = list(zip(shapes["circle"], shapes["square"], strict=False))
    assert len(pairs) >= 3
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt_a", "prompt_b"), *((a.upper(), b) for a, b in pairs)])
    rows = scan(planted_scan, kind="contrastive", pairs=tmp_path / "pairs.csv", best=5, name="shapes")
    assert rows[0]["feature"] == number("shape", "circle")
    assert rows[0]["n"] == SEEDS * len(pairs)
    assert f"{len(pairs)} pairs, matched by seed" in capsys.readouterr().out


def test_a_spatial_scan_finds_the_feature_of_objects_in_that_place(planted_scan: Path, scenes: list[Scene]) -> None:
    places = [scene.things[0].position for scene in scenes[::SEEDS]]
    place = max(sorted(set(map(str, places))), key=places.count)
    images = [scene.image for scene in scenes if scene.things[0].position == place]
    object_tokens = np.flatnonzero(scenes[images[0]].things[0].coverage > 0.5)
    r, c = np.unravel_index(object_tokens, PLAN.grid)
    region = f"{r.min() + 1}-{r.max() + 1}:{c.min() + 1}-{c.max() + 1}"
    chosen = ",".join(map(str, images))
    rows = scan(planted_scan, kind="spatial", region=region, images=chosen, per_image=True)
    assert rows[0]["feature"] == number("position", place)
    assert rows[0]["site"] == "img_0"  # text has no places
    assert rows[0]["token"] in object_tokens
    assert rows[0]["share"] > 0.9
    assert rows[0]["n"] == len(images)
    by_share = scan(planted_scan, kind="spatial", region=region, images=chosen, rank="share", name="by-share")
    assert [row["share"] for row in by_share] == sorted((row["share"] for row in by_share), reverse=True)
    outside = scan(planted_scan, kind="spatial", region=region, images=str(images[0]), name="one")
    ground = number("background", scenes[images[0]].background)
    assert ground not in [row["feature"] for row in outside]


def test_a_mask_of_another_size_says_the_same_as_the_rectangle(planted_scan: Path, tmp_path: Path) -> None:
    mask = np.zeros((60, 180), np.uint8)
    mask[20:40, 60:120] = 255  # rows 3 and 4 of 6, columns 4 to 6 of 9
    Image.fromarray(mask).save(tmp_path / "mask.png")
    by_mask = scan(planted_scan, kind="spatial", mask=tmp_path / "mask.png", images="0-30")
    by_tokens = scan(planted_scan, kind="spatial", region="3-4:4-6", images="0-30")
    by_share = scan(planted_scan, kind="spatial", region="0.334-0.666:0.334-0.666", images="0-30")
    assert by_mask == by_tokens == by_share
    assert by_mask


def test_a_temporal_scan_finds_features_that_fall_as_the_planted_signal_does(planted_scan: Path) -> None:
    rows = scan(planted_scan, kind="temporal", pattern="fall", sites="img_0", prompts="^a red", best=1)
    assert rows[0]["feature"] == number("colour", "red")
    assert rows[0]["pattern"] in ("falls", "only step 0")
    assert rows[0]["step"] == 0
    assert rows[0]["change"] < 0
    assert rows[0]["step_0"] > rows[0]["step_1"]
    assert not [row for row in scan(planted_scan, kind="temporal", pattern="rise", sites="img_0") if row["score"] > 1]
    with pytest.raises(UsageError, match="only step 1 is chosen"):
        scan(planted_scan, kind="temporal", steps="1")


def test_a_top_scan_of_one_prompt_finds_what_it_shows(planted_scan: Path, scenes: list[Scene]) -> None:
    thing = scenes[0].things[0]
    said = [("colour", thing.colour), ("shape", thing.shape), ("position", thing.position)]
    shown = {number(group, str(value)) for group, value in said} | {number("background", scenes[0].background)}
    rows = scan(planted_scan, kind="top", images="0-2", sites="img_0", best=4)
    assert {row["feature"] for row in rows} == shown
    assert all(row["n"] == SEEDS and row["deviation"] > 0 for row in rows)
    on_object = scan(planted_scan, kind="top", images="0-2", sites="img_0", tokens=_object_tokens(scenes[0]), best=3)
    assert {row["feature"] for row in on_object} == shown - {number("background", scenes[0].background)}


def _object_tokens(scene: Scene) -> str:
    return ",".join(map(str, np.flatnonzero(scene.things[0].coverage > 0.5)))


def test_a_top_scan_of_words_looks_at_their_tokens_only(planted_scan: Path) -> None:
    rows = scan(planted_scan, kind="top", words="^red$", prompts="^a red", best=1)
    assert rows[0]["feature"] == number("colour", "red")
    assert rows[0]["site"] == "txt_0"
    assert rows[0]["at"] == "red"
    assert rows[0]["token"] == 1  # a red …


def test_the_table_begins_with_what_graph_targets_takes_and_names_labels(planted_scan: Path) -> None:
    analysis = open_analysis(Inputs(**where(planted_scan)))
    subject = next(subject for subject in analysis.subjects if subject.name == "img_0")
    file = Path(str(subject.place)) / "labels.json"
    try:
        book = LabelBook.of(subject)
        book.set(number("colour", "red"), "ripe tomatoes", "ada", _moment())
        book.save()
        scan(planted_scan, kind="contrastive", positive="^a red", name="labelled", sites="img_0")
    finally:
        file.unlink(missing_ok=True)
    with (planted_scan / "out" / "scan" / "labelled.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0])[:5] == ["image", "step", "site", "token", "feature"]
    assert rows[0]["label"] == "ripe tomatoes"
    matrix = analysis.matrix(subject, int(rows[0]["step"]))
    assert int(rows[0]["token"]) == matrix.tokens(int(rows[0]["feature"]))[int(rows[0]["image"])]
    record = json.loads((planted_scan / "out" / "scan" / "labelled.json").read_text())
    assert record["kind"] == "contrastive"
    assert record["matched_by_seed"]
    assert str(planted_scan) not in json.dumps(record)


def _moment() -> Any:
    from datetime import UTC, datetime

    return datetime(2026, 1, 1, tzinfo=UTC)


def test_equal_questions_give_equal_bytes(planted_scan: Path) -> None:
    asked = {"kind": "spatial", "region": "top", "images": "0-20", "per_image": True, "every_step": True, "best": 5}
    scan(planted_scan, **asked)
    names = ("spatial.csv", "spatial.json", "spatial.images.csv")
    first = {name: (planted_scan / "out" / "scan" / name).read_bytes() for name in names}
    scan(planted_scan, **asked)
    assert first == {name: (planted_scan / "out" / "scan" / name).read_bytes() for name in names}


def test_a_feature_stands_once_at_its_best_step_unless_every_step_is_asked_for(planted_scan: Path) -> None:
    once = scan(planted_scan, kind="top", sites="img_0", best=10)
    assert len({row["feature"] for row in once}) == 10
    every = scan(planted_scan, kind="top", sites="img_0", best=40, every_step=True, name="every")
    places = [(row["feature"], row["step"]) for row in every]
    assert len(set(places)) == len(places)
    assert len({feature for feature, _ in places}) < len(places)


def test_figures_of_single_images_average_to_the_listed_one(planted_scan: Path) -> None:
    rows = scan(planted_scan, kind="spatial", region="centre", images="0-11", per_image=True, best=3, name="each")
    with (planted_scan / "out" / "scan" / "each.images.csv").open() as lines:
        each = list(csv.DictReader(lines))
    assert len(each) == 3 * 12
    for row in rows:
        own = [float(one["figure"]) for one in each if int(one["rank"]) == row["rank"]]
        assert np.mean(own) == pytest.approx(row["difference"], rel=1e-4)


def test_a_plan_says_what_would_be_read_and_writes_nothing(
    planted_scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(planted_scan, kind="spatial", region="top", name="never", plan=True) == []
    assert "reads rows of 1 sites x 2 steps, 8 chunks of 16 images" in capsys.readouterr().out
    assert scan(planted_scan, kind="top", name="never", plan=True) == []
    assert "reads 4 score matrices" in capsys.readouterr().out
    assert not (planted_scan / "out" / "scan" / "never.csv").exists()


def test_a_share_counts_where_a_feature_is_active_on_enough_images(planted_scan: Path) -> None:
    asked = {"kind": "spatial", "region": "1-2:1-5", "sites": "img_0", "best": 96, "every_step": True, "rank": "share"}
    few, more = scan(planted_scan, **asked, min_images=1), scan(planted_scan, **asked, min_images=30)
    assert 0 < len(more) < len(few)
    assert more == [
        row | {"rank": place} for place, row in enumerate((r for r in few if r["images_active"] >= 30), start=1)
    ]
    assert all(row["share_base"] == pytest.approx(10 / 54) for row in few)
    matrix = open_store(planted_scan / "store")
    row = few[0]
    subject = open_analysis(Inputs(**where(planted_scan, sites="img_0"))).subjects[0]
    weight = subject.dictionary.encoder.weight.detach().numpy().astype(np.float64)[row["feature"]]
    bias = float(subject.dictionary.encoder.bias[row["feature"]])
    x = matrix.read(subject.site, row["step"], "mlp_in", 0, 120).astype(np.float64).reshape(120, *PLAN.grid, -1)
    assert row["images_active"] == ((x[:, :2, :5] @ weight + bias).max(axis=(1, 2)) > 0).sum()


def test_a_store_of_sampled_tokens_is_looked_at_where_they_were_kept(tmp_path: Path) -> None:
    plan = Plan(n_images=20, steps=1, sites=("img_0",), pictures=False, tokens={"img": StreamTokens("sample", 9, 54)})
    store = planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    rows = scan(tmp_path, kind="spatial", region="1-2:1-5", best=48)
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
    scan(tmp_path, kind="spatial", region="1:1-2", name="corner")
    record = json.loads((tmp_path / "out" / "scan" / "corner.json").read_text())
    assert record["inside"] == {"joint": [24, 25]}
