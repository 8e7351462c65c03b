"""Heat lies where its token is, contact sheets show prompts once, and pictures are the same bytes every time."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from analyze.inputs import open_analysis
from analyze.labels.book import LabelBook
from analyze.pictures import contact, over_steps, sheets
from analyze.pictures.examples import feature_row, gather_examples, heated, scale_of
from analyze.pictures.heat import Heat, heats
from analyze.pictures.narrowed import judged_alone
from analyze.pictures.overlay import Look
from analyze.pictures.settings import SheetSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from store.errors import NonFiniteError, UsageError
from store.format import StreamTokens
from store.sites import Site
from store.split import normalise
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build


def test_the_heat_of_a_joint_site_is_that_of_its_image_tokens(scored: Inputs) -> None:
    store = open_analysis(scored).store
    text, (rows, columns) = store.meta.max_sequence_length, store.meta.grid
    token = 2 * columns + 5
    heat = Heat(0, np.asarray([0, text - 1, text + token]), np.asarray([9.0, 9.0, 3.0], np.float32))
    picture = Image.new("RGB", (columns * 8, rows * 8), (90, 90, 90))
    pixels = np.asarray(heated(store, "joint", picture, heat, 3.0, Look(patches=True)), np.int64)
    y, x = np.nonzero(pixels[..., 0] > 150)
    assert {(int(a) // 8, int(b) // 8) for a, b in zip(y, x, strict=True)} == {(2, 5)}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("sheets")
    plan = Plan(n_images=40, seeds_per_prompt=2, steps=2, text_tokens=16)
    planted_store(folder / "store", plan)
    inputs = Inputs(
        store=folder / "store", dictionaries=planted_dictionaries(folder / "dictionaries", plan), out=folder / "out"
    )
    scores.run(ScoresSettings(**vars(inputs)))
    return inputs


def test_heats_of_some_features_are_those_of_the_whole_dictionary(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    topk = build(DictionaryConfig("transcoder", Site.parse("img_0"), 32, 48, activation="topk", k=5))
    topk.initialise(seed=0)
    image_subject = analysis.subjects[0]
    for subject in (*analysis.subjects, replace(image_subject, outline=topk)):
        wanted = {3: [17, 2], 40: [2], 1: [39, 17]}
        found = heats(analysis, subject, 1, wanted)
        assert {feature: [heat.image for heat in group] for feature, group in found.items()} == wanted
        for feature, group in found.items():
            for heat in group:
                x = analysis.store.read(subject.site, 1, subject.point, heat.image, heat.image + 1)[0][heat.positions]
                rows = torch.from_numpy(x.astype(np.float32))
                with torch.no_grad():
                    z = subject.dictionary.encode(rows, torch.full((len(rows),), 0.5))[:, feature]
                np.testing.assert_allclose(heat.values, z, rtol=1e-5, atol=1e-6)


def test_heats_build_no_module_for_each_image(scored: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = open_analysis(scored)
    subject = analysis.subjects[0]
    assert judged_alone(subject.dictionary)  # and it is loaded now

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert len(heats(analysis, subject, 0, {1: [5, 9], 3: [9]})[1]) == 2


def test_a_weight_that_is_not_finite_is_refused_by_name(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    broken = build(DictionaryConfig("transcoder", Site.parse("img_0"), 32, 48))
    broken.initialise(seed=0)
    with torch.no_grad():
        broken.encoder.bias[7] = torch.nan
    with pytest.raises(NonFiniteError, match="transcoder_img_0 gives a NaN"):
        heats(analysis, replace(analysis.subjects[0], outline=broken), 0, {7: [0]})


def test_a_sheet_shows_each_prompt_once_best_first(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    for subject in analysis.subjects:
        table = analysis.matrix(subject, 0).features()
        for examples in gather_examples(analysis, subject, 0, table, [0, 1, 9, 22], 8).values():
            prompts = [normalise(example.prompt) for example in examples]
            assert len(prompts) == len(set(prompts)) > 0
            values = [example.score for example in examples]
            assert values == sorted(values, reverse=True)
            for example in examples:
                assert example.score == pytest.approx(example.heat.values.max(), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 4), pytest.param({"patches": True, "clip_percentile": 80.0, "side": 90}, 4, marks=pytest.mark.slow),
        pytest.param({"over_steps": True}, 2, marks=pytest.mark.slow),
        pytest.param({"over_steps": True, "matched": True}, 2, marks=pytest.mark.slow),
        ({"over_steps": True, "matched": True, "sites": "img_0"}, 1),
        ({"features": "3", "images": "0,38"}, 8), ({"features": "3", "images": "17", "over_steps": True, "top": 8}, 2),
    ],
)  # fmt: skip
def test_pictures_are_written_for_every_site_and_are_equal_bytes_again(
    scored: Inputs, capsys: pytest.CaptureFixture[str], more: dict[str, Any], count: int
) -> None:
    options = {**vars(scored), "best": 1, "top": 2, **more}
    first = {path: path.read_bytes() for path in sheets.run(SheetSettings(**options))}
    assert len(first) == count
    assert f"sheets: {count} " in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sheets.run(SheetSettings(**options))} == first
    for path in first:
        with Image.open(path) as image:
            assert min(image.size) >= 48


def test_an_overlay_of_a_chosen_image_has_its_size_and_the_colours_of_the_contact_sheet(scored: Inputs) -> None:
    options = {**vars(scored), "features": "1", "images": "5", "sites": "img_0", "steps": "0"}
    (own,), (large,) = (sheets.run(SheetSettings(**options, side=side)) for side in (None, 200))
    assert own == large == scored.out / "sheets" / "img_0" / "step.0" / "feature-1-image-5.png"
    with Image.open(large) as image:
        assert max(image.size) == 200
    sheets.run(SheetSettings(**options))
    analysis = open_analysis(scored)
    subject, table = analysis.subjects[0], analysis.matrix(analysis.subjects[0], 0).features()
    shown = gather_examples(analysis, subject, 0, table, [1], 8)[1]
    heat = heats(analysis, subject, 0, {1: [5]})[1][0]
    picture = analysis.store.picture(5)
    assert picture is not None
    expected = heated(analysis.store, "img", picture, heat, scale_of(example.heat for example in shown))
    with Image.open(own) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_one_feature_over_steps_is_on_one_scale_and_matched_features_are_found(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    subject = analysis.subjects[0]
    tables = {step: analysis.matrix(subject, step).features() for step in analysis.steps}
    same = over_steps.columns_of(analysis, subject, tables, 1, matched=False)
    assert [(column.step, column.feature) for column in same] == [(0, 1), (1, 1)]
    matched = over_steps.columns_of(analysis, subject, tables, 1, matched=True)
    for column in matched:
        if not column.reference:
            other = analysis.matrix(subject, column.step).scores().astype(np.float64)
            reference = next(each for each in matched if each.reference)
            own = analysis.matrix(subject, reference.step).scores(1).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                correlation = [np.corrcoef(own, scores)[0, 1] for scores in other.T]
            assert column.feature == int(np.nanargmax(correlation))


def with_active(table: pa.Table, images: int) -> pa.Table:
    """The feature table as if every feature were active on so many images."""
    place = table.column_names.index("images_active")
    return table.set_column(place, "images_active", pa.array([images] * len(table), pa.int64()))


def test_only_features_that_fire_often_enough_and_alike_are_matched_over_steps(
    scored: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = open_analysis(scored)
    subject = analysis.subjects[0]
    tables = {step: analysis.matrix(subject, step).features() for step in analysis.steps}
    active = {step: table["images_active"].to_numpy() for step, table in tables.items()}
    most = int(max(counts[1] for counts in active.values()))

    def matched(feature: int, min_images: int) -> list[over_steps.Shown]:
        return over_steps.columns_of(analysis, subject, tables, feature, True, min_images)

    for min_images in (1, most):
        assert all(active[c.step][c.feature] >= min_images for c in matched(1, min_images) if "correlation " in c.note)
    few = matched(1, most + 1)
    assert [column.feature for column in few] == [1, 1]
    assert f"active on {most} images, too few" in next(column.note for column in few if column.reference)
    for correlation, images, found in ((0.31, 40, 7), (0.29, 40, 1), (0.31, 0, None)):
        alike = np.full(48, -0.5, np.float32)
        alike[7] = correlation
        monkeypatch.setattr(over_steps, "correlations_with", lambda *_, alike=alike: alike)
        tables = {step: with_active(table, images) for step, table in tables.items()}
        if not images:
            assert "active at no step" in [column.note for column in matched(1, 8)]
            continue
        (other,) = (column for column in matched(1, 8) if not column.reference)
        assert other.feature == found


def test_labels_stand_in_the_titles_of_sheets(scored: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []

    def page(title: str, notes: Sequence[Any], lines: Sequence[Image.Image]) -> Image.Image:
        titles.append(title)
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(contact, "page", page)
    monkeypatch.setattr(over_steps, "page", page)
    book = LabelBook(None)
    book.set(1, "something yellow", "ada", datetime(2026, 1, 1, tzinfo=UTC))
    monkeypatch.setattr(LabelBook, "of", classmethod(lambda _cls, _subject: book))
    options = {**vars(scored), "features": "1", "sites": "txt_0", "steps": "0,1"}
    sheets.run(SheetSettings(**options))
    sheets.run(SheetSettings(**options, over_steps=True))
    assert titles == [
        "txt_0/1 · something yellow, step 0", "txt_0/1 · something yellow, step 1", "txt_0/1 · something yellow over 2 steps",
    ]  # fmt: skip


def test_a_feature_that_is_never_active_still_gives_a_sheet(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    table = analysis.matrix(analysis.subjects[0], 0).features()
    assert contact.sheet(analysis, analysis.subjects[0], 0, feature_row(table, 5), []).width > 300


def test_a_joint_site_shows_pictures_and_prompts(tmp_path: Path) -> None:
    tokens = {"joint": StreamTokens("all", 24 + 54, 24 + 54)}
    inputs = analysed(tmp_path, Plan(n_images=6, sites=("joint_0",), tokens=tokens, chunk_images=4, steps=2))
    analysis = open_analysis(inputs)
    subject = analysis.subjects[0]
    table = analysis.matrix(subject, 0).features()
    feature = int(np.argmax(table["images_active"].to_numpy()))
    (examples,) = gather_examples(analysis, subject, 0, table, [feature], 2).values()
    assert all(example.pieces for example in examples)
    assert examples[0].heat.positions.max() == 24 + 53
    assert len(sheets.run(SheetSettings(**vars(inputs), best=1, top=2))) == 2
    assert len(sheets.run(SheetSettings(**vars(inputs), best=1, top=2, over_steps=True))) == 1


def analysed(folder: Path, plan: Plan) -> Inputs:
    planted_store(folder / "store", plan)
    inputs = Inputs(
        store=folder / "store", dictionaries=planted_dictionaries(folder / "dictionaries", plan), out=folder / "out"
    )
    scores.run(ScoresSettings(**vars(inputs)))
    return inputs


def test_a_store_without_pictures_has_sheets_of_text_features_alone(tmp_path: Path) -> None:
    inputs = analysed(tmp_path, Plan(n_images=6, pictures=False, chunk_images=4, steps=1))
    with pytest.raises(UsageError, match="holds no pictures"):
        sheets.run(SheetSettings(**vars(inputs)))
    only = {**vars(inputs), "sites": "txt_0"}
    assert len(sheets.run(SheetSettings(**only, best=1))) == 1
    assert len(sheets.run(SheetSettings(**only, best=1, images="2"))) == 1
    with pytest.raises(UsageError, match="there is only step 0"):
        sheets.run(SheetSettings(**only, over_steps=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "48"}, "no feature 48: there are 48"),
        ({"images": "40"}, "no image 40: there are 40"),
        ({"images": "x"}, "'x' .* is no image"),
        ({"top": 17}, "keeps 16 top images"),
    ],
)
def test_what_is_not_there_is_not_drawn(scored: Inputs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sheets.run(SheetSettings(**vars(scored), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"clip_percentile": 0.0}, {"clip_percentile": 101.0}, {"side": 3}, {"matched": True}, {"top": 0}, {"best": 0}, {"min_images": 3},
        {"over_steps": True, "images": "3", "top": 4}, {"over_steps": True, "matched": True, "min_images": 0},
    ],
)  # fmt: skip
def test_sheets_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SheetSettings(store=Path("s"), dictionaries=Path("d"), out=Path("o"), **options)
