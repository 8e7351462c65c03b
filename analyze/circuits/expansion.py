"""A graph, grown from its targets: expand the most influential features, rank again, until enough are expanded.

1. All targets are traced back: what feeds each is edges from features, errors, inputs and constant paths.
2. The unexpanded features are ranked (`ranking`), and the best `batch` of them traced back too; again, until `nodes` are expanded.
3. Features that are not expanded become rests, edges under `min_attribution` and beyond the budget become `dropped` (`compaction`).

Graphs of one trace grow side by side: what they want traced goes through the model together, and a node that several of them
expand is traced once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from analyze.circuits.assembly import Grown, assemble
from analyze.circuits.feeds import Feed, feeds
from analyze.circuits.frozen import FrozenModel, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.ranking import Explored, Ranking, best, scores
from analyze.circuits.sources import ActiveIndex, decode, encode
from store.errors import UsageError

HELD = 2_000
"""nodes that graphs may expand together, unless one graph alone is larger: what feeds them is held until the graphs are made"""
EDGES, EDGE_BYTES = 20_000, 12
"""what feeds a node is reckoned as so many edges at most: a quarter of the model's memory may hold what graphs beside one another need"""
LEAST_Z = 1e-4
"""a feature that is less active feeds nothing, by the rule of DifFRACT"""


def expand(
    model: FrozenModel,
    targets: Sequence[Target],
    ranking: Ranking,
    nodes: int,
    batch: int,
    min_attribution: float,
    edges: int | None = None,
) -> Graph:
    """The graph of these targets, per token: `nodes` expanded at most, targets among them, ranked anew after every `batch`.

    Every expanded node's edges add up to its pre-activation.  `edges`: how many to keep at most, those of `dropped` not counted.
    Facts: `n_txt`, `n_img`, `targets`, `totals`; the caller adds what it knows.  `UsageError` for a target of several or weighted
    features without a name, for one that stands twice, and for more targets than `nodes`.
    """
    return expand_many(model, [targets], ranking, nodes, batch, min_attribution, edges)[0]


def expand_many(
    model: FrozenModel,
    groups: Sequence[Sequence[Target]],
    ranking: Ranking,
    nodes: int,
    batch: int,
    min_attribution: float,
    edges: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Graph]:
    """The graph of each group of targets, as `expand` makes them, with sweeps shared; `progress` hears how many more are expanded.

    Which targets stand together in a sweep moves sums in their last bit: to have the same bytes again, ask for the same groups.
    """
    top = max((member.site.layer for group in groups for target in group for member in target.members), default=0)
    index = ActiveIndex(model, top)
    growing = [_begun(model, index, targets, nodes) for targets in groups]
    tell = progress or (lambda _: None)
    found = []
    held = min(HELD, model.memory // (4 * EDGE_BYTES * max(1, min(EDGES, len(index)))))
    together = max(1, held // nodes)
    for begin in range(0, len(growing), together):
        some = growing[begin : begin + together]
        _grow(_Growth(model, index, ranking, nodes, batch, min_attribution), some, tell)
        for each in some:
            grown = Grown(each.targets, np.asarray(each.codes), tuple(each.feeds))
            found.append(assemble(model, index, grown, min_attribution, edges))
            each.feeds.clear()
    return found


@dataclass(frozen=True)
class _Growth:
    """How graphs grow."""

    model: FrozenModel
    index: ActiveIndex
    ranking: Ranking
    nodes: int
    batch: int
    least: float


@dataclass
class _Growing:
    """A graph that grows."""

    targets: tuple[Target, ...]
    codes: list[int]
    """of the nodes to expand, in order; targets first"""
    ids: list[int]
    """their numbers as candidates; -1 for what is none"""
    feeds: list[Feed] = field(default_factory=list)
    """of those that are expanded"""
    complete: bool = False
    edges: int = 0
    """features that feed them, together"""
    columns: tuple[np.ndarray, np.ndarray, np.ndarray] = (
        np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0)
    )  # fmt: skip
    """those: source, target and value of each edge, with room for more"""

    def add(self, found: Sequence[Feed]) -> None:
        """Take over what feeds the next nodes."""
        more = self.edges + sum(len(feed.features) for feed in found)
        if more > len(self.columns[0]):
            source, target, value = (np.resize(column, max(more, 2 * len(column))) for column in self.columns)
            self.columns = source, target, value
        for feed in found:
            here = slice(self.edges, self.edges + len(feed.features))
            for column, values in zip(self.columns, (feed.features, len(self.feeds), feed.values), strict=True):
                column[here] = values
            self.edges = here.stop
            self.feeds.append(feed)

    def explored(self) -> Explored:
        """What feeds the expanded nodes."""
        start = np.zeros(len(self.codes))
        start[: len(self.targets)] = 1 / len(self.targets)
        source, target, value = (column[: self.edges] for column in self.columns)
        strength = np.asarray([feed.strength for feed in self.feeds])
        return Explored(source, target, value, np.asarray(self.ids, dtype=np.int32), strength, start)


def _begun(model: FrozenModel, index: ActiveIndex, targets: Sequence[Target], nodes: int) -> _Growing:
    """The graph of its targets alone, none expanded yet."""
    if not 0 < len(targets) <= nodes:
        raise UsageError(
            f"a graph of {len(targets)} targets and {nodes} expanded nodes: at least one target, and room for all"
        )
    codes = []
    for number, target in enumerate(targets):
        if target.name is not None:
            codes.append(int(encode("supernode", feature=number)))
        elif len(target.members) == 1 and target.members[0].weight == 1:
            (member,) = target.members
            codes.append(int(encode("feature", model.sites.index(member.site), member.token, member.feature)))
        else:
            raise UsageError(f"a target of {len(target.members)} weighted features has no name: give it one")
    named = [target.name for target in targets if target.name is not None]
    if len(set(codes)) < len(codes) or len(set(named)) < len(named):
        raise UsageError("a target stands twice in one graph: name each once")
    return _Growing(tuple(targets), codes, index.find(np.asarray(codes)).tolist())


def _grow(growth: _Growth, graphs: Sequence[_Growing], tell: Callable[[int], object]) -> None:
    """Expand all graphs to their end, side by side: a round traces what each wants next, each node once."""
    known: dict[Target, Feed] = {}
    least_z = LEAST_Z if growth.ranking == "difract" else 0.0
    while pending := [graph for graph in graphs if not graph.complete]:
        wanted = {id(graph): _targets_of_next(growth.model, graph) for graph in pending}
        fresh = list(dict.fromkeys(target for each in wanted.values() for target in each if target not in known))
        known.update(zip(fresh, feeds(growth.model, growth.index, fresh, growth.least, least_z), strict=True))
        for graph in pending:
            graph.add([known[target] for target in wanted[id(graph)]])
            tell(len(wanted[id(graph)]))
            room = min(growth.batch, growth.nodes - len(graph.codes))
            chosen = best(scores(graph.explored(), growth.ranking, len(growth.index)), room)
            graph.complete = not len(chosen)
            graph.ids += chosen.tolist()
            graph.codes += growth.index.codes[chosen].tolist()


def _targets_of_next(model: FrozenModel, graph: _Growing) -> list[Target]:
    """The nodes of a graph that are to be expanded now, as targets."""
    places = range(len(graph.feeds), len(graph.codes))
    parts = [part.tolist() for part in decode(np.asarray([graph.codes[place] for place in places], dtype=np.int64))]
    return [
        graph.targets[place] if place < len(graph.targets) else Target((Member(model.sites[site], token, feature),))
        for place, _, site, token, feature in zip(places, *parts, strict=True)
    ]
