"""A graph, grown from its targets: expand the most influential features, rank again, until enough are expanded.

1. All targets are traced back: what feeds each is edges from features, errors, inputs and constant paths.
2. The unexpanded features are ranked (`ranking`), and the best `batch` of them traced back too; again, until `nodes` are expanded.
3. Features that are not expanded become rests, edges under `min_attribution` and beyond the budget become `dropped` (`compaction`).

Graphs of one trace grow side by side: what they want traced goes through the model together, and a node that several of them
expand is traced once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from analyze.circuits.assembly import Grown, assemble
from analyze.circuits.feeds import Feed, Feeder
from analyze.circuits.frozen import FrozenModel, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.ranking import Explored, Ranking, best, scores
from analyze.circuits.sources import ActiveIndex, decode, encode
from store.errors import UsageError

HELD = 2_000
"""nodes that graphs may expand together, unless one graph alone is larger: what feeds them is held until the graphs are made"""
EDGE_BYTES = 64
"""what an edge that feeds an expanded node takes until its graph is made: in its `Feed`, in the columns of its graph, which grow by
doubling, and where nodes are ranked; a quarter of the model's memory may hold what graphs beside one another need"""
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
    growth = _Growth(model, index, ranking, nodes, batch, min_attribution)
    growing = {number: _begun(model, index, targets, nodes) for number, targets in enumerate(groups)}
    found: dict[int, Graph] = {}
    while growing:
        growth.round(list(growing.values())[: growth.room(list(growing.values()))], progress or (lambda _: None))
        for number, each in list(growing.items()):
            if each.complete:
                grown = Grown(each.targets, np.asarray(each.codes), tuple(each.feeds))
                found[number] = assemble(model, index, grown, min_attribution, edges)
                del growing[number], grown
        growth.forget(growing.values())
    return [found[number] for number in range(len(groups))]


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


class _Growth:
    """How graphs grow side by side: a round traces what each wants next, each node once."""

    def __init__(
        self, model: FrozenModel, index: ActiveIndex, ranking: Ranking, nodes: int, batch: int, least: float
    ) -> None:
        self.model, self.index, self.ranking, self.nodes, self.batch = model, index, ranking, nodes, batch
        self._feeder = Feeder(model, index, least, LEAST_Z if ranking == "difract" else 0.0)
        self._known: dict[Target, Feed] = {}
        self._held, self._of = 0, 0

    def room(self, graphs: Sequence[_Growing]) -> int:
        """How many of the graphs may grow in the next round: those whose feeds memory has room for, by the edges of nodes so far."""
        held = max(1, self.model.memory // (4 * EDGE_BYTES))  # edges
        if not self._of:  # only targets are traced yet
            return max(1, held // max(1, len(self.index) * max(len(graph.targets) for graph in graphs)))
        return max(1, min(HELD // self.nodes, held * self._of // max(1, self._held * self.nodes)))

    def round(self, graphs: Sequence[_Growing], tell: Callable[[int], object]) -> None:
        """Trace what each graph wants next, and rank anew."""
        wanted = [_targets_of_next(self.model, graph) for graph in graphs]
        fresh = list(dict.fromkeys(target for each in wanted for target in each if target not in self._known))
        feeds = self._feeder.feeds(fresh)
        self._known.update(zip(fresh, feeds, strict=True))
        self._held, self._of = self._held + sum(len(feed.features) for feed in feeds), self._of + len(feeds)
        for graph, targets in zip(graphs, wanted, strict=True):
            graph.add([self._known[target] for target in targets])
            tell(len(targets))
            room = min(self.batch, self.nodes - len(graph.codes))
            chosen = best(scores(graph.explored(), self.ranking, len(self.index)), room)
            graph.complete = not len(chosen)
            graph.ids += chosen.tolist()
            graph.codes += self.index.codes[chosen].tolist()

    def forget(self, graphs: Iterable[_Growing]) -> None:
        """Let go of what feeds no graph that still grows."""
        needed = {id(feed) for graph in graphs for feed in graph.feeds}
        self._known = {target: feed for target, feed in self._known.items() if id(feed) in needed}


def _targets_of_next(model: FrozenModel, graph: _Growing) -> list[Target]:
    """The nodes of a graph that are to be expanded now, as targets."""
    places = range(len(graph.feeds), len(graph.codes))
    parts = [part.tolist() for part in decode(np.asarray([graph.codes[place] for place in places], dtype=np.int64))]
    return [
        graph.targets[place] if place < len(graph.targets) else Target((Member(model.sites[site], token, feature),))
        for place, _, site, token, feature in zip(places, *parts, strict=True)
    ]
