"""`analyze graphs`: edges that recur over prompts, and the graphs of one image over its steps."""

import io
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from analyze.circuits import command as graph_command
from analyze.circuits import gathering
from analyze.circuits.exchange import difract
from analyze.circuits.finished import read_finished
from analyze.circuits.gathering import GraphsSettings, Together, run
from analyze.circuits.graph import Graph
from analyze.circuits.panels import Panel, draw_panels, layout
from analyze.circuits.settings import GraphSettings
from store.errors import ForeignError, MismatchError, StoreError, UsageError
from store.layout import runs_folder
from tests.circuit_graphs import Edge, aggregated, graph_of
from train.claim import claimed

TARGET = "feature_L2_img_p4_f7"
PROMPTS = ("a red circle", "A red  circle", "a blue square")
"""of the images; the first two are one prompt, case and spaces aside"""


def edges_of(image: int, step: int) -> list[Edge]:
    """Some edges recur everywhere, one with either sign, one in a single image, one from step 1 on."""
    edges = [
        ("feature_L1_img_p4_f1", TARGET, 0.5 + 0.1 * image),
        ("feature_L1_txt_p1_f2", TARGET, 0.25 if image else -0.25),
        ("input_L0_img_p4", "feature_L1_img_p4_f1", 1.0 + step),
        ("input_L0_txt_p1", "feature_L1_txt_p1_f2", 1.0),
        ("bias_L2_img_encoder", TARGET, 0.5),
    ]
    edges += [("feature_L0_img_p5_f9", TARGET, 0.125)] if image == 2 else []
    edges += [("feature_L0_img_p5_f3", "feature_L1_img_p4_f1", -0.75)] if step else []
    return edges


def write(folder: Path, image: int, step: int, **facts: Any) -> None:
    """A finished graph."""
    of: Mapping[str, Any] = {
        "image": image, "step": step, "prompt": PROMPTS[image], "seed": image, "sigma": 1.0 - step / 2, "grid": [2, 3],
        "targets": [{"name": TARGET, "site": "img_2", "token": 4, "feature": 7}], "transcoders": {"img_2": {"identity": "abc"}},
    }  # fmt: skip
    graph = graph_of(edges_of(image, step), [TARGET], of | facts, {TARGET: 1.0})
    aggregated(graph).write(folder / "aggregated")
    graph.write(folder)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of three images at two steps, as `graph --targets` leaves them; never written to but for `together`."""
    root = tmp_path_factory.mktemp("many") / "G"
    for image in range(3):
        for step in range(2):
            write(root / "graphs" / f"image-{image:05d}.step-{step}.img_2.p4.f7", image, step)
    return root


@pytest.fixture(scope="module")
def together(graphs: Path) -> Together:
    return run(GraphsSettings(graphs=(graphs,)))


def tables(*graphs: Path, out: Path, **options: Any) -> Together:
    """The tables alone."""
    return run(GraphsSettings(graphs=graphs, out=out, pictures=False, **options))


def test_edges_recur_over_graphs_images_and_prompts_as_a_plain_count_says(graphs: Path, together: Together) -> None:
    values: dict[tuple[str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    fed: dict[str, set[tuple[int, int]]] = defaultdict(set)
    into: dict[tuple[str, int, int], float] = defaultdict(float)
    for image in range(3):
        for step in range(2):
            for source, target, value in edges_of(image, step):
                short = tuple(
                    "_".join(w for w in name.split("_") if not w.startswith("p")) for name in (source, target)
                )
                pair = (short[0].replace("input_L0_", "input_"), short[1])
                values[pair][image, step] = value
                fed[pair[1]].add((image, step))
                into[pair[1], image, step] += abs(value)
    expected = {pair: where for pair, where in values.items() if len(where) >= 2}
    rows = {(row["source"], row["target"]): row for row in together.edges.to_pylist()}
    assert set(rows) == set(expected)
    for pair, where in expected.items():
        row, found = rows[pair], list(where.values())
        assert (row["graphs"], row["of_graphs"]) == (len(where), len(fed[pair[1]])), pair
        assert row["images"] == len({image for image, _ in where})
        assert row["prompts"] == len({PROMPTS[image].lower().replace("  ", " ") for image, _ in where})
        assert row["steps"] == sorted({step for _, step in where})
        assert row["mean"] == pytest.approx(statistics.fmean(found))
        assert row["deviation"] == pytest.approx(statistics.pstdev(found), abs=1e-12)
        assert (row["least"], row["most"]) == (pytest.approx(min(found)), pytest.approx(max(found)))
        assert row["share"] == pytest.approx(statistics.fmean(abs(v) / into[pair[1], *at] for at, v in where.items()))
    either = rows["feature_L1_txt_f2", "feature_L2_img_f7"]
    assert either["same_sign"] == pytest.approx(4 / 6), "four of six graphs have the sign of most"


def test_most_prompts_come_first_and_what_stands_in_too_few_is_left_out(
    together: Together, graphs: Path, tmp_path: Path
) -> None:
    rows = tables(graphs, out=tmp_path / "a", min_prompts=2).edges.to_pylist()
    assert [row["prompts"] for row in rows] == sorted((row["prompts"] for row in rows), reverse=True)
    assert all(row["prompts"] >= 2 for row in rows)
    assert "feature_L0_img_f9" not in {row["source"] for row in rows}, "it stands in one image"
    assert "feature_L0_img_f9" in {row["source"] for row in together.edges.to_pylist()}
    assert len(tables(graphs, out=tmp_path / "b", min_graphs=7).edges) == 0


def test_nodes_recur_with_their_mean_influence_and_effect(graphs: Path, together: Together) -> None:
    row = next(row for row in together.nodes.to_pylist() if row["name"] == "feature_L1_img_f1")
    of = [read_finished(folder.parent).graph for folder in sorted(graphs.glob("graphs/*/facts.json"))]
    nodes = [next(n for n in graph.nodes.to_pylist() if n["name"] == "feature_L1_img_f1") for graph in of]
    assert row["graphs"] == row["of_graphs"] == 6
    assert row["influence"] == pytest.approx(statistics.fmean(node["influence"] for node in nodes))
    assert row["mean"] == pytest.approx(statistics.fmean(node["effect"] for node in nodes))


def test_graphs_of_one_image_lie_side_by_side_over_its_steps(together: Together, graphs: Path) -> None:
    rows = together.over_steps.to_pylist()
    assert {row["name"] for row in rows} == {f"image-{image:05d}.feature_L2_img_f7" for image in range(3)}
    late = [row for row in rows if row["node"] == "feature_L0_img_f3"]
    assert [(row["image"], row["step"], row["at_steps"]) for row in late] == [(image, 1, 1) for image in range(3)]
    always = [row for row in rows if row["node"] == "input_img" and row["image"] == 1]
    assert [(row["step"], row["at_steps"]) for row in always] == [(0, 2), (1, 2)]
    edges = together.edges_over_steps.to_pylist()
    fed = {row["step"]: row for row in edges if row["source"] == "input_img" and row["image"] == 0}
    assert [fed[step]["attribution"] for step in (0, 1)] == [1.0, 2.0]
    assert [fed[step]["share"] for step in (0, 1)] == [pytest.approx(1.0), pytest.approx(2.0 / 2.75)]
    names = [path.relative_to(graphs / "together").as_posix() for path in together.pictures]
    assert names == [*(f"over_steps/image-{image:05d}.feature_L2_img_f7.png" for image in range(3)), "recurring.png"]
    assert all(Image.open(io.BytesIO(path.read_bytes())).width > 500 for path in together.pictures)


def test_a_target_that_moves_between_steps_is_one_and_two_tokens_of_one_step_are_two(tmp_path: Path) -> None:
    for step, token in ((0, 4), (1, 5)):
        name = TARGET.replace("p4", f"p{token}")
        targets = [{"name": name, "site": "img_2", "token": token, "feature": 7}]
        write(tmp_path / "G" / "graphs" / f"{step}", 0, step, targets=targets)
    names = set(tables(tmp_path / "G", out=tmp_path / "a").over_steps["name"].to_pylist())
    assert names == {"image-00000.feature_L2_img_f7"}
    write(tmp_path / "G" / "graphs" / "more", 0, 1)
    names = set(tables(tmp_path / "G", out=tmp_path / "b").over_steps["name"].to_pylist())
    assert names == {"image-00000.feature_L2_img_p4_f7"}, "token 5 has one step alone"


def test_tables_on_the_disk_are_those_returned_and_equal_runs_write_equal_bytes(
    together: Together, graphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run(
        GraphsSettings(graphs=(graphs / "graphs" / "image-00000.step-0.img_2.p4.f7", graphs), out=tmp_path / "again")
    )
    for name, table in (
        ("recurring", together.edges),
        ("recurring_nodes", together.nodes),
        ("over_steps", together.over_steps),
    ):
        assert pq.read_table(graphs / "together" / f"{name}.parquet").equals(table)
    first, second = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (graphs / "together", tmp_path / "again")
    )
    assert first == second, "a folder given twice counts once"
    assert len(again.pictures) == 4
    said = capsys.readouterr().out
    assert "feature_L1_img_f1 -> feature_L2_img_f7" in said
    assert "bias_L2_img_encoder" not in said, "constants recur everywhere"
    assert "6 graphs of 3 images" in said


def test_a_single_graph_has_nothing_that_recurs_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "G", 0, 0)
    run(GraphsSettings(graphs=(tmp_path / "G",)))
    (tmp_path / "G" / "together" / "over_steps").mkdir(parents=True)
    (tmp_path / "G" / "together" / "over_steps" / "image-00009.feature_L2_img_f7.png").touch()
    made = run(GraphsSettings(graphs=(tmp_path / "G",)))
    assert len(made.edges) == len(made.over_steps) == 0 and made.pictures == ()
    assert not list((tmp_path / "G" / "together").rglob("*.png")), "pictures of an earlier run are gone"
    assert "no edge recurs over 1 graph" in capsys.readouterr().out


def supernode(name: str, *members: tuple[int, int], weight: float = 1.0) -> dict[str, Any]:
    """A target of some features of img_2, each at a token."""
    of = [{"site": "img_2", "token": token, "feature": feature, "weight": weight} for token, feature in members]
    return {"name": f"supernode_{name}", "members": of}


def test_targets_whose_names_differ_in_a_point_have_a_picture_each(tmp_path: Path) -> None:
    for step in range(2):
        for name in ("red.x", "red-x"):
            write(tmp_path / "G" / f"graphs/{name}.{step}", 0, step, targets=[supernode(name, (4, 7))])
    made = tables(tmp_path / "G", out=tmp_path / "o")
    assert set(made.over_steps["name"].to_pylist()) == {f"image-00000.supernode_red{mark}x" for mark in ".-"}


def test_many_targets_have_a_name_that_a_file_may_have_and_tables_come_before_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in (15, 99):
        targets = [{"name": f"feature_L2_img_p4_f{number}", "token": 4} for number in [*range(15), last]]
        for step in range(2):
            write(tmp_path / "G" / f"graphs/{last}.{step}", 0, step, targets=targets)
    made = run(GraphsSettings(graphs=(tmp_path / "G",)))
    names = sorted(set(made.over_steps["name"].to_pylist()))
    assert len(names) == 2 and all(len(name) < 200 for name in names)
    assert all(name.startswith("image-00000.feature_L2_img_f0+feature_L2_img_f1+and-14.") for name in names)
    assert sorted(path.stem for path in made.pictures if path.parent.name == "over_steps") == names
    monkeypatch.setattr(gathering, "draw_panels", lambda *given: pytest.fail("no picture can be drawn"))
    with pytest.raises(pytest.fail.Exception):
        run(GraphsSettings(graphs=(tmp_path / "G",), out=tmp_path / "o"))
    assert pq.read_table(tmp_path / "o" / "over_steps.parquet").equals(made.over_steps)
    assert json.loads((tmp_path / "o" / "run.json").read_text())["finished"] is False
    monkeypatch.undo()
    run(GraphsSettings(graphs=(tmp_path / "G",), out=tmp_path / "o"))
    assert "finished" not in json.loads((tmp_path / "o" / "run.json").read_text())


def test_supernodes_of_one_name_are_of_the_same_features_wherever_their_tokens_lie(tmp_path: Path) -> None:
    for step, token in ((0, 4), (1, 5)):
        write(tmp_path / "G" / f"graphs/{step}", 0, step, targets=[supernode("red", (token, 7), (token + 1, 8))])
    assert len(tables(tmp_path / "G", out=tmp_path / "o").over_steps)
    for other in (supernode("red", (4, 7), (5, 9)), supernode("red", (4, 7), (5, 8), weight=0.5)):
        write(tmp_path / "H", 1, 0, targets=[other])
        with pytest.raises(MismatchError, match=r"call different features supernode_red: .*img_2:7"):
            tables(tmp_path / "G", tmp_path / "H", out=tmp_path / "o")


def test_a_second_look_at_one_place_at_the_same_time_is_refused(graphs: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "o", runs_folder(tmp_path / "o")), pytest.raises(StoreError, match="another process looks"):
        tables(graphs, out=tmp_path / "o")


def test_graphs_of_different_dictionaries_and_folders_without_graphs_are_refused(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no graphs"):
        run(GraphsSettings(graphs=(tmp_path / "nothing",)))
    write(tmp_path / "H", 0, 0, transcoders={"img_2": {"identity": "other"}})
    with pytest.raises(MismatchError, match="different dictionaries of img_2"):
        run(GraphsSettings(graphs=(graphs, tmp_path / "H")))
    for wrong in ({"min_graphs": 0}, {"min_prompts": 0}, {"best": 0}, {"drawn": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            GraphsSettings(graphs=(graphs,), **wrong)


def test_one_graph_from_two_places_is_refused_with_both(graphs: Path, tmp_path: Path) -> None:
    write(tmp_path / "H", 0, 0)
    with pytest.raises(UsageError, match=r"image-00000\.step-0\S* and \S*H explain the same: .* would count twice"):
        run(GraphsSettings(graphs=(graphs, tmp_path / "H"), out=tmp_path / "o"))
    write(tmp_path / "H", 0, 0, store="sha256-another")
    made = tables(graphs, tmp_path / "H", out=tmp_path / "o")
    assert max(made.edges["images"].to_pylist()) == 4, "image 0 of another store is another image"


def test_a_folder_of_something_else_is_not_written_into_and_nothing_there_is_removed(
    graphs: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / "over_steps" / "image-1.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(UsageError, match="is not empty and holds no graphs together"):
        tables(graphs, out=tmp_path / "mine")
    assert mine.exists()
    (tmp_path / "mine" / "run.json").write_text('{"format": "granary graphs", "version": 1}')
    with pytest.raises(ForeignError, match="not the record of graphs together"):
        tables(graphs, out=tmp_path / "mine")


def test_an_edge_that_excites_is_orange_and_one_that_suppresses_blue_as_on_the_page() -> None:
    nodes = {TARGET: 1.0, "feature_L1_img_f1": 0.5}
    for sign, more, less in ((1.0, 0, 2), (-1.0, 2, 0)):
        panel = Panel("a", nodes, [("feature_L1_img_f1", TARGET, sign)], frozenset({TARGET}))
        picture = np.asarray(Image.open(io.BytesIO(draw_panels([panel], "", 5))).convert("RGB")).astype(int)
        drawn = picture[: picture.shape[0] * 4 // 5]  # the legend has both
        assert (drawn[..., more] - drawn[..., less] > 100).any()
        assert not (drawn[..., less] - drawn[..., more] > 100).any()


def test_a_node_stands_at_one_place_in_all_panels_and_the_most_influential_are_drawn() -> None:
    names = [
        f"feature_L{layer}_{stream}_f{number}" for layer in range(3) for stream in ("img", "txt") for number in range(8)
    ]
    rng = np.random.default_rng(0)
    panels = [
        Panel(
            f"step {step}",
            {name: float(rng.random()) for name in names if rng.random() < 0.7},
            [],
            frozenset({names[0]}),
        )
        for step in range(3)
    ]
    plan = layout(panels, 10)
    best = {name: max(panel.nodes.get(name, 0.0) for panel in panels) for name in names}
    assert set(plan.places) == {
        names[0],
        *sorted((n for n in names if n != names[0]), key=lambda name: -best[name])[:10],
    }
    assert len(set(plan.places.values())) == 11, "two nodes at one place"
    for name, (x, y) in plan.places.items():
        assert (x < 0) == ("txt" in name) and -plan.text <= x <= 1 - plan.text
        assert round(y) == int(name.split("_L")[1][0])
    picture = draw_panels(panels, "title", 10)
    assert picture == draw_panels(panels, "title", 10)
    assert Image.open(io.BytesIO(picture)).format == "PNG"


def test_what_the_command_graph_makes_is_exported_and_looked_at_together(traced_flux: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {
        "store": traced_flux / "store",
        "dictionaries": traced_flux / "dictionaries",
        "out": tmp_path / "g",
    }
    asked: dict[str, Any] = {"image": "all", "step": "all", "target": ("img_2:max:3",), "skip_inactive": True}
    made = graph_command.run(
        GraphSettings(**places, **asked, nodes=3, batch=2, page=False, export="circuit-tracer,graphml")
    )
    folders = [each.folder for each in made.made if each.folder is not None]
    assert len(folders) >= 2
    for folder in folders:
        said = json.loads((tmp_path / "g" / "circuit-tracer" / f"{folder.name}.json").read_text())
        assert said["metadata"]["slug"] == folder.name, "it is called as its folder is"
        assert {"const", "img", "txt"} >= {token.split()[0] for token in said["metadata"]["prompt_tokens"]}
        assert nx.read_graphml(folder / "graph.graphml").number_of_edges() == len(Graph.read(folder).edges)
        assert difract.read(folder / "graph.json").facts["step"] == Graph.read(folder).facts["step"]
    listed = json.loads((tmp_path / "g" / "circuit-tracer" / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == sorted(folder.name for folder in folders), "one list for all"
    together = tables(tmp_path / "g", out=tmp_path / "together")
    assert set(together.edges["target"].to_pylist()) >= {"feature_L2_img_f3"}
    assert together.edges["graphs"].to_pylist()[0] >= 2
