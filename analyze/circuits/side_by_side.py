"""The graphs of one image and target at several steps, side by side: what is there from the start, what comes and goes."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.circuits.finished import Finished
from analyze.circuits.panels import Panel
from analyze.circuits.recurring import CONSTANT

Groups = Mapping[str, Sequence[Finished]]
"""graphs of one image and target by step, under the name of their picture"""

MANY, LONGEST = 3, 120
"""targets, and characters of them, that stand in the name of a picture"""
WHAT = [
    pa.field("name", pa.string(), nullable=False),  # of the group
    pa.field("image", pa.int64(), nullable=False),
    pa.field("step", pa.int32(), nullable=False),
]
NODE_STEP = pa.schema(
    [
        *WHAT,
        pa.field("node", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        ("layer", pa.int32()),
        ("stream", pa.string()),
        ("feature", pa.int32()),
        ("activation", pa.float64()),
        ("influence", pa.float64()),
        ("effect", pa.float64()),
        pa.field("at_steps", pa.int32(), nullable=False),  # at how many of the steps the node stands
    ]
)
EDGE_STEP = pa.schema(
    [
        *WHAT,
        pa.field("source", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("attribution", pa.float64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),  # of all |a| into the target at that step
        pa.field("at_steps", pa.int32(), nullable=False),
    ]
)


def grouped(members: Sequence[Finished]) -> dict[str, list[Finished]]:
    """The graphs of one image and the same features at two or more steps, by step, under a name.

    A target may stand at another token at each step, as `max` finds it; where a step has several tokens of it, tokens are kept apart.
    """
    groups: dict[tuple[str, int, tuple[str, ...]], list[Finished]] = defaultdict(list)
    for member in members:
        groups[member.store, member.image, member.explained].append(member)
    apart: dict[tuple[str, int, tuple[str, ...]], list[Finished]] = {}
    for (store, image, explained), group in groups.items():
        if len({member.step for member in group}) == len(group):
            apart[store, image, explained] = group
            continue
        for member in group:
            apart.setdefault((store, image, member.targets), []).append(member)
    several = len({member.store for member in members}) > 1
    found: dict[str, list[Finished]] = {}
    for (store, image, names), group in apart.items():
        if len({member.step for member in group}) == len(group) > 1:
            start = (f"store-{store.removeprefix('sha256-')[:8]}." if several else "") + f"image-{image:05d}."
            name = start + _called(names)
            if name in found:  # names that differ in what no file can be called
                name += f".{_digest(names)}"
            found[name] = sorted(group, key=lambda member: member.step)
    return found


def _called(names: Sequence[str]) -> str:
    """Targets in the name of a file: of many the first two, how many more, and what tells them from others."""
    text = re.sub(r"[^\w.+-]+", "-", "+".join(names))
    if len(names) <= MANY and len(text) <= LONGEST:
        return text
    first = re.sub(r"[^\w.+-]+", "-", "+".join(names[:2]))[:LONGEST]
    more = f"+and-{len(names) - 2}" if len(names) > 2 else ""
    return f"{first}{more}.{_digest(names)}"


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("+".join(names).encode()).hexdigest()[:8]


def nodes_over_steps(groups: Groups) -> pa.Table:
    """A row a node and step at which it stands, columns as in `NODE_STEP`."""
    rows: list[dict[str, Any]] = []
    for name, group in groups.items():
        at = _count(node for member in group for node in member.graph.names)
        for member in group:
            rows += [
                {**row, "name": name, "image": member.image, "step": member.step, "node": row["name"], "at_steps": at[row["name"]]}
                for row in member.graph.nodes.to_pylist()
            ]  # fmt: skip
    return pa.Table.from_pylist([{key: row[key] for key in NODE_STEP.names} for row in rows], schema=NODE_STEP)


def edges_over_steps(groups: Groups) -> pa.Table:
    """A row an edge and step at which it stands, columns as in `EDGE_STEP`."""
    rows: list[dict[str, Any]] = []
    for name, group in groups.items():
        shares = [edge_shares(member) for member in group]
        at = _count(edge for of in shares for edge in of)
        for member, of in zip(group, shares, strict=True):
            rows += [
                {"name": name, "image": member.image, "step": member.step, "source": source, "target": target,
                 "attribution": value, "share": abs(share), "at_steps": at[source, target]}
                for (source, target), (value, share) in of.items()
            ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EDGE_STEP)


def edge_shares(member: Finished) -> dict[tuple[str, str], tuple[float, float]]:
    """Of each edge by name its attribution, and that over all |a| into its target."""
    graph, names = member.graph, member.graph.names
    whole = np.bincount(graph.targets, np.abs(graph.attributions), minlength=len(names))
    return {
        (names[source], names[target]): (value, value / (float(whole[target]) or 1.0))
        for source, target, value in zip(
            graph.sources.tolist(), graph.targets.tolist(), graph.attributions.tolist(), strict=True
        )
    }


def step_panels(group: Sequence[Finished]) -> list[Panel]:
    """What is drawn of a group: a panel a step, without constants."""
    panels = []
    for member in group:
        nodes = member.graph.nodes.to_pylist()
        told = {row["name"]: row["influence"] or 0.0 for row in nodes if row["kind"] not in CONSTANT}
        edges = [
            (source, target, share)
            for (source, target), (_, share) in edge_shares(member).items()
            if source in told and target in told
        ]
        sigma = member.graph.facts.get("sigma")
        title = f"step {member.step}" + ("" if sigma is None else f", sigma {sigma:.3g}")
        panels.append(Panel(title, told, edges, frozenset(row["name"] for row in nodes if row["target"])))
    return panels


def over_steps_text(groups: Groups, best: int) -> str:
    """For a terminal: of each target over steps, how much of a step's graph stands at the one before too."""
    if not groups:
        return "  no image has graphs of one target at several steps: nothing to lay side by side"
    lines = []
    for name, group in list(groups.items())[:best]:
        kept = []
        for before, member in pairwise(group):
            old, new = set(edge_shares(before)), edge_shares(member)
            weight = sum(abs(share) for _, share in new.values())
            stayed = sum(abs(share) for edge, (_, share) in new.items() if edge in old)
            kept.append(f"{before.step}->{member.step} {stayed / (weight or 1.0):.0%}")
        lines.append(f"  {name}: of its edges, by share, stood at the step before: {', '.join(kept)}")
    if len(groups) > best:
        lines.append(f"  … and {len(groups) - best:,} more in over_steps.parquet")
    return "\n".join(lines)


def _count(things: Any) -> dict[Any, int]:
    counted: dict[Any, int] = defaultdict(int)
    for thing in things:
        counted[thing] += 1
    return counted
