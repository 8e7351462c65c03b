"""What `--check` finds of a graph: whether it conserves, whether its trace replays, whether its edges are what a perturbation does.

conservation   of every expanded node, |pre-activation - sum of all that flows in| / max(|pre-activation|, sum of |edges|), before
               any threshold
replay         attention outputs, MLP inputs and residuals computed again from the trace, against those that were recorded: the largest
               difference over the largest value.  What does not replay is in the graph as a bias node, so it breaks no conservation
activation     of every expanded feature, |z - pre-activation| / (|pre-activation| + a thousandth of all |edges| into it): a feature that
               is active passes its pre-activation on as it is (ReLU, TopK, BatchTopK, JumpReLU), and z and the pre-activation are
               computed apart, z by what says which features are active and the pre-activation from the row of one feature
edges          edges drawn at random; what the source writes to the residual is sent through the frozen model forwards, block after
               block by the equations as they stand (`perturbation`), and the change of the target's pre-activation is read:
               |change - attribution| over |attribution| + a thousandth of all |edges| into that target
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analyze.circuits.frozen import FrozenModel, Member, Target, perturbed
from analyze.circuits.graph import Graph
from analyze.circuits.influence import column
from analyze.circuits.nodes import Node
from analyze.circuits.settings import GraphSettings

CONSERVATION = {"float32": 1e-5, "float64": 1e-12}
"""by what attributions are computed in"""
REPLAY = {"float32": 1e-4, "bfloat16": 5e-2}
"""by what traces are written in"""
ACTIVATION = {"float32": 1e-3, "float64": 1e-9}
EDGES = {"float32": 1e-3, "float64": 1e-9}
KINDS = ("conservation", "replay", "activation", "edges")
SMALL = 1e-3
"""of all that flows into a target: an edge is not judged to more digits than this has"""
PERTURBED = ("feature", "error", "input")
"""kinds of node that can be made larger"""


@dataclass(frozen=True)
class Check:
    """What was found of one graph: the largest error of each kind, and its bound."""

    conservation: float
    replay: float
    activation: float
    edges: float
    compared: int
    """edges that were compared with a perturbation"""
    bounds: tuple[float, float, float, float]
    """of conservation, replay, activation, edges"""

    @property
    def worst(self) -> tuple[tuple[str, float, float], ...]:
        """What is over its bound: what, the error, the bound.  A NaN is."""
        found = zip(KINDS, (self.conservation, self.replay, self.activation, self.edges), self.bounds, strict=True)
        return tuple((what, error, bound) for what, error, bound in found if not error <= bound)


def check_graph(
    settings: GraphSettings, model: FrozenModel, graph: Graph, asked: Sequence[Target], trace_dtype: str
) -> Check:
    """What was found of a graph per token; `asked` are its targets."""
    conservation = graph.nodes["conservation"].drop_null().to_numpy()
    edges, compared = _edge_error(settings, model, graph, asked)
    replay = model.replay_error(max(member.site.layer for target in asked for member in target.members))
    return Check(
        conservation=_largest(conservation), replay=_largest(np.asarray(list(replay.values()))),
        activation=activation_error(graph), edges=edges, compared=compared,
        bounds=(CONSERVATION[settings.dtype], REPLAY[trace_dtype], ACTIVATION[settings.dtype], EDGES[settings.dtype]),
    )  # fmt: skip


def activation_error(graph: Graph) -> float:
    """The largest difference of an expanded feature's z from its pre-activation."""
    z, pre, conservation = (column(graph, name) for name in ("activation", "pre", "conservation"))
    expanded = np.isfinite(conservation) & (np.asarray(graph.nodes["kind"].to_pylist()) == "feature")
    flow = np.bincount(graph.targets, np.abs(graph.attributions), len(graph.nodes))[expanded]
    return _largest(np.abs(z - pre)[expanded] / np.maximum(np.abs(pre)[expanded] + SMALL * flow, np.finfo(float).tiny))


def _largest(errors: np.ndarray) -> float:
    """The largest; NaN where one is."""
    return float(errors.max()) if len(errors) else 0.0


def _edge_error(
    settings: GraphSettings, model: FrozenModel, graph: Graph, asked: Sequence[Target]
) -> tuple[float, int]:
    """The largest error of edges drawn at random, and how many were drawn."""
    kinds = np.asarray(graph.nodes["kind"].to_pylist())
    there = np.flatnonzero(np.isin(kinds[graph.sources], PERTURBED))
    drawn = np.random.default_rng(settings.seed).permutation(there)[: settings.check_edges]
    if not len(drawn):
        return 0.0, 0
    names = graph.names
    source_rows, source_at = np.unique(graph.sources[drawn], return_inverse=True)
    target_rows, target_at = np.unique(graph.targets[drawn], return_inverse=True)
    known = {_name_of(target): target for target in asked}
    sources = [Node.parse(names[row]) for row in source_rows]
    targets = [_target(names[row], known) for row in target_rows]
    changed = perturbed(model, sources, targets)[source_at, target_at]
    flow = np.bincount(graph.targets, np.abs(graph.attributions), len(names))[graph.targets[drawn]]
    edges = graph.attributions[drawn]
    return _largest(np.abs(changed - edges) / np.maximum(np.abs(edges) + SMALL * flow, np.finfo(float).tiny)), len(
        drawn
    )


def _name_of(target: Target) -> str:
    if target.name is not None:
        return Node("supernode", term=target.name).name
    (member,) = target.members
    return Node("feature", member.site, member.token, member.feature).name


def _target(name: str, known: Mapping[str, Target]) -> Target:
    """What is traced back at a node of the graph."""
    if name in known:
        return known[name]
    node = Node.parse(name)
    assert node.site is not None and node.token is not None and node.feature is not None
    return Target((Member(node.site, node.token, node.feature),))


def check_table(checks: Sequence[tuple[str, Check]]) -> str:
    """A line a graph, for a terminal."""
    width = max(len("graph"), *(len(name) for name, _ in checks))
    lines = [f"  {'graph':<{width}}  conservation  replay error  z against pre  edges perturbed  largest edge error"]
    for name, check in checks:
        mark = "" if not check.worst else "  OVER: " + ", ".join(what for what, _, _ in check.worst)
        lines.append(
            f"  {name:<{width}}  {check.conservation:>12.2e}  {check.replay:>12.2e}  {check.activation:>13.2e}  {check.compared:>15}  "
            f"{check.edges:>18.2e}{mark}"
        )
    bounds = checks[0][1].bounds
    lines.append(
        f"  {'bound':<{width}}  {bounds[0]:>12.0e}  {bounds[1]:>12.0e}  {bounds[2]:>13.0e}  {'':>15}  {bounds[3]:>18.0e}"
    )
    return "\n".join(lines)
