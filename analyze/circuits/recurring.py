"""Edges and nodes that stand in many graphs: how often, over how many prompts, with what sign and how strong."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.circuits.finished import Finished
from analyze.circuits.nodes import Node
from analyze.circuits.panels import Panel
from store.sizes import many
from store.split import normalise

COUNTS = [
    pa.field("graphs", pa.int32(), nullable=False),  # in how many it stands
    pa.field("of_graphs", pa.int32(), nullable=False),  # in how many it could: an edge's target has edges; a node: all
    pa.field("images", pa.int32(), nullable=False),
    pa.field("prompts", pa.int32(), nullable=False),  # case and spaces aside
    pa.field("steps", pa.list_(pa.int32()), nullable=False),
]
SPREAD = [
    pa.field("mean", pa.float64(), nullable=False),  # of an edge its attribution, of a node its effect
    pa.field("deviation", pa.float64(), nullable=False),  # standard deviation over those graphs
    pa.field("least", pa.float64(), nullable=False),
    pa.field("most", pa.float64(), nullable=False),
    pa.field("same_sign", pa.float64(), nullable=False),  # share of those graphs with the sign that most have
]
EDGE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        *COUNTS,
        *SPREAD,
        pa.field("share", pa.float64(), nullable=False),  # mean over those graphs of |a| over all |a| into the target
    ]
)
NODE = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        *COUNTS,
        *SPREAD,
        pa.field("influence", pa.float64(), nullable=False),  # mean over those graphs
    ]
)
CONSTANT = ("bias", "dropped")
"""kinds of node that recur everywhere and say little: in the tables, not in what is printed and drawn"""


def recurring_edges(members: Sequence[Finished], min_graphs: int = 2, min_prompts: int = 1) -> pa.Table:
    """A row an edge that stands in so many graphs, of so many prompts: by prompts, graphs, share, falling; columns as in `EDGE`."""
    found: dict[tuple[str, str], list[tuple[Finished, float, float]]] = defaultdict(list)
    fed: dict[str, int] = defaultdict(int)
    for member in members:
        graph, names = member.graph, member.graph.names
        whole = np.bincount(graph.targets, np.abs(graph.attributions), minlength=len(names))
        for row in np.flatnonzero(whole).tolist():
            fed[names[row]] += 1
        for source, target, value in zip(graph.sources, graph.targets, graph.attributions.tolist(), strict=True):
            found[names[source], names[target]].append((member, value, abs(value) / (whole[target] or 1.0)))
    rows = [
        {"source": source, "target": target, **_counts(stands, fed[target]), **_spread([value for _, value, _ in stands]),
         "share": float(np.mean([share for _, _, share in stands]))}
        for (source, target), stands in found.items()
    ]  # fmt: skip
    kept = _enough(rows, min_graphs, min_prompts)
    kept.sort(key=lambda row: (-row["prompts"], -row["graphs"], -row["share"], row["source"], row["target"]))
    return pa.Table.from_pylist(kept, schema=EDGE)


def recurring_nodes(members: Sequence[Finished], min_graphs: int = 2, min_prompts: int = 1) -> pa.Table:
    """A row a node that stands in so many graphs, of so many prompts: by prompts, graphs, influence, falling; columns as in `NODE`."""
    found: dict[str, list[tuple[Finished, float, float]]] = defaultdict(list)
    for member in members:
        nodes = member.graph.nodes
        for name, effect, influence in zip(
            *(nodes[column].to_pylist() for column in ("name", "effect", "influence")), strict=True
        ):
            found[name].append((member, effect or 0.0, influence or 0.0))
    rows = [
        {"name": name, **_counts(stands, len(members)), **_spread([effect for _, effect, _ in stands]),
         "influence": float(np.mean([influence for _, _, influence in stands]))}
        for name, stands in found.items()
    ]  # fmt: skip
    kept = _enough(rows, min_graphs, min_prompts)
    kept.sort(key=lambda row: (-row["prompts"], -row["graphs"], -row["influence"], row["name"]))
    return pa.Table.from_pylist(kept, schema=NODE)


def _enough(rows: list[dict[str, Any]], min_graphs: int, min_prompts: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["graphs"] >= min_graphs and row["prompts"] >= min_prompts]


def _counts(stands: Iterable[tuple[Finished, float, float]], of: int) -> dict[str, Any]:
    members = [member for member, _, _ in stands]
    return {
        "graphs": len(members),
        "of_graphs": of,
        "images": len({(member.store, member.image) for member in members}),
        "prompts": len({normalise(member.prompt) for member in members}),
        "steps": sorted({member.step for member in members}),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    positive = sum(value > 0 for value in values)
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values)),
        "least": min(values),
        "most": max(values),
        "same_sign": max(positive, len(values) - positive) / len(values),
    }


def telling(edges: pa.Table) -> list[dict[str, Any]]:
    """The rows of edges whose source is no constant."""
    return [row for row in edges.to_pylist() if Node.parse(row["source"]).kind not in CONSTANT]


def recurring_panel(edges: pa.Table, nodes: pa.Table, targets: Iterable[str] = ()) -> Panel:
    """What is drawn of recurring edges: their nodes by mean influence, and each edge by its mean share; `targets` get a ring."""
    rows = telling(edges)
    names = dict.fromkeys(name for row in rows for name in (row["source"], row["target"]))
    known = dict(zip(nodes["name"].to_pylist(), nodes["influence"].to_pylist(), strict=True))
    return Panel(
        f"{many(len(rows), 'edge')}, each in {min((row['graphs'] for row in rows), default=0)} graphs or more; wide: much is passed on",
        {name: known.get(name, 0.0) for name in names},
        [(row["source"], row["target"], float(np.copysign(row["share"], row["mean"]))) for row in rows],
        frozenset(targets) & frozenset(names),
    )


def recurring_text(edges: pa.Table, graphs: int, best: int) -> str:
    """The table of the first recurring edges for a terminal."""
    rows = telling(edges)
    if not rows:
        return f"  no edge recurs over {many(graphs, 'graph')}"
    shown = rows[:best]
    names = [f"{row['source']} -> {row['target']}" for row in shown]
    width = max(len("edge"), *map(len, names))
    lines = [f"  {'edge':<{width}}  prompts images  graphs  attribution      ±  same sign  share"]
    for name, row in zip(names, shown, strict=True):
        held = f"{row['graphs']}/{row['of_graphs']}"
        lines.append(
            f"  {name:<{width}}  {row['prompts']:>7} {row['images']:>6} {held:>7}  {row['mean']:>+11.4f} {row['deviation']:>6.3f}"
            f"  {row['same_sign']:>9.0%}  {row['share']:>5.1%}"
        )
    if len(rows) > best:
        lines.append(f"  … and {len(rows) - best:,} more in recurring.parquet")
    return "\n".join(lines)
