"""Circuit-guided steering from end to end, on a small store of tiny-flux and transcoders that were never trained."""

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analyze.circuits.command import run as graph
from analyze.circuits.settings import GraphSettings
from analyze.guided.command import Guided, run
from analyze.guided.settings import GuidedSettings
from analyze.guided.targets import TargetsSettings
from analyze.guided.targets import run as targets
from analyze.scoring.scores import run as scores
from analyze.scoring.settings import ScoresSettings
from analyze.truth.judging import run as truth
from analyze.truth.settings import TruthSettings
from store.errors import MismatchError, UsageError
from store.files import read_json
from tests.object_server import tree
from tests.traced_tiny_flux import traced_store, transcoders

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a traced `store` of 64 images, `dictionaries`, `analysis` with a truth table, and the `graphs` of blue."""
    folder = tmp_path_factory.mktemp("guided")
    few: dict[str, Any] = {"layers": "0-1", "steps": "1", "trace_steps": "1", "split": "val"}
    traced_store(folder / "store", images=64, batch_size=20, trace_images="0-63", **few)
    transcoders(folder / "dictionaries", layers=2)
    inputs: dict[str, Any] = {
        "store": folder / "store",
        "dictionaries": folder / "dictionaries",
        "out": folder / "analysis",
    }
    scores(ScoresSettings(**inputs, workers=1))
    truth(TruthSettings(**inputs))
    targets(asked(folder))
    graph(
        GraphSettings(
            store=folder / "store", dictionaries=folder / "dictionaries", targets=folder / "blue.csv", out=folder / "graphs",
            nodes=6, batch=3, page=False, skip_inactive=True,
        )
    )  # fmt: skip
    return folder


def asked(folder: Path, **changes: Any) -> TargetsSettings:
    given: dict[str, Any] = {
        "traces": folder / "store", "store": folder / "store", "dictionaries": folder / "dictionaries",
        "analysis": folder / "analysis", "values": "blue", "each": 1, "last": 1, "out": folder / "blue.csv",
    }  # fmt: skip
    return TargetsSettings(**{**given, **changes})


def steer(place: Path, out: Path, **changes: Any) -> Guided:
    given: dict[str, Any] = {
        "store": place / "store", "dictionaries": place / "dictionaries", "analysis": place / "analysis",
        "graphs": (place / "graphs",), "values": "blue", "top": 3, "arms": "circuit,single,random", "images": 2, "shown": 2,
        "own_strengths": "none", "out": out,
    }  # fmt: skip
    return run(GuidedSettings(**{**given, **changes}))


def test_every_arm_is_drawn_and_judged_and_finished_values_are_not_drawn_again(place: Path, tmp_path: Path) -> None:
    made = steer(place, tmp_path / "o")
    assert made.forwards == 4 * 2 * 4  # plain and three arms, two pictures, four steps
    table = pq.read_table(tmp_path / "o/values/blue.parquet")
    assert table["arm"].to_pylist() == ["circuit"] * 2 + ["single"] * 2 + ["random"] * 2
    traced = {row["image"] for row in _rows(place / "blue.csv")}
    assert not traced & set(table["image"].to_pylist())  # no judged picture explained the circuit
    before = tree(tmp_path / "o")
    again = steer(place, tmp_path / "o")
    assert again.forwards == 0 and tree(tmp_path / "o") == before
    assert steer(place, tmp_path / "other").rates == made.rates and tree(tmp_path / "other") == before


def test_an_out_of_other_settings_is_refused_and_a_plan_draws_nothing(place: Path, tmp_path: Path) -> None:
    made = steer(place, tmp_path / "o", plan=True)
    assert made.rates is None and not (tmp_path / "o").exists()
    steer(place, tmp_path / "o")
    with pytest.raises(UsageError, match=r"settings strength 3\.0, now 5\.0: choose another --out"):
        steer(place, tmp_path / "o", strength=5.0)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no guided steering"):
        steer(place, tmp_path / "p")


def test_own_strengths_are_chosen_on_pictures_that_are_not_judged(place: Path, tmp_path: Path) -> None:
    steer(place, tmp_path / "o", arms="circuit", own="circuit", own_strengths="2,4", tuning=3)
    table = pq.read_table(tmp_path / "o/values/blue.parquet")
    assert table["own_strength"].to_pylist() == [False, False, True, True]
    about = read_json(tmp_path / "o/values/blue.json")
    assert set(about["strengths_tried"]["circuit"]) == {"2", "4"} and len(about["tuned_on"]) == 3
    assert not set(about["tuned_on"]) & set(about["judged"])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"steps": "9"}, UsageError, "9"),
        ({"by": "supernode", "supernode": ("blue=img_1:96",)}, UsageError, "transcoder_img_1 has no feature 96"),
        ({"by": "supernode", "supernode": ("blue=img_9:1",)}, UsageError, "img_9"),
        ({"values": "pink"}, UsageError, "there is no graph of pink"),
        ({"tokens": "64", "by": "img"}, UsageError, "has no token 64"),
        ({"graphs": ("nowhere",)}, UsageError, "holds no graphs"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    import harvest.models.loading

    def loaded(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(harvest.models.loading, "load_pipeline", loaded)
    graphs = tuple(map(Path, changes.pop("graphs", (place / "graphs",))))
    with pytest.raises(error, match=said):
        steer(place, tmp_path / "o", graphs=graphs, arms="circuit", **changes)
    assert not (tmp_path / "o").exists()


def test_graphs_of_another_store_are_refused(place: Path, tmp_path: Path) -> None:
    other = traced_store(tmp_path / "s", images=2, layers="0-1", steps="1", trace_steps="1", split="val")
    with pytest.raises(MismatchError, match="say with --traces which store's traces the graphs explain"):
        steer(place, tmp_path / "o", traces=other)


def _rows(path: Path) -> list[dict[str, int]]:
    with path.open(newline="") as file:
        return [{"image": int(row["image"])} for row in csv.DictReader(file)]
