"""GraphML, which networkx, Gephi, Cytoscape and yEd read: every node and edge with what is known of it."""

import io
from pathlib import Path
from typing import Any

import networkx as nx

from analyze.circuits.graph import Graph
from store.files import write_bytes

LISTS = ("map_token", "map_value")
"""columns that GraphML cannot hold: of an aggregated graph they are written as text, values apart by spaces"""
FACTS = ("store", "model", "image", "prompt", "seed", "step", "sigma")
"""facts that become attributes of the graph"""


def to_networkx(graph: Graph) -> "nx.DiGraph[str]":
    """The graph as a `networkx.DiGraph`: nodes by name with their columns, edges with `attribution` and `weight`, its absolute value.

    Columns that say nothing of a node are left out, since GraphML has no null.
    """
    made: nx.DiGraph[str] = nx.DiGraph(**{key: value for key in FACTS if _plain(value := graph.facts.get(key))})
    names = graph.names
    for row in graph.nodes.to_pylist():
        said = {key: _text(value) if key in LISTS else value for key, value in row.items() if value is not None}
        made.add_node(said.pop("name"), **said)
    for source, target, value in zip(graph.sources, graph.targets, graph.attributions.tolist(), strict=True):
        made.add_edge(names[source], names[target], attribution=value, weight=abs(value))
    return made


def write(graph: Graph, path: Path) -> None:
    """Publish a graph, per token or aggregated, as GraphML; `networkx.read_graphml` gives it back."""
    file = io.BytesIO()
    nx.write_graphml(to_networkx(graph), file)
    write_bytes(path, file.getvalue())


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _text(values: list[Any]) -> str:
    return " ".join(map(str, values))
