"""A graph as the page reads it: columns of numbers, the strongest edges where there are more than a page can draw.

A node's name, layer, stream, token and feature stand in columns of their own; the page builds the name from them.  Edges are scored as
pruning scores them, |attribution| over the sum into its target, times the target's influence, and come strongest first.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from analyze.circuits.graph import Graph
from analyze.report.packing import packed

KINDS = ("feature", "error", "input", "rest", "bias", "dropped", "supernode")
STREAMS = ("txt", "img", "joint")
MOST_EDGES = 60_000
"""edges of a graph that the page gets: a megabyte, and what a browser still draws while a slider moves"""
NONE = -1


def view_columns(graph: Graph, most: int = MOST_EDGES) -> dict[str, Any]:
    """Nodes and edges as packed columns, the `most` strongest edges; targets, and nodes that have an edge among them.

    `left_out` says how many nodes and edges are not there.  Edges stand in falling order of their score.
    """
    n_nodes, n_edges = len(graph.nodes), len(graph.edges)
    score = edge_scores(graph)
    order = np.argsort(-score, kind="stable")[:most]
    sources, targets = graph.sources[order], graph.targets[order]
    target = targets_of(graph)
    kept = target.copy()
    kept[sources] = True
    kept[targets] = True
    rows = np.flatnonzero(kept)
    place = np.full(n_nodes, NONE, np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    nodes = graph.nodes.take(pa.array(rows))
    return {
        "count": len(rows),
        "kinds": KINDS,
        "streams": STREAMS,
        "kind": packed(_codes(nodes["kind"], KINDS), "u1"),
        "stream": packed(_codes(nodes["stream"], STREAMS), "u1"),
        **{name: packed(_array(nodes[name], NONE), "i4") for name in ("layer", "token", "feature", "order")},
        "terms": {str(row): term for row, term in enumerate(nodes["term"].to_pylist()) if term is not None},
        **{
            name: packed(_array(nodes[name], np.nan), "f4")
            for name in ("activation", "pre", "influence", "effect", "conservation")
        },
        "target": packed(target[rows], "u1"),
        "maps": _maps(nodes),
        "edges": {
            "source": packed(place[sources], "i4"),
            "target": packed(place[targets], "i4"),
            "attribution": packed(graph.attributions[order], "f4"),
        },
        "left_out": {"nodes": n_nodes - len(rows), "edges": n_edges - len(order)},
    }


def targets_of(graph: Graph) -> Bool[np.ndarray, " node"]:
    """Which nodes were asked for."""
    return np.array(graph.nodes["target"].to_pylist(), bool)


def edge_scores(graph: Graph) -> Float[np.ndarray, " edge"]:
    """How much each edge matters to the targets: its share of what comes into its target, times that node's influence."""
    size = np.abs(graph.attributions)
    into = np.bincount(graph.targets, size, len(graph.nodes))
    influence = np.nan_to_num(_array(graph.nodes["influence"], np.nan).astype(np.float64))
    influence[targets_of(graph)] = np.maximum(1.0, influence.max(initial=0.0))
    return np.asarray(size / np.maximum(into[graph.targets], 1e-30) * influence[graph.targets])


def _maps(nodes: pa.Table) -> dict[str, str] | None:
    """Tokens and values of all nodes, one after the other, and where each node's begin; None where no node has any."""
    tokens, values = nodes["map_token"].combine_chunks(), nodes["map_value"].combine_chunks()
    counts = np.asarray(pc.fill_null(pc.list_value_length(tokens), 0).to_numpy(zero_copy_only=False)).astype(np.int64)
    if not counts.sum():
        return None
    return {
        "start": packed(np.concatenate([[0], np.cumsum(counts)]), "i4"),
        "token": packed(_flat(tokens), "i4"),
        "value": packed(_flat(values), "f4"),
    }


def _flat(lists: Any) -> np.ndarray:
    return np.asarray(pc.list_flatten(lists).to_numpy(zero_copy_only=False))


def _codes(column: Any, words: Iterable[str]) -> Int[np.ndarray, " node"]:
    """The place of each word in `words`; 255 for null."""
    codes = {word: place for place, word in enumerate(words)}
    return np.array([codes.get(word, 255) for word in column.to_pylist()], np.int64)


def _array(column: Any, missing: float | int) -> np.ndarray:
    return np.asarray(pc.fill_null(column, pa.scalar(missing, column.type)).to_numpy())
