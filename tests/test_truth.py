"""The truth table finds planted features, on images and tokens, and says where there are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth import judging as truth
from analyze.truth.attributes import ATTRIBUTES, Attribute, image_labels, read_scenes, token_labels
from analyze.truth.halves import halves_of
from analyze.truth.settings import TruthSettings
from store import open_store
from store.errors import UsageError
from store.format import StreamTokens
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

MISSING = {
    Attribute("colour", "pink"),
    Attribute("shape", "ring"),
    Attribute("position", "top left"),
    Attribute("background", "black"),
}
PLAN = Plan(n_images=220, planted=tuple(attribute for attribute in ATTRIBUTES if attribute not in MISSING))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a planted store, its dictionaries, and their scores in `out`."""
    folder = tmp_path_factory.mktemp("planted")
    planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    scores.run(ScoresSettings(**where(folder)))
    return folder


def where(folder: Path, **more: Any) -> dict[str, Any]:
    return {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out", **more}


@pytest.fixture(scope="module")
def table(planted: Path) -> dict[str, Any]:
    return truth.run(TruthSettings(**where(planted, images="all")))


def test_every_planted_attribute_is_stood_for_by_its_own_feature(table: dict[str, Any]) -> None:
    for number, entry in enumerate(table["attributes"]):
        attribute = Attribute(entry["group"], entry["value"])
        assert attribute == ATTRIBUTES[number]
        for stream in ("img", "txt"):
            place = entry["streams"][stream]["images"]
            if attribute not in MISSING:
                assert place["feature"] == number
                assert place["auroc"] > 0.99
                assert (place["site"], place["step"]) == (f"{stream}_0", 0)  # where the signal is strongest
            else:
                assert place["auroc"] < 0.9


def test_attributes_without_a_feature_are_named_and_the_verdict_counts_the_others(table: dict[str, Any]) -> None:
    for stream in ("img", "txt"):
        assert set(table["verdict"][stream]["without"]) == {str(attribute) for attribute in MISSING}
        assert table["verdict"][stream]["with_feature"] == len(ATTRIBUTES) - len(MISSING)


def test_over_tokens_the_planted_feature_is_chosen_and_feature_ceiling_and_floor_all_read_it(
    table: dict[str, Any],
) -> None:
    for number, entry in enumerate(table["attributes"]):
        if Attribute(entry["group"], entry["value"]) in MISSING:
            continue
        tokens = entry["streams"]["img"]["tokens"]
        assert tokens["chosen_by_tokens"]["feature"] == number
        assert tokens["chosen_by_images"] > 0.99
        assert min(tokens[key]["auroc"] for key in ("chosen_by_tokens", "ceiling", "floor")) > 0.99
        assert "tokens" not in entry["streams"]["txt"]


def test_truth_is_written_with_null_for_what_does_not_exist_and_equal_bytes(
    planted: Path, table: dict[str, Any]
) -> None:
    first = {name: (planted / "out" / name).read_bytes() for name in ("truth.json", "truth.parquet")}
    truth.run(TruthSettings(**where(planted, images="all")))
    assert first == {name: (planted / "out" / name).read_bytes() for name in first}
    assert json.loads(first["truth.json"]) == json.loads(json.dumps(table))
    rows = pq.read_table(planted / "out" / "truth.parquet").to_pylist()
    assert len(rows) == 2 * 2 * len(ATTRIBUTES)
    assert all(row["token_auroc"] is None for row in rows if row["stream"] == "txt")


def test_halves_never_share_a_prompt_and_depend_only_on_the_seed() -> None:
    prompts = [f"prompt {number // 3}" for number in range(60)]
    halves = halves_of(prompts, seed=4)
    assert (halves.part == halves_of(prompts, seed=4).part).all()
    assert (halves.part != halves_of(prompts, seed=5).part).any()
    for part in np.unique(halves.part):
        inside = {prompt for prompt, where in zip(prompts, halves.part, strict=True) if where == part}
        outside = {prompt for prompt, where in zip(prompts, halves.part, strict=True) if where != part}
        assert not inside & outside
    assert halves.choose.sum() == halves.score.sum() == 30


def test_labels_follow_the_masks(planted: Path) -> None:
    scenes = read_scenes(open_store(planted / "store"))
    shown, defined = image_labels(scenes)
    assert defined.all()
    labels = token_labels(scenes, seed=0)
    red = ATTRIBUTES.index(Attribute("colour", "red"))
    for row in np.flatnonzero(labels.population["object"])[:200]:
        scene = scenes[labels.scene[row]]
        assert scene.things[0].coverage[labels.token[row]] >= 0.5
        assert labels.shown[row, red] == (scene.things[0].colour == "red") == shown[labels.scene[row], red]
    for row in np.flatnonzero(labels.population["background"])[:200]:
        assert scenes[labels.scene[row]].things[0].coverage[labels.token[row]] == 0


def test_positions_are_undefined_in_scenes_of_two_objects(planted: Path) -> None:
    scene = read_scenes(open_store(planted / "store"))[0]
    two = type(scene)(0, scene.background, True, (scene.things[0], scene.things[0]), scene.said)
    _, defined = image_labels([two])
    places = np.asarray([attribute.group == "position" for attribute in ATTRIBUTES])
    assert not defined[0, places].any()
    assert defined[0, ~places].all()
    labels = token_labels([two], seed=0)
    assert not labels.population["placed"].any()
    assert labels.population["object"].any()


def test_sampled_image_tokens_are_judged_where_they_were_kept(tmp_path: Path) -> None:
    plan = Plan(n_images=220, steps=1, sites=("img_0",), tokens={"img": StreamTokens("sample", 20, 54)})
    planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    scores.run(ScoresSettings(**where(tmp_path)))
    table = truth.run(TruthSettings(**where(tmp_path, images="all")))
    red = table["attributes"][0]["streams"]["img"]["tokens"]
    assert red["chosen_by_tokens"]["feature"] == 0
    assert red["chosen_by_tokens"]["auroc"] > 0.99


def test_held_out_images_are_those_of_held_out_prompts(planted: Path) -> None:
    with pytest.raises(UsageError, match="at least 20 images of held-out prompts") as caught:
        truth.run(TruthSettings(**where(planted)))
    assert "--images all" in str(caught.value)
