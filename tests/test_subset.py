"""A part of a store is a store: it verifies, reads the same numbers, and says where it came from."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store import Site, Store, open_store
from store.card import card_of, has_prompts
from store.care.verify import verify
from store.errors import DamagedError, UnfinishedError, UsageError
from store.files import json_bytes, read_self_checked, self_checked, write_bytes
from store.format import StreamTokens, part_files
from store.sharing.pull import PullSettings, run
from store.sharing.subset import KEPT_WITHOUT_PROMPTS
from tests.small_store import SmallStore, make_store
from tests.toy_stores import mlp_of_site, toy_store

MakeStore = Callable[..., SmallStore]
IMG, TXT = Site.parse("img_0"), Site.parse("txt_0")


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def pull(source: Path, folder: Path, **selection: Any) -> Store:
    run(PullSettings(url=str(source), folder=folder, **selection))
    return open_store(folder)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """A store of ten images in three parts that no test changes."""
    return make_store(tmp_path_factory.mktemp("parent") / "store", weights=True)


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        ({}, {"layers": "0", "streams": "img", "steps": "1"}),
        ({}, {"images": "4-9"}),
        ({}, {"images": "4-7", "streams": "txt"}),
        ({}, {"prompts": False}),
        ({"store_dtype": "fp8-e4m3", "codec": "zstd"}, {"streams": "img", "images": "0-3"}),
        (
            {"image_tokens": StreamTokens("sample", 5, 12), "text_tokens": StreamTokens("real+1", 8, 8)},
            {"images": "8-9", "steps": "0"},
        ),
        ({"sites": ("img_0", "img_1", "txt_1"), "weights": True}, {"layers": "1", "prompts": False}),
    ],
)
def test_a_part_of_a_store_is_a_valid_store_with_the_same_numbers(
    small_store: MakeStore, tmp_path: Path, options: dict[str, Any], selection: dict[str, Any]
) -> None:
    parent = small_store(**options).store
    part = pull(Path(parent.path), tmp_path / "part", **selection)
    assert verify(tmp_path / "part").ok
    assert part.meta.parent is not None
    first, stop = part.meta.parent["images"]
    assert (part.n_images, part.meta.parent["store"], part.meta.parent["origin"]) == (
        stop - first, parent.id, parent.origin,
    )  # fmt: skip
    for site in part.sites:
        for step in part.steps:
            found = part.tokens(site.stream, step)
            np.testing.assert_array_equal(found, parent.tokens(site.stream, step, first, stop))
            kept = found >= 0
            for point in part.points:
                values = part.read(site, step, point)
                np.testing.assert_array_equal(values[kept], parent.read(site, step, point, first, stop)[kept])
    assert part.prompts().column("image").to_pylist() == list(range(stop - first))
    for name in part.prompts().column_names:
        if name != "image":
            assert part.prompts()[name].to_pylist() == parent.prompts()[name].slice(first, stop - first).to_pylist()


def test_the_files_of_a_part_are_those_that_its_metadata_promises(parent: SmallStore, tmp_path: Path) -> None:
    part = pull(parent.path, tmp_path / "part", streams="img", images="4-9")
    there = {name for name in tree(tmp_path / "part") if not name.startswith(("commits/", "seal"))}
    created = set(read_self_checked(tmp_path / "part" / "commits" / "store.json")["files"])
    assert there == created | {name for number in range(2) for name in part_files(part.meta, number)}
    assert sum(name.startswith("weights/") for name in created) == 1


def test_chunks_are_the_bytes_of_the_parent_under_their_new_numbers(parent: SmallStore, tmp_path: Path) -> None:
    pull(parent.path, tmp_path / "part", images="4-9")
    array = "activations/double.00/img/step.1/mlp_in"
    for here, there in ((0, 1), (1, 2)):
        assert (tmp_path / "part" / array / f"c.{here}.0.0").read_bytes() == (
            parent.path / array / f"c.{there}.0.0"
        ).read_bytes()


def test_statistics_of_a_part_are_those_of_its_images(parent: SmallStore, tmp_path: Path) -> None:
    part = pull(parent.path, tmp_path / "part", streams="txt", steps="1", images="4-7")
    found, values = part.statistics(TXT, 1, "mlp_out"), parent.values[TXT, 1, "mlp_out"][4:8].astype(np.float64)
    np.testing.assert_allclose(found.mean, values.reshape(-1, 16).mean(axis=0))
    assert found.rows == 4 * 8
    alone = (tmp_path / "part" / "statistics" / "part-00000.safetensors").read_bytes()
    assert b"txt_0/step.1" in alone
    assert b"img_0" not in alone and b"step.0" not in alone


def test_equal_selections_give_equal_bytes_and_one_id(parent: SmallStore, tmp_path: Path) -> None:
    for selection in ({"images": "4-9", "streams": "img"}, {"prompts": False}):
        once = pull(parent.path, tmp_path / f"a{len(selection)}", **selection)
        again = pull(parent.path, tmp_path / f"b{len(selection)}", **selection, threads=1)
        assert once.id == again.id
        assert tree(Path(once.path)) == tree(Path(again.path))


@pytest.mark.parametrize("selection", [{}, {"layers": "0", "streams": "img,txt", "steps": "0-1", "images": "0-9"}])
def test_the_selection_of_everything_is_the_store_itself(
    parent: SmallStore, tmp_path: Path, selection: dict[str, Any]
) -> None:
    assert pull(parent.path, tmp_path / "copy", **selection).id == parent.store.id
    assert tree(tmp_path / "copy") == tree(parent.path)


def test_a_part_of_a_part_remembers_both_and_stays_without_prompts(parent: SmallStore, tmp_path: Path) -> None:
    middle = pull(parent.path, tmp_path / "middle", images="4-9", prompts=False)
    last = pull(tmp_path / "middle", tmp_path / "last", images="4-5")
    assert last.meta.parent is not None
    assert last.meta.parent["store"] == middle.id
    assert last.meta.parent["parent"] == middle.meta.parent
    assert not has_prompts(last.meta)
    np.testing.assert_array_equal(last.read(IMG, 0, "mlp_in"), parent.store.read(IMG, 0, "mlp_in", 8, 10))
    assert pull(tmp_path / "middle", tmp_path / "same", prompts=False).id == middle.id


def test_without_prompts_nothing_says_what_was_asked_for(tmp_path: Path) -> None:
    words = [f"secret{i:02d}" for i in range(10)]
    made = make_store(tmp_path / "store", prompts=words, truths=[f"truth of {word}" for word in words])
    part = pull(tmp_path / "store", tmp_path / "part", prompts=False)
    assert tuple(part.prompts().column_names) == KEPT_WITHOUT_PROMPTS
    assert part.picture(0) is None and not (tmp_path / "part" / "images").exists()
    assert any(b"secret" in data for data in tree(tmp_path / "store").values())  # so that the next line can fail
    assert not any(b"secret" in data for data in tree(tmp_path / "part").values())
    assert part.prompts()["split"].to_pylist() == made.store.prompts()["split"].to_pylist()
    assert "their texts left out" in (tmp_path / "part" / "README.md").read_text()


def test_pictures_of_a_part_load_under_their_new_numbers(parent: SmallStore, tmp_path: Path) -> None:
    import datasets

    part = pull(parent.path, tmp_path / "part", images="4-9")
    here, there = part.picture(2), parent.store.picture(6)
    assert here is not None and there is not None
    assert here.tobytes() == there.tobytes()
    cache = str(tmp_path / "cache")
    pictures = datasets.load_dataset(str(tmp_path / "part"), "images", split="train", cache_dir=cache)
    prompts = datasets.load_dataset(str(tmp_path / "part"), "prompts", split="train", cache_dir=cache)
    assert pictures["id"] == prompts["image"] == list(range(6))
    assert pictures[2]["image"].tobytes() == there.tobytes()
    assert prompts[0]["prompt"] == "prompt number 4"


def test_a_part_with_recomputed_targets_carries_the_weights_of_its_sites_alone(tmp_path: Path) -> None:
    toy_store(tmp_path / "store", mlp=True, targets="recomputed")
    part = pull(tmp_path / "store", tmp_path / "part", layers="1", images="0-3")
    assert part.recomputed and part.sites == (Site.parse("img_1"),)
    content = part.weights_file(part.sites[0])
    assert content is not None
    assert [file.name for file in (tmp_path / "part" / "weights").iterdir()] == [
        f"sha256-{hashlib.sha256(content).hexdigest()}.safetensors"
    ]
    assert mlp_of_site(part.sites[0], 4)["net.2.bias"].tobytes() in content


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ({"images": "2-9"}, "--images 0-9 would do"),
        ({"images": "0-4"}, "--images 0-7 would do"),
        ({"images": "5"}, "--images 4-7 would do"),
        ({"images": "0-10"}, "images 0 to 9"),
        ({"images": "9-4"}, "images 0 to 9"),
        ({"images": "first"}, "write a range"),
        ({"layers": "3"}, "no layer double:3"),
        ({"layers": "single:0"}, "no layer single:0"),
        ({"layers": "x"}, "write all, 0-3,6"),
        ({"streams": "joint"}, "has the streams img, txt"),
        ({"steps": "2"}, "no step 2"),
    ],
)
def test_a_selection_that_cannot_be_says_what_could(
    parent: SmallStore, tmp_path: Path, selection: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pull(parent.path, tmp_path / "part", **selection)
    assert not (tmp_path / "part").exists()


def test_a_step_that_was_not_kept_is_refused(small_store: MakeStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has the steps 1"):
        pull(small_store(steps=(1,)).path, tmp_path / "part", steps="0")


def test_an_unfinished_store_is_not_shared(small_store: MakeStore, tmp_path: Path) -> None:
    made = small_store()
    (made.path / "seal.json").unlink()
    with pytest.raises(UnfinishedError):
        pull(made.path, tmp_path / "part")


def test_a_damaged_chunk_is_not_copied_and_the_copy_never_looks_whole(small_store: MakeStore, tmp_path: Path) -> None:
    made = small_store()
    chunk = made.path / "activations/double.00/img/step.0/mlp_in/c.1.0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:9] + bytes([whole[9] ^ 4]) + whole[10:])
    with pytest.raises(DamagedError, match=r"mlp_in/c\.1\.0\.0 differs"):
        pull(made.path, tmp_path / "copy")
    with pytest.raises(UnfinishedError):
        open_store(tmp_path / "copy")
    chunk.write_bytes(whole)
    assert pull(made.path, tmp_path / "copy").id == made.store.id
    assert tree(tmp_path / "copy") == tree(made.path)


def test_a_record_that_names_files_outside_is_refused(small_store: MakeStore, tmp_path: Path) -> None:
    """A store from elsewhere, consistent in itself, must not write beside the folder that it is pulled into."""
    path = small_store().path
    record = read_self_checked(path / "commits" / "store.json")
    record["files"]["../outside"] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    write_bytes(path / "commits" / "store.json", json_bytes(self_checked(record)))
    seal = read_self_checked(path / "seal.json")
    seal["commits"]["store"] = hashlib.sha256((path / "commits" / "store.json").read_bytes()).hexdigest()
    write_bytes(path / "seal.json", json_bytes(self_checked(seal)))
    write_bytes(path.parent / "outside", b"")
    with pytest.raises(DamagedError, match="outside"):
        pull(path, tmp_path / "deep" / "copy")
    assert not (tmp_path / "deep").exists()


def test_a_card_is_a_function_of_the_metadata_and_says_what_the_store_is(small_store: MakeStore) -> None:
    made = small_store(store_dtype="fp8-e4m3")
    card = card_of(made.store.meta)
    assert card.encode() == (made.path / "README.md").read_bytes()
    assert card == card_of(open_store(made.path).meta)
    for words in (
        "license: unknown",
        "`random`",
        "0" * 64,
        "img_0, txt_0",
        "float8 e4m3",
        "img 12 of 12 (all)",
        "zarr.open_array",
    ):
        assert words in card
    assert "images/" not in card_of(small_store(pictures="none").store.meta)
