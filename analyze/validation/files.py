"""Where a validation lies, and that OUT holds nothing else.

OUT/run.json              store, model, dictionaries, graphs, settings, versions: what decides the numbers
OUT/graphs/NAME/…         direct.parquet, pairwise.parquet and, last, done.json, of one graph
OUT/direct.parquet        a row an edge (`direct`);   OUT/pairwise.parquet   a row a pair (`pairwise`)
OUT/agreement.parquet     correlations (`agreement`); validation.json, validation.md, validation.png the same to be read
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from analyze.validation.agreement import agreement_table, compared
from analyze.validation.graphs import Job, Validated
from analyze.validation.measured_graph import Measured
from analyze.validation.plots import scatter
from analyze.validation.text import page
from store.files import read_json, sha256_bytes, write_bytes, write_json
from store.sizes import many
from store.tables import read_table, table_bytes, write_table
from train.dictionaries.provenance import model_name

RUN, DONE = "run.json", "done.json"
FORMAT, VERSION, WHAT = "granary validation", 1, "validation"
AGAIN = "remove its folder and run the command again, which measures that graph once more"
TABLES = ("direct", "pairwise")


@dataclass(frozen=True)
class Together:
    """What came of all graphs."""

    agreement: pa.Table
    """correlations: columns as in `analyze.validation.agreement`"""
    direct: pa.Table | None
    pairwise: pa.Table | None
    facts: dict[str, Any]
    """what `validation.json` says: model, store, settings, graphs with image, step, prompt and targets, drift, exactness"""


def record_of(validated: Validated) -> dict[str, Any]:
    """What decides the numbers."""
    from harvest.models.model import choose_device, library_versions

    settings = validated.settings
    return {
        "format": FORMAT, "version": VERSION, "store": validated.store.id,
        "model": {"id": validated.store.meta.model.get("id"), "weights_sha256": dict(validated.canvas.weights)},
        "dictionaries": {str(site): subject.identity for site, subject in sorted(validated.subjects.items())},
        "graphs": {job.name: _graph_hash(job) for job in validated.jobs},
        "settings": {
            **settings.choices, "batch_size": validated.batch_size, "threads": validated.canvas.threads,
            "device": choose_device(settings.device).type,
        },
        "versions": library_versions(),
    }  # fmt: skip


def _graph_hash(job: Job) -> str:
    """SHA-256 of a graph's nodes and edges: another graph of the same target gives other numbers."""
    return sha256_bytes(table_bytes(job.graph.nodes) + table_bytes(job.graph.edges))


def folder_of(validated: Validated, job: Job) -> Path:
    """Where what came of one graph lies."""
    return validated.settings.out / "graphs" / job.name


def publish_graph(validated: Validated, job: Job, found: Measured, sigma: float, exact: float | None) -> None:
    """Write what came of one graph, its record last."""
    folder = folder_of(validated, job)
    for name, table in zip(TABLES, (found.direct, found.pairwise), strict=True):
        if table is not None:
            write_table(folder / f"{name}.parquet", table)
    member = job.member
    write_json(
        folder / DONE,
        {
            "name": job.name, "image": member.image, "step": member.step, "prompt": member.prompt, "sigma": sigma,
            "targets": list(member.targets), "perturbed": len(job.rows), "read": len(job.readers), "drift": found.drift,
            "out_of_reach": found.out_of_reach, "exactness": exact,
        },
    )  # fmt: skip


def publish_all(validated: Validated) -> Together:
    """Tables, page and picture of all graphs in OUT."""
    settings, out = validated.settings, validated.settings.out
    tables: dict[str, pa.Table | None] = {}
    for name, hold in zip(TABLES, (True, False), strict=True):
        paths = [folder_of(validated, job) / f"{name}.parquet" for job in validated.jobs]
        tables[name] = pa.concat_tables([read_table(path, AGAIN) for path in paths]) if hold in settings.holds else None
        if (table := tables[name]) is not None:
            write_table(out / f"{name}.parquet", table)
    tests = compared(tables["direct"], tables["pairwise"])
    agreement = agreement_table(tests)
    write_table(out / "agreement.parquet", agreement)
    graphs = [read_json(folder_of(validated, job) / DONE) for job in validated.jobs]
    exact = [graph["exactness"] for graph in graphs if graph["exactness"] is not None]
    model = model_name(validated.store.meta.model)
    facts: dict[str, Any] = {
        "model": model, "store": validated.store.id, "settings": record_of(validated)["settings"], "graphs": graphs,
        "drift": max(graph["drift"] for graph in graphs), "out_of_reach": max(graph["out_of_reach"] for graph in graphs),
        "exactness": max(exact) if exact else None,
    }  # fmt: skip
    write_json(out / "validation.json", {**facts, "agreement": agreement.to_pylist()})
    write_bytes(out / "validation.md", page(agreement, facts).encode())
    title = f"{model}: {many(len(graphs), 'graph')}, eps {settings.eps:g}"
    write_bytes(out / "validation.png", scatter(tests, title))
    return Together(agreement, tables["direct"], tables["pairwise"], facts)
