"""The tables of a graph that has grown: codes become rows and names, and what is known of each node is filled in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.circuits.compaction import Edges, compact, edge_table
from analyze.circuits.feeds import Feed
from analyze.circuits.frozen import FrozenModel, Target
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.influence import shares, with_influence
from analyze.circuits.nodes import Node
from analyze.circuits.sources import KINDS, ActiveIndex, decode, encode, nodes_of


@dataclass(frozen=True)
class Grown:
    """Expanded nodes in order, and what feeds each."""

    targets: tuple[Target, ...]
    """the first of them"""
    codes: np.ndarray
    """int64 (expanded,)"""
    feeds: tuple[Feed, ...]


def assemble(model: FrozenModel, index: ActiveIndex, grown: Grown, least: float, budget: int | None) -> Graph:
    """The graph per token: expanded nodes in their order first, then what else feeds them, in order of codes."""
    edges = compact(_all_edges(index, grown), grown.codes, least, budget, len(grown.targets))
    others = np.setdiff1d(edges.source, grown.codes)
    codes = np.concatenate([grown.codes, others, encode("dropped")[None]])
    order = np.argsort(codes, kind="stable")
    source = order[np.searchsorted(codes, edges.source, sorter=order)]
    lost = np.flatnonzero(edges.dropped)
    links = [
        np.concatenate([source, np.full(len(lost), len(codes) - 1)]),
        np.concatenate([edges.target, lost]),
        np.concatenate([edges.value, edges.dropped[lost]]),
    ]
    if not len(lost):
        codes = codes[:-1]
    by = np.lexsort((links[0], links[1]))
    names = [target.name or "" for target in grown.targets]
    nodes = _node_table(nodes_of(codes, model.sites, names), index, grown, codes)
    graph = with_influence(Graph(nodes, edge_table(*(part[by] for part in links)), {}))
    return Graph(graph.nodes, graph.edges, _facts(model, grown, graph))


def _all_edges(index: ActiveIndex, grown: Grown) -> Edges:
    sizes = [len(feed.features) for feed in grown.feeds], [len(feed.others) for feed in grown.feeds]
    place = np.arange(len(grown.feeds), dtype=np.int32)
    return Edges(
        np.concatenate([*(index.codes[feed.features] for feed in grown.feeds), *(feed.others for feed in grown.feeds)]),
        np.concatenate([np.repeat(place, size) for size in sizes]),
        np.concatenate([*(feed.values for feed in grown.feeds), *(feed.other_values for feed in grown.feeds)]),
        np.asarray([feed.dropped for feed in grown.feeds]),
    )


def _node_table(nodes: Sequence[Node], index: ActiveIndex, grown: Grown, codes: np.ndarray) -> pa.Table:
    """The nodes' table without influence; a feature's map says where it is active in the trace, and how much."""
    expanded, asked = len(grown.codes), len(grown.targets)
    kind, site, _, feature = (part.tolist() for part in decode(codes))
    z = [_activation(index, grown, place) for place in range(expanded)]
    maps = [
        index.over_tokens(site[row], feature[row]) if KINDS[kind[row]] == "feature" else None for row in range(expanded)
    ]
    more = len(nodes) - expanded
    columns: dict[str, list[Any]] = {
        "name": [node.name for node in nodes],
        "kind": [node.kind for node in nodes],
        "layer": [None if node.site is None else node.site.layer for node in nodes],
        "stream": [None if node.site is None else node.site.stream for node in nodes],
        "token": [node.token for node in nodes],
        "feature": [node.feature for node in nodes],
        "term": [node.term for node in nodes],
        "activation": z + [None] * more,
        "pre": [feed.pre for feed in grown.feeds] + [None] * more,
        "order": [max(0, place - asked + 1) for place in range(expanded)] + [None] * more,
        "target": [place < asked for place in range(len(nodes))],
        "conservation": [feed.conservation for feed in grown.feeds] + [None] * more,
        "map_token": [None if each is None else each[0].tolist() for each in maps] + [None] * more,
        "map_value": [None if each is None else each[1].tolist() for each in maps] + [None] * more,
    }
    nothing = [None] * len(nodes)
    arrays = [pa.array(columns.get(field.name, nothing), field.type) for field in NODES]
    return pa.Table.from_arrays(arrays, schema=NODES)


def _activation(index: ActiveIndex, grown: Grown, place: int) -> float:
    """z of an expanded node; of a supernode the weighted sum."""
    if place >= len(grown.targets):
        return float(index.z[index.find(grown.codes[place : place + 1])[0]])
    members = grown.targets[place].members
    rows = index.find(np.concatenate([index.code_of(each.site, each.token, each.feature) for each in members]))
    return float(sum(each.weight * index.z[row] for each, row in zip(members, rows.tolist(), strict=True) if row >= 0))


def _facts(model: FrozenModel, grown: Grown, graph: Graph) -> dict[str, Any]:
    """What is known of the graph here: streams' lengths, targets, totals."""
    table = graph.nodes.select(["name", "activation", "pre"]).slice(0, len(grown.targets)).to_pylist()
    return {
        **{f"n_{stream}": count for stream, count in model.tokens.items()},
        "targets": [_described(target, row) for target, row in zip(grown.targets, table, strict=True)],
        "totals": totals(graph),
    }


def _described(target: Target, row: dict[str, Any]) -> dict[str, Any]:
    members = [
        {"site": str(each.site), "token": each.token, "feature": each.feature, "weight": each.weight}
        for each in target.members
    ]
    if target.name is not None:
        return {**row, "members": members}
    return {**row, **{key: members[0][key] for key in ("site", "token", "feature")}}


def totals(graph: Graph) -> dict[str, Any]:
    """Counts of a graph per token, its worst conservation, what its targets are made of, and the share of |edges| in `dropped`."""
    dropped = np.asarray(graph.nodes["kind"].to_pylist(), dtype=object)[graph.sources] == "dropped"
    magnitude = np.abs(graph.attributions)
    conservation = graph.nodes["conservation"].drop_null().to_pylist()
    return {
        "nodes": len(graph.nodes),
        "edges": len(graph.edges),
        "expanded": len(conservation),
        "conservation": float(np.max(conservation)),
        "shares": shares(graph),
        "dropped": float(magnitude[dropped].sum() / (magnitude.sum() or 1.0)),
    }
