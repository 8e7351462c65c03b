"""Graphs to test with: out of lists of edges, without a model; influence along the lines of `analyze.circuits.influence`."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from analyze.circuits.graph import EDGES, NODES, Graph
from analyze.circuits.nodes import Node
from analyze.labels.book import LabelBook

GOLDEN = Path(__file__).parent / "golden" / "circuit_a" / "golden_graph.json"
Edge = tuple[str, str, float]


def graph_of(
    edges: Iterable[Edge], targets: Iterable[str], facts: Mapping[str, Any], z: Mapping[str, float] | None = None
) -> Graph:
    """A graph of named edges, acyclic; pairs that stand twice are added up, influence is that of normalised |edges|."""
    summed: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, value in edges:
        summed[source, target] += value
    asked = list(targets)
    names = list(dict.fromkeys([*asked, *(name for pair in summed for name in pair)]))
    into: dict[str, float] = defaultdict(float)
    for (_, target), value in summed.items():
        into[target] += abs(value)
    reach = dict.fromkeys(asked, 1.0 / len(asked))
    influence = dict.fromkeys(names, 0.0) | reach
    while reach:  # powers of the normalised matrix, until nothing is reached any more
        further: dict[str, float] = defaultdict(float)
        for (source, target), value in summed.items():
            if reach.get(target):
                further[source] += abs(value) / into[target] * reach[target]
        for name, value in further.items():
            influence[name] += value
        reach = further
    rows = [_row(name, name in asked, influence[name], (z or {}).get(name), summed) for name in names]
    place = {name: number for number, name in enumerate(names)}
    listed = [
        {"source": place[source], "target": place[target], "attribution": value}
        for (source, target), value in summed.items()
    ]
    return Graph(pa.Table.from_pylist(rows, schema=NODES), pa.Table.from_pylist(listed, schema=EDGES), dict(facts))


def _row(
    name: str, asked: bool, influence: float, z: float | None, edges: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    node = Node.parse(name)
    effect = sum(value for (source, _), value in edges.items() if source == name)
    return {
        "name": name, "kind": node.kind, "layer": node.site.layer if node.site else None,
        "stream": node.site.stream if node.site else None, "token": node.token, "feature": node.feature, "term": node.term,
        "activation": (1.0 if z is None else z) if node.kind == "feature" else None, "pre": z if asked else None,
        "order": 0 if asked else None, "target": asked, "influence": influence, "effect": effect,
    }  # fmt: skip


def aggregated(graph: Graph) -> Graph:
    """The same graph without tokens: edges added up over both ends, maps as `analyze.circuits.aggregation` makes them."""
    short = [Node.parse(name).aggregated.name for name in graph.names]
    edges = [
        (short[source], short[target], value)
        for source, target, value in zip(graph.sources, graph.targets, graph.attributions.tolist(), strict=True)
    ]
    asked = [name for name, target in zip(short, graph.nodes["target"].to_pylist(), strict=True) if target]
    made = graph_of(edges, dict.fromkeys(asked), graph.facts)
    maps: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row, name in zip(graph.nodes.to_pylist(), short, strict=True):
        if row["token"] is not None and row["kind"] == "feature":
            maps[name][row["token"]] = row["activation"]
    tokens = graph.nodes["token"].to_pylist()
    for source, value in zip(graph.sources.tolist(), graph.attributions.tolist(), strict=True):
        if tokens[source] is not None and not short[source].startswith("feature"):
            maps[short[source]][tokens[source]] += value
    rows = made.nodes.to_pylist()
    for row in rows:
        found = maps[row["name"]]
        row |= {"map_token": sorted(found), "map_value": [found[token] for token in sorted(found)]}
        if row["kind"] == "feature":
            row["activation"] = max(found.values(), default=None)
        if row["kind"] == "input":
            row["layer"] = 0
    return Graph(pa.Table.from_pylist(rows, schema=NODES), made.edges, made.facts)


def book(feature: int, text: str) -> LabelBook:
    """The labels of a dictionary of which one feature has one."""
    made = LabelBook(None)
    made.set(feature, text, "somebody", datetime(2026, 1, 1, tzinfo=UTC))
    return made


def golden() -> tuple[Graph, dict[str, Any]]:
    """The reference's graph per token as one of ours, and everything that its file says."""
    said: dict[str, Any] = json.loads(GOLDEN.read_text())
    target = said["target"]
    name = Node.parse("feature_L{layer}_{stream}_p{position}_f{feature}".format(**target)).name
    facts = {
        "store": "store-1", "model": "case_a", "image": 7, "prompt": said["prompt"], "seed": said["seed"], "step": said["step"],
        "sigma": said["timestep"], "grid": [4, 4], "n_txt": 16, "n_img": 16, "picture": False, "height": said["height"],
        "width": said["width"],
        "targets": [{"name": name, "site": f"{target['stream']}_{target['layer']}", "token": target["position"],
                     "feature": target["feature"], "pre": target["preactivation"], "activation": target["preactivation"]}],
        "transcoders": {f"{stream}_{layer}": {"name": f"transcoder_{stream}_{layer}"} for stream in ("img", "txt") for layer in range(4)},
        "settings": {"nodes": 40, "min_attribution": 1e-4, "node_threshold": 0.8, "edge_threshold": 0.98},
        "totals": {"expanded": 40, "nodes": 166, "edges": 3280},
    }  # fmt: skip
    edges = [(source, end, value) for source, end, value in said["edges"]]
    return graph_of(edges, [name], facts, {name: target["preactivation"]}), said
