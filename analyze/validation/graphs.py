"""Which graphs are validated, with the store and the transcoders that they were made from; all that cannot be is refused here.

No model is loaded: a graph of another store, transcoders that are not the ones it was made with, a store that does not say what
drew it, and graphs without anything to perturb are found from records alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from analyze.circuits.finished import Finished, check_alike, finished_folders, read_finished
from analyze.circuits.graph import Graph
from analyze.circuits.nodes import Node
from analyze.inputs import Subject, dictionary_identity, loaded
from analyze.steering.canvas import Canvas, canvas_of_store
from analyze.steering.drawing import Shot, shots_of
from analyze.steering.shelf import Shelf, shelf_of
from analyze.validation.node_writes import Reader, readers_of
from analyze.validation.settings import ValidateSettings
from store import Store, open_store
from store.errors import DamagedError, MismatchError, UsageError
from store.sites import Site, Stream

LONGEST_NAME = 120
"""characters of a folder's name"""


@dataclass(frozen=True)
class Job:
    """One graph and what of it is perturbed and read."""

    name: str
    """as in tables: `image-00002.step-3.img_3.p51.f286`"""
    member: Finished
    """the graph per token"""
    rows: tuple[int, ...]
    """the nodes that are perturbed, rows of the graph's nodes"""
    readers: tuple[Reader, ...]

    @property
    def graph(self) -> Graph:
        """Per token."""
        return self.member.graph

    @cached_property
    def nodes(self) -> list[Node]:
        """The graph's nodes, by row."""
        return [Node.parse(name) for name in self.graph.names]

    @property
    def top(self) -> int:
        """The highest layer that is read: blocks above do not matter."""
        return max(reader.layer for reader in self.readers)


@dataclass(frozen=True)
class Validated:
    """Everything that a validation needs but the model."""

    settings: ValidateSettings
    store: Store
    canvas: Canvas
    shelf: Shelf
    subjects: Mapping[Site, Subject]
    jobs: tuple[Job, ...]
    shots: Mapping[int, Shot]
    """image -> what it is drawn from"""
    text_lengths: Mapping[int, int]
    """image -> how many text tokens are no padding"""
    left_out: int
    """graphs without anything to perturb"""

    @property
    def by_call(self) -> dict[tuple[int, int], list[Job]]:
        """(image, step) -> the graphs of it, in order."""
        found: dict[tuple[int, int], list[Job]] = {}
        for job in self.jobs:
            found.setdefault((job.member.image, job.member.step), []).append(job)
        return dict(sorted(found.items()))

    @property
    def batch_size(self) -> int:
        """Perturbations that run at once."""
        return self.settings.batch_size or max(8, self.store.meta.batch_size)

    def sites(self, top: int) -> list[Site]:
        """Every site up to a layer."""
        streams: tuple[Stream, Stream] = ("img", "txt")
        return [Site("double", layer, stream) for layer in range(top + 1) for stream in streams]


def open_validated(settings: ValidateSettings) -> Validated:
    """The graphs, store and transcoders that `settings` name, checked against one another; every refusal is a `GranaryError`."""
    store = open_store(settings.store)
    canvas = canvas_of_store(store, settings.model)
    members = [read_positional(folder) for folder in finished_folders(settings.graphs)]
    check_alike(members)
    for member in members:
        if member.store != store.id:
            raise MismatchError(
                f"{member.folder} explains a trace of store {member.store[:23]}…, and {store.path} is {store.id[:23]}…: give the "
                "store that the graphs were made from"
            )
    shelf = shelf_of(settings.dictionaries, canvas)
    subjects = _subjects(members, shelf, settings.dictionaries)
    jobs = _jobs(members, settings)
    images = sorted({member.image for member in members})
    shots = dict(zip(images, shots_of(store, images), strict=True))
    lengths = store.prompt_columns("text_length", if_there=True)
    known = "text_length" in lengths.column_names
    tokens = store.meta.max_sequence_length
    text = {image: int(lengths["text_length"][image].as_py()) if known else tokens for image in images}
    return Validated(settings, store, canvas, shelf, subjects, tuple(jobs), shots, text, len(members) - len(jobs))


def read_positional(folder: Path) -> Finished:
    """The graph per token of a folder, and what it is of; `DamagedError` for one that does not say."""
    graph = Graph.read(folder)
    missing = [key for key in ("image", "step", "store", "targets", "transcoders") if key not in graph.facts]
    if missing:
        raise DamagedError(f"{folder}: facts.json does not say {missing[0]}: make the graph again with analyze graph")
    said = {key: graph.facts[key] for key in ("image", "step", "store")}
    return replace(read_finished(folder), graph=graph, **said)


def _subjects(members: Sequence[Finished], shelf: Shelf, folder: Path) -> dict[Site, Subject]:
    """The transcoder of each site that the graphs were made with; `UsageError` where there is none, `MismatchError` for another."""
    wanted: dict[str, str] = {}
    for member in members:
        wanted |= {site: str(of["identity"]) for site, of in member.graph.facts["transcoders"].items()}
    found = {}
    for text, identity in sorted(wanted.items()):
        site = Site.parse(text)
        outline = shelf.outlines.get((site, "transcoder"))
        if outline is None:
            raise UsageError(
                f"{folder} has no transcoder of {site}, which the graphs were made with: give the folder that they were made from"
            )
        assert outline.place is not None
        here = dictionary_identity(loaded(outline.place))
        if here != identity:
            raise MismatchError(
                f"{outline.place} is not the transcoder of {site} that the graphs were made with: it is {here[:16]}…, expected "
                f"{identity[:16]}…; give the folder that they were made from, or make the graphs again"
            )
        found[site] = Subject(text, outline, here)
    return found


def _jobs(members: Sequence[Finished], settings: ValidateSettings) -> list[Job]:
    """Every graph with what is perturbed; `UsageError` where there is nothing at all."""
    jobs: dict[str, Job] = {}
    for member in sorted(members, key=lambda each: (each.image, each.step, each.targets, each.members)):
        readers = readers_of(member.graph)
        rows = _perturbed(member.graph, readers, settings)
        name = _name(member)
        if name in jobs:  # a supernode of the same name, of features at other tokens
            name = f"{name}.{hashlib.sha256(repr(member.members).encode()).hexdigest()[:8]}"
        if rows:
            jobs[name] = Job(name, member, tuple(rows), tuple(readers))
    if not jobs:
        raise UsageError(
            f"none of {len(members)} graphs has a {' or '.join(settings.kinds)} below another expanded node: there is nothing to "
            "perturb; make graphs with more --nodes, or choose --sources feature,error,rest"
        )
    return list(jobs.values())


def _perturbed(graph: Graph, readers: Sequence[Reader], settings: ValidateSettings) -> list[int]:
    """The rows of the nodes that are perturbed: of the kinds asked for, below some reader; the most influential, in order of rows."""
    top = max(reader.layer for reader in readers)
    columns = [graph.nodes[name].to_pylist() for name in ("kind", "layer", "order", "influence")]
    rows, weights = [], []
    for row, (kind, layer, order, influence) in enumerate(zip(*columns, strict=True)):
        known = order is not None or kind != "feature"
        if kind in settings.kinds and known and layer is not None and layer < top:
            rows.append(row)
            weights.append(influence or 0.0)
    if settings.most is not None:
        best = np.argsort(-np.asarray(weights), kind="stable")[: settings.most]
        rows = sorted(rows[place] for place in best.tolist())
    return rows


def _name(member: Finished) -> str:
    """What a graph is called in tables, as its folder is among several graphs."""
    words = []
    for target in member.targets:
        node = Node.parse(target)
        words.append(str(node.term) if node.site is None else f"{node.site}.p{node.token}.f{node.feature}")
    name = f"image-{member.image:05d}.step-{member.step}.{'+'.join(words)}"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 13]}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"
