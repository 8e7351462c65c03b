"""circuit-tracer's JSON: a folder that its own frontend opens (`circuit-tracer start-server --graph_file_dir FOLDER`).

    FOLDER/graph-metadata.json             the graphs of the folder; writing another graph into it adds to them
    FOLDER/SLUG.json                       metadata, qParams, nodes, links
    FOLDER/SLUG.features/NUMBER.json       what its page of a feature shows: where the feature is active in this trace

That program knows one sequence of tokens, layers, and an output.  So a graph per token is laid out for it as follows:

1. Its sequence is made of pseudo-tokens that name stream, place and step, such as `txt 3 @1` and `img 2,5 @1` (row, column, at step
   1): those tokens alone at which a node stands, text first, after one that carries what has no token.
2. Its output is the target: a "logit" node above the target's feature, whose label ends in `(p=…)`, here the target's part of the
   targets' pre-activations.  A supernode is such an output itself.
3. `rest`, bias and `dropped` are of the type of error nodes, which it draws as diamonds, and say in their label what they are.
4. A feature's number pairs (2 × layer, or 2 × layer + 1 for the text stream) with the feature, as its own numbers pair (layer,
   feature), so that the streams stay apart; its page shows the feature's own number.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analyze.circuits.exchange.columns import Columns, place_of
from analyze.circuits.graph import Graph
from analyze.labels.book import LabelBook
from store.errors import ForeignError
from store.files import json_bytes, read_json, write_bytes, write_json

SCHEMA_VERSION = 1
TRANSCODER, ERROR, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"
TYPES = {"feature": TRANSCODER, "input": EMBEDDING, "supernode": LOGIT}
"""its type of our kinds of node; the others are errors to it"""
UNNUMBERED = {"error": -1, "rest": -2, "dropped": -3}
"""its feature number of what is no feature; biases count on from -4"""
MOST_NODES, MOST_LINKS = 2_000, 20_000
"""what its page opens in two seconds; of larger graphs the most influential nodes and the strongest links are written"""
SHOWN = 32
"""tokens that the page of a feature shows at most"""
PINNED = 8
"""features that stand in its subgraph at first, beside the target"""

Labels = Mapping[str, LabelBook]
"""the labels of each site's dictionary, by the site's name"""


def write(
    graph: Graph, folder: Path, slug: str | None = None, labels: Labels | None = None, most_nodes: int = MOST_NODES
) -> Path:
    """Write a graph per token into a folder of circuit-tracer's, and return the graph's file there.

    `slug` is what its address says (default: image, step and target).  `ForeignError` for an aggregated graph.
    """
    if any(kind == "feature" and token is None for kind, token in _columns(graph, "kind", "token")):
        raise ForeignError(
            "circuit-tracer's form is of graphs per token, and this one is aggregated: give the graph's own folder"
        )
    slug = slug or slug_of(graph)
    content = _content(graph, slug, labels or {}, most_nodes)
    numbers = {node["name"]: node["feature"] for node in content["nodes"] if node["feature_type"] == TRANSCODER}
    alike: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in graph.nodes.to_pylist():
        if row["name"] in numbers:
            alike[numbers[row["name"]]].append(row)
    (folder / f"{slug}.features").mkdir(parents=True, exist_ok=True)
    for number, rows in alike.items():
        page = folder / f"{slug}.features" / f"{number}.json"
        write_bytes(page, json_bytes(_page(number, rows, graph.facts)))
    path = folder / f"{slug}.json"
    write_json(path, content)
    _list(folder, content["metadata"])
    return path


def slug_of(graph: Graph) -> str:
    """What a graph is called: `image-00017.step-2.img_3.p12.f66`, or with the supernode's name; several targets are counted."""
    targets = [row for row in graph.nodes.to_pylist() if row["target"]]
    if not targets:
        raise ForeignError("the graph says of no node that it is a target: it cannot be shown as circuit-tracer does")
    first = targets[0]
    name = first["term"] if first["kind"] == "supernode" else "{stream}_{layer}.p{token}.f{feature}".format(**first)
    more = f".and-{len(targets) - 1}" if len(targets) > 1 else ""
    image, step = graph.facts.get("image"), graph.facts.get("step")
    begin = "" if image is None else f"image-{image:05d}."
    return re.sub(r"[^\w.+-]+", "-", f"{begin}step-{step}.{name}{more}")


def _content(graph: Graph, slug: str, labels: Labels, most: int) -> dict[str, Any]:
    rows = graph.nodes.to_pylist()
    kept = _kept(rows, most)
    columns = Columns.of([rows[number] for number in kept], graph.facts)
    nodes = {number: _node(rows[number], columns, labels) for number in kept}
    reached = _cumulate(nodes, rows)
    links = [
        {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"], "weight": value}
        for source, target, value in _strongest(graph, kept)
    ]
    outputs, into = _outputs(rows, nodes, columns)
    shown = [*nodes.values(), *outputs, *_embeddings(nodes, columns)]
    asked = [nodes[number] for number in kept if rows[number]["target"]]
    best = sorted((n for n in kept if rows[n]["kind"] == "feature" and nodes[n] not in asked), key=_falling(rows))
    pinned = [node["node_id"] for node in [*outputs, *asked, *(nodes[number] for number in best[:PINNED])]]
    metadata = {
        "slug": slug,
        "scan": f"./graph_data/{slug}.features",
        "transcoder_list": [],
        "prompt_tokens": columns.tokens,
        "prompt": _title(graph),
        "node_threshold": reached,
        "schema_version": SCHEMA_VERSION,
    }
    parameters = {
        "pinnedIds": pinned,
        "supernodes": [],
        "linkType": "either",
        "clickedId": asked[0]["node_id"],
        "sg_pos": "",
    }
    return {"metadata": metadata, "qParams": parameters, "nodes": shown, "links": [*links, *into]}


def _kept(rows: list[dict[str, Any]], most: int) -> list[int]:
    """The nodes that are written, ascending: targets, then the most influential."""
    influence = np.array([row["influence"] or 0.0 for row in rows])
    asked = np.array([row["target"] for row in rows])
    kept: list[int] = np.lexsort((np.arange(len(rows)), -influence, ~asked))[:most].tolist()
    return sorted(kept)


def _cumulate(nodes: Mapping[int, dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """Give nodes what its slider cuts at, the share of influence that a node and all stronger ones hold; the largest share."""
    order = sorted((n for n in nodes if not rows[n]["target"]), key=_falling(rows))
    running = itertools.accumulate(rows[number]["influence"] or 0.0 for number in order)
    total = sum(row["influence"] or 0.0 for row in rows if not row["target"]) or 1.0
    reached = 0.0
    for number, held in zip(order, running, strict=True):
        nodes[number]["influence"] = reached = min(1.0, held / total)
    return reached or 1.0


def _falling(rows: list[dict[str, Any]]) -> Callable[[int], tuple[float, int]]:
    """What sorts nodes by falling influence."""
    return lambda number: (-(rows[number]["influence"] or 0.0), number)


def _node(row: Mapping[str, Any], columns: Columns, labels: Labels) -> dict[str, Any]:
    """One of our nodes as one of its."""
    kind, column = TYPES.get(row["kind"], ERROR), columns.of_node(row)
    site = f"{row['stream']}_{row['layer']}"
    feature, layer, identity = UNNUMBERED.get(row["kind"], 0), "E", row["name"]
    if row["kind"] == "feature":
        feature = paired(2 * row["layer"] + (row["stream"] == "txt"), row["feature"])
        identity = f"{row['layer']}_{row['feature']}_{column}"
    if row["kind"] == "bias":
        feature = columns.bias_number(row)
    if kind != EMBEDDING:
        layer = str(columns.top if kind == LOGIT else row["layer"] or 0)
    if kind == EMBEDDING:
        feature = column
    node = _bare(identity, feature, layer, column, kind) | {"name": row["name"], "activation": row["activation"]}
    match row["kind"]:
        case "feature":
            node["clerp"] = f"{site}/{row['feature']} at {columns.place(row)}"
            if site in labels and (name := labels[site].text(row["feature"])):
                node["clerp"] = f"{name} · {node['clerp']}"
        case "error":
            node["clerp"] = f"error of {site} at {columns.place(row)}"
        case "rest":
            node["clerp"] = f"features of {site} at {columns.place(row)} that were not expanded"
        case "bias":
            node["clerp"] = f"bias of {site}: {row['term']}"
        case "dropped":
            node["clerp"] = "edges under the thresholds"
        case "supernode":
            node |= {"clerp": output_label(row["term"], 1.0), "token_prob": 1.0, "is_target_logit": True}
    return node


def _outputs(
    rows: list[dict[str, Any]], nodes: Mapping[int, dict[str, Any]], columns: Columns
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An output above each feature that was asked for, and the link that leads there."""
    asked = [number for number in nodes if rows[number]["target"] and rows[number]["kind"] == "feature"]
    pre = [abs(rows[number]["pre"] or rows[number]["activation"] or 0.0) for number in asked]
    outputs: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    for number, value in zip(asked, pre, strict=True):
        row, below, share = rows[number], nodes[number], value / (sum(pre) or 1.0)
        name = f"{row['stream']}_{row['layer']}/{row['feature']} at {columns.place(row)}"
        output = _bare(f"target_{row['name']}", below["feature"], str(columns.top), below["ctx_idx"], LOGIT)
        outputs.append(
            output | {"clerp": output_label(name, share), "token_prob": share, "is_target_logit": not outputs}
        )
        links.append({"source": below["node_id"], "target": output["node_id"], "weight": row["pre"] or value})
    return outputs, links


def _embeddings(nodes: Mapping[int, dict[str, Any]], columns: Columns) -> list[dict[str, Any]]:
    """Embedding nodes of the columns that have none: its page names only columns with one."""
    there = {node["ctx_idx"] for node in nodes.values() if node["feature_type"] == EMBEDDING}
    missing = [column for column in range(len(columns.tokens)) if column not in there]
    return [_bare(f"column_{column}", column, "E", column, EMBEDDING) for column in missing]


def _bare(identity: str, feature: int, layer: str, column: int, kind: str) -> dict[str, Any]:
    """A node of its with everything that its readers ask for."""
    return {
        "node_id": identity.replace(",", " "),  # its addresses list nodes with commas between
        "jsNodeId": identity.replace(",", " "),
        "feature": feature,
        "layer": layer,
        "ctx_idx": column,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _page(number: int, rows: list[dict[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What its page of a feature reads: the tokens of the trace at which the feature is active, the strongest, in their order."""
    found = {row["token"]: row["activation"] or 0.0 for row in rows}
    for row in rows:
        found |= dict(zip(row["map_token"] or [], row["map_value"] or [], strict=True))
    strongest = sorted(found, key=lambda token: (-found[token], token))[:SHOWN]
    tokens = sorted(strongest)
    example = {
        "tokens": [f"{place_of(rows[0]['stream'], token, facts)}: {found[token]:.3g}  " for token in tokens],
        "tokens_acts_list": [found[token] for token in tokens],
        "train_token_ind": tokens.index(strongest[0]),
        "is_repeated_datapoint": False,
    }
    return {
        "index": number,
        "act_min": 0.0,
        "act_max": found[strongest[0]] or 1.0,
        "top_logits": [],
        "bottom_logits": [],
        "examples_quantiles": [{"quantile_name": "Where it is active here", "examples": [example]}],
    }


def _list(folder: Path, metadata: dict[str, Any]) -> None:
    """Enter a graph into the list of the folder, by slug; a list that says it already is left alone."""
    path = folder / "graph-metadata.json"
    known = read_json(path)["graphs"] if path.is_file() else []
    if metadata in known:
        return
    graphs = [graph for graph in known if graph["slug"] != metadata["slug"]] + [metadata]
    write_bytes(path, json_bytes({"graphs": sorted(graphs, key=lambda graph: str(graph["slug"]))}))


def _title(graph: Graph) -> str:
    facts = graph.facts
    where = [f"{name} {facts[name]}" for name in ("image", "step") if facts.get(name) is not None]
    return " · ".join([str(facts.get("prompt") or ""), *where]).strip(" ·")


def _strongest(graph: Graph, kept: list[int]) -> list[tuple[int, int, float]]:
    """The links that are written, in the graph's order."""
    sources, targets, values = graph.sources, graph.targets, graph.attributions
    among = np.flatnonzero(np.isin(sources, kept) & np.isin(targets, kept))
    strongest = among[np.argsort(-np.abs(values[among]), kind="stable")[:MOST_LINKS]]
    chosen = np.sort(strongest)
    return list(zip(sources[chosen].tolist(), targets[chosen].tolist(), values[chosen].tolist(), strict=True))


def _columns(graph: Graph, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(graph.nodes[name].to_pylist() for name in names), strict=True))


def output_label(name: str, share: float) -> str:
    """What an output is called: its frontend takes name and number out of this very form."""
    quoted = name.replace('"', "'").replace("(p=", "(")
    return f'Output "{quoted}" (p={share:.3f})'


def paired(x: int, y: int) -> int:
    """Cantor's pairing of two numbers, in which its schema 1 counts features."""
    return (x + y) * (x + y + 1) // 2 + y
