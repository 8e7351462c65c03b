"""Graphs without tokens: a feature is one node wherever it is active."""

import re

import numpy as np
import pyarrow as pa

from analyze.circuits.compaction import summed_edges
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.influence import column, with_influence

_AT_TOKEN = re.compile(r"(?:(?P<kind>input)_L0)?(?P<where>.*?)_p\d+(?P<feature>(?:_f\d+)?)$")
"""names of nodes at a token, as `Node.aggregated` takes them apart: fifty thousand in a fraction of a second"""


def aggregate(graph: Graph) -> Graph:
    """The graph with edges summed over the tokens of both ends; `map_token` and `map_value` keep where each node stands.

    A node's edges add up to its `pre`, which is the sum of those of its expanded tokens, as is its `effect`.  Its `activation` is
    the largest, its `order` the first, its `conservation` the worst of its tokens.  Maps: of a feature its z wherever it is
    active in the trace, of inputs, errors and rests what they add at each token, |a| summed over edges.  Influence is computed
    anew.  A graph that is aggregated already comes back as it is, but for that.
    """
    rows, first = _groups(graph)
    nodes = graph.nodes.take(pa.array(first))
    names = [
        name if token is None else _AT_TOKEN.sub(r"\g<kind>\g<where>\g<feature>", name)
        for name, token in zip(nodes["name"].to_pylist(), nodes["token"].to_pylist(), strict=True)
    ]
    effects = np.bincount(rows, column(graph, "effect"), minlength=len(first))
    columns = {
        "name": pa.array(names),
        "token": pa.nulls(len(first), pa.int32()),
        "activation": _reduced(graph, "activation", rows, first, np.fmax),
        "pre": _reduced(graph, "pre", rows, first, np.add),
        "order": _reduced(graph, "order", rows, first, np.fmin),
        "target": _reduced(graph, "target", rows, first, np.maximum),
        "conservation": _reduced(graph, "conservation", rows, first, np.fmax),
    }
    columns["map_token"], columns["map_value"] = _maps(graph, rows, first)
    table = pa.Table.from_arrays(
        [columns.get(name, nodes[name]) if name != "effect" else pa.array(effects) for name in NODES.names],
        schema=NODES,
    )
    edges = summed_edges(rows[graph.sources], rows[graph.targets], graph.attributions)
    return with_influence(Graph(table, edges, graph.facts), effects)


def _groups(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The aggregated node of each node, int64 (node,), and the first node of each: in the order of first ones."""
    seen: dict[tuple, int] = {}
    keys = zip(*(graph.nodes[name].to_pylist() for name in ("kind", "layer", "stream", "feature", "term")), strict=True)
    rows = np.asarray([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
    return rows, np.unique(rows, return_index=True)[1]


def _reduced(graph: Graph, name: str, rows: np.ndarray, first: np.ndarray, by: np.ufunc) -> pa.Array:
    """A column over the nodes of each group, of those that have a value; null where none has."""
    of = NODES.field(name).type
    values = column(graph, name)
    there = ~np.isnan(values)
    found = np.full(len(first), -np.inf if by is np.fmax else np.inf if by is np.fmin else 0.0)
    by.at(found, rows[there], values[there])
    empty = np.bincount(rows[there], minlength=len(first)) == 0
    return pa.array(np.where(empty, 0, found), mask=empty, from_pandas=False).cast(of)


def _maps(graph: Graph, rows: np.ndarray, first: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Where each aggregated node stands and with what: the two list columns, null where tokens mean nothing."""
    weight = np.bincount(graph.sources, np.abs(graph.attributions), minlength=len(graph.nodes))
    tokens, kinds = graph.nodes["token"].to_pylist(), graph.nodes["kind"].to_pylist()
    z = graph.nodes["activation"].to_pylist()
    given_token, given_value = graph.nodes["map_token"].to_pylist(), graph.nodes["map_value"].to_pylist()
    found: list[dict[int, float] | None] = [None] * len(first)
    for node, row in enumerate(rows.tolist()):
        if given_token[node] is not None:
            here = dict(zip(given_token[node], given_value[node], strict=True))
        elif tokens[node] is not None:
            here = {tokens[node]: z[node] if kinds[node] == "feature" else float(weight[node])}
        else:
            continue
        found[row] = {**(found[row] or {}), **here}
    sorted_maps = [None if each is None else sorted(each.items()) for each in found]
    return (
        pa.array(
            [None if each is None else [token for token, _ in each] for each in sorted_maps],
            NODES.field("map_token").type,
        ),
        pa.array(
            [None if each is None else [value for _, value in each] for each in sorted_maps],
            NODES.field("map_value").type,
        ),
    )
