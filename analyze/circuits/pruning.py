"""The part of a graph that matters most: features, then edges, until their influence is a given share of their stream's."""

import numpy as np
import pyarrow as pa

from analyze.circuits.compaction import summed_edges
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.influence import column, edge_weights, influence, is_constant
from analyze.circuits.nodes import Node
from store.errors import UsageError

CONSTANTS = "constants"
"""what constant paths and `dropped` are pruned as, beside the streams"""


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """The graph with the most influential features and edges, each stream apart; the rule is DifFRACT's.

    1. Of each stream the features in falling influence until they hold a share `nodes` of the stream's; the one that crosses stays.
       Targets, errors, inputs and rests always stay.
    2. Influence again, among what stayed.  The score of an edge is its weight (`influence.edge_weights`) times the influence
       of its target; by the stream of their source, edges in falling score until they hold a share `edges`.
    3. What was cut is added to `dropped`, so that edges still add up to `pre`; constants without an edge go.

    A `pre` stays what it was, as do `influence` and `effect`: they are those of the whole graph.
    """
    for what, share in (("nodes", nodes), ("edges", edges)):
        if not 0 < share <= 1:
            raise UsageError(f"the share of {what} to keep is {share}: give more than 0, and 1 at most")
    graph = _with_dropped(graph)
    stays = _nodes_that_stay(graph, influence(graph), nodes)
    kept = _edges_that_stay(graph, stays, edges)
    return _cut(graph, stays, kept)


def _nodes_that_stay(graph: Graph, weights: np.ndarray, share: float) -> np.ndarray:
    """Which nodes do, bool (node,)."""
    target = column(graph, "target") > 0
    free = np.asarray([kind == "feature" for kind in graph.nodes["kind"].to_pylist()]) & ~target
    streams = np.asarray(graph.nodes["stream"].to_pylist(), dtype=object)
    streams[~free] = None
    return np.asarray(~free | _most(weights, streams, share))


def _edges_that_stay(graph: Graph, stays: np.ndarray, share: float) -> np.ndarray:
    """Which edges do, bool (edge,): of those between nodes that stay."""
    there = np.flatnonzero(stays[graph.sources] & stays[graph.targets])
    among = Graph(graph.nodes, graph.edges.take(pa.array(there)), graph.facts)
    score = edge_weights(among) * influence(among)[among.targets]
    streams = np.asarray(graph.nodes["stream"].to_pylist(), dtype=object)
    groups = np.where(is_constant(graph), CONSTANTS, streams)[among.sources]
    kept = np.zeros(len(graph.edges), dtype=bool)
    kept[there[_most(score, groups, share)]] = True
    return kept


def _most(score: np.ndarray, group: np.ndarray, share: float) -> np.ndarray:
    """The highest of each group (None: no group) until their sum is that share of the group's; equal ones in order of rows."""
    keep = np.zeros(len(score), dtype=bool)
    for name in sorted({each for each in group.tolist() if each is not None}):
        rows = np.flatnonzero(group == name)
        rows = rows[np.argsort(-score[rows], kind="stable")]
        before = np.concatenate([[0.0], np.cumsum(score[rows])])
        keep[rows[(before[:-1] < share * before[-1]) | (share == 1)]] = True
    return keep


def _with_dropped(graph: Graph) -> Graph:
    """The graph with a node `dropped`, where it has none."""
    if "dropped" in graph.nodes["kind"].to_pylist():
        return graph
    row = dict.fromkeys(NODES.names) | {"name": Node("dropped").name, "kind": "dropped", "target": False}
    row |= {"influence": 0.0, "effect": 0.0}
    return Graph(pa.concat_tables([graph.nodes, pa.Table.from_pylist([row], schema=NODES)]), graph.edges, graph.facts)


def _cut(graph: Graph, stays: np.ndarray, kept: np.ndarray) -> Graph:
    """The graph of the nodes that stay, with the edges that are not kept added to `dropped`."""
    dropped = graph.nodes["kind"].to_pylist().index("dropped")
    source = np.where(kept, graph.sources, dropped)
    ends = stays[graph.targets]
    source, target, value = source[ends], graph.targets[ends], graph.attributions[ends]
    linked = np.zeros(len(stays), dtype=bool)
    linked[source] = True
    rows = np.flatnonzero(stays & (linked | ~is_constant(graph)))
    to = np.cumsum(np.isin(np.arange(len(stays)), rows)) - 1
    return Graph(graph.nodes.take(pa.array(rows)), summed_edges(to[source], to[target], value), graph.facts)
