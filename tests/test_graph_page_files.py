"""The files of the page of graphs: what they hold, what they are called, and which graphs are refused."""

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analyze.circuits.graph import Graph
from analyze.circuits.viewer.columns import edge_scores, view_columns
from analyze.circuits.viewer.pages import graphs_in, write_pages
from analyze.labels.book import LabelBook
from analyze.report import building as report
from analyze.report.settings import ReportSettings
from store.errors import MismatchError, UsageError
from store.labels import Label
from tests.graph_pages import Fixture, script_value
from tests.synthetic_graphs import graph_of, random_graph, write_graphs


@pytest.fixture(scope="module")
def made(graph_pages: Fixture) -> Fixture:
    return graph_pages


def test_the_page_gets_the_strongest_edges_and_says_what_it_lacks() -> None:
    graph, _ = random_graph(60, 200)
    view = view_columns(graph, most=50)
    assert view["left_out"]["edges"] == 150
    score = edge_scores(graph)
    strongest = np.sort(np.abs(graph.attributions[np.argsort(-score, kind="stable")[:50]]))
    values = np.frombuffer(base64.b64decode(view["edges"]["attribution"]), "<f4")
    np.testing.assert_allclose(np.sort(np.abs(values)), strongest, rtol=1e-6)
    assert view["count"] == len(graph.nodes) - view["left_out"]["nodes"]
    assert np.frombuffer(base64.b64decode(view["target"]), "u1").sum() == 1


def test_equal_graphs_give_equal_pages_wherever_they_lie(tmp_path: Path) -> None:
    def pages_in(place: Path) -> dict[str, bytes]:
        write_graphs(place, random_graph(60, 200))
        write_pages([place], place)
        return {str(p.relative_to(place)): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}

    assert pages_in(tmp_path / "a") == pages_in(tmp_path / "b")
    assert pages_in(tmp_path / "a") == pages_in(tmp_path / "b")  # written again over itself


def test_every_graph_has_a_name_and_every_dictionary_too(tmp_path: Path) -> None:
    book = LabelBook(None, labels=[Label(7, "2026-01-01T00:00:00Z", "Ada", "red edges")])
    folders = []
    for number, name in enumerate(("red", "red-2", "red", "red")):
        identity = f"{number % 2}" * 64
        target = {"name": f"supernode_{name}", "site": None, "token": None, "feature": None}
        facts = {
            "image": 0, "step": 0, "grid": [1, 1], "targets": [target],
            "transcoders": {"img_0": {"name": "transcoder", "identity": identity}},
        }  # fmt: skip
        graph_of([("feature_L0_img_p0_f7", "feature_L1_img_p0_f3", 1.0)], facts, {}).write(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    write_pages(folders, tmp_path / "out", None, {"1" * 64: book})
    contents = script_value(tmp_path / "out" / "page" / "data" / "graphs.js")
    assert contents["pictures"]["without"] == "the page was made without the store"
    names = [entry["name"] for entry in contents["graphs"]]
    assert names == [f"image-00000.step-0.{name}" for name in ("red.0", "red-2", "red.2", "red.3")], (
        "of one name by folder"
    )
    assert all((tmp_path / "out" / "page" / "data" / "graphs" / f"{name}.js").is_file() for name in names)
    called = [entry["dictionaries"]["img_0"]["name"] for entry in contents["graphs"]]
    assert called == ["transcoder-00000000", "transcoder-11111111"] * 2
    labels = script_value(tmp_path / "out" / "page" / "data" / "labels.js")
    assert [label["text"] for label in labels[called[1]]] == ["red edges"]


def test_graphs_that_do_not_fit_leave_a_report_as_it_is(made: Fixture, tmp_path: Path) -> None:
    other = {"store": "sha256-0", "image": 0, "step": 0, "grid": [1, 1]}
    graph_of([("input_L0_img_p0", "feature_L1_img_p0_f3", 1.0)], other, {}).write(tmp_path / "g")
    before = {path: path.stat().st_mtime_ns for path in made.report.rglob("*")}
    for plan in (False, True):
        for place, error in ((tmp_path / "g", MismatchError), (tmp_path / "nothing", UsageError)):
            with pytest.raises(
                error, match="make the graphs from this one" if error is MismatchError else "holds no graph"
            ):
                report.run(ReportSettings(**made.inputs, graphs=(place,), plan=plan))
    assert {path: path.stat().st_mtime_ns for path in made.report.rglob("*")} == before


def test_graphs_of_another_store_are_refused(made: Fixture, tmp_path: Path) -> None:
    other = graph_of(
        [("input_L0_img_p0", "feature_L1_img_p0_f3", 1.0)],
        {"store": "sha256-0", "image": 0, "step": 0, "grid": [1, 1]},
        {},
    )
    other.write(tmp_path / "g")
    with pytest.raises(MismatchError, match="is of store sha256-0"):
        write_pages([tmp_path / "g"], tmp_path / "out", made.store)


def test_a_folder_that_is_given_twice_stands_once(tmp_path: Path) -> None:
    write_graphs(tmp_path / "g", random_graph(60, 200))
    (tmp_path / "link").symlink_to(tmp_path / "g")
    assert graphs_in([tmp_path / "g", tmp_path / "link", tmp_path / "g" / ".." / "g"]) == [tmp_path / "g"]


def test_nodes_without_an_edge_are_counted_where_no_edge_is_left_out() -> None:
    graph = graph_of([("feature_L0_img_p0_f7", "feature_L1_img_p0_f3", 1.0)], {}, {})
    rows = [
        *graph.nodes.to_pylist(),
        graph.nodes.to_pylist()[0] | {"name": "feature_L0_img_p0_f8", "feature": 8, "target": False},
    ]
    with_one = Graph(pa.Table.from_pylist(rows, schema=graph.nodes.schema), graph.edges, {})
    assert view_columns(with_one)["left_out"] == {"nodes": 1, "edges": 0}
