"""Sites, numbers, splits and token draws: the small languages that people write."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.errors import UsageError
from store.format import StreamTokens
from store.sites import Site, choose_sites, parse_numbers, parse_sites
from store.split import normalise, split_of
from store.tokens import image_policy, kept_positions, text_policy


@given(st.sampled_from(["img", "txt", "joint"]), st.integers(0, 99))
def test_a_site_is_its_short_name(stream: str, layer: int) -> None:
    site = Site.parse(f"{stream}_{layer}")
    assert str(site) == f"{stream}_{layer}"
    assert site.kind == ("single" if stream == "joint" else "double")


def test_sites_are_written_as_ranges() -> None:
    assert [str(site) for site in parse_sites("img_0-2, txt_6,img_1")] == ["img_0", "img_1", "img_2", "txt_6"]
    assert Site.parse("img_6").path == "double.06/img"


@pytest.mark.parametrize("text", ["", "img", "img_", "img_-1", "image_3", "img_3-1", "img_0;txt_0"])
def test_what_names_no_site_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_sites(text)


def test_a_site_that_is_not_there_is_named_beside_those_that_are() -> None:
    there = parse_sites("img_0-1")
    assert choose_sites("all", there, "the pack") == there
    with pytest.raises(UsageError, match="the pack has no img_2, img_3; it has img_0, img_1"):
        choose_sites("img_0-3", there, "the pack")


def test_numbers_are_written_as_ranges_and_bounded() -> None:
    assert parse_numbers("0-2,5", 6, "step") == (0, 1, 2, 5)
    assert parse_numbers("all", 3, "step") == (0, 1, 2)
    with pytest.raises(UsageError, match="there is no step 6-7: there are 6, 0 to 5"):
        parse_numbers("4-7", 6, "step")
    with pytest.raises(UsageError, match="there is no step 9: there are 6, 0 to 5"):
        parse_numbers("0-3,9", 6, "step")
    with pytest.raises(UsageError, match="there is no part 0: there are none"):
        parse_numbers("0", 0, "part")


def test_a_range_is_bounded_before_it_is_counted_out() -> None:
    tracemalloc.start()
    with pytest.raises(UsageError, match="there is no image 5-99999999999: there are 5, 0 to 4"):
        parse_numbers("0-99999999999", 5, "image")
    with pytest.raises(UsageError, match="more than 18 digits"):
        parse_numbers(f"0-{'9' * 5000}", 5, "image")
    with pytest.raises(UsageError, match="names layer 99999999999: layers go up to 9999"):
        parse_sites("img_0-99999999999")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_split_ignores_case_spaces_and_flags_and_holds_out_five_percent() -> None:
    assert normalise("  A  Red\tCircle --ar 16:9 --v 6 ") == "a red circle"
    for i in range(200):
        assert split_of(f"Prompt {i}") == split_of(f"  prompt   {i} --ar 4:3")
    share = np.mean([split_of(f"a picture of {i} things") == "val" for i in range(20000)])
    assert 0.045 < share < 0.055


def test_the_split_is_fixed_for_ever() -> None:
    held_out = [i for i in range(100) if split_of(f"prompt {i}") == "val"]
    assert held_out == HELD_OUT_OF_100


HELD_OUT_OF_100 = [1, 12, 30, 35, 57, 61, 75]


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 49), st.data())
def test_drawn_tokens_are_distinct_ascending_and_repeatable(
    total: int, seed: int, image: int, step: int, data: st.DataObject
) -> None:
    policy = StreamTokens("sample", data.draw(st.integers(1, total)), total)
    drawn = kept_positions(policy, seed, image, step, "img", 0)
    assert len(drawn) == policy.kept
    assert len(set(drawn.tolist())) == policy.kept
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < total
    np.testing.assert_array_equal(drawn, kept_positions(policy, seed, image, step, "img", 0))


def test_the_draw_is_uniform_and_differs_by_image_step_and_stream() -> None:
    policy = StreamTokens("sample", 8, 64)
    counts = np.bincount(np.concatenate([kept_positions(policy, 0, i, 0, "img", 0) for i in range(4000)]), minlength=64)
    assert abs(counts / 4000 - 8 / 64).max() < 0.03
    first = kept_positions(policy, 0, 0, 0, "img", 0).tolist()
    others = [
        kept_positions(policy, *args, 0).tolist()
        for args in ((1, 0, 0, "img"), (0, 1, 0, "img"), (0, 0, 1, "img"), (0, 0, 0, "txt"))
    ]
    assert first not in others


@given(st.integers(1, 40), st.integers(0, 20), st.integers(1, 40))
def test_real_text_tokens_are_all_kept_and_padding_is_drawn_beside_them(length: int, extra: int, total: int) -> None:
    length = min(length, total)
    policy = text_policy(f"real+{extra}", total, total)
    drawn = kept_positions(policy, 0, 3, 1, "txt", length)
    kept = drawn[drawn >= 0]
    np.testing.assert_array_equal(kept[:length], np.arange(length))
    assert len(kept) == length + min(extra, total - length)
    assert (kept[length:] >= length).all()
    assert (drawn[len(kept) :] == -1).all()


@pytest.mark.parametrize("text", ["none", "0", "65", "-3", "1.5", ""])
def test_an_image_token_policy_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="from 1 to 64"):
        image_policy(text, 64)


@pytest.mark.parametrize("text", ["some", "real+", "real-1", "5"])
def test_a_text_token_policy_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"real\+N"):
        text_policy(text, 64, 10)


def test_reading_a_pack_imports_neither_zarr_nor_torch() -> None:
    code = "import sys, store, store.shards; sys.exit(bool({'zarr', 'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
