"""Graphs for tests: from plain lists of edges, and grown from a planted model whose every edge is drawn at random."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from analyze.circuits.compaction import summed_edges
from analyze.circuits.frozen import Active, Attribution, FrozenModel, Target
from analyze.circuits.graph import NODES, Graph
from analyze.circuits.influence import CONSTANT, with_influence
from analyze.circuits.nodes import Node
from store.sites import Site, Stream

Edge = tuple[str, str, float]


def graph_of(edges: Sequence[Edge], target: str, pre: Mapping[str, float] | None = None) -> Graph:
    """The graph of these edges between named nodes; `pre` of nodes with edges into them is their sum unless given."""
    names = list(dict.fromkeys([target, *(name for _, name, _ in edges), *(name for name, _, _ in edges)]))
    row = {name: at for at, name in enumerate(names)}
    found = {name: sum(value for _, end, value in edges if end == name) for _, name, _ in edges} | dict(pre or {})
    nodes = [Node.parse(name) for name in names]
    rows = [
        dict.fromkeys(NODES.names)
        | {
            "name": name, "kind": node.kind, "token": node.token, "feature": node.feature, "term": node.term,
            "layer": node.site and node.site.layer, "stream": node.site and node.site.stream, "target": name == target,
            "pre": found.get(name), "activation": found.get(name) if node.kind == "feature" else None,
            "conservation": 0.0 if name in found else None,
        }
        for name, node in zip(names, nodes, strict=True)
    ]  # fmt: skip
    ends = [np.asarray([row[edge[at]] for edge in edges], dtype=np.int64) for at in (0, 1)]
    table = summed_edges(*ends, np.asarray([edge[2] for edge in edges]))
    return with_influence(Graph(pa.Table.from_pylist(rows, schema=NODES), table, {}))


def named_edges(graph: Graph) -> dict[tuple[str, str], float]:
    """(source, target) -> attribution."""
    names = graph.names
    return {
        (names[source], names[target]): value
        for source, target, value in zip(
            graph.sources.tolist(), graph.targets.tolist(), graph.attributions.tolist(), strict=True
        )
    }


def without_token(name: str) -> str:
    """The name in an aggregated graph, by the look of it."""
    name = re.sub(r"_p\d+", "", name)
    return re.sub(r"_L\d+", "", name) if name.startswith("input") else name


def reference_form(graph: Graph) -> Graph:
    """The graph as DifFRACT would make it: rests are errors of their place, constants and what was dropped are left out.

    Influence and effect are computed anew, among what is left.
    """
    nodes = [Node.parse(name) for name in graph.names]
    renamed = [Node("error", node.site, node.token).name if node.kind == "rest" else node.name for node in nodes]
    known = set(graph.names)
    stays = [
        node.kind not in CONSTANT and (node.kind != "rest" or name not in known)
        for node, name in zip(nodes, renamed, strict=True)
    ]
    rows = np.flatnonzero(stays)
    place = {renamed[row]: number for number, row in enumerate(rows.tolist())}
    to = np.asarray([place.get(name, -1) for name in renamed], dtype=np.int64)
    table = graph.nodes.take(pa.array(rows))
    for column, values in (
        ("name", [renamed[row] for row in rows.tolist()]),
        ("kind", [Node.parse(renamed[row]).kind for row in rows.tolist()]),
    ):
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), pa.array(values))
    source, target = to[graph.sources], to[graph.targets]
    there = (source >= 0) & (target >= 0)
    merged = summed_edges(source[there], target[there], graph.attributions[there])
    return with_influence(Graph(table, merged, graph.facts))


class PlantedModel(FrozenModel):
    """Stands in for a frozen model: what feeds each active feature is drawn at random, and its z is the sum.

    Of the features, errors and inputs below, a share `density` feeds it; a constant makes its pre-activation positive.
    """

    def __init__(
        self, layers: int = 3, features: int = 12, img: int = 6, txt: int = 4, seed: int = 0, density: float = 0.7
    ) -> None:
        rng = np.random.default_rng(seed)
        streams: tuple[Stream, ...] = ("img", "txt")
        self.sites = tuple(sorted(Site("double", layer, stream) for layer in range(layers) for stream in streams))
        self.n_blocks, self.d_model = layers, 8
        self.tokens: dict[Stream, int] = {"txt": txt, "img": img}
        self.asked: list[Target] = []
        self.below: dict[tuple[int, int, int], list[tuple[str, float, tuple[int, int, int]]]] = {}
        self.z: dict[tuple[int, int, int], float] = {}
        for row, site in enumerate(self.sites):
            for token in range(self.tokens[site.stream]):
                for feature in np.flatnonzero(rng.random(features) < 0.4).tolist():
                    self._plant(rng, (row, token, feature), density)

    def _plant(self, rng: np.random.Generator, key: tuple[int, int, int], density: float) -> None:
        layer = self.sites[key[0]].layer
        fed: list[tuple[str, float, tuple[int, int, int]]] = []
        for row, site in enumerate(self.sites):
            tokens = range(self.tokens[site.stream])
            if site.layer < layer:
                fed += [("feature", 0.0, other) for other in self.z if other[0] == row]
                fed += [("error", 0.0, (row, token, 0)) for token in tokens]
            if site.layer == 0:
                fed += [("input", 0.0, (row, token, 0)) for token in tokens]
        values = rng.normal(size=len(fed)) * 10 ** rng.uniform(-5, 0, size=len(fed)) * (rng.random(len(fed)) < density)
        fed = [(kind, float(value), other) for (kind, _, other), value in zip(fed, values, strict=True) if value]
        constant = max(0.0, -sum(value for _, value, _ in fed)) + float(rng.uniform(0.1, 1))
        self.below[key] = [*fed, ("bias", constant, (key[0], 0, 0))]
        self.z[key] = sum(value for _, value, _ in self.below[key])

    def active(self, site: Site) -> Active:
        keys = sorted(key for key in self.z if key[0] == self.sites.index(site))
        return Active(
            np.asarray([key[1] for key in keys], dtype=np.int32), np.asarray([key[2] for key in keys], dtype=np.int32),
            np.asarray([self.z[key] for key in keys]),
        )  # fmt: skip

    def activation(self, site: Site, token: int, feature: int) -> float:
        return self.z.get((self.sites.index(site), token, feature), 0.0)

    preactivation = activation

    def attribute(self, targets: Sequence[Target], threshold: float = 0.0) -> Attribution:
        self.asked += targets
        count = len(targets)
        below = np.zeros(count)
        errors = {site: np.zeros((count, self.tokens[site.stream])) for site in self.sites}
        inputs: dict[Stream, np.ndarray] = {stream: np.zeros((count, n)) for stream, n in self.tokens.items()}
        bias: dict[tuple[Site, str], np.ndarray] = {(site, "encoder"): np.zeros(count) for site in self.sites}
        edges: dict[tuple[int, int, int, int], float] = {}
        for at, target in enumerate(targets):
            for member in target.members:
                key = (self.sites.index(member.site), member.token, member.feature)
                for kind, value, (row, token, feature) in self.below[key]:
                    site, added = self.sites[row], member.weight * value
                    if kind == "feature":
                        edges[at, row, token, feature] = edges.get((at, row, token, feature), 0.0) + added
                    elif kind == "error":
                        errors[site][at, token] += added
                    elif kind == "input":
                        inputs[site.stream][at, token] += added
                    else:
                        bias[site, "encoder"][at] += added
        kept = sorted(key for key, value in edges.items() if abs(value) >= threshold)
        for key, value in edges.items():
            below[key[0]] += value if abs(value) < threshold else 0
        pre = np.asarray(
            [
                sum(m.weight * self.z[self.sites.index(m.site), m.token, m.feature] for m in target.members)
                for target in targets
            ]
        )
        columns = [np.asarray([key[at] for key in kept]) for at in range(4)]
        kinds = (np.int32, np.int16, np.int32, np.int32)
        return Attribution(
            pre, *(column.astype(kind) for column, kind in zip(columns, kinds, strict=True)),
            np.asarray([edges[key] for key in kept], dtype=np.float64), below, errors, inputs, bias, pre.copy(),
            np.zeros(count),
        )  # fmt: skip
