"""How far what a graph predicts agrees with what the model did: correlations over all rows, a graph, and kinds of source.

    direct         predicted and measured change of edges, MLPs held
    total          predicted and measured change of pairs, along all paths, nothing held
    pairwise       influence and |measured| of sources on the targets that graphs explain
    pairwise-all   the same on every expanded node

Pooled figures also gain from graphs being of different size, as pre-activations are; so the mean over the graphs' own figures stands
beside them, with the least and the most.  `rival` is the Spearman correlation of |measured| with the length of what was taken
away, which knows nothing of the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.stats import rankdata

Test = Literal["direct", "total", "pairwise", "pairwise-all"]
FEWEST = 3
"""pairs that a correlation is made of"""
POOLED = "all graphs"
AGREEMENT = pa.schema(
    [
        pa.field("test", pa.string(), nullable=False),
        pa.field("of", pa.string(), nullable=False),  # all graphs, a graph, or a kind of source
        pa.field("graphs", pa.int32(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        ("spearman", pa.float64()),  # null with fewer than 3 pairs, or where all are equal
        ("pearson", pa.float64()),
        ("magnitudes", pa.float64()),  # Spearman of |predicted| and |measured|; null for pairwise, which has no signs
        ("slope", pa.float64()),  # measured = slope * predicted, by least squares; null for pairwise
        ("same_sign", pa.float64()),  # share of pairs; null for pairwise
        ("rival", pa.float64()),  # Spearman of |measured| with the length of what was taken away; null for direct
        ("mean", pa.float64()),  # of the graphs' own Spearman; in rows of several graphs
        ("least", pa.float64()),
        ("most", pa.float64()),
    ]
)

Values = Float[np.ndarray, " pair"]


@dataclass(frozen=True)
class Rows:
    """What a test compares."""

    test: Test
    table: pa.Table
    predicted: str
    """the column"""
    signed: bool

    def values(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured of some rows, without signs where the test has none."""
        predicted, measured = (_column(self.table, name)[keep] for name in (self.predicted, "measured"))
        return (predicted, measured) if self.signed else (predicted, np.abs(measured))


def compared(direct: pa.Table | None, pairwise: pa.Table | None) -> list[Rows]:
    """The tests that these tables allow."""
    found = [] if direct is None else [Rows("direct", direct, "predicted", True)]
    if pairwise is not None:
        asked = pairwise.filter(pairwise["asked"])
        found += [
            Rows("total", pairwise, "predicted", True),
            Rows("pairwise", asked, "influence", False),
            Rows("pairwise-all", pairwise, "influence", False),
        ]
    return found


def agreement_table(tests: Sequence[Rows]) -> pa.Table:
    """A row for all graphs together, for each kind of source there is, and for each graph, test by test."""
    rows = [row for test in tests for row in _rows(test)]
    return pa.Table.from_pylist(rows, schema=AGREEMENT)


def _rows(rows: Rows) -> list[dict[str, Any]]:
    graphs = np.asarray(rows.table["graph"].to_pylist(), dtype=object)
    names = list(dict.fromkeys(graphs.tolist()))
    each = [_row(rows, name, graphs == name, graphs) for name in names]
    own = {row["of"]: row["spearman"] for row in each}
    everything = np.ones(len(graphs), dtype=bool)
    together = [_row(rows, POOLED, everything, graphs)]
    together += [_row(rows, name, keep, graphs) for name, keep in _parts(rows.table).items()]
    figures = [value for value in own.values() if value is not None]
    if figures:
        together[0] |= {"mean": float(np.mean(figures)), "least": min(figures), "most": max(figures)}
    return together + each


def _parts(table: pa.Table) -> dict[str, np.ndarray]:
    """Kinds of source, text apart by whether it is padding, and where targets stand seen from them: name -> rows."""
    kinds, streams, padding, ways = (table[name].to_pylist() for name in ("kind", "stream", "padding", "way"))
    where = ["padding" if pad else stream for stream, pad in zip(streams, padding, strict=True)]
    found: dict[str, np.ndarray] = {}
    for words in (
        [f"{kind}s" for kind in kinds],
        [f"{kind}s in {place}" for kind, place in zip(kinds, where, strict=True)],
        [f"to {way}" for way in ways],
    ):
        if len(set(words)) > 1:
            found |= {name: np.asarray(words, dtype=object) == name for name in sorted(set(words))}
    return found


def _row(rows: Rows, of: str, keep: np.ndarray, graphs: np.ndarray) -> dict[str, Any]:
    predicted, measured = rows.values(keep)
    row: dict[str, Any] = {
        "test": rows.test, "of": of, "graphs": len(set(graphs[keep].tolist())), "n": len(predicted),
        "spearman": spearman(predicted, measured), "pearson": pearson(predicted, measured),
    }  # fmt: skip
    if rows.signed and len(predicted):
        row["magnitudes"] = spearman(np.abs(predicted), np.abs(measured))
        row["slope"] = float(predicted @ measured / (predicted @ predicted)) if predicted.any() else None
        row["same_sign"] = float(np.mean(np.sign(predicted) == np.sign(measured)))
    if "written" in rows.table.column_names:
        row["rival"] = spearman(_column(rows.table, "written")[keep], np.abs(measured))
    return row


def _column(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(table[name].to_numpy(), dtype=np.float64)


def pearson(one: Values, other: Values) -> float | None:
    """The correlation of two columns; None with fewer than 3 pairs, or where all values of one are equal."""
    if len(one) < FEWEST:
        return None
    a, b = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else None


def spearman(one: Values, other: Values) -> float | None:
    """The correlation of ranks, equal values sharing theirs; None as `pearson`."""
    return pearson(rankdata(one), rankdata(other)) if len(one) >= FEWEST else None
