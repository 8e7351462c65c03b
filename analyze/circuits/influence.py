"""How much each node has to do with the targets: influence, signed effect, and the shares of image, text, errors and constants.

None needs the inverse of a matrix, nor a matrix: `ranking.flow` goes over the edges once for every length of path.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analyze.circuits.graph import Graph
from analyze.circuits.ranking import SMALL, flow

CONSTANT = ("bias", "dropped")
"""kinds of nodes that do not depend on the picture, or are many things at once: they take no part in normalising"""
LEAVES = ("img", "txt", "error", "bias", "rest", "dropped")


def influence(graph: Graph) -> np.ndarray:
    """The influence of every node on the targets, float64 (node,), >= 0: the targets' own is 1 together.

    It is the sum over all paths to a target of the product of |a| / (sum of |a| of all that feeds the same node).  Constants (bias,
    dropped) are left out of that sum, as the reference knows none; their own influence is their share of a sum that has them.
    """
    target = column(graph, "target")
    start = target / max(1.0, float(target.sum()))
    return flow(graph.sources, graph.targets, edge_weights(graph), start)


def edge_weights(graph: Graph) -> np.ndarray:
    """|a| of every edge over the sum of |a| of what feeds its target: float64 (edge,); constants as in `influence`."""
    magnitude, ends = np.abs(graph.attributions), graph.targets
    constant = is_constant(graph)[graph.sources]
    count = len(graph.nodes)
    fed = np.bincount(ends[~constant], magnitude[~constant], minlength=count)
    every = np.bincount(ends, magnitude, minlength=count)
    return np.asarray(magnitude / np.maximum(np.where(constant, every[ends], fed[ends]), SMALL))


def is_constant(graph: Graph) -> np.ndarray:
    """Whether each node is a constant path or what was dropped: bool (node,)."""
    return np.asarray(pc.is_in(graph.nodes["kind"], pa.array(CONSTANT)).to_numpy(zero_copy_only=False))


def effect(graph: Graph) -> np.ndarray:
    """What the targets' pre-activations would lose, together, without each node: float64 (node,), > 0 where it excites them.

    All paths count: what a node adds to a feature changes what that feature adds further on, in proportion.  Exact for the frozen
    model as long as selections stay, over as many paths as the graph has; so over the leaves (inputs, errors, constants, rests,
    dropped) effects sum to the targets' pre-activation.  A target's own is its pre-activation, plus what it does to others.
    For a graph per token; `aggregate` sums it over tokens.
    """
    pre, target = column(graph, "pre"), column(graph, "target")
    passes = np.nan_to_num(pre) > 0  # a node that was not expanded has no edges to pass anything on to

    def in_proportion(arrived: np.ndarray) -> np.ndarray:
        return np.asarray(np.divide(arrived, pre, out=np.zeros_like(arrived), where=passes))

    found = flow(graph.sources, graph.targets, graph.attributions, target, in_proportion)
    return np.asarray(found - target + np.where(target > 0, pre, 0.0))


def shares(graph: Graph) -> dict[str, dict[str, float]]:
    """What the targets are made of, three ways, each of the targets' pre-activation or of the sum of |edges|.

    `direct`: edges into the targets, by what they come from (`features`, `img` and `txt` inputs, `error`, `bias`, `rest`,
    `dropped`), over the pre-activation; sums to 1.  `absolute`: |edges| over their sum.  `paths`: the same kinds along all
    paths, so features are none of them: the effects of the leaves over the pre-activation; sums to 1 too.
    """
    target = column(graph, "target") > 0
    pre = float(column(graph, "pre")[target].sum())
    into = target[graph.targets]
    value, kinds = graph.attributions[into], _kinds(graph)
    of_edge = kinds[graph.sources[into]]
    effects = column(graph, "effect")

    def sums(of: np.ndarray, values: np.ndarray, whole: float, names: tuple[str, ...]) -> dict[str, float]:
        return {name: float(values[of == name].sum()) / (whole or 1.0) for name in names}

    return {
        "direct": sums(of_edge, value, pre, ("features", *LEAVES)),
        "absolute": sums(of_edge, np.abs(value), float(np.abs(value).sum()), ("features", *LEAVES)),
        "paths": sums(kinds, effects, pre, LEAVES),
    }


def with_influence(graph: Graph, effects: np.ndarray | None = None) -> Graph:
    """The graph with the columns `influence` and `effect` filled; `effects` where they are known better than by `effect`."""
    nodes = graph.nodes
    for name, values in (("influence", influence(graph)), ("effect", effect(graph) if effects is None else effects)):
        nodes = nodes.set_column(nodes.schema.get_field_index(name), nodes.schema.field(name), pa.array(values))
    return Graph(nodes, graph.edges, graph.facts)


def column(graph: Graph, name: str) -> np.ndarray:
    """A column of the nodes as float64 (node,): NaN where a node has no value, 1 for true."""
    return np.asarray(graph.nodes[name].to_numpy(zero_copy_only=False), dtype=np.float64)


def _kinds(graph: Graph) -> np.ndarray:
    """What each node counts as in `shares`: its kind, its stream for an input, `features` for a feature or supernode."""
    names = {"feature": "features", "supernode": "features"}
    return np.asarray(
        [
            stream if kind == "input" else names.get(kind, kind)
            for kind, stream in zip(graph.nodes["kind"].to_pylist(), graph.nodes["stream"].to_pylist(), strict=True)
        ],
        dtype=object,
    )
