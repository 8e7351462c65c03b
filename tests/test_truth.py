"""The truth table finds planted features, on images and tokens, and says where there are none."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth import judging as truth
from analyze.truth.attributes import ATTRIBUTES, Attribute, image_labels, read_scenes, token_labels
from analyze.truth.halves import halves_of
from analyze.truth.judges import Judges, choose_judges
from analyze.truth.settings import TruthSettings
from analyze.truth.summary import summary
from analyze.truth.table import Findings
from analyze.truth.writing import markdown, printed
from store import Store, open_store
from store.errors import NonFiniteError, UsageError
from store.format import StreamTokens
from store.labels import Label
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

MISSING = {
    Attribute("colour", "pink"),
    Attribute("shape", "ring"),
    Attribute("position", "top left"),
    Attribute("background", "black"),
}
PLAN = Plan(
    n_images=220, pictures=False, planted=tuple(attribute for attribute in ATTRIBUTES if attribute not in MISSING)
)


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
    plan = Plan(n_images=150, steps=1, sites=("img_0",), pictures=False, tokens={"img": StreamTokens("sample", 20, 54)})
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


def test_ceiling_floor_and_best_f1_stand_beside_every_feature_over_images(planted: Path, table: dict[str, Any]) -> None:
    for number, entry in enumerate(table["attributes"]):
        for stream in ("img", "txt"):
            found = entry["streams"][stream]
            if ATTRIBUTES[number] in MISSING:
                assert found["images"]["f1"] < 0.9
            else:
                assert min(found[key]["f1"] for key in ("images", "images_floor")) > 0.9
                assert found["images_floor"]["channel"].split()[1] == str(number)  # the channel that it was planted in
                assert found["images_ceiling"]["auroc"] > 0.95
                assert 0 < found["images"]["threshold"] < 3
        best = entry["best"]
        assert best["selection"] == max(entry["streams"][stream]["images"]["selection"] for stream in ("img", "txt"))
        assert best["floor"] == entry["streams"][best["stream"]]["images_floor"]["auroc"]
    assert set(table["overall"]["without"]) == {str(attribute) for attribute in MISSING}


def test_every_dictionary_and_step_has_a_line_that_counts_its_own_rows(planted: Path, table: dict[str, Any]) -> None:
    rows = pq.read_table(planted / "out" / "truth.parquet").to_pylist()
    assert [(line["dictionary"], line["step"]) for line in table["by_dictionary"]] == [
        ("img_0", 0), ("img_0", 1), ("txt_0", 0), ("txt_0", 1),
    ]  # fmt: skip
    for line in table["by_dictionary"]:
        own = [r for r in rows if (r["dictionary"], r["step"]) == (line["dictionary"], line["step"])]
        assert line["with_feature"] == sum(r["image_auroc"] >= 0.9 for r in own)
        assert line["image_f1"] == pytest.approx(np.mean([r["image_f1"] for r in own]), abs=1e-6)
        assert (line["token_auroc"] is None) == (line["dictionary"] == "txt_0")
    with (planted / "out" / "truth.csv").open() as file:
        as_csv = list(csv.DictReader(file))
    assert [float(r["image_auroc"]) for r in as_csv] == [r["image_auroc"] for r in rows]


def own_truth(folder: Path, name: str, rows: list[list[Any]]) -> Path:
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / name


def test_a_truth_of_ones_own_gives_the_same_table_for_images(
    planted: Path, table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = read_scenes(open_store(planted / "store"))
    red, ring = Attribute("colour", "red"), Attribute("shape", "ring")
    wide = [
        ["image", "colour:red", "rings"],
        *([s.image, int(bool(s.shows(red))), int(bool(s.shows(ring)))] for s in scenes),
    ]
    long = [["image", "attribute", "value"], *([s.image, "colour:red", bool(s.shows(red))] for s in scenes)]
    long += [[s.image, "rings", "yes" if s.shows(ring) else "no"] for s in scenes]
    before = (planted / "out" / "truth.json").read_bytes()
    found = []
    for name, rows in (("wide.csv", wide), ("long.csv", long)):
        file = own_truth(tmp_path, name, rows)
        found.append(truth.run(TruthSettings(**where(planted, images="all", attributes=file, steps="0"))))
    assert found[0] == found[1]
    of_red, _ = found[0]["attributes"]
    known = table["attributes"][ATTRIBUTES.index(red)]
    assert (of_red["group"], of_red["value"]) == ("colour", "red")
    assert of_red["streams"]["txt"] == known["streams"]["txt"]
    assert of_red["streams"]["img"]["images"] == known["streams"]["img"]["images"]
    assert of_red["streams"]["img"]["images_ceiling"] == known["streams"]["img"]["images_ceiling"]
    assert "tokens" not in of_red["streams"]["img"]
    assert found[0]["overall"]["without"] == ["attribute rings"]
    assert (planted / "out" / "truth.json").read_bytes() == before  # the store's own truth stays
    assert "no feature of any stream stands for attribute rings" in capsys.readouterr().out
    assert (
        f"| colour red | {of_red['present']} | img | img_0/0 step 0 |"
        in (planted / "out" / "attributes.md").read_text()
    )


def test_images_of_which_a_truth_says_nothing_are_left_out_of_that_attribute(planted: Path, tmp_path: Path) -> None:
    scenes = read_scenes(open_store(planted / "store"))
    rows = [[s.image, int(bool(s.shows(ATTRIBUTES[0]))), ""] for s in scenes]
    for row in rows[:50]:
        row[2] = row[1]
    file = own_truth(tmp_path, "some.csv", [["image", "all", "some"], *rows])
    asked = TruthSettings(**where(planted, images="all", attributes=file, sites="txt_0", steps="1"))
    found = truth.run(asked)["attributes"]
    assert found[0]["present"] + found[0]["absent"] > 100
    assert found[1]["present"] + found[1]["absent"] < 50


def without_prompts(patch: pytest.MonkeyPatch) -> None:
    """Stores open as those do that were shared without their prompts."""
    whole = Store.prompts
    lost = ("prompt", "truth", "text_ids", "text_pieces")
    patch.setattr(Store, "prompts", lambda self: whole(self).drop_columns(list(lost)))


def test_halves_of_a_store_without_prompts_need_groups_and_keep_them_together(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = open_store(planted / "store").prompts()["prompt"].to_pylist()
    plain = own_truth(tmp_path, "plain.csv", [["image", "cat"], *([i, i % 2] for i in range(220))])
    wide = own_truth(tmp_path, "wide.csv", [["image", "group", "cat"], *([i, f"g{i // 4}", i % 2] for i in range(220))])
    long = [["image", "attribute", "value", "group"], *([i, "cat", i % 2, f"g{i // 4}"] for i in range(220))]
    asked = [
        TruthSettings(**where(planted, images="all", attributes=file))
        for file in (plain, wide, own_truth(tmp_path, "long.csv", long))
    ]
    for settings in asked[1:]:  # with prompts: equal prompts and equal groups stay together
        judges = choose_judges(open_analysis(settings), settings)
        assert [str(attribute) for attribute in judges.attributes] == ["attribute cat"]
        for names in (prompts, [image // 4 for image in range(220)]):
            sides = [
                {names[image] for image in judges.images[half]} for half in (judges.halves.choose, judges.halves.score)
            ]
            assert not sides[0] & sides[1]
    without_prompts(monkeypatch)
    with pytest.raises(UsageError, match=r"the prompts were left out of this store.*add a column group to"):
        choose_judges(open_analysis(asked[0]), asked[0])
    judges = choose_judges(open_analysis(asked[1]), asked[1])
    part = judges.halves.part.reshape(55, 4)
    assert (part == part[:, :1]).all()
    assert set(part[:, 0]) == {0, 1, 2}


def test_a_verdict_is_about_what_was_selected_however_well_others_score() -> None:
    kinds = ("image", "image_probe", "image_channel", "token", "probe", "channel")
    rows = []
    for stream, step, selection, auroc in (("img", 0, 0.8, 0.95), ("img", 1, 0.9, 0.7), ("txt", 0, 0.85, 0.99)):
        row: dict[str, Any] = {"dictionary": f"{stream}_0", "site": f"{stream}_0", "stream": stream, "step": step}
        for kind in kinds:
            row |= {f"{kind}_selection": selection, f"{kind}_auroc": auroc, f"{kind}_f1": auroc}
            row |= {f"{kind}_feature": step, f"{kind}_threshold": 0.5}
        rows.append(row | {"image_channel": "mlp_in 0 max", "channel": 0, "token_auroc_of_image_feature": 0.5})
    halves = halves_of([str(image) for image in range(8)], seed=0)
    here = np.ones((8, 1), bool)
    judges = Judges((Attribute("colour", "red"),), np.arange(8), here, here, halves, 0, None)
    found = summary(Findings(judges), rows, 0.9)
    entry = found["attributes"][0]
    img = entry["streams"]["img"]
    places = [img["images"], img["images_ceiling"], img["images_floor"]]
    places += [img["tokens"][key] for key in ("chosen_by_tokens", "ceiling", "floor")]
    assert [(place["step"], place["auroc"]) for place in places] == [(1, 0.7)] * 6
    assert (entry["best"]["stream"], entry["best"]["auroc"]) == ("img", 0.7)
    assert found["verdict"]["img"]["with_feature"] == 0
    assert found["verdict"]["txt"]["with_feature"] == 1
    assert found["overall"]["without"] == ["colour red"]  # though the feature of txt would have scored better
    assert found["overall"]["with_feature"] == 0


def test_what_a_table_does_not_show_is_said(table: dict[str, Any]) -> None:
    books = {"img_0": LabelBook(None), "txt_0": LabelBook(None)}
    red = table["attributes"][0]
    text = printed(table, books)
    assert f"colour red             {red['present']:<4} img_0/0 step 0" in text
    assert "a linear probe (ridge) on the raw activations, which a feature may" in text
    assert "so a feature may beat it: it is a reference and no bound." in markdown(table, books)
    assert "left out here" not in text
    assert "joint:" not in text
    lines = [{**table["by_dictionary"][0], "step": step} for step in range(10)]
    assert "left out here: steps 4, 8; the Markdown file has them all" in printed(
        {**table, "by_dictionary": lines}, books
    )
    entries = [{**entry, "streams": {"joint": entry["streams"]["txt"]}} for entry in table["attributes"]]
    joint = {**table, "attributes": entries, "verdict": {"joint": table["verdict"]["txt"]}}
    for told in (printed(joint, books), markdown(joint, books)):
        assert "joint: no figures over tokens, which are told apart in img streams alone" in told


def test_pictures_have_no_say_in_a_truth_of_ones_own(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--any-picture is about pictures of builtin:shapes"):
        TruthSettings(**where(planted, attributes=tmp_path / "own.csv", any_picture=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["image", "cat"], [0, 2]], "line 2: cat is '2': expected 1 or 0"),
        ([["image", "cat"], [220, 1]], "line 2: there is no image 220: the store has 0 to 219"),
        ([["image", "cat"], ["first", 1]], "line 2: 'first' is no image"),
        ([["image", "cat"], [0, 1, 1]], "line 2: 3 cells where the header has 2"),
        ([["image", "attribute", "value"], [0, "cat", 1], [0, "cat", 0]], "line 3: image 0 was said to be the opposite"),
        ([["picture", "cat"], [0, 1]], "has the columns picture, cat: expected image"),
        ([["image", "cat", "cat"], [0, 1, 0]], "each once"),
        ([["image", "cat"], [0, ""]], "answers nothing"),
        ([["image", "group"], [0, "a"]], "has the columns image, group: expected image and one column an attribute"),
        ([["image", "group", "cat"], [0, "a", 1], [0, "b", 1]], "line 3: image 0 is in group 'b', and was in 'a'"),
        ([["image", "group", "cat"], [0, "", 1], *([i, i, 1] for i in range(1, 40))], "it is empty for image 0"),
        ([["image", "group", "cat"], *([i, "all", 1] for i in range(220))], r"too few lots of images \(1\)"),
        ([["image", "cat"], *([image, 1] for image in range(5))], "says something about 5"),
        ([], r"has the columns \(none\)"),
    ],
)  # fmt: skip
def test_a_truth_that_cannot_be_is_refused_by_its_line(
    planted: Path, tmp_path: Path, rows: list[list[Any]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        truth.run(TruthSettings(**where(planted, images="all", attributes=own_truth(tmp_path, "own.csv", rows))))


def test_labels_stand_beside_features_in_the_printed_and_the_markdown_table(table: dict[str, Any]) -> None:
    red = LabelBook(None, None, [Label(0, "2026-01-01T00:00:00Z", "ada", "ripe | red")])
    books = {"img_0": red, "txt_0": LabelBook(None)}
    assert "img_0/0 step 0 · ripe \\| red |" in markdown(table, books)
    assert "img_0/0 step 0 · ripe | red" in printed(table, books)
    assert max(map(len, printed(table, books).splitlines())) <= 120


def test_scores_that_are_no_numbers_are_refused(planted: Path) -> None:
    array = zarr.open_array(planted / "out" / "txt_0" / "step.1" / "scores", mode="r+")
    before = array[3, 7]
    try:
        array[3, 7] = np.inf
        with pytest.raises(NonFiniteError, match=r"txt_0/step\.1 holds a NaN or an infinite score"):
            truth.run(TruthSettings(**where(planted, images="all", sites="txt_0", steps="1")))
    finally:
        array[3, 7] = before
