"""The circuit of a value (of the colour red, say) as its attribution graphs show it: sources that recur, and what sets them apart.

1. Of every graph, each feature's effect on the target (along all paths, all its tokens together) as a share of the target's
   pre-activation; or, by path, the strongest single path from it to the target.
2. The mean over the graphs of a value, less the mean over the graphs of the other values: what red's graphs have in common with
   those of green (that there is an object at all) cancels out.
3. Sources are ranked by that difference; only those that excite the target, in the mean over the value's graphs and more than in the
   others (effect and difference above 0), belong to its circuit: a strong path may inhibit.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analyze.circuits.finished import finished_folders
from analyze.circuits.graph import Graph
from analyze.circuits.nodes import Node
from store.errors import ForeignError, MismatchError, UsageError
from store.sites import Site
from store.sizes import many

Feature = tuple[Site, int]
By = Literal["txt", "img", "both", "path", "supernode"]


@dataclass(frozen=True)
class Member:
    """One attribution graph, per token, of one value's circuit."""

    folder: Path
    image: int
    step: int
    store: str
    targets: tuple[Feature, ...]
    strengths: Mapping[Feature, float]
    """of every feature that is no target: its effect, as a share of the targets' pre-activation"""
    paths: Mapping[Feature, float]
    """of the same: the strongest single path to a target, in 0 to 1"""
    transcoders: Mapping[str, str]
    """site -> identity of the dictionary that the graph was made with"""


@dataclass(frozen=True)
class Source:
    """One feature of a circuit, and how much the graphs speak for it."""

    site: Site
    feature: int
    share: float
    """mean over the value's graphs"""
    elsewhere: float
    """mean over the graphs of the other values; 0 where there are none"""
    graphs: int
    """in how many of the value's graphs it stands"""

    @property
    def excess(self) -> float:
        """What it is ranked by."""
        return self.share - self.elsewhere

    @property
    def key(self) -> Feature:
        """Site and number."""
        return self.site, self.feature

    def __str__(self) -> str:
        return f"{self.site}:{self.feature}"


def read_members(roots: Sequence[Path]) -> list[Member]:
    """The graphs below some folders of `analyze graph`; `UsageError` where there are none, `ForeignError` for a broken one."""
    return [_member(folder) for folder in finished_folders(roots)]


def _member(folder: Path) -> Member:
    graph = Graph.read(folder)
    facts = graph.facts
    try:
        pre = sum(abs(float(target["pre"])) for target in facts["targets"])
        image, step, store = int(facts["image"]), int(facts["step"]), str(facts["store"])
        explained = _explained(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignError(
            f"{folder}/facts.json does not say what it is of ({error!r}): make the graph again"
        ) from None
    nodes = graph.nodes
    kinds, targets = np.asarray(nodes["kind"].to_pylist()), np.asarray(nodes["target"].to_pylist(), bool)
    rows = np.flatnonzero((kinds == "feature") & ~targets).tolist()
    named = graph.names
    names = [Node.parse(named[row]) for row in rows]
    effects, best = nodes["effect"].to_pylist(), strongest_paths(graph)
    strengths: dict[Feature, float] = defaultdict(float)
    paths: dict[Feature, float] = defaultdict(float)
    for row, node in zip(rows, names, strict=True):
        assert node.site is not None and node.feature is not None
        key = node.site, node.feature
        if key not in explained:
            strengths[key] += (effects[row] or 0.0) / (pre or 1.0)
            paths[key] = max(paths[key], float(best[row]))
    made_with = {site: str(of.get("identity")) for site, of in (facts.get("transcoders") or {}).items()}
    return Member(folder, image, step, store, explained, strengths, paths, made_with)


def _explained(facts: Mapping[str, Any]) -> tuple[Feature, ...]:
    """The features that a graph explains; the members of a supernode, where it explains one."""
    named = [each for target in facts["targets"] for each in target.get("members") or [target]]
    return tuple(dict.fromkeys((Site.parse(each["site"]), int(each["feature"])) for each in named))


def strongest_paths(graph: Graph) -> np.ndarray:
    """For every node the strongest path from it to a target, float64 (node,): the product of its edges' shares.

    An edge's share is its |attribution| over all |attributions| into the same node; a target has 1, a node without a path 0.
    """
    strength = np.asarray(graph.nodes["target"].to_pylist(), np.float64)
    weights = np.abs(graph.attributions)
    into = np.bincount(graph.targets, weights, minlength=len(strength))
    shares = np.divide(weights, into[graph.targets], out=np.zeros_like(weights), where=into[graph.targets] > 0)
    while True:  # a graph is acyclic: as many rounds as its longest path has edges
        longer = strength.copy()
        np.maximum.at(longer, graph.sources, shares * strength[graph.targets])
        if np.array_equal(longer, strength):
            return strength
        strength = longer


def ranked_sources(members: Mapping[str, Sequence[Member]], value: str, by: By) -> list[Source]:
    """The sources of a value's circuit, best first; `members`: the graphs of every value.

    `by`: txt, img or both streams by effect, or path.  `UsageError` for a value without graphs, or without any such source.
    """
    streams = ("txt", "img") if by in ("both", "path") else (by,)
    found = mean_strengths(members, value, by == "path")
    effects = _mean([member.strengths for member in members[value]])
    circuit = [
        source
        for source in found
        if source.site.stream in streams and source.excess > 0 and effects.get(source.key, 0.0) > 0
    ]
    if not circuit:
        raise UsageError(
            f"the {many(len(members[value]), 'graph')} of {value} have no source by {by} that excites the target more than those of the "
            "other values: trace more images or earlier steps, or choose another --by"
        )
    return circuit


def mean_strengths(members: Mapping[str, Sequence[Member]], value: str, by_path: bool = False) -> list[Source]:
    """Every feature in the graphs of a value but their targets, by `excess`, falling; `UsageError` for a value without graphs."""
    own = members.get(value, ())
    if not own:
        raise UsageError(
            f"there is no graph of {value}: there are graphs of {', '.join(map(str, members)) or 'nothing'}"
        )
    told: Callable[[Member], Mapping[Feature, float]] = (lambda m: m.paths) if by_path else (lambda m: m.strengths)
    here = _mean([told(member) for member in own])
    others = _mean([told(member) for other, each in members.items() if other != value for member in each])
    explained = {feature for member in own for feature in member.targets}
    found = [
        Source(*key, share, others.get(key, 0.0), sum(key in told(member) for member in own))
        for key, share in here.items()
        if key not in explained
    ]
    return sorted(found, key=lambda source: (-source.excess, source.key))


def _mean(found: Sequence[Mapping[Feature, float]]) -> dict[Feature, float]:
    """Mean over graphs; a feature that does not stand in a graph has 0 there."""
    total: dict[Feature, float] = defaultdict(float)
    for each in found:
        for key, value in each.items():
            total[key] += value / len(found)
    return dict(total)


def check_dictionaries(members: Sequence[Member], identities: Mapping[str, str]) -> None:
    """`MismatchError` for graphs made with other dictionaries (site -> identity): their features are others."""
    for member in members:
        for site, identity in member.transcoders.items():
            if identities.get(site) != identity:
                raise MismatchError(
                    f"{member.folder} was made with another dictionary of {site}: {identity[:16]}…, --dictionaries has "
                    f"{identities.get(site, 'none')[:16]}…: give the dictionaries of the graphs"
                )
