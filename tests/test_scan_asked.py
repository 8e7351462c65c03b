"""What a scan is asked: masks and regions read as what they are, seeds that are not known, what cannot be answered."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from PIL import Image

from analyze.scan.contrast import sides_of
from analyze.scan.images import catalogue
from analyze.scan.region import mask_cover, rectangle
from analyze.scan.settings import ScanSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from store import Store, open_store
from store.errors import DamagedError, NonFiniteError, UsageError
from tests import analyze_planted
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.small_scans import scan, where


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
    planted_scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, noted in (((90, 60), False), ((60, 60), True)):
        Image.fromarray(np.tri(size[1], size[0], dtype=np.uint8) * 255).save(tmp_path / "m.png")
        scan(planted_scan, kind="spatial", mask=tmp_path / "m.png", plan=True)
        assert ("is stretched over the picture, which is 9 : 6 wide to high" in capsys.readouterr().out) == noted


def test_rectangles_in_tokens_shares_and_names() -> None:
    assert rectangle("2-3:1", (4, 3)).reshape(4, 3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert rectangle("0.0-0.5:0.5-1.0", (2, 3)).reshape(2, 3).tolist() == [[0, 0.5, 1], [0, 0, 0]]
    np.testing.assert_array_equal(rectangle("top", (4, 2)), rectangle("1-2:1-2", (4, 2)))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kind": "spatial", "region": "moon"}, "is no region: write rows:columns"),
        ({"kind": "spatial", "region": "3-7:1-4"}, "leaves the picture, which has tokens 1 to 6"),
        ({"kind": "spatial", "region": "2-3:0-3"}, "'0-3' in .* leaves the picture, which has tokens 1 to 9"),
        ({"kind": "spatial", "region": "4-3:1-4"}, "is empty"),
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
def test_what_cannot_be_asked_is_refused_with_what_to_do(
    planted_scan: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        scan(planted_scan, **asked)


def test_a_contrast_of_prompts_can_be_confined_to_some_images(planted_scan: Path) -> None:
    known = catalogue(open_store(planted_scan / "store"))
    settings = ScanSettings(
        store="s", dictionaries=Path("d"), out=Path("o"), kind="contrastive", positive="red", images="20-31"
    )
    ((a, b),) = sides_of(known, settings)
    red = [image for image in range(20, 32) if "red" in known.prompts[image]]
    assert a.tolist() == red and sorted([*a, *b]) == list(range(20, 32))
    other = next(prompt for prompt in known.prompts if prompt != known.prompts[0])
    with pytest.raises(UsageError, match=r"none of the images 0 has a prompt that matches --positive .*: images \d+"):
        sides_of(known, replace(settings, positive=f"^{other}$", images="0"))


def test_images_whose_prompts_are_others_are_named_where_none_is_left(planted_scan: Path) -> None:
    prompts = open_store(planted_scan / "store").prompts()["prompt"].to_pylist()
    other = next(prompt for prompt in prompts if prompt != prompts[0])
    with pytest.raises(UsageError, match="none of the images 0-2 has a prompt that matches"):
        scan(planted_scan, kind="top", images="0-2", prompts=f"^{other}$")


def test_pairs_that_the_store_has_not_are_refused_by_their_place(planted_scan: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    prompt = open_store(planted_scan / "store").prompts()["prompt"][0].as_py()
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
            scan(planted_scan, kind="contrastive", pairs=file)
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        scan(planted_scan, kind="contrastive", pairs=tmp_path / "none.csv")
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        scan(planted_scan, kind="spatial", mask=tmp_path / "mask.png")
    Image.new("L", (9, 6)).save(tmp_path / "dark.png")
    with pytest.raises(UsageError, match="covers no token"):
        scan(planted_scan, kind="spatial", mask=tmp_path / "dark.png")


def test_one_seed_has_no_deviation_and_says_so(planted_scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scan(planted_scan, kind="top", images="0", sites="img_0", name="single")
    assert "one seed a prompt" in capsys.readouterr().out
    assert np.isnan(rows[0]["deviation"])
    with (planted_scan / "out" / "scan" / "single.csv").open() as lines:
        assert next(csv.DictReader(lines))["deviation"] == ""


def test_a_store_without_prompts_is_not_said_to_have_one_seed_a_prompt(
    planted_scan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store.prompts
    lost = ("prompt", "truth", "text_ids", "text_pieces")
    monkeypatch.setattr(Store, "prompts", lambda self: whole(self).drop_columns(list(lost)))
    for asked in ({"kind": "top", "images": "0-5"}, {"kind": "contrastive", "images": "0-2", "against": "3-5"}):
        scan(planted_scan, **asked, plan=True)
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
