"""SD3's text holds padding before its end: it is told apart from real tokens wherever that matters."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze.counted import counted_rows
from analyze.pictures.heat import Heat
from analyze.pictures.words import highlighted
from analyze.scoring.images import Pieces
from harvest.models.text import longest_of, tokenize
from harvest.tiny_flux.tokenizers import clip_tokenizer, t5_tokenizer
from store.strata import CODES, RealText, StreamTokens, codes_of
from store.tokens import _draw, kept_positions, text_policy

PLACES, LENGTH = 77, 16
SHORT, LONG = "green cross", "a small red circle on a blue background"


def pipeline(with_t5: bool) -> Any:
    """The tokenizers of an SD3 pipeline, under its name."""
    parts = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_max_length": PLACES}
    return type("StableDiffusion3Pipeline", (), {**parts, "tokenizer_3": t5_tokenizer() if with_t5 else None})()


@pytest.mark.parametrize("with_t5", [True, False])
def test_clips_end_mark_is_real_and_what_follows_it_is_padding(with_t5: bool) -> None:
    short, long, empty = tokenize(pipeline(with_t5), [SHORT, LONG, ""], LENGTH)
    assert short.pieces[:4] == ("⟨start⟩", "▁green", "▁cross", "</s>") and set(short.pieces[4:PLACES]) == {"·"}
    assert short.pieces[PLACES:] == (("▁green", "▁cross", "</s>") if with_t5 else ())
    assert short.padding == tuple(range(4, PLACES)) and long.padding == tuple(range(10, PLACES))
    assert empty.padding == tuple(range(2, PLACES))
    # start, eight words, end of CLIP; eight words, end of T5
    assert (short.real, long.real, empty.real) == ((7, 19, 3) if with_t5 else (4, 10, 2))
    assert longest_of(pipeline(with_t5), [SHORT, LONG], LENGTH) == long.real
    (full,) = tokenize(pipeline(with_t5), ["red " * 100], LENGTH)
    assert full.padding == () and full.pieces[PLACES - 1] == "</s>" and full.clip_cut


def test_a_place_is_real_where_either_encoder_of_clip_has_a_token() -> None:
    class Longer:
        def __call__(self, prompts: list[str], **_: Any) -> Any:
            return type("Found", (), {"input_ids": [[0] * 6 for _ in prompts]})

    pipe = pipeline(True)
    pipe.tokenizer_2 = Longer()
    (found,) = tokenize(pipe, [SHORT], LENGTH)
    assert found.padding == tuple(range(6, PLACES)) and longest_of(pipe, [SHORT], LENGTH) == found.real == 9


@pytest.mark.parametrize("extra", [0, 3, 500])
@pytest.mark.parametrize(("length", "padding"), [(9, range(3, 6)), (6, range(4, 6)), (8, ()), (12, range(12))])
def test_kept_positions_are_the_real_ones_and_a_draw_of_all_others(
    length: int, padding: tuple[int, ...], extra: int
) -> None:
    total, real = 12, [place for place in range(length) if place not in padding]
    policy = text_policy(f"real+{extra}", total, len(real))
    found = kept_positions(policy, 5, 2, 1, "txt", length, padding)
    others = [place for place in range(total) if place not in real]
    drawn = [others[place] for place in _draw(len(others), min(extra, len(others)), 5, 2, 1, "txt")]
    expected = sorted(real + drawn)
    assert found.dtype == np.int32 and found.tolist() == expected + [-1] * (policy.kept - len(expected))
    joint = StreamTokens("strata", policy.kept + 2, total + 2, (policy, StreamTokens("all", 2, 2)))
    assert kept_positions(joint, 5, 2, 1, "joint", length, padding).tolist() == [*found, total, total + 1]


def test_codes_counts_words_and_what_counts_know_the_padding_inside() -> None:
    length, padding = [6, 3, 5], [[2, 3], [], [4, 9, -1]]  # what is beyond the text says nothing
    table = pa.table({"text_length": pa.array(length, pa.int32()), "text_padding": pa.array(padding)})
    text = RealText.of(pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    expected = [[0, 1, 4, 5], [0, 1, 2], [0, 1, 2, 3]]
    positions = np.tile(np.arange(9), (3, 1))
    rows = np.arange(3)[:, None]
    assert [np.flatnonzero(row).tolist() for row in text.at(rows, positions)] == expected
    assert text.count(8).tolist() == [4, 3, 4] and text.count(3).tolist() == [2, 3, 3]
    assert text[1:].at(rows[:2], positions[1:]).tolist() == text.at(rows, positions)[1:].tolist()
    assert (text.of_image(0), text.of_image(1)) == ((6, [2, 3]), (3, []))
    codes = codes_of("joint", positions, text.at(rows, positions), 8)
    assert (codes[:, 8] == CODES["image"]).all() and (codes[:, :8] == CODES["real"]).sum(axis=1).tolist() == [4, 3, 4]
    counted = counted_rows(positions, "joint", text, 8, padding=False)
    assert [np.flatnonzero(row).tolist() for row in counted] == [[*each, 8] for each in expected]
    pieces = Pieces(pa.chunked_array([pa.array([list("ab··ef"), list("abc"), list("abcd·")])]))
    found = pieces.at(np.repeat(0, 6), np.arange(6), text)
    assert [pieces.words[number] if number >= 0 else "" for number in found] == ["a", "b", "", "", "e", "f"]


def test_a_column_of_that_name_that_is_a_prompt_files_own_says_nothing() -> None:
    table = pa.table({"text_length": pa.array([2], pa.int32()), "text_padding": ["[0]"]})
    assert RealText.of(table).at(np.array([0]), np.arange(3)).tolist() == [True, True, False]


def test_padding_is_not_among_the_words_that_are_drawn() -> None:
    heat = Heat(0, np.array([1, 4]), np.array([1.0, 2.0], np.float32))
    drawn = highlighted(["⟨start⟩", "▁red", "·", "·", "▁red", "</s>"], heat, 2.0, [2, 3])
    assert [(piece.text, piece.heat) for piece in drawn] == [("⟨start⟩", 0), ("red", 0.5), ("red", 1), ("⟨end⟩", 0)]
