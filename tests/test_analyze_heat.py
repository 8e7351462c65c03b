"""Heat lies where its token is, whatever the size of the picture, and words and numbers say what they should."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.pictures.drawing import fitted, ordinal
from analyze.pictures.heat import Heat
from analyze.pictures.narrowed import activations_of, judged_alone
from analyze.pictures.overlay import enlarged, heat_scale, overlay, token_grid
from analyze.pictures.words import highlighted, percent
from store.sites import Site
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build


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


def test_the_clip_percentile_decides_what_is_hottest_and_all_above_looks_the_same() -> None:
    values = np.arange(101, dtype=np.float32)
    assert heat_scale([values], 100.0) == 100
    assert heat_scale([values], 50.0) == pytest.approx(np.percentile(values[1:], 50))
    picture = Image.new("RGB", (60, 10), (128, 128, 128))
    heat = np.asarray([[0, 1, 2, 3, 4, 9]], np.float32)
    pixels = np.asarray(overlay(picture, heat, 3.0, smooth=False))
    assert np.array_equal(pixels[:, 30:40], pixels[:, 50:60])
    assert not np.array_equal(pixels[:, 20:30], pixels[:, 30:40])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 50), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_patches_are_constant_and_cover_a_picture_of_any_size_and_aspect_exactly(
    rows: int, columns: int, more_height: int, more_width: int, seed: int
) -> None:
    height, width = rows + more_height, columns + more_width
    half = Fraction(1, 2)  # the token that a pixel's middle lies in, exactly
    heat = np.random.default_rng(seed).random((rows, columns), np.float32)
    large = enlarged(heat, (width, height), smooth=False)
    y, x = (
        [int((Fraction(i) + half) * n / size) for i in range(size)] for n, size in ((rows, height), (columns, width))
    )
    assert np.array_equal(large, heat[np.ix_(y, x)])
    drawn = np.asarray(overlay(Image.new("RGB", (width, height), (90, 90, 90)), heat, 1.0, smooth=False))
    for token in np.ndindex(rows, columns):
        patch = drawn[np.ix_(np.equal(y, token[0]), np.equal(x, token[1]))].reshape(-1, 3)
        assert len(patch) > 0
        assert np.all(patch == patch[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_smooth_heat_keeps_its_place_at_another_resolution(rows: int, columns: int, seed: int) -> None:
    heat = np.random.default_rng(seed).random((rows, columns), np.float32)
    once, twice = (enlarged(heat, (factor * columns * 8, factor * rows * 8)) for factor in (1, 2))
    halved = twice.reshape(rows * 8, 2, columns * 8, 2).mean(axis=(1, 3))
    assert np.abs(halved - once).max() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {}, {"time_embed_dim": 8}, {"activation": "jumprelu"}, {"activation": "batchtopk", "k": 6}, {"skip": True},
        {"kind": "sae", "family": "flux-sae"},
    ],
)  # fmt: skip
def test_activations_of_some_features_are_those_of_the_whole_dictionary(options: dict[str, Any]) -> None:
    config = DictionaryConfig(
        **{"kind": "transcoder", "site": Site.parse("img_0"), "d_model": 10, "n_features": 24, **options}
    )
    whole = build(config)
    whole.initialise(seed=1)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    x, sigma = torch.randn(30, 10, generator=torch.Generator().manual_seed(3)), torch.linspace(0, 1, 30)
    some = [17, 3, 4]
    assert judged_alone(whole)
    with torch.no_grad():
        expected, found = whole.encode(x, sigma)[:, some], activations_of(whole, some, x, sigma)
    assert (expected > 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_features_of_topk_compete_so_they_are_never_computed_alone() -> None:
    config = DictionaryConfig("transcoder", Site.parse("img_0"), 10, 24, activation="topk", k=4)
    assert not judged_alone(build(config))


def test_ordinals_and_sizes() -> None:
    assert [ordinal(number) for number in (99.0, 99.5, 91.0, 12.0, 50.0)] == ["99th", "99.5th", "91st", "12th", "50th"]
    assert [fitted(Image.new("RGB", size), 100).size for size in ((400, 200), (10, 40))] == [(100, 50), (25, 100)]


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
