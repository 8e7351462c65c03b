"""Edges of attribution graphs from a trace, against running the transformer once a node.

    tiny-flux     as `harvest --trace` stored it: 5 double blocks, 64 image and 16 text tokens, d_model 128
    d_model 512   a random model in 8 double blocks, 1,024 image and 128 text tokens

Ours is `FrozenModel.attribute` on the nodes of a graph in batches, and `expand`, which also ranks nodes and writes the graph's tables.
The reference's way (`bench.reference_circuits`) runs the patched transformer forward to its end and backward for every node, with
P stored, MLP outputs cached and nothing moved between devices; its edges must be ours.  Both take every edge, in float32; seconds
are per expanded node, edges included, by turns, in one run.  Each model has a graph of 40 nodes in batches of 10, as `analyze graph`
makes it when nothing is said, and a larger one in larger batches, for what a sweep costs whatever is in it is shared by its batch.

Least work: the counted operations (`bench.circuit_cases.operations`).  At full FLUX dimensions on a GPU: `python bench/gpu_circuits.py`.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from analyze.circuits.expansion import expand
from analyze.circuits.frozen import Attribution, FrozenModel, Member, Target
from analyze.circuits.graph import Graph
from analyze.circuits.trace import Trace, TraceSource, stored_trace
from bench.circuit_cases import Case, Node, Work, operations, random_inputs, random_transcoders
from bench.lines import Line, Need, Peer, Seconds, Size
from bench.plain_flux import Shape
from bench.reference_circuits import NodeEdges, Recording, Reference, record
from bench.timing import by_turns, quiet
from harvest import fill
from harvest.models.loading import load_pipeline
from harvest.models.model import choose_device
from harvest.sample import Sampler
from harvest.settings import HarvestSettings
from store import open_store
from store.sites import Site

THRESHOLD, MEMORY = 1e-4, 2 << 30
PROMPT, STEP = "a small red circle on a blue background", 2
TINY = Case(Shape(4, 32, 5, 2, 32, 96, 64, (8, 12, 12)), 16, (8, 8), 5, 1024, 0.0625)
RANDOM = Case(Shape(4, 128, 8, 0, 64, 512, 256, (16, 56, 56)), 128, (32, 32), 8, 8192, 0.05)
SMALL = Case(Shape(2, 16, 3, 2, 12, 20, 10, (4, 6, 6)), 4, (2, 3), 3, 64, 0.2)
TOLERANCE = 1e-4
"""of an edge, relative to its node's largest"""


@dataclass(frozen=True)
class Subject:
    """One traced model with both ways to its edges."""

    name: str
    case: Case
    reference: Reference
    load: Callable[[], FrozenModel]
    """our model, made anew: its blocks are read when they are first needed"""
    sample: int
    """nodes that the reference is timed on, at most"""
    rounds: int
    goal: float
    """of ours / its, for edges alone"""


def lines(size: Size) -> Iterator[Line]:
    """Every graph of every model of that size."""
    for make, graphs in SIZES[size]:
        with tempfile.TemporaryDirectory() as folder:
            subject = make(Path(folder))
            for nodes, batch in graphs:
                yield from graph_lines(subject, nodes, batch)


def graph_lines(subject: Subject, count: int, batch: int) -> Iterator[Line]:
    """One graph both ways: in batches, all at once, and with everything that `expand` does beside."""
    before = _reset_peak()
    model = subject.load()
    target = loudest(model)
    graph = grown(model, target, count, batch)
    taken = (_peak() - before) / 1e6
    nodes = expanded(graph)
    some = evenly(nodes, subject.sample)
    sizes = list(dict.fromkeys((batch, len(nodes))))
    ours = [partial(in_batches, model, nodes, size) for size in sizes] + [partial(grown, model, target, count, batch)]
    with subject.reference.patched():
        worst = greatest_error(model, subject.reference, some)
        *times, theirs = by_turns(*ours, partial(one_by_one, subject.reference, some), rounds=subject.rounds)
    active = {site: len(model.active(site).token) for site in model.sites}
    its = work_of(subject.case, some, active, 1).reference / len(some)
    note = (
        f"{len(graph.edges):,} edges, apart by {worst:.0e} at most; {taken:.0f} MB; {its / 1e9:.3g} GFLOP a node the other way, "
        f"timed on {len(some)} nodes"
    )
    names = [f"batches of {size}" if size < len(nodes) else "all at once" for size in sizes] + ["expand"]
    for name, size, seconds in zip(names, (*sizes, batch), times, strict=True):
        goal = None if name == "expand" else subject.goal
        peer = Peer("a forward and a backward pass a node", _each(theirs, len(some)), goal)
        work = work_of(subject.case, nodes, active, size).ours / len(nodes)
        what = f"{subject.name}, {len(nodes)} nodes, {name}"
        yield Line(what, _each(seconds, len(nodes)), (peer,), (Need("float32", work),), note)
        note = ""


def _each(seconds: Seconds, count: int) -> Seconds:
    """Seconds a node."""
    return tuple(whole / count for whole in seconds)


def work_of(case: Case, nodes: Sequence[Node], active: Mapping[Site, int], batch: int) -> Work:
    """Operations of both ways for these nodes."""
    return operations(case, nodes, active, batch, case.shape.double_blocks, case.shape.single_blocks)


def evenly(nodes: Sequence[Node], count: int) -> list[Node]:
    """At most so many of the nodes, evenly over their blocks."""
    ordered = sorted(nodes, key=lambda node: node.site.layer)
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def loudest(model: FrozenModel) -> Target:
    """The most active feature of the image stream in the topmost block."""
    site = max((site for site in model.sites if site.stream == "img"), key=lambda site: site.layer)
    active = model.active(site)
    best = int(active.z.argmax())
    return Target((Member(site, int(active.token[best]), int(active.feature[best])),))


def grown(model: FrozenModel, target: Target, count: int, batch: int) -> Graph:
    """The graph of a target with so many expanded nodes."""
    return expand(model, [target], ranking="influence", nodes=count, batch=batch, min_attribution=THRESHOLD, edges=None)


def expanded(graph: Graph) -> list[Node]:
    """The nodes of a graph that were expanded, in that order."""
    rows = [row for row in graph.nodes.to_pylist() if row["order"] is not None and row["kind"] == "feature"]
    return [
        Node(Site("double", row["layer"], row["stream"]), row["token"], row["feature"])
        for row in sorted(rows, key=lambda row: int(row["order"]))
    ]


def in_batches(model: FrozenModel, nodes: Sequence[Node], size: int) -> list[Attribution]:
    """Our edges of all nodes."""
    targets = [Target((Member(node.site, node.token, node.feature),)) for node in nodes]
    return [model.attribute(targets[start : start + size], THRESHOLD) for start in range(0, len(targets), size)]


def one_by_one(reference: Reference, nodes: Sequence[Node]) -> list[NodeEdges]:
    """The reference's edges of all nodes."""
    return [reference.edges(node.site, node.token, node.feature) for node in nodes]


def greatest_error(model: FrozenModel, reference: Reference, nodes: Sequence[Node]) -> float:
    """The greatest difference between both ways' edges, relative to the node's largest edge; beyond `TOLERANCE` nothing is timed."""
    (found,) = in_batches(model, nodes, len(nodes))
    worst = 0.0
    for number, node in enumerate(nodes):
        theirs = reference.edges(node.site, node.token, node.feature)
        differences, largest = [], 0.0
        for index, site in enumerate(model.sites):
            if site.layer < node.site.layer:
                at = (found.row == number) & (found.site == index)
                mine = (found.token[at], found.feature[at], found.value[at])
                differences.append(_features_apart(mine, tuple(map(_float64, theirs.features[site]))))
                differences.append(float(np.abs(found.errors[site][number] - _float64(theirs.errors[site])).max()))
                largest = max(largest, np.abs(mine[2]).max(initial=0.0))
        for stream, values in theirs.inputs.items():
            differences.append(float(np.abs(found.inputs[stream][number] - _float64(values)).max()))
            largest = max(largest, float(np.abs(found.inputs[stream][number]).max()))
        worst = max(worst, max(differences) / largest)
    if worst > TOLERANCE:
        raise AssertionError(
            f"both ways' edges differ by {worst:.1e} of the largest one of their node: nothing is compared"
        )
    return worst


def _features_apart(mine: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> float:
    """The greatest difference of an edge (token, feature, value); one at the threshold may stand on one side only."""
    keys = [(token.astype(np.int64) << 32) + feature.astype(np.int64) for token, feature, _ in (mine, theirs)]
    every = np.unique(np.concatenate(keys))
    values = np.zeros((2, len(every)))
    for row, (key, edges) in enumerate(zip(keys, (mine, theirs), strict=True)):
        values[row, np.searchsorted(every, key)] = edges[2]
    alone = (values == 0).any(axis=0) & (np.abs(values).max(axis=0) < 1.01 * THRESHOLD)
    return float(np.abs(values[0] - values[1])[~alone].max(initial=0.0))


def _float64(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def of_tiny_flux(folder: Path) -> Subject:
    """tiny-flux: our trace is what `harvest --trace` stored; the reference runs the pipeline's own transformer on the same latents."""
    (folder / "prompts.txt").write_text(PROMPT + "\n")
    settings = HarvestSettings(
        out=folder / "store", prompts=str(folder / "prompts.txt"), images=1, steps=str(STEP), dtype="float32", trace=True,
        trace_images="0", trace_steps=str(STEP), trace_dtype="float32", pictures="none",
    )  # fmt: skip
    with quiet():
        fill.run(settings)
        pipe = load_pipeline(settings, choose_device("cpu"), "float32")
    recording = record(pipe.transformer.requires_grad_(False), inputs_at(pipe, STEP), TINY.traced)
    source = stored_trace(open_store(folder / "store"), 0, STEP)
    return subject_of("tiny-flux", TINY, recording, source, sample=40, rounds=4, goal=1 / 30)


def inputs_at(pipe: Any, step: int) -> dict[str, Any]:
    """What the pipeline hands to its transformer at a step of the picture of `PROMPT` with seed 0."""
    calls: list[dict[str, Any]] = []

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(dict(kwargs))

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    Sampler(pipe, (), 64, 64, 4, TINY.n_txt, 0.0, pictures=False).draw([PROMPT], [0], lambda _step, _captured: None)
    hook.remove()
    found = {name: value for name, value in calls[step].items() if name != "return_dict"}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}


def of_random(case: Case, sample: int, rounds: int, _folder: Path) -> Subject:
    """A random model, in diffusers' own class."""
    torch.manual_seed(0)
    shape = case.shape
    transformer = FluxTransformer2DModel(
        in_channels=shape.in_channels, num_layers=shape.double_blocks, num_single_layers=shape.single_blocks,
        attention_head_dim=shape.d_head, num_attention_heads=shape.heads, joint_attention_dim=shape.text_channels,
        pooled_projection_dim=shape.pooled_channels, axes_dims_rope=shape.axes,
    )  # fmt: skip
    recording = record(transformer.requires_grad_(False), random_inputs(case), case.traced)
    return subject_of(f"d_model {shape.d_model}", case, recording, recording, sample, rounds, goal=1 / 5)


def subject_of(
    name: str, case: Case, recording: Recording, source: TraceSource, sample: int, rounds: int, goal: float
) -> Subject:
    """Both ways over one trace, with the same transcoders."""
    transcoders = random_transcoders(recording, case.n_features, case.share)

    def load() -> FrozenModel:
        return FrozenModel(Trace(source, torch.float32), transcoders, MEMORY)

    return Subject(name, case, Reference(recording, transcoders, THRESHOLD), load, sample, rounds, goal)


def _reset_peak() -> int:
    """Resident bytes now; `_peak` counts from here on.  0 where the system cannot say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(match[1]) if match else 0


SIZES: dict[Size, tuple[tuple[Callable[[Path], Subject], tuple[tuple[int, int], ...]], ...]] = {
    "tiny": ((partial(of_random, SMALL, 2, 1), ((4, 2),)),),
    "quick": ((of_tiny_flux, ((200, 50),)), (partial(of_random, RANDOM, 4, 1), ((40, 10),))),
    "full": ((of_tiny_flux, ((40, 10), (200, 50))), (partial(of_random, RANDOM, 8, 2), ((40, 10), (200, 50)))),
}
"""models, and the graphs of each: nodes, and how many are expanded at once"""
