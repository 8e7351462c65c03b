"""Circuit-guided steering: which features make a circuit, what it is compared with, and what is refused before a model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analyze.guided import case_studies
from analyze.guided.arms import _contrast
from analyze.guided.results import (
    ALL,
    PICTURES,
    best_strength,
    edge_of,
    edges_said,
    goals_of,
    lines_of,
    measured,
    rates_table,
    verdict_of,
)
from analyze.guided.settings import GuidedSettings
from analyze.guided.sources import (
    Member,
    check_dictionaries,
    mean_strengths,
    ranked_sources,
    read_members,
    strongest_paths,
)
from analyze.steering.judging import VERDICTS, Rate
from store.errors import ForeignError, MismatchError, UsageError
from store.sites import Site
from tests.small_graphs import graph_of

TARGET = "feature_L2_img_p3_f7"
IMG, TXT = Site.parse("img_1"), Site.parse("txt_0")


def fed(edges: Sequence[tuple[str, str, float]], target: str = TARGET, **facts: Any) -> Any:
    """A graph of edges with the facts that `analyze graph` gives it."""
    graph = graph_of(edges, target)
    pre = sum(value for _, end, value in edges if end == target)
    told = {"name": target, "pre": pre, "site": "img_2", "feature": 7, "token": 3}
    graph.facts.update(
        {"image": 0, "step": 1, "store": "sha256-x", "prompt": "a red circle", "seed": 5, "asked": ["img_2:3:7"],
         "targets": [told], "transcoders": {"img_2": {"identity": "abc", "name": "t"}}} | facts
    )  # fmt: skip
    return graph


def member(strengths: dict[tuple[Site, int], float], step: int = 0, paths: Any = None) -> Member:
    targets = ((Site.parse("img_2"), 7),)
    return Member(Path("g"), 0, step, "sha256-x", targets, strengths, paths or strengths, {"img_2": "abc"})


def test_a_source_counts_with_its_effect_over_all_tokens_as_a_share_of_the_target(tmp_path: Path) -> None:
    graph = fed(
        [("feature_L0_txt_p1_f9", TARGET, 1.0), ("feature_L0_txt_p2_f9", TARGET, 2.0), ("feature_L1_img_p0_f4", TARGET, 5.0),
         ("feature_L0_txt_p1_f9", "feature_L1_img_p0_f4", 3.0), ("error_L0_img_p0", "feature_L1_img_p0_f4", 1.0)]
    )  # fmt: skip
    graph.write(tmp_path / "g")
    (found,) = read_members([tmp_path / "g"])
    assert found.targets == ((Site.parse("img_2"), 7),) and (found.image, found.step) == (0, 1)
    assert found.strengths[IMG, 4] == pytest.approx(5 / 8)
    assert found.strengths[TXT, 9] == pytest.approx((1 + 2 + 5 * 3 / 4) / 8)  # directly, and through img_1:4


def test_a_graph_without_any_other_feature_has_no_sources(tmp_path: Path) -> None:
    fed([("error_L0_img_p0", TARGET, 1.0)]).write(tmp_path / "g")
    (found,) = read_members([tmp_path / "g"])
    assert found.strengths == {} and found.targets == ((Site.parse("img_2"), 7),)


def test_the_strongest_path_is_the_product_of_shares_along_the_best_way() -> None:
    graph = fed(
        [("feature_L0_txt_p1_f9", TARGET, -1.0), ("feature_L1_img_p0_f4", TARGET, 3.0),
         ("feature_L0_txt_p1_f9", "feature_L1_img_p0_f4", 1.0), ("error_L0_img_p0", "feature_L1_img_p0_f4", 1.0)]
    )  # fmt: skip
    found = dict(zip(graph.names, strongest_paths(graph).tolist(), strict=True))
    assert found[TARGET] == 1 and found["feature_L1_img_p0_f4"] == 0.75
    assert found["feature_L0_txt_p1_f9"] == 0.375  # 3/4 * 1/2, more than 1/4 directly


def test_what_all_values_have_in_common_belongs_to_no_circuit() -> None:
    graphs = {
        "red": [member({(TXT, 1): 0.2, (TXT, 2): 0.5, (IMG, 3): 0.3}), member({(TXT, 1): 0.4, (TXT, 2): 0.5})],
        "green": [member({(TXT, 2): 0.5, (TXT, 8): 0.9})],
    }
    assert [str(source) for source in ranked_sources(graphs, "red", "txt")] == ["txt_0:1"]
    assert [str(source) for source in ranked_sources(graphs, "red", "both")] == ["txt_0:1", "img_1:3"]
    (best, *_) = ranked_sources(graphs, "red", "txt")
    assert best.share == pytest.approx(0.3) and (best.elsewhere, best.graphs) == (0.0, 2)
    assert [str(source) for source in ranked_sources(graphs, "green", "txt")] == ["txt_0:8"]


def test_paths_rank_by_path_and_suppressors_are_what_inhibits() -> None:
    graphs = {"red": [member({(TXT, 1): 0.1, (IMG, 2): 0.3, (IMG, 9): -0.4}, paths={(TXT, 1): 0.6, (IMG, 2): 0.2})]}
    assert [source.key for source in ranked_sources(graphs, "red", "path")] == [(TXT, 1), (IMG, 2)]
    assert [source.key for source in case_studies.suppressors(graphs, "red")] == [(IMG, 9)]


def test_what_inhibits_the_target_is_no_source_however_strong_its_path() -> None:
    graphs = {
        "red": [member({(TXT, 1): 0.1, (IMG, 2): -0.3, (IMG, 3): -0.1}, paths={(TXT, 1): 0.2, (IMG, 2): 0.6})],
        "green": [member({(IMG, 3): -0.9}, paths={})],
    }
    assert [source.key for source in ranked_sources(graphs, "red", "path")] == [(TXT, 1)]
    assert [source.key for source in ranked_sources(graphs, "red", "both")] == [
        (TXT, 1)
    ]  # img_1:3 inhibits red less than green


def test_a_value_without_graphs_or_sources_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no graph of blue: there are graphs of red"):
        mean_strengths({"red": [member({})]}, "blue")
    with pytest.raises(UsageError, match="the 1 graph of red have no source by img"):
        ranked_sources({"red": [member({(TXT, 1): 0.5})]}, "red", "img")


def test_graphs_of_other_dictionaries_are_refused() -> None:
    with pytest.raises(MismatchError, match="made with another dictionary of img_2: abc…, --dictionaries has xyz…"):
        check_dictionaries([member({})], {"img_2": "xyz"})
    check_dictionaries([member({})], {"img_2": "abc"})


def test_a_graph_that_does_not_say_what_it_is_of_is_refused(tmp_path: Path) -> None:
    graph = fed([("feature_L0_txt_p1_f9", TARGET, 1.0)])
    del graph.facts["targets"]
    graph.write(tmp_path / "g")
    with pytest.raises(ForeignError, match="does not say what it is of"):
        read_members([tmp_path / "g"])


def test_contrast_equals_its_definition_and_a_silent_feature_has_none() -> None:
    scores = np.asarray([[4.0, 0, 1], [6.0, 0, 1], [1.0, 0, 1], [3.0, 0, 1]])
    found = _contrast(scores, np.asarray([True, True, False, False]))
    assert found[0] == pytest.approx((5 - 2) / (1 + 0.05 * 6))
    assert found[1] == 0 and found[2] == 0


def judged(changed: list[bool], shape: list[bool], position: list[bool], **facts: Any) -> pa.Table:
    """The table of one value and arm."""
    given = {"value": "red", "arm": "circuit", "own_strength": False, "strength": 3.0, "features": 6} | facts
    rows = [
        given
        | {"image": place, "prompt": "p", "seed": place, "asked": True, "changed": one, "lost": False}
        | {f"kept_{name}": True for name in ("background", "count", "colour", "size")}
        | {"kept_shape": two, "kept_position": three}
        | {name: ["x"] for name in VERDICTS.names if name.startswith(("plain_", "read_"))}
        for place, (one, two, three) in enumerate(zip(changed, shape, position, strict=True))
    ]
    return pa.Table.from_pylist(rows, PICTURES)


def test_a_clean_change_changes_the_colour_and_neither_shape_nor_position() -> None:
    found = measured(judged([True, True, True, False], [True, False, True, True], [True, True, False, True]), "colour")
    assert found["changed"] == Rate(3, 4) and found["kept_shape"] == Rate(3, 4) and found["clean"] == Rate(1, 4)


def tried(**clean: int) -> dict[float, dict[str, Rate]]:
    """Clean changes of ten by strength, all of them changed: s3=4."""
    return {float(s[1:]): {"changed": Rate(10, 10), "clean": Rate(count, 10)} for s, count in clean.items()}


def test_the_own_strength_is_the_one_with_most_clean_changes() -> None:
    assert best_strength(tried(s3=4, s10=6, s30=2)) == 10
    assert best_strength(tried(s10=5, s3=5)) == 3  # of equals the smallest


def test_a_best_strength_at_an_end_of_those_tried_is_said() -> None:
    edges = {
        "mid": tried(s3=4, s10=6, s30=2),
        "low": tried(s3=4, s10=1),
        "high": tried(s3=1, s10=4),
        "no": tried(s3=0, s10=0),
    }
    assert {name: edge_of(each) for name, each in edges.items()} == {
        "mid": None, "low": "least", "high": "greatest", "no": "none"
    }  # fmt: skip
    about = {
        "value": "red",
        "own_strengths": {arm: {"strength": best_strength(each), "edge": edge_of(each)} for arm, each in edges.items()},
    }
    said = edges_said([about])
    assert said == [
        "no strength of --own-strengths changed a tuning picture cleanly: red no (3)",
        "best at the least of --own-strengths, a smaller one may do better: red low (3)",
        "best at the greatest of --own-strengths, a greater one may do better: red high (10)",
    ]


def test_every_arm_is_tried_at_the_same_strengths_by_default() -> None:
    settings = asked()
    assert settings.own_arms == settings.chosen_arms
    ratios = np.asarray(settings.sweep[1:]) / np.asarray(settings.sweep[:-1])
    assert len(ratios) == 10 and ratios.min() > 1.2 and ratios.max() < 1.6  # no gap in which an arm's best could lie


def test_rates_are_told_by_value_and_over_all_and_the_best_arm_is_named() -> None:
    tables = [
        pa.concat_tables([judged([True, True], [True, True], [True, True], value=value), judged([False, True], [True, True], [True, True],
                          value=value, arm="single", features=1)])
        for value in ("red", "green")
    ]  # fmt: skip
    table = rates_table(tables, "colour")
    assert dict.fromkeys(table["value"].to_pylist()).keys() == {"red", "green", ALL}
    lines = lines_of(table, "colour")
    assert lines[0][:6] == ["colour", "intervened on", "features", "strength", "pictures", "changed"]
    assert lines[-1][:6] == [ALL, "single", "1", "3", "4", "50 %"]
    assert verdict_of(table, "colour") == (
        "circuit leads, with overlapping 95 % intervals: 100 % of 4 pictures have another colour and the same shape and position; "
        "single 50 %"
    )
    assert goals_of(table, "colour") == (
        "changed in 70 % or more of the pictures, with shape and position each kept in 80 % or more: circuit 2 of 2 values, "
        "single 0 of 2 values"
    )
    many, none = [True] * 20, [False] * 20
    sure = rates_table([judged(many, many, many), judged(none, many, many, arm="single")], "colour")
    assert verdict_of(sure, "colour").startswith("circuit wins: 100 % of 20 pictures ")
    equal = rates_table([judged([True], [True], [True], arm=arm) for arm in ("circuit", "single")], "colour")
    assert verdict_of(equal, "colour").startswith("circuit and single do equally well: 100 % of 1 picture ")


def asked(**changes: Any) -> GuidedSettings:
    places: dict[str, Any] = {name: Path(name) for name in ("dictionaries", "analysis", "out")}
    return GuidedSettings(**{"store": "s", "graphs": (Path("g"),), **places, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attribute": "mood"}, "--attribute 'mood' is not one of colour"),
        ({"values": "red,crimson"}, "there is no colour 'crimson'"),
        ({"arms": "circuit,magic"}, "--arms: there is no arm 'magic'; there are circuit, target"),
        ({"top": 0}, "--top is 0: give at least 1"),
        ({"strength": float("nan")}, "--strength is nan: give a finite number"),
        ({"own_strengths": "3,nan"}, "write finite numbers such as 3,10,30, or none"),
        ({"own": "nonsense", "own_strengths": "none"}, "--own: there is no arm 'nonsense'"),
        ({"own_strengths": "strong"}, "write finite numbers such as 3,10,30, or none"),
        ({"by": "supernode"}, "give both or neither"),
        ({"supernode": ("red=img_3:66",)}, "give both or neither"),
        ({"by": "supernode", "values": "red", "supernode": ("red=",)}, "'' is no feature"),
        ({"by": "supernode", "values": "red", "supernode": ("blue=img_3:66",)}, "each value of --values"),
        ({"by": "supernode", "values": "red,blue", "supernode": ("blue=img_3:66",)}, "names no circuit of red"),
        ({"tokens": "most"}, "chooses no tokens"),
    ],
)
def test_bad_settings_are_refused_with_the_flag_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked(**changes)
    assert said in str(caught.value)


def test_a_supernode_names_the_circuit_by_hand() -> None:
    settings = asked(by="supernode", values="red", supernode=("red=txt_0:9+img_1:4+txt_0:9",))
    assert settings.supernodes == {"red": ((TXT, 9), (IMG, 4))}
    assert asked(mode="zero").sweep == () and asked(own="single", arms="circuit").own_arms == ()


def test_recipes_of_the_case_studies_hold_what_they_compare() -> None:
    alone, context, both = case_studies.colour_prior([(IMG, 4)], [(TXT, 9)])
    assert {edit.site for edit in both.edits} == {IMG, TXT} and len(alone.edits) == len(context.edits) == 1
    assert [each.name for each in case_studies.suppressor([(IMG, 4)])] == [
        "suppressor off",
        "suppressor x 2",
        "suppressor x 4",
    ]
    steps = [each.off[0].steps for each in case_studies.stepwise("txt", (0, 1), 3)]
    assert steps == [(0,), (1,), (2,), (0, 1, 2), (1, 2)]
    assert [len(each.edits) for each in case_studies.concept_and_context([(IMG, 4)], [(TXT, 9)])] == [1, 1, 2]


def test_stream_shares_are_means_over_the_graphs_of_a_step() -> None:
    graphs = [
        member({(TXT, 1): 0.3, (IMG, 2): -0.1}, 0),
        member({(TXT, 1): 1.0}, 0),
        member({(IMG, 2): 2.0}, 1),
        member({}, 2),
    ]
    found = case_studies.stream_shares(graphs)
    assert found == {0: {"img": pytest.approx(0.125), "txt": pytest.approx(0.875)}, 1: {"img": 1.0, "txt": 0.0}}
