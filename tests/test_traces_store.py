"""A store looks after its traces as after everything else: read, checked, mended, compared, shared, extended."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from store import Site, Store, UsageError, layout, open_store
from store.care import diff, remove, repair
from store.care.verify import verify
from store.errors import DamagedError, ForeignError, UnfinishedError
from store.files import json_bytes, self_checked
from store.format import StoreMeta
from store.info import describe
from store.opening import read_meta
from store.sharing.pull import PullSettings
from store.sharing.pull import run as pull
from store.traces import Traced, parse_trace_file, trace_file
from store.writer import sealed
from tests.small_store import make_store, small_meta
from tests.small_traces import HEADS, make_traced, trace_content, traced_meta, write_traced
from tests.test_store import tree


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_traced(tmp_path_factory.mktemp("traced") / "store")


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Path:
    pull(PullSettings(url=store.path, folder=tmp_path / "copy"))
    return tmp_path / "copy"


def local(store: Store) -> Path:
    return Path(store.path)


# names and metadata


def test_the_name_of_a_trace_says_which_it_is() -> None:
    assert trace_file(17, 2, 6) == "traces/image-00000017/step.2/double.06.safetensors"
    assert parse_trace_file(trace_file(17, 2, 6)) == (17, 2, 6)
    assert parse_trace_file(trace_file(123456789, 10, 100)) == (123456789, 10, 100)
    for odd in ("traces/image-0017/step.2/double.06.safetensors", "traces/image-00000017/step.02/double.06.safetensors",
                "traces/image-00000017/step.2/double.006.safetensors", "traces/image-00000017/step.2/double.06"):  # fmt: skip
        assert parse_trace_file(odd) is None


def test_a_store_without_traces_says_nothing_of_them() -> None:
    assert "traces" not in small_meta().attributes()
    assert StoreMeta.from_attributes(json.loads(json_bytes(small_meta().attributes())), "x").traces is None


def test_metadata_with_traces_read_back_as_they_were() -> None:
    meta = traced_meta()
    assert StoreMeta.from_attributes(json.loads(json_bytes(meta.attributes())), "x") == meta
    assert meta.traced == Traced((1, 2, 9), (0, 1), (0, 1), "bfloat16", meta.traced.weights)  # type: ignore[union-attr]
    assert meta.origin != small_meta(sites=meta.sites).origin


@pytest.mark.parametrize(
    "change",
    [
        {"images": "1-2,10"}, {"images": "2-1"}, {"images": "01"}, {"images": "1,2,9"}, {"images": ""}, {"images": 3},
        {"images": "0-999999999"}, {"images": "1-2-3"}, {"steps": [1, 0]}, {"steps": [5]}, {"steps": []}, {"steps": ["0"]},
        {"blocks": [0, 2]}, {"blocks": [1]}, {"blocks": []}, {"dtype": "float16"}, {"weights": ["x", "y"]},
        {"weights": ["../../../x.safetensors"] * 2}, {"weights": []}, {"more": 1},
    ],
)  # fmt: skip
def test_traces_that_no_store_has_are_refused(change: dict[str, Any]) -> None:
    found = json.loads(json_bytes(traced_meta().attributes()))
    found["traces"] |= change
    with pytest.raises(ForeignError, match="malformed"):
        StoreMeta.from_attributes(found, "x")


# reading


def test_what_was_written_is_read(store: Store) -> None:
    assert store.traced == store.meta.traced
    found = store.trace_block(9, 1, 1)
    assert found["q"].shape == (20, HEADS, 4) and found["q"].dtype == ml_dtypes.bfloat16
    assert found["r1.txt"].shape == (8,) and found["gate_msa.img"].shape == (16,)
    assert found["gate_msa.img"].dtype == np.float32
    assert found["resid_out.img"].shape == (12, 16) and "resid_out.img" not in store.trace_block(9, 1, 0)
    assert store.trace_facts(9, 1, 1)["sigma"] == 0.5
    assert store.trace_weights(1)["to_out.0.weight"].shape == (16, 16)
    assert store.replay_errors() == {"attn": 1e-3, "mlp_in": 2e-3, "resid": 3e-3}
    assert store.trace_bytes == sum(file.stat().st_size for file in (local(store) / "traces").rglob("*.safetensors"))
    assert "traces  images 1-2,9 at steps 0-1, blocks 0-1, bfloat16" in describe(store)


def test_mlp_values_lie_once_where_the_store_keeps_them_in_the_same_dtype(store: Store, tmp_path: Path) -> None:
    other = make_traced(tmp_path / "store", dtype="float32")
    for image in (1, 9):
        shared, own = store.trace_block(image, 1, 0), other.trace_block(image, 1, 0)
        assert shared.keys() == own.keys()
        for point in ("mlp_in", "mlp_out"):
            there = store.read(Site.parse("img_0"), 1, point, image, image + 1)[0]  # type: ignore[arg-type]
            np.testing.assert_array_equal(shared[f"{point}.img"], there)
            assert own[f"{point}.img"].dtype == np.float32
    name = trace_file(9, 1, 0)
    assert (local(store) / name).stat().st_size < (local(other) / name).stat().st_size / 2


@pytest.mark.parametrize(
    ("asked", "words"),
    [((3, 0, 0), "of image 3"), ((1, 7, 0), "of step 7"), ((1, 0, 2), "of block 2"), ((3, 7, 2), "image 3, step 7, block 2")],
)  # fmt: skip
def test_what_is_not_traced_is_named_beside_what_is(store: Store, asked: tuple[int, int, int], words: str) -> None:
    with pytest.raises(
        UsageError, match=f"{words}.*: its traces are of images 1-2,9 at steps 0-1, blocks 0-1, bfloat16"
    ):
        store.trace_block(*asked)
    with pytest.raises(UsageError, match="no trace of block 5"):
        store.trace_weights(5)


def test_a_store_without_traces_says_how_to_make_them(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "store").store
    assert plain.traced is None and plain.replay_errors() == {}
    with pytest.raises(UsageError, match=r"has no traces.*--trace-images 4 --trace-steps 1"):
        plain.trace_block(4, 1, 0)


def test_a_trace_of_a_part_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    write_traced(tmp_path / "store", parts=1)
    store = open_store(tmp_path / "store", unfinished=True)
    assert store.trace_block(1, 0, 0)
    with pytest.raises(UnfinishedError, match="images 8 to 9"):
        store.trace_block(9, 0, 0)


@pytest.mark.parametrize(
    ("images", "chunk", "blocks"), [("0-999999", 64, 51), ("0-63", 64, 9999)], ids=["in all", "in a part"]
)
def test_more_traces_than_any_store_has_are_not_believed(images: str, chunk: int, blocks: int) -> None:
    found = traced_meta(n_images=10**6).attributes()
    found |= {"chunk_images": chunk}
    found["traces"] |= {"images": images, "blocks": list(range(blocks))}
    found["traces"]["weights"] = found["traces"]["weights"][:1] * blocks
    with pytest.raises(ForeignError, match="are too many to trace: a store has at most 100,000,000"):
        StoreMeta.from_attributes(json.loads(json_bytes(found)), "x")


# damage


@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_trace_is_named_costs_its_image_and_is_mended_from_a_copy(
    store: Store, copy: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = trace_file(2, 1, 1)
    data = bytearray((copy / name).read_bytes())
    data[-5] ^= 1
    if harm == "lose":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(DamagedError, match=r"image-00000002/step\.1/double\.01.*store verify.*store repair"):
        open_store(copy).trace_block(2, 1, 1)
    report = verify(copy)
    (finding,) = report.findings
    assert (finding.name, finding.part) == (name, 0)
    assert finding.text().endswith("costs the traces of image 2 at block 1 step 1")
    repair.run(repair.RepairSettings(str(copy), replica=store.path))
    assert verify(copy).ok and tree(copy) == tree(local(store))


def exchange(copy: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the commit of part 0 says of a file, with checksums and seal that agree."""
    commit = copy / layout.part_commit(0)
    content = json.loads(commit.read_bytes())
    change(content["files"][name])
    commit.write_bytes(json_bytes(self_checked({key: each for key, each in content.items() if key != "sha256"})))
    (copy / layout.SEAL).write_bytes(json_bytes(sealed(copy, read_meta(copy))))


def test_a_commit_that_says_no_replay_errors_of_a_trace_is_damage_to_all(copy: Path) -> None:
    exact = {"attn": 0, "mlp_in": 0}
    harms: tuple[Any, ...] = (
        None, [1], {}, {"attn": "x"}, exact, {**exact, "resid": -1.0}, {**exact, "resid": True},
        {**exact, "resid": 10**400}, {**exact, "resid": 0, "more": 0}, "absent",
    )  # fmt: skip
    exchange(copy, trace_file(2, 1, 1), lambda entry: entry.update(replay={**exact, "resid": 0}))
    assert "attn 0" in describe(open_store(copy)) and verify(copy).ok
    for replay in harms:
        exchange(
            copy,
            trace_file(2, 1, 1),
            lambda entry, replay=replay: entry.pop("replay") if replay == "absent" else entry.update(replay=replay),  # type: ignore[misc]
        )
        with pytest.raises(
            DamagedError, match=r"does not say what such a file says: .*image-00000002/step\.1/double\.01"
        ):
            describe(open_store(copy))
        assert [(each.kind, each.part) for each in verify(copy).findings] == [("damaged", 0)], replay


def test_a_trace_that_says_it_is_another_is_not_read(copy: Path) -> None:
    name, other = trace_file(2, 1, 1), trace_file(2, 0, 1)
    (copy / name).write_bytes((copy / other).read_bytes())
    there = json.loads((copy / layout.part_commit(0)).read_bytes())["files"][other]
    exchange(copy, name, lambda entry: entry.update(there))
    for read in (open_store(copy).trace_block, open_store(copy).trace_facts):
        with pytest.raises(
            DamagedError, match=r"says that it is \('granary trace', 1, 2, 0, 1\), and not .* 2, 1, 1\)"
        ):
            read(2, 1, 1)


def test_without_a_copy_the_part_of_a_damaged_trace_is_taken_out_and_can_be_made_again(
    store: Store, copy: Path
) -> None:
    (copy / trace_file(2, 1, 1)).unlink()
    done = repair.run(repair.RepairSettings(str(copy)))
    assert done.uncommitted == [0]
    assert not list((copy / "traces").rglob("image-00000001/**/*.safetensors"))
    assert list((copy / "traces").rglob("image-00000009/**/*.safetensors"))
    write_traced(copy)
    assert verify(copy).ok and tree(copy) == tree(local(store))


def test_lost_matrices_cost_the_traces_of_their_block(store: Store, copy: Path) -> None:
    assert store.meta.traced is not None
    name = f"weights/{store.meta.traced.weights[1]}"
    (copy / name).unlink()
    (finding,) = verify(copy).findings
    assert finding.text().endswith("costs the traces at block 1, which need its attention matrices")
    with pytest.raises(DamagedError, match="is missing"):
        open_store(copy).trace_weights(1)
    repair.run(repair.RepairSettings(str(copy), replica=store.path))
    assert verify(copy).ok


def test_files_among_traces_that_no_commit_lists_are_found(copy: Path) -> None:
    foreign = ("traces/image-00000003/step.0/double.00.safetensors", "traces/image-00000002/step.0/double.02.safetensors",
               "traces/note.txt")  # fmt: skip
    for name in foreign:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    assert {(each.kind, each.name) for each in verify(copy).findings} == {("unlisted", name) for name in foreign}


def test_traces_of_a_part_that_was_not_committed_are_no_damage_and_repair_clears_them(
    store: Store, tmp_path: Path
) -> None:
    writer = write_traced(tmp_path / "store", parts=2)
    with writer.claim(2) as lease:
        assert lease is not None
        name = trace_file(9, 0, 0)
        writer.put_trace(lease, name, trace_content(writer.meta, name), {})
    assert {each.kind for each in verify(tmp_path / "store").findings} == {"unfinished"}
    repair.run(repair.RepairSettings(str(tmp_path / "store")))
    assert not (tmp_path / "store" / name).exists()
    write_traced(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(local(store))


def test_traces_lost_with_all_metadata_are_still_the_stores(copy: Path) -> None:
    for name in (layout.ROOT, layout.STORE_COMMIT):
        (copy / name).unlink()
    (copy / trace_file(2, 1, 1)).unlink()
    found = verify(copy).findings
    assert not [each for each in found if each.kind == "unlisted"]
    assert [each.part for each in found if each.name == trace_file(2, 1, 1)] == [0]


def test_rm_takes_a_parts_traces_out(copy: Path) -> None:
    remove.run(remove.RemoveSettings(str(copy), parts="2"))
    assert {file.parts[-3] for file in (copy / "traces").rglob("*.safetensors")} == {"image-00000001", "image-00000002"}


# comparing and sharing


def test_diff_names_traces(store: Store, tmp_path: Path) -> None:
    other = make_traced(tmp_path / "other", images=(1, 2))
    found = diff.diff(store.path, other.path)
    assert found.metadata["traces.images"] == ("1-2,9", "1-2")
    plain = make_store(tmp_path / "plain", sites=store.meta.sites)
    assert diff.diff(store.path, plain.path).only["A"]["traces"] == "of images 1-2,9 at steps 0-1, blocks 0-1, bfloat16"
    changed = traced_meta()
    write_traced(tmp_path / "changed", replace(changed, seed=0))
    assert not diff.diff(store.path, tmp_path / "changed")


def test_a_part_of_a_store_has_the_traces_of_its_images_and_steps(store: Store, tmp_path: Path) -> None:
    pull(PullSettings(url=store.path, folder=tmp_path / "part", images="8-9", steps="1", prompts=False))
    part = open_store(tmp_path / "part")
    assert part.traced is not None and (part.traced.images, part.traced.steps) == ((1,), (1,))
    assert verify(part.place).ok
    found, there = part.trace_block(1, 1, 0), store.trace_block(9, 1, 0)
    assert found.keys() == there.keys()
    for key, values in there.items():
        np.testing.assert_array_equal(found[key], values)
    assert part.trace_facts(1, 1, 0)["image"] == 9
    np.testing.assert_array_equal(part.trace_weights(0)["to_v.weight"], store.trace_weights(0)["to_v.weight"])
    with pytest.raises(UsageError, match="of image 9"):
        part.trace_block(9, 1, 0)
    pull(PullSettings(url=part.path, folder=tmp_path / "of-part", steps="1", prompts=False))
    assert open_store(tmp_path / "of-part").trace_facts(1, 1, 0)["image"] == 9


@pytest.mark.parametrize("option", [{"layers": "0"}, {"streams": "img"}, {"images": "4-7"}])
def test_traces_stay_behind_where_what_they_need_does(
    store: Store, tmp_path: Path, option: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pull(PullSettings(url=store.path, folder=tmp_path / "part", **option))  # type: ignore[arg-type]
    assert "the traces (images 1-2,9 at steps 0-1, blocks 0-1, bfloat16) stay behind" in capsys.readouterr().out
    part = open_store(tmp_path / "part")
    assert part.traced is None and not (tmp_path / "part" / "traces").exists()
    assert verify(part.place).ok


def test_traces_that_hold_everything_themselves_come_along_with_any_layer(tmp_path: Path) -> None:
    store = make_traced(tmp_path / "store", dtype="float32")
    pull(PullSettings(url=store.path, folder=tmp_path / "part", layers="1", streams="img"))
    part = open_store(tmp_path / "part")
    np.testing.assert_array_equal(part.trace_block(2, 0, 0)["mlp_in.txt"], store.trace_block(2, 0, 0)["mlp_in.txt"])


def test_a_pull_that_was_interrupted_goes_on(store: Store, copy: Path) -> None:
    (copy / layout.SEAL).unlink()
    (copy / layout.part_commit(0)).unlink()
    (copy / trace_file(2, 1, 1)).write_bytes(b"torn")
    pull(PullSettings(url=store.path, folder=copy))
    assert tree(copy) == tree(local(store))
