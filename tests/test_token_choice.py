"""Which tokens a text chooses, masks against exact averages, and what is no choice."""

from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.steering.token_choice import ALL, TokenChoice, mask_on_grid
from store.errors import UsageError


@pytest.mark.parametrize(
    ("text", "choice", "again"),
    [
        ("all", ALL, "all"),
        (" 9,7-8,3 ", TokenChoice(positions=(3, 7, 8, 9)), "3,7-9"),
        ("above:0.5", TokenChoice(above=0.5), "above:0.5"),
        ("above:1", TokenChoice(above=1.0), "above:1.0"),
        ("mask:a b.png", TokenChoice(mask=Path("a b.png")), "mask:a b.png"),
        ("grid:011/100", TokenChoice.of_mask(np.array([[0, 1, 1], [1, 0, 0]], bool)), "grid:011/100"),
    ],
)
def test_a_choice_reads_and_writes_its_text_form(text: str, choice: TokenChoice, again: str) -> None:
    assert TokenChoice.parse(text) == choice
    assert str(choice) == again
    assert TokenChoice.parse(again) == choice
    assert len({choice, TokenChoice.parse(again)}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' chooses no tokens: write all, positions such as 3,7-9"),
        ("some", "'some' chooses no tokens"),
        ("above:", "'above:' chooses no tokens"),
        ("above:half", "'above:half' chooses no tokens"),
        ("above:0", "above:0: the share of the maximum must lie above 0 and be at most 1"),
        ("above:1.01", "must lie above 0 and be at most 1"),
        ("above:nan", "above:nan: the share"),
        ("mask:", "'mask:' chooses no tokens"),
        ("grid:012", "'grid:012' chooses no tokens"),
        ("grid:01/011", "the mask's rows must be of one length"),
        ("grid:00/00", "the mask covers nothing"),
        ("7-3", "runs backwards"),
        ("-3", "is no token"),
        ("3,,4", "is no token"),
    ],
)
def test_a_text_that_chooses_nothing_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenChoice.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": ()}, "no token is chosen"),
        ({"positions": (-1,)}, "must be 0 or more, each once"),
        ({"positions": (2, 2)}, "must be 0 or more, each once"),
        ({"positions": (2,), "above": 0.5}, "choose tokens in one way"),
        ({"mask": ()}, "must be of one length, and at least one token wide"),
        ({"mask": ((),)}, "must be of one length, and at least one token wide"),
    ],
)
def test_fields_that_choose_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenChoice(**fields)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mask_is_resampled_by_exact_means_over_each_tokens_area(data: st.DataObject) -> None:
    """Oracle: both are enlarged to a common size by repetition, and means are taken over whole cells in integers."""
    (rows, columns), grid = (data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) for _ in range(2))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    mask = mask.reshape(rows, columns)
    high, wide = lcm(rows, grid[0]), lcm(columns, grid[1])
    fine = np.kron(mask.astype(int), np.ones((high // rows, wide // columns), int))
    cells = fine.reshape(grid[0], high // grid[0], grid[1], wide // grid[1]).sum(axis=(1, 3))
    expected = 2 * cells >= (high // grid[0]) * (wide // grid[1])
    assert np.array_equal(mask_on_grid(tuple(map(tuple, mask.tolist())), grid), expected)


def test_a_picture_of_any_size_is_a_mask_and_resolves_to_positions_row_by_row(tmp_path: Path) -> None:
    picture = np.zeros((80, 60, 3), np.uint8)
    picture[40:, 20:40] = 255  # on a grid of 4 rows and 3 columns: tokens 7 and 10
    picture[:11, :20] = 255  # just over half of token 0
    picture[:9, 40:] = 255  # just under half of token 2
    Image.fromarray(picture).save(tmp_path / "mask.png")
    choice = TokenChoice.parse(f"mask:{tmp_path / 'mask.png'}")
    assert choice.resolved((4, 3)) == TokenChoice(positions=(0, 7, 10))
    assert ALL.resolved((4, 3)) is ALL


def test_masks_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no mask .*none\.png"):
        TokenChoice(mask=tmp_path / "none.png").resolved((4, 4))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png is no picture that can be read"):
        TokenChoice(mask=tmp_path / "text.png").resolved((4, 4))
    Image.new("L", (8, 8), 100).save(tmp_path / "dark.png")
    with pytest.raises(UsageError, match="no token of the 4 rows and 4 columns is half covered"):
        TokenChoice(mask=tmp_path / "dark.png").resolved((4, 4))
