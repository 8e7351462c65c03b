"""What people are shown of joint sites: pictures and words apart, in the report, in `explore`, and where only double blocks serve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.explore import html
from analyze.explore.browse_tab import refuse_single
from analyze.explore.catalogue import Listing
from analyze.explore.rows import spans_of
from analyze.guided.arms import left_out, transcoders
from analyze.inputs import Analysis, Subject
from analyze.pictures.examples import Example
from analyze.pictures.heat import Heat
from analyze.pictures.words import highlighted
from analyze.report.heat_pass import spooled
from analyze.report.packing import unpacked_heat
from analyze.report.page import _truth_row, tiles
from analyze.scan.tokens import place_of
from analyze.scoring.findings import Findings
from analyze.scoring.images import ImageFacts
from analyze.scoring.reduction import Pane
from store import Store
from store.errors import UsageError
from store.places import place_of as place_of_store
from store.sites import Site
from store.sizes import picture_size
from tests.small_store import small_meta
from tests.traced_tiny_flux import transcoder

TEXT, IMAGE = 8, 12  # 3 rows of 4 tokens


def plain(kind: type, **values: Any) -> Any:
    """One of a type with only these attributes."""
    made: Any = object.__new__(kind)
    vars(made).update(values)
    return made


def analysis_of(*names: str) -> Analysis:
    """Dictionaries of these sites over a store of which nothing is read but its metadata."""
    made = [transcoder(name, d_model=16, n_features=4) for name in names]
    store = Store(place_of_store("nowhere"), small_meta(sites=names, pictures="none"), {}, None)
    return Analysis(store, tuple(Subject(str(each.site), each, "x") for each in made), (0,), Path("nowhere"))


def test_a_weak_picture_beside_a_strong_word_keeps_its_levels() -> None:
    heat = Heat(0, np.asarray([1, TEXT, TEXT + 4]), np.asarray([300.0, 0.5, 0.2], np.float32))
    peak, levels, text_peak, text_levels = spooled(heat, TEXT + IMAGE, TEXT).split()
    shown, words = unpacked_heat(levels, float(peak), IMAGE), unpacked_heat(text_levels, float(text_peak), TEXT)
    np.testing.assert_allclose(shown, [0.5, 0, 0, 0, 0.2, *[0] * 7], atol=0.001)
    np.testing.assert_allclose(words, [0, 300, *[0] * 6])
    assert spooled(Heat(0, heat.positions - 1, heat.values), TEXT + IMAGE, 0).count(" ") == 1


def test_features_are_shown_first_where_they_see_something_then_by_their_words() -> None:
    found = Findings(3, 2, 0.0, plain(ImageFacts, groups=np.arange(3)), False, ("real", "image"))
    pane = Pane(3, 3, 0.0, None, lambda _: None, ("real", "image"))
    by_image = [[9, 3, 8], [1, 0, 0], [5, 0, 7], [0, 0, 2], [0, 1, 9], [4, 0, 0]]
    pane.scores[:] = np.asarray(by_image, np.float32)  # (image, kind), feature
    pane.tokens[:] = np.arange(18).reshape(6, 3)
    pane.finish()
    found.take(pane, 0)
    images, tokens, scores = found.examples()
    assert images[:, 0].tolist() == [2, 0] and scores[:, 0].tolist() == [4, 1] and tokens[:, 0].tolist() == [15, 3]
    assert images[:, 1].tolist() == [0, 2] and scores[:, 1].tolist() == [3, 1]  # of words alone
    assert images[:, 2].tolist() == [1, 2] and scores[:, 2].tolist() == [2, 9]  # seen in one image, then of words
    assert found.unique.result()[0][:, 0].tolist() == [0, 1]  # over all tokens


def test_explore_shows_the_words_of_a_joint_feature_and_both_of_its_scores() -> None:
    analysis = analysis_of("joint_1")
    listing = plain(Listing, subject=analysis.subjects[0], step=0)
    heat = Heat(0, np.asarray([1, TEXT + 2]), np.asarray([20.0, 3.0], np.float32))
    example = Example(heat, 20.0, "a <b> red", tuple(highlighted(["▁a", "▁<b>", "▁red"], heat, 20.0)))
    shown = html.top_images(listing, [example], analysis.store)
    assert "3 on image tokens, 20 on text tokens" in shown and ">&lt;b&gt;</mark>" in shown


def test_features_of_single_blocks_are_not_taken_to_where_they_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="joint_1: features of single-stream blocks cannot be changed yet"):
        refuse_single(Site.parse("joint_1"))
    refuse_single(Site.parse("img_1"))
    subjects = analysis_of("img_1", "joint_0", "joint_1").subjects
    assert spans_of({(each.site, "transcoder"): each.outline for each in subjects}) == "img_1"


def test_guided_steering_chooses_among_double_blocks_alone() -> None:
    analysis = analysis_of("img_1", "joint_0", "joint_1")
    assert [str(site) for site in transcoders(analysis)] == ["img_1"]
    assert [str(site) for site in left_out(analysis)] == ["joint_0", "joint_1"]


def told(name: str, selection: float) -> dict[str, Any]:
    place = {"dictionary": name, "feature": 1, "step": 0, "auroc": selection, "selection": selection, "f1": 0.5}
    return {"chosen_by_tokens": place, "chosen_by_images": None, "floor": None, "ceiling": None}


def test_the_better_of_image_and_joint_features_tells_the_tokens() -> None:
    streams = {
        name: {"images": None, "tokens": told(f"{name}_0", auroc)} for name, auroc in (("img", 0.8), ("joint", 0.9))
    }
    entry = {"group": "colour", "value": "red", "present": 3, "absent": 4, "streams": streams}
    assert _truth_row(entry, ["img", "joint"], 0.9)["tokens"]["label"] == "joint_0/1 · step 0"
    streams["joint"]["tokens"] = None
    assert _truth_row(entry, ["img", "joint"], 0.9)["tokens"]["label"] == "img_0/1 · step 0"


def test_the_tile_of_joint_dictionaries_is_of_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyze.report.page.prompt_texts", lambda _: ["a"])
    analysis = analysis_of("joint_1")
    row = {"n_features": 4, "stream": "joint", "kind": "transcoder", "fvu_value": 0.9, "fvu_tile": 0.25}
    assert {"value": "0.250", "name": "median FVU, joint, image tokens"}.items() <= tiles(analysis, None, [row])[
        -1
    ].items()


def test_tokens_of_the_picture_are_counted_from_one_and_sizes_begin_with_the_width() -> None:
    analysis = analysis_of("img_1", "joint_1")
    assert place_of(analysis, "img", 0, 0) == "row 1, column 1"
    assert place_of(analysis, "joint", 0, TEXT + 6) == "row 2, column 3"
    assert picture_size(64, 64) == "64x64 pixels"
    assert picture_size(160, 96, " × ") == "160 × 96 pixels (width × height)"
