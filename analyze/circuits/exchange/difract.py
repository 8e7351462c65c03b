"""DifFRACT's JSON version 2 (arXiv:2606.15796): an aggregated, pruned graph as that program writes it.

    version 2, target, config, stats, nodes [{id, type, layer, stream, feat_idx, activation_map}], edges [{src, tgt, attribution}], metadata

That form knows features, errors and inputs.  What we tell apart beyond them is put where its readers expect it or do not look:
`rest` (active features that were not expanded) is added to the error of its place, as that program does; edges of bias nodes and
`dropped` stand in `metadata.constants`, outside the nodes, since its sums leave them out.  A graph without `rest` comes back from
the file with the same nodes and edges, and a file of the reference's is written again as it was.

Activation maps hold what `aggregate` puts there: a feature's z at its tokens, of errors and inputs the summed |attribution| (the
reference: their summed attribution).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from analyze.circuits.graph import EDGES, NODES, Graph
from analyze.circuits.nodes import Node
from store.errors import ForeignError
from store.files import read_json, write_json
from store.sites import Site

VERSION = 2
SIZES = {"nodes": "num_nodes", "edges": "num_edges", "sum": "attribution_sum"}
"""what is said of the aggregated graph before pruning and after: in our totals, and there"""
DIGITS = 6
"""of the values of activation maps, as the reference rounds them; attributions are not rounded"""
CONSTANT = ("bias", "dropped")
"""kinds of node that its sums leave out"""


def write(graph: Graph | Path, path: Path) -> None:
    """Publish an aggregated graph, or the one in `aggregated/` of a graph's folder, as JSON version 2.

    `ForeignError` for a graph that still has tokens.
    """
    write_json(path, content(Graph.read(graph / "aggregated") if isinstance(graph, Path) else graph))


def content(graph: Graph) -> dict[str, Any]:
    """What the file says of an aggregated graph."""
    rows = graph.nodes.to_pylist()
    for row in rows:
        if row["token"] is not None:
            raise ForeignError(
                f"{row['name']} has a token, and DifFRACT's JSON is of aggregated graphs: give the folder aggregated/"
            )
    names = [_reference_name(row) for row in rows]
    nodes: dict[str, dict[str, Any]] = {}
    for name, row in zip(names, rows, strict=True):
        if row["kind"] not in CONSTANT:
            _add_node(nodes, name, row)
    edges: dict[tuple[str, str], float] = defaultdict(float)
    constants = []
    for source, target, value in zip(graph.sources, graph.targets, graph.attributions.tolist(), strict=True):
        if rows[source]["kind"] in CONSTANT:
            constants.append({"src": names[source], "tgt": names[target], "attribution": value})
        else:
            edges[names[source], names[target]] += value
    target = _target(graph.facts, rows, constants)
    stats = _stats(nodes, edges, target["id"])
    return {
        "version": VERSION,
        "target": target,
        "config": _config(graph.facts),
        "stats": stats,
        "nodes": list(nodes.values()),
        "edges": [{"src": src, "tgt": tgt, "attribution": value} for (src, tgt), value in edges.items()],
        "metadata": {**_metadata(graph.facts, stats), "constants": constants},
    }


def sizes(graph: Graph) -> dict[str, Any]:
    """Of an aggregated graph before pruning, what the file of the pruned one says of it: totals `aggregated_nodes` to `_sum`."""
    stats = content(graph)["stats"]
    return {f"aggregated_{name}": stats[key] for name, key in SIZES.items()}


def read(path: Path) -> Graph:
    """The graph of a file in JSON version 2, ours or the reference's; `ForeignError` for another file.

    Influence and effect are not in such a file: `analyze.circuits.influence.with_influence` fills them.
    """
    said = read_json(path)
    if not isinstance(said, dict) or said.get("version") != VERSION or "nodes" not in said or "edges" not in said:
        raise ForeignError(f"{path} is no graph in DifFRACT's JSON version {VERSION}")
    target = said.get("target") or {}
    constants = (said.get("metadata") or {}).get("constants") or []
    try:
        rows = [_row(node, target) for node in said["nodes"]]
        rows += [_bare(name) for name in dict.fromkeys(edge["src"] for edge in constants)]
        place = {row["name"]: number for number, row in enumerate(rows)}
        summed: dict[tuple[int, int], float] = defaultdict(float)  # the reference's own files hold some pairs twice
        for edge in [*said["edges"], *constants]:
            summed[place[edge["src"]], place[edge["tgt"]]] += float(edge["attribution"])
        facts = _facts(said)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForeignError(f"{path}: a node or an edge is not as JSON version {VERSION} has it ({error!r})") from None
    edges = [{"source": source, "target": end, "attribution": value} for (source, end), value in summed.items()]
    return Graph(pa.Table.from_pylist(rows, schema=NODES), pa.Table.from_pylist(edges, schema=EDGES), facts)


def _reference_name(row: Mapping[str, Any]) -> str:
    """What the reference calls a node: unexpanded features are part of the error of their place."""
    name: str = row["name"]
    return "error" + name.removeprefix("rest") if row["kind"] == "rest" else name


def _add_node(nodes: dict[str, dict[str, Any]], name: str, row: Mapping[str, Any]) -> None:
    tokens, values = row["map_token"] or [], row["map_value"] or []
    new = {str(token): value for token, value in zip(tokens, values, strict=True)}
    known = nodes.get(name)
    if known is not None:  # the error and the rest of one place
        before = known["activation_map"]
        new = {token: before.get(token, 0.0) + new.get(token, 0.0) for token in {**before, **new}}
    nodes[name] = {
        "id": name,
        "type": "error" if row["kind"] == "rest" else row["kind"],
        "layer": row["layer"] if row["kind"] != "input" else 0,
        "stream": row["stream"],
        "feat_idx": -1 if row["feature"] is None else row["feature"],
        "activation_map": {token: round(value, DIGITS) for token, value in new.items()},
    }


def _target(
    facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], constants: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """The target as the reference describes it: the first, where several were asked for together."""
    row: Mapping[str, Any] = next((row for row in rows if row["target"]), {})
    asked: Mapping[str, Any] = next(iter(facts.get("targets") or []), {})
    encoder = [
        edge["attribution"] for edge in constants if edge["tgt"] == row.get("name") and edge["src"].endswith("_encoder")
    ]
    pre = row.get("pre")
    return {
        "id": row.get("name"),
        "layer": row.get("layer"),
        "stream": row.get("stream"),
        "feat_idx": -1 if row.get("feature") is None else row["feature"],
        "position": asked.get("token"),
        "preactivation": pre if asked.get("pre") is None else asked["pre"],
        "encoder_bias": float(sum(encoder)) if asked.get("encoder_bias") is None else asked["encoder_bias"],
    }


def _config(facts: Mapping[str, Any]) -> dict[str, Any]:
    settings: Mapping[str, Any] = facts.get("settings") or {}
    nodes, edges = settings.get("node_threshold"), settings.get("edge_threshold")
    layers = sorted({Site.parse(site).layer for site in facts.get("transcoders") or {}})
    return {
        "prompt": facts.get("prompt"),
        "seed": facts.get("seed"),
        "step": facts.get("step"),
        "timestep": facts.get("sigma"),
        "model_id": facts.get("model"),
        "target_layers": layers,
        "height": facts.get("height"),
        "width": facts.get("width"),
        "S_img": facts.get("n_img"),
        "S_txt": facts.get("n_txt"),
        "circuit_max_nodes": settings.get("nodes"),
        "circuit_min_attribution": settings.get("min_attribution"),
        **{f"prune_node_threshold_{stream}": nodes for stream in ("img", "txt")},
        **{f"prune_edge_threshold_{stream}": edges for stream in ("img", "txt")},
    }


def _stats(
    nodes: Mapping[str, Mapping[str, Any]], edges: Mapping[tuple[str, str], float], target: str | None
) -> dict[str, Any]:
    kinds = Counter(node["type"] for node in nodes.values())
    sources = Counter(nodes[source]["type"] for source, _ in edges)
    return {
        "num_nodes": len(nodes),
        "num_edges": len(edges),
        "num_feature_nodes": kinds["feature"],
        "num_error_nodes": kinds["error"],
        "num_residual_nodes": 0,
        "num_input_nodes": kinds["input"],
        "attribution_sum": sum(value for (_, end), value in edges.items() if end == target),
        "nodes_by_stream": dict(Counter(node["stream"] for node in nodes.values() if node["stream"])),
        "edges_by_type": {
            "feature": sources["feature"],
            "error": sources["error"],
            "residual": sources["input"],
            "input": sources["input"],
        },
    }


def _metadata(facts: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    settings, totals = facts.get("settings") or {}, facts.get("totals") or {}
    return {
        "circuit_tracing": {
            "nodes_expanded": totals.get("expanded"),
            "total_nodes": totals.get("nodes"),
            "total_edges": totals.get("edges"),
            "max_nodes_budget": settings.get("nodes"),
        },
        "pruning": {
            **{f"node_threshold_{stream}": settings.get("node_threshold") for stream in ("img", "txt")},
            **{f"edge_threshold_{stream}": settings.get("edge_threshold") for stream in ("img", "txt")},
            **{f"original_{key}": totals.get(f"aggregated_{name}") for name, key in SIZES.items()},
            **{f"pruned_{key}": stats[key] for key in SIZES.values()},
        },
    }


def _facts(said: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says beside nodes and edges, as facts of a graph of ours."""
    config, target = said.get("config") or {}, said.get("target") or {}
    metadata = said.get("metadata") or {}
    tracing, pruning = metadata.get("circuit_tracing") or {}, metadata.get("pruning") or {}
    name, token = target.get("id"), target.get("position")
    asked = {
        "name": name if token is None or name is None else replace(Node.parse(name), token=token).name,
        "site": f"{target['stream']}_{target['layer']}" if target.get("stream") else None,
        "token": token,
        "feature": target.get("feat_idx"),
        "pre": target.get("preactivation"),
        "encoder_bias": target.get("encoder_bias"),
    }
    return {
        **{key: config.get(key) for key in ("prompt", "seed", "step", "height", "width")},
        "model": config.get("model_id"),
        "sigma": config.get("timestep"),
        "n_img": config.get("S_img"),
        "n_txt": config.get("S_txt"),
        "targets": [asked],
        "transcoders": {
            f"{stream}_{layer}": {} for layer in config.get("target_layers") or [] for stream in ("img", "txt")
        },
        "settings": {
            "nodes": tracing.get("max_nodes_budget") or config.get("circuit_max_nodes"),
            "min_attribution": config.get("circuit_min_attribution"),
            "node_threshold": pruning.get("node_threshold_img"),
            "edge_threshold": pruning.get("edge_threshold_img"),
        },
        "totals": {
            "expanded": tracing.get("nodes_expanded"),
            "nodes": tracing.get("total_nodes"),
            "edges": tracing.get("total_edges"),
            **{f"aggregated_{name}": pruning.get(f"original_{key}") for name, key in SIZES.items()},
        },
    }


def _row(said: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """A node of the file as a row of ours."""
    row = _bare(said["id"])
    if said["type"] != row["kind"]:
        raise ValueError(f"{said['id']} is called a {said['type']}")
    found = {int(token): float(value) for token, value in (said.get("activation_map") or {}).items()}
    asked = said["id"] == target.get("id")
    return {
        **row,
        "activation": max(found.values(), default=None) if row["kind"] == "feature" else None,
        "pre": target.get("preactivation") if asked else None,
        "target": asked,
        "order": 0 if asked else None,
        "map_token": sorted(found),
        "map_value": [found[token] for token in sorted(found)],
    }


def _bare(name: str) -> dict[str, Any]:
    """What a node's name says of it."""
    node = Node.parse(name)
    site = node.site
    return {
        "name": name,
        "kind": node.kind,
        "layer": None if site is None or (node.kind == "input" and node.token is None) else site.layer,
        "stream": None if site is None else site.stream,
        "token": node.token,
        "feature": node.feature,
        "term": node.term,
        "target": False,
    }
