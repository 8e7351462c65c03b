"""Joint strata as stores and packs keep them: which token is which, what is kept of each, and figures of each apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analyze.counted import are_lower_bounds
from store import Site, Store
from store.care.verify import VerifySettings
from store.care.verify import run as verify
from store.errors import ForeignError
from store.format import StoreMeta, StreamTokens
from store.info import describe
from store.pack import PackSettings
from store.pack import run as make_pack
from store.packing.describe import describe as describe_pack
from store.shards import Pack
from store.statistics import array_statistics
from store.strata import CODES, Group
from store.tokens import image_policy, joint_policy, kept_positions, text_policy
from tests.small_packs import digests, in_runs, whole
from tests.small_store import make_store, small_meta

JOINT = Site.parse("joint_0")
FEW: dict[str, Any] = {"image_tokens": StreamTokens("sample", 5, 12), "text_tokens": StreamTokens("real+1", 8, 8)}
SITES = ("img_0", "txt_0", "joint_0")


def kinds_by_hand(store: Store, step: int) -> np.ndarray:
    """(image, slot) `real`, `padding`, `image` or nothing, written down one by one."""
    lengths = store.prompts()["text_length"].to_pylist()
    text = store.meta.tokens["joint"].total - store.meta.grid[0] * store.meta.grid[1]
    names = [
        ["" if t < 0 else "image" if t >= text else "real" if t < length else "padding" for t in row]
        for row, length in zip(store.tokens("joint", step).tolist(), lengths, strict=True)
    ]
    return np.asarray(names)


def test_a_joint_sequence_keeps_the_tokens_that_text_and_image_keep() -> None:
    text, image = text_policy("real+2", 16, 5), image_policy("4", 64)
    joint = joint_policy(text, image)
    assert (joint.kept, joint.total, joint.policy) == (11, 80, "strata")
    assert joint_policy(text_policy("all", 16, 5), image_policy("all", 64)) == StreamTokens("all", 80, 80)
    for number, length in enumerate((3, 5)):
        found = kept_positions(joint, 7, number, 2, "joint", length)
        words = kept_positions(text, 7, number, 2, "txt", length)
        drawn = kept_positions(image, 7, number, 2, "img", length)
        np.testing.assert_array_equal(found, [*words, *(drawn + 16)])
    assert kept_positions(joint, 7, 0, 2, "joint", 3)[5:8].tolist()[:2] == [-1, -1]  # in the middle, not at the end


@pytest.mark.parametrize(
    "change",
    [
        {"strata": None},
        {"policy": "sample"},
        {"kept": 11},
        {"strata": {"txt": {"policy": "all", "kept": 8, "total": 8}}},
        {
            "strata": {
                "txt": {"policy": "all", "kept": 7, "total": 7},
                "img": {"policy": "sample", "kept": 5, "total": 13},
            }
        },
        {"strata": {"txt": 3, "img": "x"}},
        {"total": 11, "policy": "all", "kept": 11, "strata": {}},
    ],
)
def test_the_policy_is_read_back_and_one_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    meta = small_meta(sites=("joint_0",), **FEW)
    said = json.loads(json.dumps(meta.attributes()))
    assert StoreMeta.from_attributes(said, "here") == meta
    assert set(said["tokens"]["joint"]["strata"]) == {"txt", "img"}
    said["tokens"]["joint"] = {
        name: value for name, value in {**said["tokens"]["joint"], **change}.items() if value is not None
    }
    with pytest.raises(ForeignError, match="malformed"):
        StoreMeta.from_attributes(said, "here")


def test_only_a_joint_sequence_has_strata() -> None:
    said = json.loads(json.dumps(small_meta(sites=("img_0", "joint_0"), **FEW).attributes()))
    said["tokens"]["img"] = {**said["tokens"]["joint"]}
    with pytest.raises(ForeignError, match="malformed: the policy of tokens is 'strata'"):
        StoreMeta.from_attributes(said, "here")


@pytest.mark.parametrize(
    ("text", "image", "without_padding", "with_padding"),
    [("real+0", "all", False, True), ("real+1", "sample", True, True), ("all", "sample", True, True), ("all", "all", False, False)],
)  # fmt: skip
def test_maxima_over_a_joint_site_are_lower_bounds_only_where_counted_tokens_are_missing(
    tmp_path: Path, text: str, image: str, without_padding: bool, with_padding: bool
) -> None:
    kept = {"all": 12, "sample": 5}[image]
    texts = StreamTokens(text, 8 if text == "all" else 7, 8)
    made = make_store(
        tmp_path / "s", n_images=4, sites=SITES, image_tokens=StreamTokens(image, kept, 12), text_tokens=texts
    )
    assert are_lower_bounds(made.store, "joint", padding=False) is without_padding
    assert are_lower_bounds(made.store, "joint", padding=True) is with_padding
    assert are_lower_bounds(made.store, "img", padding=False) is (image == "sample")
    assert are_lower_bounds(made.store, "txt", padding=True) is (text != "all")


def test_streams_of_double_blocks_say_what_they_always_said() -> None:
    assert small_meta(sites=("img_0",), **FEW).attributes()["tokens"] == {
        "img": {"policy": "sample", "kept": 5, "total": 12}
    }


def test_statistics_of_text_and_image_are_those_of_their_rows(tmp_path: Path) -> None:
    made = make_store(tmp_path / "s", sites=SITES, store_dtype="float32", **FEW)
    for step in (0, 1):
        kinds = kinds_by_hand(made.store, step)
        found = made.store.statistics(JOINT, step, "mlp_out")
        for stream, chosen in (("txt", ("real", "padding")), ("img", ("image",))):
            rows = made.store.read(JOINT, step, "mlp_out")[np.isin(kinds, chosen)]
            part = found.strata[stream]  # type: ignore[index]
            assert part.rows == len(rows)
            np.testing.assert_allclose(part.sum, rows.astype(np.float64).sum(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(part.variance, rows.astype(np.float64).var(0), rtol=1e-9)
        rows = made.store.read(JOINT, step, "mlp_out")[kinds != ""]
        np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-9, atol=1e-12)
        assert found.rows == sum(part.rows for part in found.strata.values()) == len(rows)
    lines = describe(made.store).splitlines()
    place = next(number for number, line in enumerate(lines) if line.strip().startswith("joint_0 "))
    assert [lines[place + k].split()[0] for k in (1, 2)] == ["text", "image"]
    assert "joint: 13 of 20: text 8 of 8 (real+1) and image 5 of 12 (sample)" in describe(made.store)
    assert verify(VerifySettings(store=str(tmp_path / "s"))).ok


def test_parts_written_before_strata_were_told_apart_are_read_without_them() -> None:
    values = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    plain = array_statistics(values, None)
    assert not isinstance(plain, int)
    assert "strata" not in plain.scalars()
    again = type(plain).of_part("joint_0/step.0/mlp_in", plain.tensors("joint_0/step.0/mlp_in"), plain.scalars())
    assert again.strata == {} and again.rows == 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Pack]:
    folder = tmp_path_factory.mktemp("joint")
    made = make_store(folder / "s", n_images=40, sites=SITES, d_model=8, chunk_images=8, **FEW)
    pack = make_pack(PackSettings(store=str(folder / "s"), out=folder / "p"))
    assert pack is not None
    return made.store, pack


@pytest.mark.parametrize("runs", [0, 3])
def test_a_pack_says_of_every_row_what_kind_of_token_it_is(
    packed: tuple[Store, Pack], tmp_path: Path, runs: int
) -> None:
    store, pack = packed
    with in_runs(runs):
        make_pack(PackSettings(store=store.path, out=tmp_path / "again"))
    assert digests(tmp_path / "again") == digests(pack.path)
    columns = whole(pack, JOINT)
    kinds = {step: kinds_by_hand(store, step) for step in store.steps}
    positions = {step: store.tokens("joint", step) for step in store.steps}
    names = []
    for image, step, token in zip(columns["image"], columns["step"], columns["token"], strict=True):
        (slot,) = np.flatnonzero(positions[int(step)][image] == token)
        names.append(kinds[int(step)][image, slot])
    assert columns["stratum"].tolist() == [CODES[name] for name in names]
    counts = {name: names.count(name) for name in ("real", "padding", "image")}
    assert pack.group_rows(JOINT) == counts and min(counts.values()) > 20
    assert f"{counts['image']:,}" in describe_pack(pack)
    groups: tuple[Group, ...] = ("real", "padding", "image")
    assert pack.groups(JOINT) == ("all", *groups)
    for step in store.steps:
        for group in groups:
            rows = columns["mlp_out"][(np.asarray(names) == group) & (columns["step"] == step)].astype(np.float64)
            np.testing.assert_allclose(pack.mean(JOINT, step, "mlp_out", group), rows.mean(0), rtol=1e-9, atol=1e-12)


def test_a_joint_pack_of_before_has_its_rows_in_one_group(packed: tuple[Store, Pack]) -> None:
    plan = {name: value for name, value in packed[1].manifest["plan"].items() if name != "strata"}
    old = Pack(packed[1].path, {**packed[1].manifest, "plan": plan})
    assert old.groups(JOINT) == ("all",) and old.group_rows(JOINT) == {}
    assert old.groups(Site.parse("txt_0")) == ("all", "real", "padding")
    assert packed[1].manifest["plan"]["strata"] == {"joint": ["real", "padding", "image"]}
