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
from analyze.circuits.expansion import expand_many
from analyze.circuits.folders import graph_folder, is_done, write_graph
from analyze.circuits.frozen import FrozenModel, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.influence import shares
from analyze.circuits.inquiry import Inquiry, tokens_of
from analyze.circuits.pruning import prune
from analyze.circuits.targets import Ask, Experiment
from analyze.circuits.trace import Trace, stored_trace
from analyze.circuits.transcoders import Transcoders
from analyze.prompts import prompt_text
from store.errors import UsageError
from store.sizes import parse_size
from train.dictionaries.provenance import model_name

TOGETHER = 16
"""graphs of a trace that share sweeps"""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Made:
    """One experiment and what came of it."""

    experiment: Experiment
    name: str
    folder: Path | None
    """None where no target is active"""
    reason: str | None = None
    """why there is no graph"""
    new: bool = False
    check: Check | None = None


@dataclass(frozen=True)
class Found:
    """An experiment with its `max` tokens looked up."""

    experiment: Experiment
    tokens: tuple[int, ...]
    inactive: str | None
    """what is not active, in words"""

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.experiment.name(self.tokens)

    @property
    def targets(self) -> list[Target]:
        """As the frozen model takes them."""
        tokens, made = iter(self.tokens), []
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
    """Every experiment with what came of it, in order; graphs that are there already are found, the others made."""
    seen: dict[str, str] = {}
    nodes = inquiry.settings.nodes
    with tqdm(total=len(inquiry.experiments) * nodes, desc="graph", unit="node", mininterval=0.5) as progress:
        for (image, step), wanted in inquiry.traces.items():
            progress.set_postfix_str(f"image {image}, step {step}", refresh=False)
            model = LazyModel(inquiry, image, step, wanted)
            found = [_there(inquiry, experiment) or look_up(model, experiment) for experiment in wanted]
            for each in found:
                if inquiry.alone and each.inactive is not None:
                    raise UsageError(f"{each.experiment.where}: {each.inactive}")
                _refuse_same_name(seen, each)
            for start in range(0, len(found), TOGETHER):
                group, before = found[start : start + TOGETHER], progress.n
                yield from _make_group(inquiry, model, group, progress.update)
                progress.update(
                    before + len(group) * nodes - progress.n
                )  # some graphs have fewer nodes, some were there


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
            trace = Trace(
                stored_trace(store, self.image, self.step), DTYPES[settings.dtype], device_of(settings.device)
            )
            self._opened = FrozenModel(trace, transcoders, parse_size(settings.memory))
        return self._opened


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
    tokens, inactive = [], []
    for ask in experiment.asks:
        token = _most_active(model(), ask) if ask.token is None else ask.token
        if token is None or not model().activation(ask.site, token, ask.feature) > 0:
            inactive.append(_not_active(model(), experiment, ask))
        tokens.append(0 if token is None else token)
    return Found(experiment, tuple(tokens), "; ".join(inactive) or None)


def _most_active(model: FrozenModel, ask: Ask) -> int | None:
    """The token where a feature is most active, the first of equals; None when it is active nowhere."""
    active = model.active(ask.site)
    mine = active.feature == ask.feature
    return int(active.token[mine][active.z[mine].argmax()]) if mine.any() else None


def _not_active(model: FrozenModel, experiment: Experiment, ask: Ask) -> str:
    where = f"image {experiment.image} at step {experiment.step}"
    best = _most_active(model, ask)
    if best is None:
        return (
            f"{ask.site} feature {ask.feature} is active at no token of {where}; analyze scan finds features that are"
        )
    assert ask.token is not None
    pre = model.preactivation(ask.site, ask.token, ask.feature)
    return (
        f"{ask.site} feature {ask.feature} is not active at token {ask.token} of {where} (pre-activation {pre:.3g}); it is most "
        f"active at token {best}: write {ask.site}:max:{ask.feature}"
    )


def _refuse_same_name(seen: dict[str, str], found: Found) -> None:
    if found.name in seen:
        raise UsageError(
            f"{seen[found.name]} and {found.experiment.where} are one graph, {found.name}: name each target once"
        )
    seen[found.name] = found.experiment.where


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
            yield Made(each.experiment, each.name, None, each.inactive)
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
    pruned = prune(aggregate(whole), settings.node_threshold, settings.edge_threshold)
    facts["totals"] |= {"pruned_nodes": len(pruned.nodes), "pruned_edges": len(pruned.edges)}
    return whole, Graph(pruned.nodes, pruned.edges, {**pruned.facts, "totals": facts["totals"]})


def _facts(inquiry: Inquiry, model: FrozenModel, found: Found, graph: Graph) -> dict[str, Any]:
    """What the graph is of, and how it came out."""
    store, experiment, meta = inquiry.store, found.experiment, inquiry.store.meta
    prompts, tokens = store.prompts(), tokens_of(store)
    subjects = {site: inquiry.subjects[site] for site in inquiry.needed([experiment])}
    totals = {
        **graph.facts.get("totals", {}), "nodes": len(graph.nodes), "edges": len(graph.edges), "shares": shares(graph),
        "replay_error": model.replay_error(),
    }  # fmt: skip
    return {
        **graph.facts,
        "store": store.id, "model": model_name(meta.model), "image": experiment.image, "prompt": prompt_text(store, experiment.image),
        "seed": prompts["seed"][experiment.image].as_py(), "step": experiment.step,
        "sigma": float(prompts["sigma"][experiment.image].as_py()[experiment.step]),
        "grid": list(meta.grid),
        "height": meta.height, "width": meta.width, "n_txt": tokens["txt"], "n_img": tokens["img"],
        "picture": meta.pictures != "none", "asked": found.asked,
        "transcoders": {str(site): {"name": of.outline.name, "identity": of.identity} for site, of in subjects.items()},
        "settings": inquiry.settings.choices, "totals": totals,
    }  # fmt: skip
