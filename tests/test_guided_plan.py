"""What `guided` settles before it draws: which graphs speak for a value, which pictures are left, what an OUT may be gone on with."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze.guided import planning
from analyze.guided.arms import Labelled, Told, told_by_truth
from analyze.guided.command import _judged, record
from analyze.guided.planning import Case, GuidedPlan
from analyze.guided.settings import GuidedSettings
from analyze.guided.sources import Feature, Member
from analyze.inputs import Analysis, Subject, check_results
from analyze.steering.canvas import canvas_of_store
from analyze.truth.attributes import Attribute, Scene, Thing
from analyze.truth.halves import Halves
from analyze.truth.judges import Judges
from store import Site, Store, open_store
from store.errors import DamagedError, GranaryError, MismatchError, UsageError
from store.files import write_json
from tests.traced_tiny_flux import transcoder

IMG, LAST = Site.parse("img_1"), Site.parse("img_2")
TOLD = [Told("red", 1, (IMG, 4), 0.9), Told("red", 1, (LAST, 7), 0.8), Told("red", 3, (LAST, 5), 0.9)]


@pytest.fixture
def store(traced_flux: Path) -> Store:
    return open_store(traced_flux / "store")


@pytest.fixture
def analysis(store: Store, tmp_path: Path) -> Analysis:
    made = [transcoder(str(site)) for site in (IMG, LAST)]
    return Analysis(store, tuple(Subject(str(each.site), each, "x") for each in made), (1, 3), tmp_path)


def scene(image: int, colour: str, said: str = "") -> Scene:
    return Scene(image, "black", True, (Thing(colour, "ring", "left", np.zeros(4, np.float32)),), said or str(image))


def member(image: int, *targets: Feature, step: int = 1) -> Member:
    return Member(Path("g"), image, step, "sha256-x", targets, {(IMG, 2): 0.5}, {}, {})


def asked(**changes: Any) -> GuidedSettings:
    places: dict[str, Any] = {name: Path(name) for name in ("dictionaries", "analysis", "out")}
    return GuidedSettings(
        **{"store": "s", "graphs": (Path("g"),), "values": "red", "own_strengths": "none", **places, **changes}
    )


def test_a_graph_speaks_for_a_value_only_if_it_explains_what_tells_it(
    analysis: Analysis, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Scene(2, "black", True, (scene(2, "red").things[0], scene(2, "green").things[0]), "2")
    monkeypatch.setattr(planning, "read_scenes", lambda _store: [scene(0, "red"), scene(1, "green"), both])
    monkeypatch.setattr(planning, "told_by_truth", lambda *_: TOLD)
    good = [
        member(0, (LAST, 7)),
        member(0, (IMG, 4)),
        member(0, (LAST, 5), step=3),
    ]  # of --last 1, of --last 2, of another step
    other = [member(0, (LAST, 3)), member(0, (LAST, 5)), member(0, (LAST, 7), (LAST, 3)), member(1, (LAST, 7))]
    found, several, foreign = planning._by_value([*good, *other, member(2, (LAST, 7))], store, analysis, "colour")
    assert found == {"red": good} and (several, foreign) == (1, len(other))


def settled(
    analysis: Analysis, settings: GuidedSettings, monkeypatch: pytest.MonkeyPatch, arms: Any, members: list[Member]
) -> Case:
    pool = planning._Pool((), (scene(0, "red"),), analysis.store)
    monkeypatch.setattr(planning, "features_of_arms", arms)
    monkeypatch.setattr(planning, "_labelled", lambda *_: Labelled(np.arange(1), np.ones(1, bool)))
    monkeypatch.setattr(planning, "best_of_truth", lambda *_: (LAST, 7))
    judges = Judges((), np.arange(1), np.zeros((1, 0), bool), np.zeros((1, 0), bool), Halves(np.asarray([2])), 0, None)
    canvas = canvas_of_store(analysis.store)
    return planning._case("red", {"red": members} if members else {}, pool, analysis, canvas, judges, settings)


def test_with_the_target_in_the_circuit_every_arm_has_as_many_features(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[Feature, ...]] = []

    def arms(_arms: Any, own: tuple[Feature, ...], *_: Any) -> dict[str, tuple[Feature, ...]]:
        counted.append(own)
        return {"circuit": own}

    case = settled(analysis, asked(by="img", with_target=True), monkeypatch, arms, [member(0, (LAST, 7))])
    assert counted == [((IMG, 2), (LAST, 7))] and case.variants[0].features == counted[0]
    settled(analysis, asked(by="img"), monkeypatch, arms, [member(0, (LAST, 7))])
    assert counted[1] == ((IMG, 2),)


@pytest.mark.parametrize(("feature", "said"), [("img_99:1", "img_99"), ("img_1:99999", "has no feature 99999")])
def test_a_circuit_by_hand_is_checked_before_the_other_arms_are_made_for_it(
    feature: str, said: str, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arms(*_: Any) -> None:
        raise AssertionError("arms were made of features that are not there")

    settings = asked(by="supernode", supernode=(f"red={feature}",))
    with pytest.raises(GranaryError, match=said):
        settled(analysis, settings, monkeypatch, arms, [member(0, (LAST, 7))])
    with pytest.raises(
        UsageError, match="leave out the arms target and matched"
    ):  # by hand, and no graph that has a target
        settled(analysis, settings, monkeypatch, arms, [])


class ValStore(Store):
    """A store whose prompts are all held out."""

    def prompts(self) -> pa.Table:
        table = super().prompts()
        return table.set_column(table.column_names.index("split"), "split", pa.array(["val"] * len(table)))


def test_pictures_of_another_store_are_judged_unless_this_one_shows_their_scene(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.copy(store)
    other.__class__ = ValStore
    halves = Halves(np.asarray([0, 2, 2]))
    judges = Judges((), np.arange(3), np.zeros((3, 0), bool), np.zeros((3, 0), bool), halves, 0, None)
    mine, theirs = (
        [scene(i, "red") for i in range(3)],
        [scene(0, "red", "1"), scene(1, "red", "new"), scene(2, "blue", "x")],
    )
    monkeypatch.setattr(planning, "read_scenes", lambda of: theirs if of is other else mine)
    monkeypatch.setattr(planning, "open_store", lambda _place: other)
    found = planning._pool(asked(judge="j"), canvas_of_store(store), store, store, judges, set())
    red = Attribute("colour", "red")
    assert found.pictures(red) == ([0], [1]) and found.judged_store is other
    own = planning._pool(asked(), canvas_of_store(store), store, store, judges, set())
    assert own.pictures(red) == ([0], [1, 2]) and own.judged_store is store
    with pytest.raises(MismatchError, match=r"--judge .*: height is 64, that of --store is 128"):
        planning._check_same_drawing(other, replace(canvas_of_store(store), height=128), None)


def plan_of(analysis: Analysis, **changes: Any) -> GuidedPlan:
    given: dict[str, Any] = {
        "value": "red", "circuit": (), "targets": ((LAST, 7),), "variants": (), "judged": (4, 5), "tuning": (), "graphs": 1,
    }  # fmt: skip
    truth = changes.pop("truth", {"seed": 0})
    store = analysis.store
    return GuidedPlan(asked(), analysis, canvas_of_store(store), (Case(**{**given, **changes}),), store, truth, 0, 0)


def test_an_out_is_not_gone_on_with_for_other_pictures_or_another_truth_table(
    analysis: Analysis, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    write_json(out / "run.json", record(plan_of(analysis)))
    check_results(out, record(plan_of(analysis)), "guided steering")
    for changes, said in (
        ({"judged": (4, 6)}, r"circuits red judged \[4, 5\], now \[4, 6\]"),
        ({"truth": {"seed": 1}}, "truth seed 0, now 1"),
        (
            {"variants": (planning._variant("single", ((LAST, 3),), asked(), analysis),)},
            "circuits red arms single nothing, now",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            check_results(out, record(plan_of(analysis, **changes)), "guided steering")  # type: ignore[arg-type]


def test_cut_tables_are_one_message(analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "truth.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DamagedError, match=r"truth.parquet cannot be read .* run python -m analyze truth again"):
        told_by_truth(analysis, "colour")
    (tmp_path / "values").mkdir()
    (tmp_path / "values/red.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DamagedError, match=r"red.parquet cannot be read .* draws that value once more"):
        _judged(tmp_path, plan_of(analysis).cases[0])
