"""Makes the graphs of an inquiry, trace by trace: one trace read feeds all its targets, and what is done is not done again.

1. A trace is opened, and `max` tokens are looked up in it; targets that are not active there are set apart.
2. Its graphs are made `TOGETHER` at a time, so that a sweep serves several of them, then pruned and summed over tokens.
3. Each is published as soon as it is there, its facts last.  A group of which one is missing is computed again as a whole, so
   that an interrupted run ends with the bytes of one that was not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from analyze.circuits.aggregation import aggregate
from analyze.circuits.checks import Check, check_graph
from analyze.circuits.exchange import difract
from analyze.circuits.expansion import expand_many
from analyze.circuits.folders import graph_folder, is_done, write_graph
from analyze.circuits.frozen import FrozenModel, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.influence import shares
from analyze.circuits.inquiry import Inquiry, tokens_of
from analyze.circuits.pruning import prune
from analyze.circuits.targets import Ask, Experiment, Wanted
from analyze.circuits.trace import Trace, stored_trace
from analyze.circuits.transcoders import Transcoders
from analyze.prompts import prompt_text
from store.errors import UsageError
from store.sites import Stream
from train.dictionaries.provenance import model_name

TOGETHER = 16
"""graphs of a trace that share sweeps"""
NOTHING = 1e-6
"""a supernode whose members cancel out to this share of them has nothing to explain"""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Made:
    """One experiment and what came of it."""

    experiment: Experiment
    name: str
    folder: Path | None
    """None where there is no graph"""
    reason: str | None = None
    """why there is none"""
    new: bool = False
    check: Check | None = None
    inactive: bool = False
    """whether the reason is that a target cannot be explained, mostly because it is not active"""


@dataclass(frozen=True)
class Found:
    """An experiment with its `max` tokens looked up."""

    experiment: Experiment
    tokens: tuple[int | None, ...]
    """None for a `max` of a feature that is active nowhere"""
    inactive: str | None
    """what is not active, in words"""

    @property
    def name(self) -> str:
        """What its folder is called, or would be."""
        return self.experiment.name(self.tokens)

    @property
    def targets(self) -> list[Target]:
        """As the frozen model takes them."""
        found, made = [token for token in self.tokens if token is not None], []
        assert len(found) == len(self.tokens)  # an experiment that is not active has no targets
        tokens = iter(found)
        for wanted in self.experiment.wanted:
            members = tuple(Member(ask.site, next(tokens), ask.feature, ask.weight) for ask in wanted.asks)
            made.append(Target(members, wanted.name))
        return made

    @property
    def asked(self) -> list[str]:
        """Its targets as flags write them, with the tokens that were found."""
        tokens = iter(self.tokens)
        return [
            str(replace(wanted, asks=tuple(replace(ask, token=next(tokens)) for ask in wanted.asks)))
            for wanted in self.experiment.wanted
        ]


def make_all(inquiry: Inquiry) -> Iterator[Made]:
    """Every experiment with what came of it, trace by trace; graphs that are there already are found, the others made.

    Of experiments that turn out to be one graph, as `max` and the token that it means, the first has it.
    """
    seen: dict[str, Found] = {}
    nodes = inquiry.settings.nodes
    with tqdm(total=len(inquiry.experiments) * nodes, desc="graph", unit="node", mininterval=0.5) as progress:
        for (image, step), wanted in inquiry.traces.items():
            progress.set_postfix_str(f"image {image}, step {step}", refresh=False)
            model = LazyModel(inquiry, image, step, wanted)
            every = [_there(inquiry, experiment) or look_up(model, experiment) for experiment in wanted]
            if inquiry.alone and every[0].inactive is not None and not inquiry.settings.skip_inactive:
                raise UsageError(f"{every[0].experiment.where}: {every[0].inactive}")
            found = []
            for each in every:
                first = seen.setdefault(each.name, each) if each.inactive is None else each
                if first is each:
                    found.append(each)
                    continue
                yield _second(each, first)
                progress.update(nodes)
            for start in range(0, len(found), TOGETHER):
                group, before = found[start : start + TOGETHER], progress.n
                yield from _make_group(inquiry, model, group, progress.update)
                progress.update(
                    before + len(group) * nodes - progress.n
                )  # some graphs have fewer nodes, some were there
    for experiment in inquiry.untraced:
        tokens = tuple(ask.token for ask in experiment.asks)
        what = (
            f"image {experiment.image}" if experiment.image not in inquiry.traced.images else f"step {experiment.step}"
        )
        yield Made(experiment, experiment.name(tokens), None, f"{what} is not traced")


def _second(found: Found, first: Found) -> Made:
    """An experiment whose folder another has."""
    where = first.experiment.where
    if found.asked == first.asked:
        return Made(found.experiment, found.name, None, f"the same graph as that of {where}")
    reason = f"its folder would be called as that of {where}: give the supernode another name"
    return Made(found.experiment, found.name, None, reason, inactive=True)


class LazyModel:
    """The frozen model of one trace, opened when it is needed: a trace whose graphs are all there is not read."""

    def __init__(self, inquiry: Inquiry, image: int, step: int, wanted: Sequence[Experiment]) -> None:
        self.inquiry, self.image, self.step = inquiry, image, step
        self.sites, self.n_blocks = inquiry.needed(wanted), max(each.top for each in wanted) + 1
        self._opened: FrozenModel | None = None

    def __call__(self) -> FrozenModel:
        """The model."""
        if self._opened is None:
            settings, store = self.inquiry.settings, self.inquiry.store
            transcoders = Transcoders({site: self.inquiry.subjects[site] for site in self.sites})
            source, device = stored_trace(store, self.image, self.step), device_of(settings.device)
            trace = Trace(source, DTYPES[settings.dtype], device, self.n_blocks)
            self._opened = FrozenModel(trace, transcoders, settings.held)
        return self._opened

    def real_tokens(self, stream: Stream) -> int:
        """How many tokens of a stream `max` chooses among: those of the prompt without its padding, or all with --padding."""
        store = self.inquiry.store
        every = tokens_of(store)[stream]
        if stream != "txt" or self.inquiry.settings.padding:
            return every
        return min(every, int(store.prompts()["text_length"][self.image].as_py()))

    def most_active(self, ask: Ask, padding: bool = False) -> int | None:
        """The token where a feature is most active, the first of equals; None when it is active nowhere."""
        active = self().active(ask.site)
        mine = active.feature == ask.feature
        if not padding:
            mine = mine & (active.token < self.real_tokens(ask.site.stream))
        return int(active.token[mine][active.z[mine].argmax()]) if mine.any() else None


def device_of(asked: str) -> torch.device:
    """Where to compute; `UsageError` for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no GPU that PyTorch can use; leave --device out, or say cpu")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")


def _there(inquiry: Inquiry, experiment: Experiment) -> Found | None:
    """An experiment without `max` whose graph is there: nothing has to be looked up in its trace."""
    tokens = [ask.token for ask in experiment.asks if ask.token is not None]
    found = Found(experiment, tuple(tokens), None)
    if len(tokens) < len(list(experiment.asks)) or not _is_done(inquiry, found):
        return None
    return found


def look_up(model: LazyModel, experiment: Experiment) -> Found:
    """The tokens of an experiment, `max` found, and what of it is not active in the trace."""
    tokens: list[int | None] = []
    inactive: list[str] = []
    for wanted in experiment.wanted:
        found, of = [], "" if wanted.name is None else f"of supernode {wanted.name}, "
        for ask in wanted.asks:
            token = model.most_active(ask) if ask.token is None else ask.token
            if token is None or not model().activation(ask.site, token, ask.feature) > 0:
                inactive.append(of + _not_active(model, ask))
            found.append(token)
        tokens += found
        if not inactive and wanted.name is not None and (nothing := _degenerate(model(), wanted, found)):
            inactive.append(nothing)
    alone = [
        place
        for wanted, place in zip(_owners(experiment), _places(experiment, tokens), strict=True)
        if wanted.name is None
    ]
    if not inactive and len(set(alone)) < len(alone):
        inactive.append("two of the targets are one, as max means the token of another: name each once")
    return Found(experiment, tuple(tokens), "; ".join(inactive) or None)


def _owners(experiment: Experiment) -> list[Wanted]:
    return [wanted for wanted in experiment.wanted for _ in wanted.asks]


def _places(experiment: Experiment, tokens: Sequence[int | None]) -> list[tuple[object, ...]]:
    return [(ask.site, token, ask.feature) for ask, token in zip(experiment.asks, tokens, strict=True)]


def _degenerate(model: FrozenModel, wanted: Wanted, tokens: Sequence[int | None]) -> str | None:
    """What is wrong with a supernode whose members are all active; None when nothing is."""
    places = [(ask.site, token, ask.feature) for ask, token in zip(wanted.asks, tokens, strict=True)]
    if twice := [place for place in places if places.count(place) > 1]:
        site, token, feature = twice[0]
        return f"supernode {wanted.name} has {site}:{token}:{feature} twice, once as max: name it once"
    parts = [ask.weight * model.preactivation(*place) for ask, place in zip(wanted.asks, places, strict=True) if place[1] is not None]  # type: ignore[arg-type]  # fmt: skip
    if abs(sum(parts)) <= NOTHING * sum(map(abs, parts)):
        return f"the members of supernode {wanted.name} cancel out: their weighted pre-activations add up to {sum(parts):.1g}"
    return None


def _not_active(model: LazyModel, ask: Ask) -> str:
    where = f"image {model.image} at step {model.step}"
    best = model.most_active(ask)
    feature, real = f"{ask.site} feature {ask.feature}", model.real_tokens(ask.site.stream)
    if best is None:
        anywhere = model.most_active(ask, padding=True)
        if anywhere is not None:
            return f"{feature} is active at padding alone, tokens from {real} on, of {where}: see --padding, or write token {anywhere}"
        return f"{feature} is active at no token of {where}; analyze scan finds features that are"
    assert ask.token is not None
    pre = model().preactivation(ask.site, ask.token, ask.feature)
    return (
        f"{feature} is not active at token {ask.token} of {where} (pre-activation {pre:.3g}); it is most active at token {best}: "
        f"write {ask.site}:max:{ask.feature}"
    )


def _make_group(
    inquiry: Inquiry, model: LazyModel, group: Sequence[Found], progress: Callable[[int], object]
) -> Iterator[Made]:
    """Make the graphs of a group that are not there, sharing sweeps."""
    out, active = inquiry.settings.out, [each for each in group if each.inactive is None]
    folders = {each.name: graph_folder(out, each.name, inquiry.alone) for each in active}
    done = {each.name: is_done(folders[each.name], each.asked, inquiry.identities(each.experiment)) for each in active}
    graphs: dict[str, Graph] = {}
    if not all(done.values()):
        settings = inquiry.settings
        made = expand_many(
            model(), [each.targets for each in active], settings.ranking, settings.nodes, settings.batch,
            settings.min_attribution, settings.edges, progress,
        )  # fmt: skip
        graphs = dict(zip(folders, made, strict=True))
    for each in group:
        if each.inactive is not None:
            yield Made(each.experiment, each.name, None, each.inactive, inactive=True)
            continue
        folder = folders[each.name]
        if not done[each.name]:
            write_graph(folder, *finished(inquiry, model(), each, graphs[each.name]))
        check = _checked(inquiry, model(), each, folder) if inquiry.settings.check else None
        yield Made(each.experiment, each.name, folder, None, not done[each.name], check)


def _is_done(inquiry: Inquiry, found: Found) -> bool:
    folder = graph_folder(inquiry.settings.out, found.name, inquiry.alone)
    return is_done(folder, found.asked, inquiry.identities(found.experiment))


def _checked(inquiry: Inquiry, model: FrozenModel, found: Found, folder: Path) -> Check:
    return check_graph(inquiry.settings, model, Graph.read(folder), found.targets, inquiry.traced.dtype)


def finished(inquiry: Inquiry, model: FrozenModel, found: Found, graph: Graph) -> tuple[Graph, Graph]:
    """A graph with all its facts, and the same pruned and summed over tokens."""
    settings = inquiry.settings
    facts = _facts(inquiry, model, found, graph)
    whole = Graph(graph.nodes, graph.edges, facts)
    over_tokens = aggregate(whole)
    pruned = prune(over_tokens, settings.node_threshold, settings.edge_threshold)
    facts["totals"] |= difract.sizes(over_tokens)
    facts["totals"] |= {"pruned_nodes": len(pruned.nodes), "pruned_edges": len(pruned.edges)}
    return whole, Graph(pruned.nodes, pruned.edges, {**pruned.facts, "totals": facts["totals"]})


def _facts(inquiry: Inquiry, model: FrozenModel, found: Found, graph: Graph) -> dict[str, Any]:
    """What the graph is of, and how it came out."""
    store, experiment, meta = inquiry.store, found.experiment, inquiry.store.meta
    prompts, tokens = store.prompts(), tokens_of(store)
    subjects = {site: inquiry.subjects[site] for site in inquiry.needed([experiment])}
    totals = {
        **graph.facts.get("totals", {}), "nodes": len(graph.nodes), "edges": len(graph.edges), "shares": shares(graph),
        "replay_error": model.replay_error(experiment.top),
    }  # fmt: skip
    targets = [
        {**said, "encoder_bias": _encoder_bias(model, target)}
        for said, target in zip(graph.facts["targets"], found.targets, strict=True)
    ]
    return {
        **graph.facts, "targets": targets,
        "store": store.id, "model": model_name(meta.model), "image": experiment.image, "prompt": prompt_text(store, experiment.image),
        "seed": prompts["seed"][experiment.image].as_py(), "step": experiment.step,
        "sigma": float(prompts["sigma"][experiment.image].as_py()[experiment.step]),
        "grid": list(meta.grid),
        "height": meta.height, "width": meta.width, "n_txt": tokens["txt"], "n_img": tokens["img"],
        "picture": meta.pictures != "none", "asked": found.asked,
        "transcoders": {str(site): {"name": of.outline.name, "identity": of.identity} for site, of in subjects.items()},
        "settings": inquiry.settings.choices, "totals": totals,
    }  # fmt: skip


def _encoder_bias(model: FrozenModel, target: Target) -> float:
    """The bias of a target's encoder, weighted over its members."""
    return sum(
        each.weight * float(model.transcoders[each.site].encoder.bias[each.feature].detach()) for each in target.members
    )
