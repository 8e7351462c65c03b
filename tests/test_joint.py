"""Single-stream blocks: their text tokens, padding and image tokens are told apart from the store to the pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analyze.circuits.command import notes
from analyze.circuits.inquiry import Inquiry
from analyze.compare import comparing, pairs
from analyze.compare.settings import CompareSettings
from analyze.faithfulness.groups import groups_of, left_out
from analyze.faithfulness.settings import FaithfulnessSettings
from analyze.inputs import open_analysis
from analyze.pictures import sheets
from analyze.pictures.contact import keys
from analyze.pictures.examples import Example, heated, pictures_with_heat, scales_of
from analyze.pictures.heat import Heat
from analyze.pictures.settings import SheetSettings
from analyze.report.findings import Spotlight, sentence
from analyze.report.page import dictionary_rows
from analyze.scoring import scores
from analyze.scoring.matrices import ScoreMatrix
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from analyze.steering.canvas import canvas_of_store
from analyze.truth import judging as truth
from analyze.truth.attributes import ATTRIBUTES, Attribute
from analyze.truth.settings import TruthSettings
from harvest import HarvestSettings
from harvest import run as harvest
from store import Site, Store, open_store
from store.errors import UsageError
from store.format import StreamTokens
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import open_pack
from store.strata import CODES
from tests import analyze_planted
from tests.analyze_planted import Plan, planted_dictionaries, planted_store
from tests.small_models import flux_dev
from tests.small_packs import whole
from tests.test_joint_strata import kinds_by_hand
from train import TrainSettings, load_dictionary
from train import run as train
from train.results.evaluate import evaluate
from train.results.sweep import table
from train.rows.means import TrainingMeans

pytestmark = pytest.mark.usefixtures("without_pictures")
DRAW: dict[str, Any] = {
    "prompts": "builtin:shapes", "images": 24, "resolution": 32, "max_sequence_length": 16, "threads": 1, "batch_size": 24,
    "num_inference_steps": 2, "guidance": 3.5, "layers": "double:1,single:all", "tokens": "6", "text_tokens": "real+2",
}  # fmt: skip


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
def test_scores_and_tables_have_each_kind_of_token_apart(
    line: Path, tmp_path: Path, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    of_image = matrix.scores(kind="image")
    for feature, images in enumerate(rows["unique_image"]):  # where there is something to see
        if (seen := of_image[:, feature]).max() > 0:
            assert images[0] == seen.argmax() and rows["unique_score"][feature][0] == pytest.approx(seen.max())
    shown = np.where(np.isin(kinds, counted)[..., None], z, 0)
    np.testing.assert_allclose(matrix.scores(), shown.max(1), atol=1e-5)
    where = np.take_along_axis(store.tokens("joint", 1), shown.argmax(1), 1)
    alive = shown.max(1) > 1e-4
    np.testing.assert_array_equal(matrix.tokens()[alive], where[alive])
    if padding:
        return
    drawn = sheets.run(SheetSettings(**given, sites="joint_1", steps="1", best=1, top=2))
    assert len(drawn) == 1
    noted: list[Any] = []
    monkeypatch.setattr(
        pairs, "page", lambda title, notes, lines, plain=pairs.page: plain(title, noted.extend(notes) or notes, lines)
    )
    (found,) = comparing.run(CompareSettings(**given, of="joint_1@1", other="img_1@1"))
    assert found.summary["notes"][0] == "joint_1@1 is compared by its image tokens, which both sites have"
    assert found.summary["notes"][0] in noted
    image = matrix.scores(kind="image").astype(np.float64)
    other = ScoreMatrix.open(tmp_path / "a" / "img_1" / "step.1").scores().astype(np.float64)
    (row,) = [row for row in found.table.to_pylist() if row["by"] == "correlation" and row["rank"] == 0][:1]
    expected = np.corrcoef(image[:, row["feature"]], other[:, row["match"]])[0, 1]
    assert row["correlation"] == pytest.approx(expected, abs=1e-4)
    pair_is_drawn_by_image_tokens(given, image, other)


def pair_is_drawn_by_image_tokens(given: dict[str, Any], image: np.ndarray, other: np.ndarray) -> None:
    """For a feature that is stronger on words: its images and its scale of colours are those of its image tokens."""
    settings = CompareSettings(**given, of="joint_1@1", other="img_1@1", top=4)
    analysis = open_analysis(settings)
    of, to = comparing._alike(*comparing.chosen_pairs(analysis, settings)[0])
    whole = of.matrix.scores().astype(np.float64)
    differ = np.flatnonzero((whole.argmax(0) != image.argmax(0)) & (image.max(0) > 0))
    feature, match = int(differ[0]), int(other.max(0).argmax())
    images = pairs.shared_images(analysis, (of, to), (feature, match), 4)
    assert images[0] == image[:, feature].argmax() != whole[:, feature].argmax()
    assert other[:, match].argmax() in images[:2]
    column = pairs._column(analysis, of, feature, images, settings)
    shown = np.concatenate([example.heat.values for example in column.examples.values()])
    assert column.scale <= shown.max() == pytest.approx(image[images, feature].max(), rel=1e-5)
    assert all((e.heat.positions >= analysis.store.meta.text_tokens).all() for e in column.examples.values())
    assert pairs.columns_are_pictures((of, to))


def test_image_tokens_and_words_of_a_joint_site_have_a_scale_of_colours_each(line: Path) -> None:
    store = open_store(line / "stored")
    text = store.meta.text_tokens
    strong, weak = np.asarray([20.0, 8.0], np.float32), np.asarray([3.0, 1.0], np.float32)
    joint = Heat(0, np.asarray([0, 2, text + 1, text + 6]), np.concatenate([strong, weak]))
    alone = Heat(0, np.asarray([1, 6]), weak)
    scales = scales_of(store, "joint", [joint])
    assert scales.picture == pytest.approx(3, rel=0.01) and scales.words == pytest.approx(20, rel=0.01)
    assert [type(key) is str for key in keys(scales, "joint")] == [False, False]
    (drawn,), (plain,) = (
        pictures_with_heat(store, stream, [Example(heat, 1.0, "", None)], 64)  # type: ignore[arg-type]
        for stream, heat in (("joint", joint), ("img", alone))
    )
    np.testing.assert_array_equal(np.asarray(drawn[1]), np.asarray(plain[1]))
    assert np.any(np.asarray(drawn[1]) != np.asarray(heated(store, "joint", drawn[0], joint, scales.words)))
    words = scales_of(store, "joint", [Heat(0, joint.positions[:2], strong)])
    assert keys(words, "joint")[0] == "image tokens: not active on those shown"


def test_the_overview_of_a_joint_dictionary_is_of_all_its_tokens_with_each_kind_beside(
    line: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"store": line / "stored", "dictionaries": trained(line), "out": tmp_path / "a"}
    scores.run(ScoresSettings(**given, steps="1"))
    analysis = open_analysis(Inputs(**given, steps="1"))
    rows = {row["name"]: row for row in dictionary_rows(analysis)}
    measured = next(s for s in analysis.subjects if s.site.stream == "joint").outline.metrics
    joint = rows["joint_1"]
    assert measured is not None and joint["fvu_value"] == measured["fvu"] != measured["real"]["fvu"]
    assert joint["l0_value"] == measured["l0"] and joint["padding"] is None
    kinds = (("image tokens", "image"), ("text tokens", "real"), ("padding", "padding"))
    assert joint["kinds"] == [(name, f"{measured[kind]['fvu']:.3f}") for name, kind in kinds]
    assert "kinds" not in rows["img_1"]


def test_dictionaries_of_single_blocks_are_left_out_of_faithfulness_unless_they_are_named(
    line: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"store": line / "stored", "dictionaries": (trained(line),), "out": tmp_path / "f"}
    canvas = canvas_of_store(open_store(line / "stored"), str(line / "model"), None)
    every, named = FaithfulnessSettings(**given), FaithfulnessSettings(**given, sites="joint_1")
    groups = groups_of(every, canvas)
    assert {str(site) for group in groups for site in group.sites} == {"img_1"}
    assert [str(site) for site in left_out(every, groups)] == ["joint_1"]
    with pytest.raises(UsageError, match="joint_1 cannot be spliced"):
        groups_of(named, canvas)


def trained(line: Path) -> Path:
    """Dictionaries of a joint and an image site, trained once."""
    out = line / "both"
    if not out.exists():
        train(TrainSettings(
            pack=line / "stored-train", val=line / "stored-val", sites="joint_1,img_1", expansion=2,
            batch=128, epochs=2, time_embed_dim=16, threads=1,
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
    plain, of_text = analyze_planted._signal, ATTRIBUTES.index(Attribute("background", "yellow"))

    def signal(plan: Plan, stream: str, step: int, scene: dict[str, Any], words: list[str], total: int) -> np.ndarray:
        """Text as in txt, then the image as in img."""
        assert stream == "joint" and total == 78
        image = plain(plan, "img", step, scene, words, 54)
        image[:, of_text] = 0
        return np.concatenate([plain(plan, "txt", step, scene, words, 24), image])

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
    said = (tmp_path / "out" / "truth.md").read_text()
    assert "no figures over tokens" not in said and "judged by its image tokens alone" in said
    over_images = [entry["streams"]["joint"] for entry in found["attributes"]]
    assert over_images[0]["images"]["feature"] == 0 and over_images[0]["images"]["auroc"] > 0.99
    # the words tell this background without fault, and no feature or channel of the picture does
    assert all(over_images[of_text][name]["auroc"] < 0.9 for name in ("images", "images_floor"))
    assert "background yellow" in found["verdict"]["joint"]["without"]
    analysis = open_analysis(Inputs(**given))
    scored = analysis.matrix(analysis.subjects[0], 0).features().to_pydict()
    assert scored["max_real"][of_text] > 3 * scored["max_image"][of_text]
    spot = Spotlight(analysis.subjects[0], 0, 0, ATTRIBUTES[0], 0.99, over_images[0]["images"]["auroc"])
    assert sentence(analysis, spot, False, None).startswith("joint_0/0 at step 0 fires on red patches: AUROC 1.00 over")


def test_graphs_say_in_one_line_that_they_stop_before_single_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyze.circuits.command.memory_note", lambda _inquiry: None)
    single = tuple(Site.parse(name) for name in ("joint_0", "joint_1", "joint_3"))
    inquiry = Inquiry.__new__(Inquiry)
    vars(inquiry).update(unchecked=(), experiments=(), subjects={}, untraced=(), scanned=True, single=single)
    expected = "note: joint_0-1,3 left out: graphs stop at the last double block, before the single-stream ones"
    assert notes(inquiry) == [expected]
    vars(inquiry)["single"] = ()
    assert notes(inquiry) == []
