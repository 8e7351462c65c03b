"""`diff` says where two stores differ, by their commits alone unless values are asked for."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from store import Site, layout
from store.__main__ import COMMANDS
from store.care.diff import Gap, diff
from store.care.findings import Costs
from store.command import program
from store.format import StreamTokens
from store.writer import StoreWriter
from tests.small_store import SmallStore, make_store, small_part

IMG, TXT = Site.parse("img_0"), Site.parse("txt_0")
WORDS = [f"prompt number {i}" for i in range(10)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("diff") / "a")


def rewritten(made: SmallStore, path: Path, part: int, words: list[str] = WORDS, add: float = 0.0) -> Path:
    """A copy in which a part was written again: img_0 step 1 mlp_in of image 5 is greater by `add`, and other prompts."""
    shutil.copytree(made.path, path)
    for name in (layout.SEAL, layout.part_commit(part)):
        (path / name).unlink()
    meta = made.store.meta
    values = {key: array.astype(meta.carrier.logical) for key, array in made.values.items()}
    changed = made.values[IMG, 1, "mlp_in"].copy()
    changed[5] += add
    values[IMG, 1, "mlp_in"] = changed.astype(meta.carrier.logical)
    writer = StoreWriter.open_or_create(path, meta)
    writer.write_part(part, small_part(meta, part, values, words))
    writer.seal()
    return path


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = program("store", COMMANDS, ["diff", *map(str, words)])
    return code, capsys.readouterr().out


def test_equal_stores_are_equal_and_no_chunk_is_read(
    made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(made.path, tmp_path / "b"))
    assert not diff(made.path, other, values=True)
    for folder in ("activations", "prompts", "images", "statistics"):
        shutil.rmtree(other / folder)
    assert not diff(made.path, other)
    assert "by their seals: no chunk was read; python -m store verify" in said(capsys, made.path, other)[1]
    (other / layout.SEAL).unlink()
    assert not diff(made.path, other), "what is compared are the commits, whether sealed or not"
    code, text = said(capsys, made.path, other)
    assert code == 0
    assert text.endswith("A and B are equal\n")


def test_what_differs_is_named_by_part_image_site_step_and_point(
    made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = rewritten(made, tmp_path / "b", 1, ["other words"] * 10, add=2.0)
    found = diff(made.path, other)
    assert set(found.parts) == {1}
    assert set(found.parts[1]) == {
        Costs("activations", (4, 7), ("img_0",), (1,), ("mlp_in",)),
        Costs("prompts", (4, 7)),
        Costs("statistics", (4, 7)),
    }
    assert not found.metadata
    code, text = said(capsys, made.path, other)
    assert code == 1
    assert (
        "files: part 1: images 4-7 at img_0 step 1 mlp_in; the prompts of images 4-7; the statistics of images 4-7"
        in text
    )


def test_values_say_by_how_much(made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = rewritten(made, tmp_path / "b", 1, add=2.0)
    found = diff(made.path, other, values=True)
    ((key, gap),) = found.values.items()
    assert key == (IMG, 1, "mlp_in")
    assert isinstance(gap, Gap)
    a = made.values[key][4:8].astype(np.float64)
    b = made.values[key][4:8].astype(np.float64)
    b[1] = (made.values[key][5] + 2.0).astype(made.store.meta.carrier.logical)
    assert gap.greatest == np.abs(a - b).max()
    assert gap.relative_rms == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()))
    assert gap.images == 4
    assert found.columns == []
    assert (
        f"values: img_0 step 1 mlp_in: greatest difference {gap.greatest:.4g}"
        in said(capsys, made.path, other, "--values")[1]
    )


def test_the_columns_of_prompts_that_differ_are_named(made: SmallStore, tmp_path: Path) -> None:
    words = [*WORDS[:5], "quite another", *WORDS[6:]]
    found = diff(made.path, rewritten(made, tmp_path / "b", 1, words), values=True)
    assert found.parts == {1: [Costs("prompts", (4, 7))]}
    assert set(found.columns) - {"split"} == {"prompt"}


def test_metadata_are_compared_leaf_by_leaf(
    made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_store(tmp_path / "b", seed=4)
    found = diff(made.path, other.path)
    assert found.metadata == {"seed": (0, 4)}
    assert "metadata: seed is 0 in A and 4 in B" in said(capsys, made.path, other.path)[1]


def test_stores_of_other_sites_steps_and_lengths_are_compared_where_they_overlap(tmp_path: Path) -> None:
    small = make_store(tmp_path / "a", sites=("img_0", "txt_0"), steps=(1,), n_images=8)
    large = make_store(tmp_path / "b", sites=("img_0", "img_1"), steps=(0, 1), n_images=12)
    found = diff(small.path, large.path)
    assert found.only == {
        "A": {"sites": "txt_0"},
        "B": {"sites": "img_1", "steps": "0", "images": "8 to 11"},
    }
    assert {each.sites for costs in found.parts.values() for each in costs if each.what == "activations"} == {
        ("img_0",)
    }


def test_a_subset_agrees_in_what_it_has(tmp_path: Path) -> None:
    """Sites were drawn in order, so the first of two stores' sites holds the same values."""
    one = make_store(tmp_path / "a", sites=("img_0",), pictures="none")
    two = make_store(tmp_path / "b", sites=("img_0", "img_1"), pictures="none")
    found = diff(one.path, two.path, values=True)
    assert found.parts == {}
    assert found.only["B"] == {"sites": "img_1"}
    assert found.values == {}


def test_other_dtypes_and_codecs_are_compared_by_value(
    made: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zipped = make_store(tmp_path / "b", codec="zstd")
    code, text = said(capsys, made.path, zipped.path)
    assert code == 1
    assert (
        "not compared; they differ in codec: equal values lie in files of different bytes (--values reads them)" in text
    )
    found = diff(made.path, zipped.path, values=True)
    assert {gap.greatest for gap in found.values.values() if isinstance(gap, Gap)} == {0.0}
    assert len(found.values) == 8
    assert "img_0 step 0 mlp_in: equal in 10 images" in said(capsys, made.path, zipped.path, "--values")[1]
    chunks = diff(made.path, make_store(tmp_path / "c", chunk_images=8).path, values=True)
    assert {gap.greatest for gap in chunks.values.values() if isinstance(gap, Gap)} == {0.0}


def test_what_cannot_be_compared_is_said(made: SmallStore, tmp_path: Path) -> None:
    fewer = make_store(tmp_path / "b", image_tokens=StreamTokens("sample", 5, 12))
    assert diff(made.path, fewer.path, values=True).values[IMG, 0, "mlp_in"] == "12 tokens are kept in A and 5 in B"
    drawn = make_store(tmp_path / "c", image_tokens=StreamTokens("sample", 5, 12), seed=1)
    assert diff(fewer.path, drawn.path, values=True).values[IMG, 0, "mlp_in"] == "other tokens are kept in A than in B"
    wide = make_store(tmp_path / "d", d_model=8)
    assert diff(made.path, wide.path, values=True).values[IMG, 0, "mlp_in"] == "16 channels in A and 8 in B"


def test_empty_slots_are_equal_and_a_number_is_not_an_empty_slot(tmp_path: Path) -> None:
    ragged = make_store(tmp_path / "a", text_tokens=StreamTokens("real+0", 8, 8))
    zipped = make_store(tmp_path / "b", text_tokens=StreamTokens("real+0", 8, 8), codec="zstd")
    gap = diff(ragged.path, zipped.path, values=True).values[TXT, 0, "mlp_in"]
    assert isinstance(gap, Gap)
    assert gap.greatest == 0.0


def test_an_unfinished_store_differs_by_the_parts_that_it_lacks(made: SmallStore, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.path, tmp_path / "b"))
    for name in (layout.SEAL, layout.part_commit(1)):
        (other / name).unlink()
    found = diff(made.path, other)
    assert found.only == {"A": {"committed parts": "1"}, "B": {}}
    assert found.parts == {}


def test_parts_of_another_batch_size_are_named(made: SmallStore, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made.path, tmp_path / "b"))
    for name in (layout.SEAL, layout.part_commit(2)):
        (path / name).unlink()
    values = {key: array.astype(made.store.meta.carrier.logical) for key, array in made.values.items()}
    writer = StoreWriter.open_or_create(path, replace(made.store.meta, batch_size=2), allow_mixed=True)
    writer.write_part(2, small_part(made.store.meta, 2, values, WORDS))
    writer.seal()
    assert diff(made.path, path).metadata == {"part-00002.mixed": (None, {"batch_size": 2})}
