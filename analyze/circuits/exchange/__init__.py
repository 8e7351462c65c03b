"""Graphs in the forms of other programs: DifFRACT's JSON version 2, circuit-tracer's JSON, GraphML."""

from collections.abc import Callable, Sequence
from pathlib import Path

from analyze.circuits.exchange import circuit_tracer, difract, graphml
from analyze.circuits.graph import Graph
from store.errors import UsageError


def write_exports(
    folder: Path, formats: Sequence[str], labels: circuit_tracer.Labels | None = None, shared: Path | None = None
) -> list[Path]:
    """Write the graph of `folder` in other forms into that folder, and return what was written, in the order asked for.

    difract          graph.json, of the aggregated, pruned graph
    circuit-tracer   circuit-tracer/, which `circuit-tracer start-server --graph_file_dir FOLDER/circuit-tracer` shows
    graphml          graph.graphml, per token, and aggregated.graphml

    `folder` holds a graph per token, and its aggregated one in `aggregated/`; circuit-tracer's form names features by their
    `labels` (by site).  `shared`: where circuit-tracer/ lies instead, which lists many graphs.  `UsageError` for another form.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)} is no form that graphs are written in: choose among {', '.join(FORMATS)}"
        )
    place = folder if shared is None else shared
    return [path for name in dict.fromkeys(formats) for path in FORMATS[name](folder, labels or {}, place)]


def _difract(folder: Path, _: circuit_tracer.Labels, __: Path) -> list[Path]:
    path = folder / "graph.json"
    difract.write(folder, path)
    return [path]


def _circuit_tracer(folder: Path, labels: circuit_tracer.Labels, shared: Path) -> list[Path]:
    return [circuit_tracer.write(Graph.read(folder), shared / "circuit-tracer", labels=labels)]


def _graphml(folder: Path, _: circuit_tracer.Labels, __: Path) -> list[Path]:
    paths = [folder / "graph.graphml", folder / "aggregated.graphml"]
    for path, graph in zip(paths, (folder, folder / "aggregated"), strict=True):
        graphml.write(Graph.read(graph), path)
    return paths


FORMATS: dict[str, Callable[[Path, circuit_tracer.Labels, Path], list[Path]]] = {
    "difract": _difract,
    "circuit-tracer": _circuit_tracer,
    "graphml": _graphml,
}
"""each form, and what writes it"""
