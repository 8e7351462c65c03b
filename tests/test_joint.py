"""Single-stream blocks: their text tokens, padding and image tokens are told apart from the store to the pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.circuits.command import notes
from analyze.circuits.inquiry import Inquiry
from analyze.compare import comparing
from analyze.compare.settings import CompareSettings
from analyze.pictures import sheets
from analyze.pictures.settings import SheetSettings
from analyze.scoring import scores
from analyze.scoring.matrices import ScoreMatrix
from analyze.scoring.settings import ScoresSettings
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from harvest import HarvestSettings
from harvest import run as harvest
from store import Site, Store, open_store
from store.care.verify import VerifySettings
from store.care.verify import run as verify
from store.errors import ForeignError
from store.format import StoreMeta, StreamTokens
from store.info import describe
from store.pack import PackSettings
from store.pack import run as make_pack
from store.packing.describe import describe as describe_pack
from store.shards import Pack, open_pack
from store.statistics import array_statistics
from store.strata import CODES, Group
from store.tokens import image_policy, joint_policy, kept_positions, text_policy
from tests import analyze_planted
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.small_models import flux_dev
from tests.small_packs import digests, in_runs, whole
from tests.small_store import make_store, small_meta
from train import TrainSettings, load_dictionary
from train import run as train
from train.results.evaluate import evaluate
from train.results.sweep import table
from train.rows.means import TrainingMeans

JOINT = Site.parse("joint_0")
FEW: dict[str, Any] = {"image_tokens": StreamTokens("sample", 5, 12), "text_tokens": StreamTokens("real+1", 8, 8)}
SITES = ("img_0", "txt_0", "joint_0")
DRAW: dict[str, Any] = {
    "prompts": "builtin:shapes", "images": 40, "resolution": 32, "max_sequence_length": 16, "threads": 1, "batch_size": 20,
    "num_inference_steps": 2, "guidance": 3.5, "layers": "double:1,single:all", "tokens": "6", "text_tokens": "real+2",
}  # fmt: skip


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


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of a tiny random FLUX, targets stored and to be recomputed, with packs."""
    folder = tmp_path_factory.mktemp("line")
    model = flux_dev(folder / "model")
    for name, more in (
        ("stored", {}),
        ("recomputed", {"targets": "recomputed", "store_dtype": "float32", "layers": "single:1"}),
    ):
        harvest(HarvestSettings(out=folder / name, model=str(model), **{**DRAW, **more}))
        for split in ("train", "val"):
            make_pack(PackSettings(store=str(folder / name), out=folder / f"{name}-{split}", split=split))  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize(
    ("targets", "kind"), [("stored", "transcoder"), ("stored", "sae"), ("recomputed", "transcoder")]
)
def test_dictionaries_are_trained_and_judged_on_each_kind_of_token(line: Path, targets: str, kind: str) -> None:
    out = line / f"dictionaries-{targets}-{kind}"
    packs = [line / f"{targets}-{split}" for split in ("train", "val")]
    (made,) = train(TrainSettings(
        pack=packs[0], val=packs[1], sites="joint_1", kind=kind, expansion=2, batch=128, epochs=2, time_embed_dim=16,  # type: ignore[arg-type]
        threads=1, out=out,
    ))  # fmt: skip
    assert made.metrics is not None and (made.config.training or {})["l1"] == 3e-4
    site, pack, val = Site.parse("joint_1"), open_pack(packs[0]), open_pack(packs[1])
    again = load_dictionary(out / made.name)
    (found,) = evaluate([again], {"mlp_out": TrainingMeans(pack, site, "mlp_out")}, val)
    assert found == made.metrics
    shown = table([made])
    assert [row.split()[0] for row in shown.splitlines()[2:]] == ["real", "padding", "image"]
    if targets == "stored":
        columns = whole(val, site)
        for group in ("real", "padding", "image"):
            residual = deviation = active = rows = 0.0
            for step in val.steps:
                chosen = (columns["stratum"] == CODES[group]) & (columns["step"] == step)  # type: ignore[index]
                y = torch.from_numpy(columns["mlp_out"][chosen].astype(np.float32)).double()
                x = torch.from_numpy(columns[again.input_point][chosen].astype(np.float32))
                with torch.no_grad():
                    z = again.encode(x, torch.from_numpy(np.ascontiguousarray(columns["sigma"][chosen])))
                    mean = torch.from_numpy(np.array(pack.mean(site, step, "mlp_out", group)))  # type: ignore[arg-type]
                    residual += float((y - again.decode(z).double()).square().sum())
                deviation += float((y - mean).square().sum())
                active, rows = active + int((z > 0).sum()), rows + len(y)
            assert made.metrics[group]["rows"] == rows > 0
            assert made.metrics[group]["fvu"] == pytest.approx(residual / deviation, rel=1e-5)
            assert made.metrics[group]["l0"] == pytest.approx(active / rows, rel=1e-6)


@pytest.mark.parametrize("padding", [False, True])
def test_scores_and_tables_have_each_kind_of_token_apart(line: Path, tmp_path: Path, padding: bool) -> None:
    given: dict[str, Any] = {"store": line / "stored", "dictionaries": trained(line), "out": tmp_path / "a"}
    scores.run(ScoresSettings(**given, padding=padding))
    store, matrix = open_store(line / "stored"), ScoreMatrix.open(tmp_path / "a" / "joint_1" / "step.1")
    z = activations(line, store, 1)
    kinds, counted = kinds_by_hand(store, 1), ("real", "padding", "image") if padding else ("real", "image")
    assert matrix.kinds == counted
    rows, of_table = matrix.features().to_pydict(), json.loads(matrix.features().schema.metadata[b"rows_by_kind"])
    for kind in counted:
        mine = kinds == kind
        best = np.where(mine[..., None], z, 0).max(1)
        np.testing.assert_allclose(matrix.scores(kind=kind), best, atol=1e-5)  # type: ignore[arg-type]
        assert of_table[kind] == mine.sum()
        np.testing.assert_allclose(rows[f"density_{kind}"], (z[mine] > 0).mean(0), atol=1e-12)
        np.testing.assert_allclose(rows[f"max_{kind}"], best.max(0), atol=1e-5)
        np.testing.assert_array_equal(rows[f"images_active_{kind}"], (best > 0).sum(0))
        expected = z[mine].sum(0) / np.maximum((z[mine] > 0).sum(0), 1)
        np.testing.assert_allclose(rows[f"mean_active_{kind}"], expected, rtol=1e-4, atol=1e-5)
    shown = np.where(np.isin(kinds, counted)[..., None], z, 0)
    np.testing.assert_allclose(matrix.scores(), shown.max(1), atol=1e-5)
    where = np.take_along_axis(store.tokens("joint", 1), shown.argmax(1), 1)
    alive = shown.max(1) > 1e-4
    np.testing.assert_array_equal(matrix.tokens()[alive], where[alive])
    if padding:
        return
    drawn = sheets.run(SheetSettings(**given, sites="joint_1", steps="1", best=1, top=2))
    assert len(drawn) == 1
    (found,) = comparing.run(CompareSettings(**given, of="joint_1@1", other="img_1@1"))
    assert found.summary["notes"][0] == "joint_1@1 is compared by its image tokens, which both sites have"
    image = matrix.scores(kind="image").astype(np.float64)
    other = ScoreMatrix.open(tmp_path / "a" / "img_1" / "step.1").scores().astype(np.float64)
    (row,) = [row for row in found.table.to_pylist() if row["by"] == "correlation" and row["rank"] == 0][:1]
    expected = np.corrcoef(image[:, row["feature"]], other[:, row["match"]])[0, 1]
    assert row["correlation"] == pytest.approx(expected, abs=1e-4)


def trained(line: Path) -> Path:
    """Dictionaries of a joint and an image site, trained once."""
    out = line / "both"
    if not out.exists():
        train(TrainSettings(
            pack=line / "stored-train", sites="joint_1,img_1", expansion=2, batch=128, epochs=2, time_embed_dim=16, threads=1,
            out=out,
        ))  # fmt: skip
    return out


def activations(line: Path, store: Store, step: int) -> np.ndarray:
    """z (image, slot, feature) of the joint dictionary, zeros in empty slots."""
    dictionary = load_dictionary(trained(line) / "transcoder_joint_1")
    x = store.read(Site.parse("joint_1"), step, "mlp_in").astype(np.float32)
    there = ~np.isnan(x[..., 0])
    sigma = np.asarray(store.prompts()["sigma"].to_pylist(), np.float32)[:, step]
    z = np.zeros((*there.shape, dictionary.config.n_features), np.float32)
    with torch.no_grad():
        z[there] = dictionary.encode(
            torch.from_numpy(x[there]), torch.from_numpy(np.broadcast_to(sigma[:, None], there.shape)[there])
        )
    return z


def test_image_tokens_of_joint_sites_are_judged_against_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = analyze_planted._signal

    def signal(plan: Plan, stream: str, step: int, scene: dict[str, Any], words: list[str], total: int) -> np.ndarray:
        """Text as in txt, then the image as in img."""
        assert stream == "joint" and total == 78
        return np.concatenate([plain(plan, "txt", step, scene, words, 24), plain(plan, "img", step, scene, words, 54)])

    monkeypatch.setattr(analyze_planted, "_signal", signal)
    plan = Plan(
        n_images=150, steps=1, sites=("joint_0",), pictures=False, tokens={"joint": StreamTokens("all", 78, 78)}
    )
    planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "dictionaries", plan)
    given: dict[str, Any] = {name: tmp_path / name for name in ("store", "dictionaries", "out")}
    scores.run(ScoresSettings(**given))
    found = truth.run(TruthSettings(**given, images="all"))
    red = found["attributes"][0]["streams"]["joint"]["tokens"]
    assert red["chosen_by_tokens"]["feature"] == 0 and red["chosen_by_tokens"]["auroc"] > 0.99
    assert "no figures over tokens" not in (tmp_path / "out" / "truth.md").read_text()


def test_graphs_say_in_one_line_that_they_stop_before_single_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyze.circuits.command.memory_note", lambda _inquiry: None)
    single = tuple(Site.parse(name) for name in ("joint_0", "joint_1", "joint_3"))
    inquiry = Inquiry.__new__(Inquiry)
    vars(inquiry).update(unchecked=(), experiments=(), subjects={}, untraced=(), scanned=True, single=single)
    expected = "note: joint_0-1,3 left out: graphs stop at the last double block, before the single-stream ones"
    assert notes(inquiry) == [expected]
    vars(inquiry)["single"] = ()
    assert notes(inquiry) == []
