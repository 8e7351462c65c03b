"""Graphs for the tests of their page: any number of nodes and edges, drawn from a seed, in the tables that `analyze graph` writes."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.circuits.graph import EDGES, NODES, Graph
from analyze.circuits.nodes import Node
from store.sites import Site

GRID = (6, 9)
N_TXT = 24


def graph_of(
    edges: Iterable[tuple[str, str, float]], facts: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]
) -> Graph:
    """A graph of named nodes; `values`: what is known of some of them beside their names."""
    table: dict[tuple[str, str], float] = {}
    for source, target, value in edges:
        table[source, target] = table.get((source, target), 0.0) + value
    names = sorted({name for pair in table for name in pair} | set(values))
    place = {name: row for row, name in enumerate(names)}
    rows = []
    for name in names:
        node = Node.parse(name)
        rows.append(
            {
                "name": name,
                "kind": node.kind,
                "layer": None if node.site is None else node.site.layer,
                "stream": None if node.site is None else node.site.stream,
                "token": node.token,
                "feature": node.feature,
                "term": node.term,
                "target": False,
                **values.get(name, {}),
            }
        )
    pairs = sorted(table, key=lambda pair: (place[pair[1]], place[pair[0]]))
    columns = {
        "source": [place[source] for source, _ in pairs],
        "target": [place[target] for _, target in pairs],
        "attribution": [table[pair] for pair in pairs],
    }
    return Graph(pa.Table.from_pylist(rows, NODES), pa.table(columns, EDGES), dict(facts))


def random_graph(n_nodes: int, n_edges: int, seed: int = 0, n_layers: int = 6, **changed: Any) -> tuple[Graph, Graph]:
    """A graph per token of about so many nodes and edges, and the one over tokens that belongs to it; `changed`: of its facts."""
    random = np.random.default_rng(seed)
    kinds = random.choice(["feature", "error", "rest"], n_nodes, p=[0.8, 0.15, 0.05])
    names: dict[str, dict[str, Any]] = {}
    tokens = {"img": GRID[0] * GRID[1], "txt": N_TXT}
    target = f"feature_L{n_layers - 1}_img_p22_f66"
    while len(names) < n_nodes - 40:
        stream = "img" if random.random() < 0.65 else "txt"
        site, token = Site("double", int(random.integers(n_layers)), stream), int(random.integers(tokens[stream]))
        kind = str(kinds[len(names)])
        node = Node(kind, site, token, int(random.integers(300)) if kind == "feature" else None)  # type: ignore[arg-type]
        influence = float(random.exponential() ** 2 / 20)
        names[node.name] = {
            "activation": float(random.exponential()) if kind == "feature" else None,
            "influence": influence,
            "effect": influence * float(random.uniform(-1, 1)),
        }
    for stream, total in tokens.items():
        for token in range(0, total, 3):
            names[f"input_L0_{stream}_p{token}"] = {"influence": 0.05, "effect": 0.02}
    for layer in range(n_layers):
        names[f"bias_L{layer}_img_value"] = {"influence": 0.03, "effect": -0.03}
    names["dropped"] = {"influence": 0.02, "effect": 0.0}
    names[target] = {
        "target": True, "order": 0, "pre": 2.5, "activation": 2.5, "influence": 1.0, "effect": 1.0, "conservation": 3e-13,
    }  # fmt: skip
    edges = list(_edges(list(names), target, n_edges, n_layers, random))
    facts = {**_facts(target, n_layers), **changed}
    return graph_of(edges, facts, names), _over_tokens(edges, names, facts)


def _edges(
    names: list[str], target: str, n_edges: int, n_layers: int, random: np.random.Generator
) -> Iterable[tuple[str, str, float]]:
    """Edges upwards between different layers, every third into the target."""
    level = {name: _level(name) for name in names}
    by_level = [[name for name in names if level[name] < layer] for layer in range(n_layers)]
    features = [name for name in names if name.startswith("feature") and level[name] > 0 and name != target]
    seen: set[tuple[str, str]] = set()
    while len(seen) < n_edges:
        head = target if len(seen) % 40 == 0 else features[int(random.integers(len(features)))]
        below = by_level[level[head]]
        pair = (below[int(random.integers(len(below)))], head)
        if pair not in seen:
            seen.add(pair)
            yield *pair, float(random.laplace() * 0.3)


def _level(name: str) -> int:
    node = Node.parse(name)
    return -1 if node.kind in ("input", "dropped") else node.site.layer  # type: ignore[union-attr]


def _over_tokens(
    edges: Iterable[tuple[str, str, float]], names: Mapping[str, Mapping[str, Any]], facts: dict[str, Any]
) -> Graph:
    values: dict[str, dict[str, Any]] = {}
    for name, known in names.items():
        node = Node.parse(name)
        into = values.setdefault(
            node.aggregated.name, {"influence": 0.0, "effect": 0.0, "map_token": [], "map_value": []}
        )
        for key in ("influence", "effect"):
            into[key] += known[key]
        if node.token is not None:
            into["map_token"].append(node.token)
            into["map_value"].append(known.get("activation") or 0.4)
        for key in ("target", "order", "pre", "activation", "conservation"):
            if known.get(key) is not None:
                into[key] = known[key]
    folded = [(_folded(source), _folded(target), value) for source, target, value in edges]
    return graph_of([edge for edge in folded if edge[0] != edge[1]], facts, values)


@cache
def _folded(name: str) -> str:
    return Node.parse(name).aggregated.name


def _facts(target: str, n_layers: int) -> dict[str, Any]:
    node = Node.parse(target)
    sites = [f"{stream}_{layer}" for stream in ("img", "txt") for layer in range(n_layers)]
    return {
        "image": 3, "prompt": "a small red circle", "seed": 7, "step": 2, "sigma": 0.75, "grid": list(GRID), "n_txt": N_TXT,
        "targets": [{"name": None, "site": str(node.site), "token": node.token, "feature": node.feature, "activation": 2.5, "pre": 2.5}],
        "transcoders": {site: {"name": f"transcoder_{site}", "identity": f"{number:064x}"} for number, site in enumerate(sites)},
        "totals": {"expanded": 40, "conservation": 3e-13},
    }  # fmt: skip


def write_graphs(folder: Path, graphs: tuple[Graph, Graph]) -> Path:
    """Write a graph and the one over its tokens, as `analyze graph` does; the folder."""
    graphs[0].write(folder)
    graphs[1].write(folder / "aggregated")
    return folder
