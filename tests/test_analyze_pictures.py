"""Heat lies where its token is, contact sheets show prompts once, and pictures are the same bytes every time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.inputs import open_analysis
from analyze.pictures import sheets
from analyze.pictures.heat import Heat
from analyze.pictures.overlay import enlarged, heat_scale, overlay, token_grid
from analyze.pictures.settings import SheetSettings
from analyze.pictures.words import highlighted, percent
from analyze.report.building import contact_strip
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from store.split import normalise
from tests.analyze_planted import Plan, planted_dictionaries, planted_store


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(2, 9), st.integers(6, 19), st.booleans(), st.data())
def test_heat_is_drawn_over_the_pixels_of_its_token(
    rows: int, columns: int, pixels: int, smooth: bool, data: st.DataObject
) -> None:
    token = data.draw(st.integers(0, rows * columns - 1))
    heat = token_grid(np.asarray([2.0], np.float32), np.asarray([token]), (rows, columns))
    large = enlarged(heat, (columns * pixels, rows * pixels), smooth)
    assert large.shape == (rows * pixels, columns * pixels)
    y, x = np.unravel_index(int(large.argmax()), large.shape)
    assert (y // pixels, x // pixels) == divmod(token, columns)
    assert large.min() >= 0


def test_an_overlay_is_hot_at_the_token_and_grey_elsewhere_in_a_picture_that_is_not_square() -> None:
    picture = Image.new("RGB", (96, 48), (40, 80, 215))
    heat = token_grid(np.asarray([1.0], np.float32), np.asarray([11]), (4, 8))  # row 1, column 3
    pixels = np.asarray(overlay(picture, heat, 1.0), np.int64)
    hot, cold = pixels[18, 42], pixels[40, 90]
    assert pixels.shape == (48, 96, 3)
    assert hot[0] > 150 > cold[0]
    assert np.ptp(cold) < 40  # the picture's blue has faded


def test_the_scale_is_clipped_so_that_one_token_does_not_darken_all_others() -> None:
    values = np.ones(1000, np.float32)
    values[0] = 1000.0
    assert heat_scale([values]) < 2
    assert heat_scale([np.zeros(4, np.float32)]) == 1.0


def test_a_prompt_is_highlighted_where_the_feature_is_active() -> None:
    heat = Heat(0, np.asarray([0, 1, 3, 9]), np.asarray([0.0, 4.0, 2.0, 9.0], np.float32))
    pieces = highlighted(["▁a", "▁red", "▁ro", "se", "</s>"], heat, 4.0)
    assert [(piece.text, piece.heat, piece.space) for piece in pieces] == [
        ("a", 0.0, False), ("red", 1.0, True), ("ro", 0.0, True), ("se", 0.5, False), ("⟨end⟩", 0.0, True),
    ]  # fmt: skip


def test_shares_are_written_with_digits_that_say_something() -> None:
    assert [percent(value) for value in (0.384, 0.0211, 0.0003, 1.0, 0.0)] == [
        "38 %",
        "2.1 %",
        "0.03 %",
        "100 %",
        "0 %",
    ]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("sheets")
    plan = Plan(n_images=40, seeds_per_prompt=2, steps=1)
    planted_store(folder / "store", plan)
    inputs = Inputs(
        store=folder / "store", dictionaries=planted_dictionaries(folder / "dictionaries", plan), out=folder / "out"
    )
    scores.run(ScoresSettings(**vars(inputs)))
    return inputs


def test_a_sheet_shows_each_prompt_once_best_first(scored: Inputs) -> None:
    analysis = open_analysis(scored)
    for subject in analysis.subjects:
        table = analysis.matrix(subject, 0).features()
        for examples in sheets.gather_examples(analysis, subject, 0, table, [0, 1, 9, 22], 8).values():
            prompts = [normalise(example.prompt) for example in examples]
            assert len(prompts) == len(set(prompts)) > 0
            values = [example.score for example in examples]
            assert values == sorted(values, reverse=True)
            for example in examples:
                assert example.score == pytest.approx(example.heat.values.max(), rel=1e-5)


def test_sheets_are_written_for_every_site_and_are_equal_bytes_again(scored: Inputs) -> None:
    options = {**vars(scored), "best": 1}
    first = {path: path.read_bytes() for path in sheets.run(SheetSettings(**options))}
    assert len(first) == 2
    assert {path: path.read_bytes() for path in sheets.run(SheetSettings(**options))} == first
    for path in first:
        with Image.open(path) as image:
            assert min(image.size) > 100


def test_a_feature_that_is_never_active_still_gives_a_sheet(scored: Inputs, tmp_path: Path) -> None:
    analysis = open_analysis(scored)
    table = analysis.matrix(analysis.subjects[0], 0).features()
    image = sheets.sheet(analysis, analysis.subjects[0], 0, sheets.feature_row(table, 5), [])
    assert image.width > 300


def test_a_strip_holds_every_picture_above_its_heat() -> None:
    red, blue = Image.new("RGB", (30, 20), (255, 0, 0)), Image.new("RGB", (30, 20), (0, 0, 255))
    strip = np.asarray(contact_strip([(red, blue), (red, blue)]))
    assert strip[5, 5].tolist() == [255, 0, 0, 255]
    assert strip[-5, -5].tolist() == [0, 0, 255, 255]
    assert strip[5, 32, 3] == 0  # the gap is transparent
