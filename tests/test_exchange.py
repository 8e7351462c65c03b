"""Graphs in the forms of other programs: what DifFRACT, circuit-tracer's frontend and networkx ask of them is there."""

import copy
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pytest

from analyze.circuits import exchange
from analyze.circuits.aggregation import aggregate
from analyze.circuits.exchange import circuit_tracer, difract, graphml
from analyze.circuits.graph import Graph
from store.errors import ForeignError, UsageError
from tests.circuit_graphs import aggregated, book, golden, graph_of

TARGET = "feature_L2_img_p4_f7"
FACTS = {
    "image": 3, "prompt": "a red circle", "seed": 5, "step": 2, "sigma": 0.5, "grid": [2, 3], "n_txt": 4, "n_img": 6, "model": "m",
    "targets": [{"name": TARGET, "site": "img_2", "token": 4, "feature": 7, "pre": 2.0, "activation": 2.0}],
    "transcoders": {f"{stream}_{layer}": {"identity": "x"} for stream in ("img", "txt") for layer in range(3)},
    "settings": {"nodes": 4, "min_attribution": 1e-4, "node_threshold": 0.8, "edge_threshold": 0.98},
}  # fmt: skip
EDGES = [
    ("feature_L1_img_p4_f7", TARGET, 0.5),
    ("feature_L1_txt_p1_f7", TARGET, -0.25),
    ("feature_L0_img_p5_f3", "feature_L1_img_p4_f7", 0.75),
    ("error_L1_img_p4", TARGET, 0.125),
    ("rest_L1_img_p4", TARGET, 0.375),
    ("rest_L0_txt_p1", "feature_L1_txt_p1_f7", 0.25),
    ("input_L0_img_p4", TARGET, 1.0),
    ("input_L0_txt_p2", "feature_L1_txt_p1_f7", 0.5),
    ("bias_L2_img_encoder", TARGET, 0.5),
    ("bias_L1_img_value", TARGET, -0.25),
    ("dropped", TARGET, 0.0625),
]


@pytest.fixture(scope="module")
def small() -> Graph:
    """A graph per token with a node of every kind but supernodes; equal features in both streams of one layer."""
    return graph_of(EDGES, [TARGET], FACTS, {TARGET: 2.0, "feature_L1_img_p4_f7": 1.5})


def written(graph: Graph, folder: Path, **options: Any) -> dict[str, Any]:
    """What stands in circuit-tracer's file."""
    said: dict[str, Any] = json.loads(circuit_tracer.write(graph, folder, **options).read_text())
    return said


def test_a_pruned_graph_of_the_reference_is_written_again_as_it_was(tmp_path: Path) -> None:
    _, said = golden()
    pruned = said["pruned"]
    (tmp_path / "reference.json").write_text(json.dumps(pruned))
    graph = difract.read(tmp_path / "reference.json")
    difract.write(graph, tmp_path / "ours.json")
    ours = json.loads((tmp_path / "ours.json").read_text())

    expected = copy.deepcopy(pruned)
    summed: dict[tuple[str, str], float] = defaultdict(float)  # some pairs stand twice there
    for edge in expected["edges"]:
        summed[edge["src"], edge["tgt"]] += edge["attribution"]
    expected["edges"] = [{"src": src, "tgt": tgt, "attribution": value} for (src, tgt), value in summed.items()]
    kinds = Counter(src.partition("_")[0] for src, _ in summed)
    expected["stats"] |= {
        "num_edges": len(summed), "attribution_sum": pytest.approx(expected["stats"]["attribution_sum"]),
        "edges_by_type": {"feature": kinds["feature"], "error": kinds["error"], "residual": kinds["input"], "input": kinds["input"]},
    }  # fmt: skip
    expected["metadata"]["pruning"] |= {
        "pruned_num_edges": len(summed), "pruned_attribution_sum": expected["stats"]["attribution_sum"],
    }  # fmt: skip
    expected["metadata"]["constants"] = []
    expected["config"]["circuit_max_nodes"] = (
        40  # it says 1,000 there, a default, and 40, the budget that was kept, in the metadata
    )
    for node in [*ours["nodes"], *expected["nodes"]]:
        node["activation_map"] = dict(sorted(node["activation_map"].items()))
    assert ours == expected
    assert list(ours["nodes"][0]) == sorted(pruned["nodes"][0])


def test_a_graph_comes_back_from_difracts_form_with_its_nodes_edges_and_facts(small: Graph, tmp_path: Path) -> None:
    without = aggregated(
        graph_of([edge for edge in EDGES if not edge[0].startswith("rest")], [TARGET], FACTS, {TARGET: 2.0})
    )
    difract.write(without, tmp_path / "graph.json")
    back = difract.read(tmp_path / "graph.json")
    assert sorted(back.names) == sorted(without.names)
    assert named(back) == named(without)
    for key in ("prompt", "seed", "step", "sigma", "n_img", "n_txt", "model", "settings"):
        assert back.facts[key] == without.facts[key], key
    assert back.facts["targets"][0]["name"] == TARGET
    maps = dict(zip(back.names, back.nodes["map_value"].to_pylist(), strict=True))
    assert maps["feature_L1_img_f7"] == [1.0]


def test_difracts_form_adds_rests_to_errors_and_keeps_constants_apart(small: Graph, tmp_path: Path) -> None:
    difract.write(aggregated(small), tmp_path / "graph.json")
    said = json.loads((tmp_path / "graph.json").read_text())
    assert {node["type"] for node in said["nodes"]} == {"feature", "error", "input"}
    edges = {(edge["src"], edge["tgt"]): edge["attribution"] for edge in said["edges"]}
    assert edges["error_L1_img", "feature_L2_img_f7"] == 0.125 + 0.375
    assert edges["error_L0_txt", "feature_L1_txt_f7"] == 0.25, "a rest alone is an error there"
    assert next(node for node in said["nodes"] if node["id"] == "error_L1_img")["activation_map"] == {"4": 0.5}
    constants = {edge["src"]: edge["attribution"] for edge in said["metadata"]["constants"]}
    assert constants == {"bias_L2_img_encoder": 0.5, "bias_L1_img_value": -0.25, "dropped": 0.0625}
    assert said["target"]["encoder_bias"] == 0.5
    assert said["stats"]["attribution_sum"] == 0.5 - 0.25 + 0.5 + 1.0
    assert (said["stats"]["num_nodes"], said["stats"]["num_edges"]) == (len(said["nodes"]), len(said["edges"]))


def test_difracts_form_says_the_preactivation_at_the_targets_own_token(tmp_path: Path) -> None:
    other = TARGET.replace("p4", "p5")
    graph = graph_of([*EDGES, (other, "feature_L3_img_p4_f1", 1.0)], [TARGET], FACTS, {TARGET: 2.0})
    rows = graph.nodes.to_pylist()
    next(row for row in rows if row["name"] == other)["pre"] = 7.0  # expanded, too
    graph = Graph(pa.Table.from_pylist(rows, schema=graph.nodes.schema), graph.edges, graph.facts)
    target = difract.content(aggregate(graph))["target"]
    assert (target["position"], target["preactivation"]) == (4, 2.0)


def test_difracts_form_is_refused_for_a_graph_with_tokens(small: Graph, tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="aggregated"):
        difract.write(small, tmp_path / "graph.json")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda said: said.update(version=1), "no graph in DifFRACT's JSON version 2"),
        (lambda said: said["edges"].append({"src": "input_img", "tgt": "feature_L9_img_f9", "attribution": 1.0}), "feature_L9"),
        (lambda said: said["nodes"][0].update(id="feature 3"), "feature 3"),
        (lambda said: said["nodes"][0].update(type="error"), "called a error"),
        (lambda said: said["nodes"][0].pop("id"), "id"),
    ],
)  # fmt: skip
def test_another_file_than_difracts_is_refused_by_what_it_says(spoil: Any, told: str, tmp_path: Path) -> None:
    said = copy.deepcopy(golden()[1]["pruned"])
    spoil(said)
    (tmp_path / "graph.json").write_text(json.dumps(said))
    with pytest.raises(ForeignError, match=told):
        difract.read(tmp_path / "graph.json")


def supernodes() -> Graph:
    """A graph of one supernode; its members and what feeds it."""
    members = [{"site": "img_1", "token": token, "feature": 2, "weight": 1.0} for token in (1, 4)]
    targets = [{"name": 'supernode_red, "warm"', "pre": 1.0, "members": members}]
    edges = [("feature_L0_img_p1_f2", 'supernode_red, "warm"', 1.0), ("input_L0_img_p1", "feature_L0_img_p1_f2", 1.0)]
    return graph_of(edges, ['supernode_red, "warm"'], FACTS | {"targets": targets})


def one_token() -> Graph:
    """The smallest graph: one feature that an input feeds, at one token."""
    return graph_of([("input_L0_img_p0", "feature_L0_img_p0_f1", 1.0)], ["feature_L0_img_p0_f1"], {"step": 0})


def several_targets() -> Graph:
    """A graph of two targets, one of which feeds the other."""
    return graph_of(EDGES, [TARGET, "feature_L1_txt_p1_f7"], FACTS, {TARGET: 3.0, "feature_L1_txt_p1_f7": 1.0})


@pytest.mark.parametrize(
    "graph",
    [golden()[0], graph_of(EDGES, [TARGET], FACTS), supernodes(), one_token(), several_targets()],
    ids=["golden", "small", "supernode", "one token", "several targets"],
)
def test_circuit_tracer_gets_all_that_its_frontend_asks_for(graph: Graph, tmp_path: Path) -> None:
    said = written(graph, tmp_path)
    metadata, nodes = said["metadata"], said["nodes"]
    tokens = metadata["prompt_tokens"]
    assert metadata["scan"].startswith("./") and not metadata["scan"].startswith("./features/")
    assert len(tokens) >= 2
    assert all(0 <= node["ctx_idx"] < len(tokens) for node in nodes)
    assert all(isinstance(node["layer"], str) for node in nodes)
    outputs = [node for node in nodes if node["feature_type"] == "logit"]
    assert outputs
    for node in outputs:
        assert 0 < float(node["clerp"].split("(p=")[1].split(")")[0]) <= 1
        assert len(node["clerp"].split('"')) == 3
    assert sum(node["token_prob"] for node in outputs) == pytest.approx(1)
    alike = Counter((node["layer"], node["feature"], node["ctx_idx"]) for node in nodes)
    assert max(alike.values()) < len(tokens) * 2 / 3
    identities = [node["node_id"] for node in nodes]
    assert len(set(identities)) == len(identities)
    assert all(link["source"] in identities and link["target"] in identities for link in said["links"])
    assert said["qParams"]["clickedId"] in identities
    assert set(said["qParams"]["pinnedIds"]) <= set(identities)
    assert not any("," in identity or "supernode-" in identity for identity in identities), (
        "its addresses and clicks mean these"
    )
    assert {token for node in nodes for token in (node["ctx_idx"],) if node["feature_type"] == "embedding"} == set(
        range(len(tokens))
    )
    assert all(node["influence"] is None or 0 <= node["influence"] <= metadata["node_threshold"] for node in nodes)
    for node in nodes:
        if node["feature_type"] == "cross layer transcoder":
            page = json.loads((tmp_path / Path(metadata["scan"]).name / f"{node['feature']}.json").read_text())
            (example,) = page["examples_quantiles"][0]["examples"]
            assert len(example["tokens"]) == len(example["tokens_acts_list"]) > example["train_token_ind"]
    assert json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"] == [metadata]


def test_pseudo_tokens_encode_stream_place_and_step(small: Graph, tmp_path: Path) -> None:
    assert written(small, tmp_path)["metadata"]["prompt_tokens"] == [
        "const @2",
        "txt 1 @2",
        "txt 2 @2",
        "img 2,2 @2",
        "img 2,3 @2",
    ]


def test_circuit_tracer_gets_every_edge_and_features_of_both_streams_apart(small: Graph, tmp_path: Path) -> None:
    said = written(small, tmp_path, labels={"img_1": book(7, "warm edges")})
    nodes = {node["node_id"]: node for node in said["nodes"]}
    links = {
        (nodes[link["source"]].get("name"), nodes[link["target"]].get("name")): link["weight"] for link in said["links"]
    }
    output = links.pop((TARGET, None))
    assert output == 2.0, "the output is the target's pre-activation"
    assert links == named(small)
    by_name = {node["name"]: node for node in said["nodes"] if "name" in node}
    image, text = by_name["feature_L1_img_p4_f7"], by_name["feature_L1_txt_p1_f7"]
    assert image["feature"] != text["feature"], "they would share a page"
    assert unpaired(image["feature"])[1] == unpaired(text["feature"])[1] == 7, "the number that its page shows"
    assert image["clerp"] == "warm edges · img_1/7 at img 2,2"
    assert by_name[TARGET]["node_id"] == said["qParams"]["clickedId"]


def test_of_a_graph_too_large_to_be_drawn_the_most_influential_nodes_are_written(tmp_path: Path) -> None:
    graph, _ = golden()
    said = written(graph, tmp_path, most_nodes=40)
    kept = [node["name"] for node in said["nodes"] if "name" in node]
    influence = dict(zip(graph.names, graph.nodes["influence"].to_pylist(), strict=True))
    left = [value for name, value in influence.items() if name not in kept]
    assert len(kept) == 40
    assert min(influence[name] for name in kept) >= max(left)
    assert 0.5 < said["metadata"]["node_threshold"] < 1, "the slider ends where the written nodes do"


def test_graphs_of_one_folder_are_listed_together_and_equal_graphs_have_equal_bytes(
    small: Graph, tmp_path: Path
) -> None:
    circuit_tracer.write(small, tmp_path / "a")
    circuit_tracer.write(supernodes(), tmp_path / "a")
    circuit_tracer.write(supernodes(), tmp_path / "b")
    circuit_tracer.write(small, tmp_path / "b")
    circuit_tracer.write(small, tmp_path / "b")
    slugs = [graph["slug"] for graph in json.loads((tmp_path / "a" / "graph-metadata.json").read_text())["graphs"]]
    assert slugs == ["image-00003.step-2.img_2.p4.f7", "image-00003.step-2.red-warm-"]
    a, b = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.json")}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b


def test_circuit_tracers_form_is_refused_for_a_graph_without_tokens(small: Graph, tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="aggregated"):
        circuit_tracer.write(aggregated(small), tmp_path)


@pytest.mark.parametrize("over_tokens", [False, True])
def test_networkx_reads_nodes_edges_and_what_is_known_of_them(over_tokens: bool, small: Graph, tmp_path: Path) -> None:
    graph = aggregated(small) if over_tokens else small
    graphml.write(graph, tmp_path / "graph.graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml")
    assert read.is_directed() and nx.is_directed_acyclic_graph(read)
    assert {(source, target): of["attribution"] for source, target, of in read.edges(data=True)} == named(graph)
    assert set(read.nodes) == set(graph.names)
    for row in graph.nodes.to_pylist():
        said = read.nodes[row["name"]]
        for key in ("kind", "layer", "stream", "token", "feature", "influence", "effect", "target", "activation"):
            assert said.get(key) == row[key], (row["name"], key)
        if row["map_token"] is not None:
            assert [int(word) for word in said["map_token"].split()] == row["map_token"]
    assert read.graph["prompt"] == "a red circle" and read.graph["step"] == 2
    assert all(of["weight"] == abs(of["attribution"]) for _, _, of in read.edges(data=True))


def test_a_finished_graph_is_exported_into_its_folder_in_the_forms_asked_for(small: Graph, tmp_path: Path) -> None:
    small.write(tmp_path)
    aggregated(small).write(tmp_path / "aggregated")
    paths = exchange.write_exports(tmp_path, ["difract", "circuit-tracer", "graphml"])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "graph.json", "circuit-tracer/image-00003.step-2.img_2.p4.f7.json", "graph.graphml", "aggregated.graphml",
    ]  # fmt: skip
    assert all(path.is_file() for path in paths)
    for slug in ("a", "b"):
        exchange.write_exports(tmp_path, ["circuit-tracer"], shared=tmp_path / slug)
    assert (tmp_path / "b" / "circuit-tracer" / "graph-metadata.json").is_file(), "several graphs have one list"
    with pytest.raises(UsageError, match=r"gexf is no form .* difract, circuit-tracer, graphml"):
        exchange.write_exports(tmp_path, ["gexf"])


def named(graph: Graph) -> dict[tuple[str, str], float]:
    """Edges by the names of their ends; a pair must stand once."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source, target, value in zip(graph.sources, graph.targets, graph.attributions.tolist(), strict=True):
        found[graph.names[source], graph.names[target]].append(value)
    assert all(len(values) == 1 for values in found.values())
    return {pair: values[0] for pair, values in found.items()}


def unpaired(number: int) -> tuple[int, int]:
    """The two numbers that Cantor's pairing made this one of, as the frontend finds them."""
    diagonal = int((np.sqrt(8 * number + 1) - 1) // 2)
    second = number - diagonal * (diagonal + 1) // 2
    return diagonal - second, second
