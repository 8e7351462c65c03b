"""A graph: nodes and edges as Arrow tables, sparse throughout, and what made it.

    FOLDER/nodes.parquet   one row a node (`NODES`); edges name nodes by their row
    FOLDER/edges.parquet   one row an edge (`EDGES`): a pair stands once
    FOLDER/facts.json      what the graph is of: store, image, step, prompt, targets, dictionaries, settings, totals

Tables are written whole or not at all, and equal graphs have equal bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from store.errors import DamagedError, ForeignError
from store.files import read_json, write_json
from store.tables import write_table

GRAPH_FORMAT = "granary graph"
GRAPH_VERSION = 1

NODES = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        ("layer", pa.int32()),
        ("stream", pa.string()),
        ("token", pa.int32()),  # null in aggregated graphs
        ("feature", pa.int32()),
        ("term", pa.string()),  # which constant path a bias is; what a supernode is called
        ("activation", pa.float64()),  # z of a feature at its token; aggregated: the largest over its tokens
        ("pre", pa.float64()),  # pre-activation, of expanded nodes
        ("order", pa.int32()),  # when it was expanded: 0 a target; null when never
        pa.field("target", pa.bool_(), nullable=False),  # whether it was asked for
        ("influence", pa.float64()),  # on the targets, >= 0
        ("effect", pa.float64()),  # signed influence: > 0 excites the targets along all paths together
        ("conservation", pa.float64()),  # of expanded nodes: relative error before any threshold
        ("map_token", pa.list_(pa.int32())),  # aggregated graphs: the tokens it stands at,
        ("map_value", pa.list_(pa.float64())),  # and there a feature's z, another node's summed |attribution|
    ]
)
EDGES = pa.schema(
    [
        pa.field("source", pa.int32(), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("attribution", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Graph:
    """One attribution graph, per token or aggregated."""

    nodes: pa.Table
    edges: pa.Table
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        for what, table, schema in (("nodes", self.nodes, NODES), ("edges", self.edges, EDGES)):
            if table.schema.remove_metadata() != schema:
                raise ForeignError(
                    f"these are no {what} of a graph: columns {table.schema.names}, expected {schema.names}"
                )
        for end in ("source", "target"):
            rows = self.edges[end].to_numpy()
            if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.nodes)):
                raise ForeignError(
                    f"an edge's {end} is node {rows.min() if rows.min() < 0 else rows.max()}; there are {len(self.nodes)}"
                )

    @property
    def names(self) -> list[str]:
        """The nodes' names, by row."""
        found: list[str] = self.nodes["name"].to_pylist()
        return found

    @property
    def sources(self) -> np.ndarray:
        """Where each edge begins: rows of `nodes`, int32 (edge,)."""
        return np.asarray(self.edges["source"].to_numpy())

    @property
    def targets(self) -> np.ndarray:
        """Where each edge ends: rows of `nodes`, int32 (edge,)."""
        return np.asarray(self.edges["target"].to_numpy())

    @property
    def attributions(self) -> np.ndarray:
        """What each edge adds to its target's pre-activation: float64 (edge,)."""
        return np.asarray(self.edges["attribution"].to_numpy())

    def write(self, folder: Path) -> None:
        """Publish it in a folder, which may be there; the facts come last."""
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "nodes.parquet", self.nodes)
        write_table(folder / "edges.parquet", self.edges)
        write_json(folder / "facts.json", {"format": GRAPH_FORMAT, "version": GRAPH_VERSION, **self.facts})

    @classmethod
    def read(cls, folder: Path) -> "Graph":
        """The graph of a folder; `ForeignError` when it holds none, `DamagedError` for tables that cannot be read."""
        record = folder / "facts.json"
        if not record.is_file():
            raise ForeignError(f"{folder} holds no graph: it has no facts.json; make one with python -m analyze graph")
        facts = read_json(record)
        if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (GRAPH_FORMAT, GRAPH_VERSION):
            raise ForeignError(f"{record} is not the record of a graph in format {GRAPH_VERSION}")
        tables = []
        for name in ("nodes", "edges"):
            try:
                tables.append(pq.read_table(folder / f"{name}.parquet").replace_schema_metadata(None))
            except (OSError, pa.ArrowException) as error:
                whole = folder.parent if folder.name == "aggregated" else folder
                raise DamagedError(
                    f"{folder / name}.parquet cannot be read ({error}): remove {whole} and run the same command"
                ) from None
        return cls(
            tables[0], tables[1], {key: value for key, value in facts.items() if key not in ("format", "version")}
        )
