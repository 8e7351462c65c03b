"""Ranking, compaction, aggregation, pruning and influence agree with DifFRACT's graph and with plain dense mathematics."""

import json
import tracemalloc
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analyze.circuits.aggregation import aggregate
from analyze.circuits.compaction import Edges, compact, edge_table
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.influence import effect, influence, shares, with_influence
from analyze.circuits.nodes import Node
from analyze.circuits.pruning import prune
from analyze.circuits.ranking import Explored, best, flow, scores
from analyze.circuits.sources import decode, encode
from store.errors import ForeignError, NonFiniteError, UsageError
from tests.small_graphs import Edge, graph_of, named_edges, reference_form, without_token

GOLDEN = json.loads((Path(__file__).parent / "golden" / "circuit_a" / "golden_graph.json").read_text())
TARGET = "feature_L3_img_p12_f66"
FIRST_REST = 2536
"""edges of DifFRACT's list from here on are sums of unexpanded features under the name of an error"""


@pytest.fixture(scope="module")
def golden() -> Graph:
    """DifFRACT's graph per token, with what it sums of unexpanded features told apart from errors."""
    edges: list[Edge] = [
        (source.replace("error", "rest") if at >= FIRST_REST else source, target, value)
        for at, (source, target, value) in enumerate(GOLDEN["edges"])
    ]
    return graph_of(edges, TARGET)


def dense(graph: Graph, drop: tuple[str, ...] = ()) -> np.ndarray:
    """|a| from row to column, without the nodes of these kinds."""
    matrix = np.zeros((len(graph.nodes), len(graph.nodes)))
    matrix[graph.sources, graph.targets] = np.abs(graph.attributions)
    matrix[np.isin(graph.nodes["kind"].to_pylist(), drop)] = 0
    return matrix


def all_powers(matrix: np.ndarray) -> np.ndarray:
    """The sum of all powers, the zeroth among them."""
    return np.linalg.inv(np.eye(len(matrix)) - matrix)


# --- DifFRACT's own graph -----------------------------------------------------------------------------------------


def test_the_golden_graph_pruned_has_the_nodes_and_the_edges_of_difract(golden: Graph) -> None:
    pruned = prune(aggregate(golden), 0.8, 0.98)
    theirs = GOLDEN["pruned"]
    assert {name.replace("rest", "error") for name in pruned.names} - {"dropped"} == {
        node["id"] for node in theirs["nodes"]
    }
    ours = sorted(
        (source.replace("rest", "error"), target, value)
        for (source, target), value in named_edges(pruned).items()
        if source != "dropped"
    )
    edges = sorted((edge["src"], edge["tgt"], edge["attribution"]) for edge in theirs["edges"])
    assert [edge[:2] for edge in ours] == [edge[:2] for edge in edges]
    np.testing.assert_allclose([edge[2] for edge in ours], [edge[2] for edge in edges], atol=1e-6)


def test_the_golden_graph_summed_over_tokens_has_their_edges_and_the_tokens_of_its_nodes(golden: Graph) -> None:
    found = aggregate(golden)
    summed: dict[tuple[str, str], float] = defaultdict(float)
    for (source, target), value in named_edges(golden).items():
        summed[without_token(source), without_token(target)] += value
    assert named_edges(found) == pytest.approx(dict(summed), abs=1e-12)
    assert len(found.edges) == GOLDEN["metrics"]["agg_num_edges"]
    row = dict(zip(found.names, found.nodes.to_pylist(), strict=True))
    assert row["feature_L3_img_f66"]["map_token"] == [12]
    assert row["input_txt"]["map_token"] == list(range(16))
    assert aggregate(found).nodes.drop_columns(["influence"]) == found.nodes.drop_columns(["influence"])
    assert aggregate(found).edges == found.edges


@pytest.mark.parametrize(
    "name",
    [
        "feature_L3_img_p12_f66", "error_L10_txt_p0", "input_L0_img_p12", "input_L0_txt_p120", "rest_L2_img_p1", "dropped",
        "bias_L2_img_shift-mlp", "supernode_a_p1_f2",
    ],
)  # fmt: skip
def test_an_aggregated_node_is_called_what_its_node_says(name: str) -> None:
    graph = graph_of([(name, "feature_L4_img_p1_f2", 1.0)], "feature_L4_img_p1_f2")
    assert aggregate(graph).names == ["feature_L4_img_f2", Node.parse(name).aggregated.name]


def test_the_rule_of_difract_expands_what_it_expanded(golden: Graph) -> None:
    """Of its 40 expanded nodes the first ten after the target follow from the target's edges alone."""
    order = list(dict.fromkeys(target for _, target, _ in GOLDEN["edges"]))
    candidates = sorted({source for source, _, _ in GOLDEN["edges"] if source.startswith("feature")})
    direct = {source: value for source, target, value in GOLDEN["edges"] if target == TARGET}
    value = np.asarray([direct.get(name, 0.0) for name in candidates])
    explored = Explored(
        np.arange(len(candidates), dtype=np.int32), np.zeros(len(candidates), dtype=np.int32), value,
        np.asarray([-1], dtype=np.int32), np.asarray([1.0]), np.asarray([1.0]),
    )  # fmt: skip
    chosen = best(scores(explored, "difract", len(candidates)), 10)
    assert [candidates[row] for row in chosen] == order[1:11]


def test_the_form_of_difract_calls_rests_errors_and_has_no_constants(golden: Graph) -> None:
    edges: list[Edge] = [(source, target, value) for (source, target), value in named_edges(golden).items()]
    more: list[Edge] = [
        ("bias_L3_img_encoder", TARGET, 1.0),
        ("dropped", TARGET, 0.5),
        ("rest_L0_txt_p99", TARGET, 0.25),
    ]
    found = named_edges(reference_form(graph_of([*edges, *more], TARGET)))
    wanted: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, value in [*GOLDEN["edges"], ["error_L0_txt_p99", TARGET, 0.25]]:
        wanted[source, target] += value
    assert found == pytest.approx(dict(wanted), abs=1e-12)


# --- influence, effect, shares ------------------------------------------------------------------------------------


def test_influence_is_the_sum_of_all_powers_of_the_normalised_matrix(golden: Graph) -> None:
    matrix = dense(golden)
    powers = all_powers(matrix / np.maximum(matrix.sum(axis=0), 1e-8))
    target = golden.names.index(TARGET)
    np.testing.assert_allclose(influence(golden), powers[:, target], rtol=1e-9, atol=1e-15)


def test_constants_dilute_nothing_and_have_their_share() -> None:
    edges: list[Edge] = [
        ("error_L0_img_p0", "feature_L1_img_p0_f1", 3.0),
        ("input_L0_img_p0", "feature_L1_img_p0_f1", -1.0),
    ]
    plain = graph_of(edges, "feature_L1_img_p0_f1")
    more = graph_of([*edges, ("bias_L1_img_encoder", "feature_L1_img_p0_f1", 4.0)], "feature_L1_img_p0_f1")
    np.testing.assert_allclose(influence(plain), [1, 0.75, 0.25])
    np.testing.assert_allclose(influence(more), [1, 0.75, 0.25, 0.5])


def test_targets_of_one_graph_share_an_influence_of_one() -> None:
    edges: list[Edge] = [
        ("feature_L0_img_p0_f0", "feature_L1_img_p0_f1", 1.0), ("error_L0_img_p0", "feature_L1_img_p0_f1", 1.0),
        ("feature_L1_img_p0_f1", "feature_L2_img_p0_f2", 1.0),
    ]  # fmt: skip
    graph = graph_of(edges, "feature_L2_img_p0_f2")
    both = graph.nodes.to_pylist()
    for row in both:
        row["target"] = row["name"] in ("feature_L1_img_p0_f1", "feature_L2_img_p0_f2")
    found = influence(Graph(pa.Table.from_pylist(both, schema=NODES), graph.edges, {}))
    by_name = dict(zip(graph.names, found.tolist(), strict=True))
    assert by_name["feature_L2_img_p0_f2"] == 0.5
    assert by_name["feature_L1_img_p0_f1"] == 0.5 + 0.5
    assert by_name["error_L0_img_p0"] == by_name["feature_L0_img_p0_f0"] == 0.5


def test_effect_is_what_the_target_loses_when_a_node_is_taken_away() -> None:
    edges: list[Edge] = [
        ("input_L0_img_p0", "feature_L0_img_p0_f0", 2.0), ("bias_L0_img_encoder", "feature_L0_img_p0_f0", -0.5),
        ("feature_L0_img_p0_f0", "feature_L1_img_p1_f1", -3.0), ("input_L0_img_p0", "feature_L1_img_p1_f1", 4.0),
        ("feature_L0_img_p0_f0", "feature_L2_img_p1_f2", 0.5), ("feature_L1_img_p1_f1", "feature_L2_img_p1_f2", 2.0),
        ("error_L1_img_p1", "feature_L2_img_p1_f2", 0.25), ("rest_L1_img_p1", "feature_L2_img_p1_f2", -0.5),
    ]  # fmt: skip
    graph = graph_of(edges, "feature_L2_img_p1_f2")
    pre = {target: sum(value for _, name, value in edges if name == target) for _, target, _ in edges}

    def without(gone: str) -> float:
        """The target's pre-activation when features pass on in proportion to what they are left with."""
        left: dict[str, float] = {}
        for target in sorted(pre):
            left[target] = sum(
                value * (left[source] / pre[source] if source in pre else 1.0)
                for source, name, value in edges
                if name == target and source != gone
            )
        return left["feature_L2_img_p1_f2"]

    for name, found in zip(graph.names, effect(graph).tolist(), strict=True):
        if name != "feature_L2_img_p1_f2":
            assert found == pytest.approx(pre["feature_L2_img_p1_f2"] - without(name), abs=1e-12), name
        else:
            assert found == pre[name]


def test_shares_sum_to_one_directly_and_along_all_paths(golden: Graph) -> None:
    found = shares(golden)
    for way in found.values():
        assert sum(way.values()) == pytest.approx(1.0)
    whole = sum(value for _, target, value in GOLDEN["edges"] if target == TARGET)
    img = sum(
        value for source, target, value in GOLDEN["edges"] if target == TARGET and source.startswith("input_L0_img")
    )
    assert found["direct"]["img"] == pytest.approx(img / whole)
    assert set(found["direct"]) == {"features", "img", "txt", "error", "bias", "rest", "dropped"}
    assert set(found["paths"]) == set(found["direct"]) - {"features"}


def test_edges_in_a_circle_are_refused() -> None:
    ends = np.asarray([0, 1]), np.asarray([1, 0])
    with pytest.raises(ForeignError, match="circle"):
        flow(*ends, np.ones(2), np.asarray([1.0, 0.0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_edges_that_are_no_numbers_are_not_taken_for_a_circle(value: float) -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        flow(np.asarray([1, 2]), np.asarray([0, 1]), np.asarray([value, 0.0]), np.asarray([1.0, 0.0, 0.0]))


# --- ranking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["difract", "influence"])
def test_scores_are_those_of_the_dense_rule(ranking: str) -> None:
    rng = np.random.default_rng(3)
    count, expanded = 30, np.asarray([-1, 17, 4, 9], dtype=np.int32)
    matrix = rng.normal(size=(count, 4)) * (rng.random((count, 4)) < 0.5)  # candidate -> expanded
    matrix[expanded[1:]] *= np.triu(np.ones((3, 4)), 0)[:, [0, 1, 2, 3]] * np.asarray(
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    )
    fed = np.abs(matrix).sum(axis=0) + rng.random(4)
    source, target = np.nonzero(matrix)
    start = np.asarray([1.0, 0, 0, 0])
    explored = Explored(source.astype(np.int32), target.astype(np.int32), matrix[source, target], expanded, fed, start)
    magnitude, inner = np.abs(matrix), np.zeros((4, 4))
    inner[1:] = magnitude[expanded[1:]]
    columns = np.maximum(inner.sum(axis=0), 1e-8) if ranking == "difract" else fed
    reach = all_powers(inner / columns)[:, 0]
    wanted = (magnitude if ranking == "difract" else magnitude / fed) @ reach
    wanted[expanded[1:]] = 0
    np.testing.assert_allclose(scores(explored, ranking, count), wanted, atol=1e-12)  # type: ignore[arg-type]


def test_the_best_come_by_falling_score_and_of_equals_the_first() -> None:
    score = np.asarray([0.0, 2.0, 1.0, 3.0, 1.0, 1.0, 0.0])
    assert best(score, 3).tolist() == [3, 1, 2]
    assert best(score, 4).tolist() == [3, 1, 2, 4]
    assert best(score, 20).tolist() == [3, 1, 2, 4, 5]
    assert best(score, 0).tolist() == []
    rng = np.random.default_rng(0)
    many = rng.integers(0, 50, 1000).astype(float)
    assert best(many, 100).tolist() == np.lexsort((np.arange(1000), -many))[:100].tolist()


# --- compaction and pruning ---------------------------------------------------------------------------------------


def test_codes_hold_what_was_put_in_and_keep_its_order() -> None:
    assert [part.tolist() for part in decode(encode("feature", 57, np.asarray([4095, 3]), 49151))] == [
        [1, 1], [57, 57], [4095, 3], [49151, 49151],
    ]  # fmt: skip
    codes = [
        encode("feature", 0, 1, 5),
        encode("feature", 0, 2, 0),
        encode("feature", 1),
        encode("error"),
        encode("rest"),
    ]
    ascending = [int(code) for code in codes]
    assert sorted(ascending) == ascending


def test_compaction_names_everything_anew_and_loses_nothing() -> None:
    rng = np.random.default_rng(1)
    count = 400
    tokens = rng.integers(0, 4, count)
    features = encode("feature", rng.integers(0, 3, count), tokens, rng.integers(0, 9, count))
    source = np.where(rng.random(count) < 0.8, features, encode("error", 1, tokens))
    edges = Edges(source, rng.integers(0, 5, count).astype(np.int32), rng.normal(size=count) * 0.1, rng.normal(size=5))
    asked = encode("supernode", feature=np.arange(5))
    expanded = np.concatenate([asked, np.unique(source)[::3]])
    whole = edges.dropped + np.bincount(edges.target, edges.value, minlength=5)
    for budget in (None, 20):
        found = compact(edges, expanded, 0.05, budget, len(asked))
        kinds = decode(found.source)[0]
        assert set(found.source[kinds == 1].tolist()) <= set(expanded.tolist())
        assert (kinds == 4).any()
        assert (np.abs(found.value) >= 0.05).all()
        pairs = list(zip(found.target.tolist(), found.source.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        np.testing.assert_allclose(found.dropped + np.bincount(found.target, found.value, minlength=5), whole)
    every = compact(edges, expanded, 0.0, None, len(asked))
    shares = [
        abs(value) / np.abs(every.value[every.target == end]).sum()
        for value, end in zip(every.value, every.target, strict=True)
    ]
    best = sorted((s for s, value in zip(shares, every.value, strict=True) if abs(value) >= 0.05), reverse=True)[:20]
    kept = {(source, end) for source, end in zip(found.source, found.target, strict=True)}
    own = [s for s, source, end in zip(shares, every.source, every.target, strict=True) if (source, end) in kept]
    assert sorted(own, reverse=True) == best


def test_a_budget_of_edges_leaves_the_target_its_strongest_whatever_the_size_of_those_below() -> None:
    """A feature of block 0 has edges a thousand times as large, and passes on a tenth of what the target gets."""
    target, below = (encode("feature", site, 0, 1)[None] for site in (2, 0))
    codes = np.concatenate([encode("feature", 1, np.arange(9), 7), below, encode("input", 0, np.arange(20))])
    ends = np.concatenate([np.zeros(10), np.ones(20)]).astype(np.int32)
    value = np.concatenate([np.full(9, 0.1), [0.1], np.linspace(100, 200, 20)])
    expanded = np.concatenate([target, below, encode("feature", 1, np.arange(9), 7)])
    found = compact(Edges(codes, ends, value, np.zeros(len(expanded))), expanded, 1e-4, 12)
    assert (found.target == 0).sum() == 10, "all its edges"
    assert found.value[found.target == 1].tolist() == value[-2:].tolist()


@pytest.mark.parametrize(("nodes", "edges"), [(0.5, 0.9), (1.0, 1.0), (0.8, 0.5)])
def test_a_pruned_graph_still_adds_up(golden: Graph, nodes: float, edges: float) -> None:
    whole = aggregate(golden)
    found = prune(whole, nodes, edges)
    pre = dict(zip(found.names, found.nodes["pre"].to_pylist(), strict=True))
    into: dict[str, float] = defaultdict(float)
    for (_, target), value in named_edges(found).items():
        into[target] += value
    assert into == pytest.approx({name: value for name, value in pre.items() if value is not None})
    if nodes == edges == 1:
        assert named_edges(found) == named_edges(whole)
        assert "dropped" not in found.names
    else:
        assert len(found.edges) < len(whole.edges)


def test_a_share_that_is_none_is_refused(golden: Graph) -> None:
    with pytest.raises(UsageError, match="share of nodes"):
        prune(golden, 0.0, 0.5)
    with pytest.raises(UsageError, match="share of edges"):
        prune(golden, 0.5, 1.5)


def test_fifty_thousand_nodes_need_no_dense_matrix() -> None:
    layers, wide, count = 19, 2640, 200_000
    rng = np.random.default_rng(0)
    total = layers * wide
    target = rng.integers(wide, total, count)
    source = (rng.random(count) * (target // wide * wide)).astype(np.int64)
    rows = np.arange(total)
    columns = {
        "name": pa.array([f"feature_L{row // wide}_img_p{row % 97}_f{row % wide}" for row in rows.tolist()]),
        "kind": pa.array(["feature"] * total), "layer": pa.array(rows // wide, pa.int32()),
        "stream": pa.array(["img"] * total), "token": pa.array(rows % 97, pa.int32()),
        "feature": pa.array(rows % wide // 4, pa.int32()), "activation": pa.array(np.ones(total)),
        "pre": pa.array(np.ones(total)), "target": pa.array(rows == total - 1),
    }  # fmt: skip
    nodes = pa.Table.from_arrays([columns.get(each.name, pa.nulls(total, each.type)) for each in NODES], schema=NODES)
    tracemalloc.start()
    graph = with_influence(Graph(nodes, edge_table(source, target, rng.normal(size=count)), {}))
    pruned = prune(aggregate(graph))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 100 < len(pruned.nodes) < total
    assert peak < total * total / 8  # bytes: even a bit for each pair would be 310 MB
