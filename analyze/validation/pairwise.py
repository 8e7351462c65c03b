"""The pairwise test: how much one node of a graph has to do with another, against what it does in the model as it is.

    influence   the graph's share of what a target is made of that runs through the source, along all paths; unsigned (`influence`)
    predicted   -eps * effect: what the target would lose along all paths, each feature passing on in proportion (`effect`)
    measured    change of the target's pre-activation when the part eps of what the source writes is taken away; everything answers:
                MLPs, attention patterns, normalisations

|measured| goes with influence (the reference's test, DifFRACT, arXiv:2606.15796) and measured with predicted (with signs).  Between
source and target lie real MLPs: beside frozen patterns and norms, what tells graph and model apart here is how well transcoders stand
in for MLPs, that selections change, and that the graph passes on only through the features it has expanded: paths through rests and
errors are not in it.  Influence is a share of sums of |edges|, in which paths of opposite sign do not cancel: the model's do.

The test cannot tell these causes apart, nor say that a feature means something; and one node is perturbed at a time, so nothing is
said of what several do together.  `written`, the length of the vector that was taken away, is the plain rival: what the graph adds
to "large things do much" is the difference of the two correlations.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from analyze.circuits.graph import Graph
from analyze.circuits.influence import column, edge_weights
from analyze.circuits.ranking import flow
from analyze.validation.direct import PAIR, pair
from analyze.validation.graphs import Job
from analyze.validation.perturbed_runs import Perturbation

PAIRWISE = pa.schema(
    [
        *PAIR,
        pa.field("influence", pa.float64(), nullable=False),
        pa.field("effect", pa.float64(), nullable=False),
        pa.field("predicted", pa.float64(), nullable=False),  # change of the target's pre-activation
        pa.field("measured", pa.float64(), nullable=False),
        pa.field("written", pa.float64(), nullable=False),  # length of the perturbation at the MLP's output
    ]
)
"""one row a pair of which the target lies above the source"""


def influences(graph: Graph, target: int) -> np.ndarray:
    """The influence of every node on one expanded node, itself aside: float64 (node,), as `analyze.circuits.influence` has it."""
    start = _one(graph, target)
    return np.asarray(flow(graph.sources, graph.targets, edge_weights(graph), start) - start)


def effects(graph: Graph, target: int) -> np.ndarray:
    """What one expanded node's pre-activation would lose without each node, along all paths of the graph: float64 (node,), signed."""
    pre = column(graph, "pre")
    passes = np.nan_to_num(pre) > 0
    start = _one(graph, target)

    def in_proportion(arrived: np.ndarray) -> np.ndarray:
        return np.asarray(np.divide(arrived, pre, out=np.zeros_like(arrived), where=passes))

    return np.asarray(flow(graph.sources, graph.targets, graph.attributions, start, in_proportion) - start)


def _one(graph: Graph, row: int) -> np.ndarray:
    start = np.zeros(len(graph.nodes))
    start[row] = 1.0
    return start


def pairwise_table(
    job: Job, measured: np.ndarray, perturbations: Sequence[Perturbation], eps: float, real_text: int
) -> pa.Table:
    """Every perturbed node with every reader above it; `measured` float64 (perturbed, reader), in the job's order."""
    written = [float(each.vector.double().norm()) for each in perturbations]
    below = [_layer(job, row) for row in job.rows]
    rows = []
    for place, reader in enumerate(job.readers):
        influence, effect = influences(job.graph, reader.row), effects(job.graph, reader.row)
        for number, source in enumerate(job.rows):
            if below[number] < reader.layer:
                rows.append(
                    {
                        **pair(job, source, place, real_text),
                        "influence": float(influence[source]),
                        "effect": float(effect[source]),
                        "predicted": -eps * float(effect[source]),
                        "measured": float(measured[number, place]),
                        "written": written[number],
                    }
                )
    return pa.Table.from_pylist(rows, schema=PAIRWISE)


def out_of_reach(job: Job, measured: np.ndarray) -> float:
    """The largest change of a reader that its source cannot reach: 0, or the rounding of the model's run."""
    reach = np.asarray([[_layer(job, row) < reader.layer for reader in job.readers] for row in job.rows])
    return float(np.abs(measured[~reach]).max(initial=0.0))


def _layer(job: Job, row: int) -> int:
    site = job.nodes[row].site
    assert site is not None
    return site.layer
