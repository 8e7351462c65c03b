"""The direct test: an edge of a graph against what its source does to its target while the MLPs between them stand still.

    predicted   -eps * attribution
    measured    change of the target's pre-activation when the part eps of what the source writes is taken away, with every MLP
                output held at its plain value; attention patterns, normalisations and the norms of queries and keys are live

It shows whether the linear path that an edge stands for is what the model has there: values and output projections, gates, modulations,
the reader's encoder.  The graph freezes attention patterns and the denominators of the norms, the model does not, and that is the
whole difference: frozen in the model too, measured and predicted are equal to rounding (tests/test_validation.py).  It is of first
order, so a smaller eps does not make it vanish.  What a source writes along the residual itself lengthens it, and a live norm takes
that out again: where few large vectors make up a residual, as in text, edges promise too much (measured on tiny-flux: slope 1.0 for
image targets, 0.4 for text targets).

The test cannot show that features are what the MLPs compute with: the MLPs do not answer here, and the source is a direction that
the transcoder chose.
"""

import numpy as np
import pyarrow as pa

from analyze.circuits.nodes import Node
from analyze.validation.graphs import Job
from analyze.validation.node_writes import Reader

PAIR = [
    pa.field("graph", pa.string(), nullable=False),
    pa.field("image", pa.int32(), nullable=False),
    pa.field("step", pa.int32(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("target", pa.string(), nullable=False),
    pa.field("asked", pa.bool_(), nullable=False),  # whether the graph explains this target
    pa.field("kind", pa.string(), nullable=False),  # of the source
    pa.field("stream", pa.string(), nullable=False),  # of the source
    pa.field("padding", pa.bool_(), nullable=False),  # whether the source stands at padding of the text
    pa.field("layers", pa.int32(), nullable=False),  # from the source to the target
    pa.field("way", pa.string(), nullable=False),  # same token, other token (of the stream) or other stream
]
DIRECT = pa.schema(
    [
        *PAIR,
        pa.field("attribution", pa.float64(), nullable=False),
        pa.field("predicted", pa.float64(), nullable=False),  # change of the target's pre-activation
        pa.field("measured", pa.float64(), nullable=False),
    ]
)
"""one row an edge"""


def direct_table(job: Job, measured: np.ndarray, eps: float, real_text: int) -> pa.Table:
    """The graph's edges between what was perturbed and what was read; `measured` float64 (perturbed, reader), in the job's order."""
    sources = {row: place for place, row in enumerate(job.rows)}
    readers = {reader.row: place for place, reader in enumerate(job.readers)}
    rows = []
    for source, target, value in zip(
        job.graph.sources.tolist(), job.graph.targets.tolist(), job.graph.attributions.tolist(), strict=True
    ):
        if source in sources and target in readers:
            place = readers[target]
            rows.append(
                {
                    **pair(job, source, place, real_text),
                    "attribution": value,
                    "predicted": -eps * value,
                    "measured": float(measured[sources[source], place]),
                }
            )
    return pa.Table.from_pylist(rows, schema=DIRECT)


def pair(job: Job, source: int, reader: int, real_text: int) -> dict[str, object]:
    """The columns `PAIR` of a perturbed node (row of the graph's nodes) and a reader (by number)."""
    node, target = job.nodes[source], job.readers[reader]
    assert node.site is not None and node.token is not None
    return {
        "graph": job.name, "image": job.member.image, "step": job.member.step, "source": node.name,
        "target": job.nodes[target.row].name, "asked": target.asked, "kind": node.kind, "stream": node.site.stream,
        "padding": node.site.stream == "txt" and node.token >= real_text, "layers": target.layer - node.site.layer,
        "way": _way(node, target),
    }  # fmt: skip


def _way(node: Node, target: Reader) -> str:
    """Where a target stands, seen from a source: only the same token is reached by the residual stream alone."""
    assert node.site is not None
    members = target.target.members
    if any((member.site.stream, member.token) == (node.site.stream, node.token) for member in members):
        return "same token"
    return "other token" if any(member.site.stream == node.site.stream for member in members) else "other stream"
