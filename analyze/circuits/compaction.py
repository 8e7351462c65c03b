"""Less in a graph than was found: features that were not expanded become rests, small edges become `dropped`.

What an expanded node is fed by always adds up to its pre-activation, whatever is left out: nothing vanishes, it changes its name.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from analyze.circuits.graph import EDGES
from analyze.circuits.influence import CONSTANT
from analyze.circuits.ranking import SMALL, best, flow
from analyze.circuits.sources import FEATURE_BITS, KINDS, SITE_BITS, TOKEN_BITS, decode, encode

WHERE = (1 << SITE_BITS + TOKEN_BITS) - 1 << FEATURE_BITS
"""the bits of a code that say site and token"""


@dataclass(frozen=True)
class Edges:
    """Edges of a graph that grows, from codes to expanded nodes."""

    source: np.ndarray
    """int64 (edge,): codes"""
    target: np.ndarray
    """int32 (edge,): expanded nodes, by the order of expansion"""
    value: np.ndarray
    """float64 (edge,)"""
    dropped: np.ndarray
    """float64 (node,): what of each expanded node's feed is no edge"""


def compact(edges: Edges, expanded: np.ndarray, least: float, budget: int | None, asked: int = 1) -> Edges:
    """The same with features that are not among the codes `expanded` summed into rests, then only edges of at least `least`.

    Of more than `budget` edges those stay that pass on most to the first `asked` of `expanded`, the graph's targets (`passed_on`).
    Sorted by (target, source), a pair once.
    """
    feature = decode(edges.source)[0] == KINDS.index("feature")
    rest = feature & ~np.isin(edges.source, expanded)
    source = np.where(rest, edges.source & WHERE | encode("rest"), edges.source)
    source, target, value = _summed(source, edges.target, edges.value)
    keep = np.abs(value) >= least
    if budget is not None and keep.sum() > budget:
        strongest = best(np.where(keep, passed_on(source, target, value, expanded, asked), 0.0), budget)
        keep = np.zeros(len(value), dtype=bool)
        keep[strongest] = True
    dropped = edges.dropped + np.bincount(target[~keep], value[~keep], minlength=len(edges.dropped))
    return Edges(source[keep], target[keep], value[keep], dropped)


def passed_on(
    source: np.ndarray, target: np.ndarray, value: np.ndarray, expanded: np.ndarray, asked: int
) -> np.ndarray:
    """What each edge has to do with the targets, float64 (edge,): its share of |a| into its target, times that one's influence.

    Raw |a| would not do: features of the lowest layers have the largest edges, and the targets would keep none of theirs.  Shares
    and influence are those of `influence`, where constants are in no sum but their own.
    """
    magnitude, count = np.abs(value), len(expanded)
    constant = np.isin(decode(source)[0], [KINDS.index(kind) for kind in CONSTANT])
    fed = np.bincount(target[~constant], magnitude[~constant], minlength=count)
    every = np.bincount(target, magnitude, minlength=count)
    share = magnitude / np.maximum(np.where(constant, every[target], fed[target]), SMALL)
    order = np.argsort(expanded, kind="stable")
    at = order[np.minimum(np.searchsorted(expanded, source, sorter=order), count - 1)]
    between = expanded[at] == source
    start = np.zeros(count)
    start[:asked] = 1 / asked
    return np.asarray(share * flow(at[between], target[between], share[between], start)[target])


def summed_edges(source: np.ndarray, target: np.ndarray, value: np.ndarray) -> pa.Table:
    """The table of edges in which a pair may stand more than once: summed, sorted by (target, source)."""
    return edge_table(*_summed(source, target, value))


def edge_table(source: np.ndarray, target: np.ndarray, value: np.ndarray) -> pa.Table:
    """Edges between rows of nodes as the table of a `Graph`."""
    columns = [source.astype(np.int32), target.astype(np.int32), value.astype(np.float64)]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=EDGES)


def _summed(source: np.ndarray, target: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair once, with its sum, sorted by (target, source)."""
    order = np.lexsort((source, target))
    source, target, value = source[order], target[order], value[order]
    first = np.ones(len(source), dtype=bool)
    first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    sums = np.add.reduceat(value, np.flatnonzero(first)) if len(value) else value
    return source[first], target[first], sums
