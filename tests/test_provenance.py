"""Where two things meet, what does not belong together is refused, and both are named; what is unknown is said to be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from analyze.inputs import open_analysis
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from analyze.truth import judging as truth
from analyze.truth.settings import TruthSettings
from store import open_store
from store.errors import MismatchError, UsageError
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import open_pack
from tests.analyze_planted import Plan, planted_dictionaries, planted_store, reading_dictionary
from tests.toy_stores import toy_store
from train import Dictionary, TrainSettings, load_dictionary, run
from train.dictionaries.checkpoint import read_config, save_dictionary
from train.dictionaries.config import Parent
from train.rows.loader import Loader

MODEL = {"id": "model-a", "revision": None, "weights_sha256": {"transformer": "aa" * 32}}
OTHER = {"id": "model-b", "revision": None, "weights_sha256": {"transformer": "bb" * 32}}
UNKNOWN = {"id": None, "revision": None, "weights_sha256": None}
QUICK: dict[str, Any] = {"batch": 32, "rows": 320, "time_embed_dim": 8, "expansion": 2, "threads": 1}


def make(folder: Path, **changes: Any) -> Path:
    """`folder` with a store and its train and val pack, of `MODEL` unless `changes` say otherwise."""
    toy_store(
        folder / "store",
        **{"n_images": 60, "sites": ("img_0",), "d_model": 8, "chunk_images": 64, "model": MODEL, **changes},
    )
    for split in ("train", "val"):
        make_pack(PackSettings(store=folder / "store", out=folder / split, split=split))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and its packs, of `MODEL`."""
    return make(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another store of the same model and prompts, and its packs."""
    return make(tmp_path_factory.mktemp("other"), guidance=3.5)


@pytest.fixture(scope="module")
def dictionaries(one: Path) -> Path:
    """Dictionaries that were trained on `one`."""
    train(one, one / "dictionaries")
    return one / "dictionaries"


def train(folder: Path, out: Path, val: Path | None = None, **changes: Any) -> Dictionary:
    settings = {"pack": folder / "train", "val": val or folder / "val", "out": out, **QUICK, **changes}
    (dictionary,) = run(TrainSettings(**settings))
    return dictionary


def where(store: Path, dictionaries: Path, out: Path) -> dict[str, Path]:
    return {"store": store, "dictionaries": dictionaries, "out": out}


def test_every_result_names_what_it_was_made_from(one: Path, dictionaries: Path, tmp_path: Path) -> None:
    store, pack = open_store(one / "store"), open_pack(one / "train")
    assert pack.store_id == store.id and pack.model == MODEL
    dictionary = load_dictionary(dictionaries / "transcoder_img_0")
    assert dictionary.config.parent == Parent(pack.id, store.id, MODEL, "stored")
    assert dictionary.metrics is not None and dictionary.metrics["pack"] == open_pack(one / "val").id
    scores.run(ScoresSettings(**where(one / "store", dictionaries, tmp_path / "out")))
    analysis = open_analysis(Inputs(**where(one / "store", dictionaries, tmp_path / "out")))
    attributes = analysis.matrix(analysis.subjects[0], 0).attributes
    assert attributes["store"] == store.id
    assert attributes["dictionary"] == analysis.subjects[0].identity
    assert (attributes["dictionary_name"], attributes["site"], attributes["targets"]) == (
        dictionary.name,
        "img_0",
        "stored",
    )


def test_a_val_pack_of_another_model(one: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", model=OTHER)
    with pytest.raises(MismatchError, match=r"one.*/train is of model-a \(transformer aaaa.*other/val is of model-b"):
        train(one, tmp_path / "out", val=other / "val")
    assert not (tmp_path / "out").exists()


def test_a_val_pack_of_another_width(one: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", d_model=12)
    with pytest.raises(MismatchError, match=r"other/val has rows of width 12, --pack .*one.*/train of width 8"):
        train(one, tmp_path / "out", val=other / "val")


def test_a_val_pack_of_another_schedule(one: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", sigmas=(1.0, 0.9, 0.7, 0.4))
    with pytest.raises(
        MismatchError, match=r"step 2 is at sigma 0\.7 in --val .*other/val and at 0\.5 in --pack .*/train"
    ):
        train(one, tmp_path / "out", val=other / "val")


def test_a_val_pack_of_unknown_model_is_measured_on_with_a_note(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path / "other", model=UNKNOWN)
    assert train(one, tmp_path / "out", val=other / "val").metrics is not None
    assert f"note: whether {other / 'val'} and {one / 'train'} are of one model is not known" in capsys.readouterr().out


def test_a_training_that_goes_on_with_another_pack(
    one: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Loader.batches

    def dies(self: Loader, first: int, _last: int) -> Any:
        yield from batches(self, first, first + 5)
        raise KeyboardInterrupt

    ids = open_pack(one / "train").id, open_pack(other / "train").id
    for finished in (False, True):
        with monkeypatch.context() as patch:
            if not finished:
                patch.setattr(Loader, "batches", dies)
                with pytest.raises(KeyboardInterrupt):
                    train(one, tmp_path / "out", checkpoint_steps=3)
            else:
                train(one, tmp_path / "out")
        assert (tmp_path / "out" / "transcoder_img_0" / "config.json").exists() == finished
        with pytest.raises(MismatchError, match=f"was trained on pack {ids[0]} .*asked for is pack {ids[1]}"):
            train(other, tmp_path / "out")
    with pytest.raises(UsageError, match="--lr: there"):  # another setting is a matter of usage
        train(one, tmp_path / "out", lr=1.0)


def test_a_finished_dictionary_that_was_measured_on_another_pack(one: Path, other: Path, dictionaries: Path) -> None:
    ids = open_pack(one / "val").id, open_pack(other / "val").id
    with pytest.raises(MismatchError, match=f"was measured on {ids[0]}, not on .*{ids[1]}"):
        train(one, dictionaries, val=other / "val")


def test_a_pack_folder_of_another_store(one: Path, tmp_path: Path) -> None:
    other = toy_store(tmp_path / "other", n_images=60, sites=("img_0",), d_model=8, model=OTHER)
    with pytest.raises(MismatchError) as refused:
        make_pack(PackSettings(store=other, out=one / "train"))
    for name in (open_store(other).id, open_store(one / "store").id, "model-a", "model-b", str(one / "train")):
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model": OTHER},
            r"transcoder_img_0 is of model-a \(transformer aaaa.*/other is of model-b \(transformer bbbb",
        ),
        ({"d_model": 12}, r"transcoder_img_0 has d_model 8, the activations of store .*/other have 12"),
        ({"sites": ("img_1", "txt_0")}, r"transcoder_img_0 is a dictionary of img_0, which store .*/other has not"),
    ],
)
def test_a_dictionary_and_the_store_of_another_model_width_or_site(
    dictionaries: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    other = toy_store(tmp_path / "other", **{"sites": ("img_0",), "d_model": 8, "model": MODEL, **changes})
    with pytest.raises(MismatchError, match=reason):
        scores.run(ScoresSettings(**where(other, dictionaries, tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_dictionary_that_reads_what_the_store_does_not_keep(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "store", sites=("img_0",), d_model=8, model=MODEL, points=("mlp_in",))
    save_dictionary(tmp_path / "d" / "sae_img_0", reading_dictionary("img_0", d_model=8, kind="sae"), None, [])
    with pytest.raises(MismatchError, match=r"sae_img_0 reads mlp_out, store .*/store keeps mlp_in only"):
        scores.run(ScoresSettings(**where(store, tmp_path / "d", tmp_path / "out")))


def test_a_dictionary_of_unknown_parent_is_scored_with_a_note(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dictionary(tmp_path / "d" / "transcoder_img_0", reading_dictionary("img_0", d_model=8), None, [])
    assert read_config(tmp_path / "d" / "transcoder_img_0").parent is None
    scores.run(ScoresSettings(**where(one / "store", tmp_path / "d", tmp_path / "out")))
    note = (
        "note: that transcoder_img_0 belong to the store's model, model-a (transformer aaaaaaaaaaaa…), is not checked"
    )
    assert note in capsys.readouterr().out


def test_a_store_of_unknown_model_is_scored_with_a_note(
    dictionaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = toy_store(tmp_path / "store", sites=("img_0",), d_model=8, model=UNKNOWN)
    scores.run(ScoresSettings(**where(store, dictionaries, tmp_path / "out")))
    assert "the store's model, an unnamed model (of unknown weights), is not checked" in capsys.readouterr().out


def test_a_subset_of_a_store_is_of_the_same_model(
    one: Path, dictionaries: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = {"store": open_store(one / "store").id, "images": [0, 11]}
    part = toy_store(tmp_path / "part", 12, ("img_0",), (2,), 8, model=MODEL, parent=parent)
    scores.run(ScoresSettings(**where(part, dictionaries, tmp_path / "out")))
    assert "note:" not in capsys.readouterr().out


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A planted store, dictionaries, and `out/` with their scores and truth table."""
    plan = Plan(n_images=48, steps=1, sites=("img_0",))
    planted_store(tmp_path / "store", plan)
    planted_dictionaries(tmp_path / "d", plan)
    scores.run(ScoresSettings(**where(tmp_path / "store", tmp_path / "d", tmp_path / "out")))
    truth.run(TruthSettings(**where(tmp_path / "store", tmp_path / "d", tmp_path / "out"), images="all"))
    return tmp_path


def test_an_output_folder_of_another_store(planted: Path) -> None:
    other = planted_store(planted / "other", Plan(n_images=48, steps=1, sites=("img_0",), seed=9))
    there = where(planted / "other", planted / "d", planted / "out")
    commands: list[Callable[[], object]] = [
        lambda: scores.run(ScoresSettings(**there)),
        lambda: truth.run(TruthSettings(**there, images="all")),
        lambda: report.run(ReportSettings(**there)),
    ]
    for command in commands:
        with pytest.raises(MismatchError) as refused:
            command()
        for name in (str(planted / "out"), open_store(planted / "store").id, other.id, str(planted / "other")):
            assert name in str(refused.value)


def test_scores_of_another_dictionary(planted: Path) -> None:
    save_dictionary(planted / "new" / "transcoder_img_0", reading_dictionary("img_0", seed=5), None, [])
    settings = where(planted / "store", planted / "new", planted / "out")
    old = open_analysis(Inputs(**where(planted / "store", planted / "d", planted / "out"))).subjects[0].identity
    new = open_analysis(Inputs(**settings)).subjects[0].identity
    for command in (lambda: scores.run(ScoresSettings(**settings)), lambda: report.run(ReportSettings(**settings))):
        with pytest.raises(MismatchError, match=f"another dictionary.*{old[:16]}.*{new[:16]}"):
            command()


def test_scores_that_were_carried_over_from_another_store_or_step(planted: Path) -> None:
    analysis = open_analysis(Inputs(**where(planted / "store", planted / "d", planted / "out")))
    folder = planted / "out" / "img_0" / "step.0"
    shutil.copytree(folder, planted / "out" / "img_0" / "step.1")
    with pytest.raises(MismatchError, match=r"step\.1 holds scores of another step: 0, expected 1"):
        analysis.matrix(analysis.subjects[0], 1)
    zarr.open_group(folder).attrs["store"] = "sha256-elsewhere"
    with pytest.raises(MismatchError, match=f"another store: sha256-elsewhere, expected {analysis.store.id}"):
        report.run(ReportSettings(**where(planted / "store", planted / "d", planted / "out")))


def test_a_truth_table_of_another_dictionary(planted: Path) -> None:
    save_dictionary(planted / "new" / "transcoder_img_0", reading_dictionary("img_0", seed=5), None, [])
    shutil.rmtree(planted / "out" / "img_0")
    settings = where(planted / "store", planted / "new", planted / "out")
    scores.run(ScoresSettings(**settings))
    new = open_analysis(Inputs(**settings)).subjects[0].identity
    with pytest.raises(MismatchError, match=rf"truth\.json judges another dictionary img_0 .*given \({new[:16]}"):
        report.run(ReportSettings(**settings))
    truth.run(TruthSettings(**settings, images="all"))
    report.run(ReportSettings(**settings))
