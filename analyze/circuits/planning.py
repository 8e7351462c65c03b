"""What a run of `graph` will take, printed before it begins: bytes read, sweeps, operations, time."""

import time

import numpy as np
import torch

from analyze.circuits.experiments import device_of
from analyze.circuits.frozen import column_bytes
from analyze.circuits.inquiry import Inquiry, tokens_of
from analyze.circuits.terms import reckoned_bytes
from analyze.circuits.trace import PROJECTIONS
from store.sites import spans
from store.sizes import human_size, many
from store.traces import TRACE_DTYPES

STATES = 6
"""arrays (token, d_model) that are read of a stream of a block: residual, attention output, MLP input and output, q, k"""
PROBE = (256, 1024)
"""rows and columns of the product that says how fast this machine is"""
REST = 3.0
"""time of a sweep over that of its products: softmax, gathering active features"""
NODE = 0.01
"""seconds that an expanded node takes beside: ranking, tables, the page"""


def announce(inquiry: Inquiry) -> None:
    """Print what will be done, and what it takes at most: graphs that are there already are not made again."""
    settings, traces = inquiry.settings, inquiry.traces
    sweeps, blocks = _sweeps(inquiry), {key: max(e.top for e in wanted) + 1 for key, wanted in traces.items()}
    read = sum(_bytes(inquiry, count, sweeps[key]) for key, count in blocks.items())
    encoding = sum(_encoding(inquiry, count) for count in blocks.values())
    operations = encoding + sum(sweeps[key] * blocks[key] * _operations(inquiry) for key in traces)
    images, steps = sorted({image for image, _ in traces}), sorted({step for _, step in traces})
    print(
        f"plan: {many(len(inquiry.experiments), 'graph')} of at most {settings.nodes:,} expanded nodes, from "
        f"{many(len(traces), 'trace')} (images {spans(images)}, steps {spans(steps)}) and {many(len(inquiry.subjects), 'transcoder')}\n"
        f"  at most {human_size(read)} of traces are read; about {many(sum(sweeps.values()), 'sweep')} of "
        f"{many(_batch(inquiry), 'node')} over up to {many(max(blocks.values()), 'block')}; {operations / 1e12:.3g} TFLOP in "
        f"{settings.dtype} on {device_of(settings.device).type}, about {_duration(inquiry, operations)}; "
        f"about {human_size(max(settings.held, _least(inquiry)))} held of trace and gradients",
        flush=True,
    )


def _sweeps(inquiry: Inquiry) -> dict[tuple[int, int], int]:
    """About how many sweeps each trace takes: of every graph its targets, then batches, each in as many as its memory asks for.

    Graphs that share sweeps take fewer.
    """
    settings, found = inquiry.settings, {}
    together = _at_once(inquiry)
    for key, graphs in inquiry.traces.items():
        found[key] = 0
        for targets in (len(experiment.wanted) for experiment in graphs):
            batches = -(-max(settings.nodes - targets, 0) // settings.batch)
            found[key] += -(-targets // together) + batches * -(-settings.batch // together)
    return found


def _itemsize(inquiry: Inquiry) -> int:
    return 8 if inquiry.settings.dtype == "float64" else 4


def _column(inquiry: Inquiry) -> int:
    """About how many bytes one node takes while it goes backward, as the frozen model reckons; how many features are active is
    known only of TopK."""
    tokens, d_model = tokens_of(inquiry.store), inquiry.store.meta.d_model
    active = max(tokens[site.stream] * (subject.outline.config.k or 0) for site, subject in inquiry.subjects.items())
    blocks = 1 + max(experiment.top for experiment in inquiry.experiments)
    return 3 * column_bytes(_itemsize(inquiry), sum(tokens.values()), 3 * d_model, active, blocks)


def _at_once(inquiry: Inquiry) -> int:
    """How many nodes go backward at once where as many are wanted: a third of the memory has room for them."""
    return max(1, inquiry.settings.held // _column(inquiry))


def _batch(inquiry: Inquiry) -> int:
    """How many nodes of a batch go backward at once."""
    return min(inquiry.settings.batch, _at_once(inquiry))


def _block(inquiry: Inquiry) -> int:
    """About how many bytes one prepared block takes; of its features at most all are active somewhere."""
    tokens, widths = tokens_of(inquiry.store), {"txt": 0, "img": 0}
    for site, subject in inquiry.subjects.items():
        k = subject.outline.config.k
        distinct = subject.n_features if k is None else min(subject.n_features, k * tokens[site.stream])
        widths[site.stream] = max(widths[site.stream], distinct)
    return reckoned_bytes(sum(tokens.values()), inquiry.store.meta.d_model, _itemsize(inquiry), sum(widths.values()))


def _least(inquiry: Inquiry) -> int:
    """About what is held whatever --memory says: one prepared block, and one node that goes backward."""
    return _block(inquiry) + _column(inquiry)


def memory_note(inquiry: Inquiry) -> str | None:
    """A warning where --memory is less than one block and one node take; None where it is not."""
    least = _least(inquiry)
    if inquiry.settings.held >= least:
        return None
    return (
        f"note: --memory {inquiry.settings.memory} is less than one block and one node of this trace take: about {human_size(least)} "
        "are used, node after node; give more to be quicker"
    )


def _bytes(inquiry: Inquiry, blocks: int, sweeps: int) -> int:
    """What is read of one trace: its blocks, MLP inputs and outputs from the activations included, and their matrices.

    Half of the memory keeps blocks; the others are read again in every sweep.
    """
    tokens, meta = sum(tokens_of(inquiry.store).values()), inquiry.store.meta
    traced = np.dtype(TRACE_DTYPES[inquiry.traced.dtype]).itemsize
    matrices = sum(map(len, PROJECTIONS.values())) * meta.d_model**2 * (4 if meta.dtype == "float32" else 2)
    one = STATES * tokens * meta.d_model * traced + 8 * tokens + matrices
    again = blocks - min(blocks, inquiry.settings.held // 2 // _block(inquiry))
    return one * (blocks + sweeps * again)


def _encoding(inquiry: Inquiry, blocks: int) -> int:
    """Operations that say which features of a trace are active."""
    tokens, d_model = tokens_of(inquiry.store), inquiry.store.meta.d_model
    return sum(
        2 * tokens[site.stream] * d_model * subject.n_features
        for site, subject in inquiry.subjects.items()
        if site.layer < blocks
    )


def _operations(inquiry: Inquiry) -> int:
    """Of one sweep through one block: patterns from q and k, and for every node P^T g and the two projections."""
    tokens, d_model = sum(tokens_of(inquiry.store).values()), inquiry.store.meta.d_model
    nodes = _batch(inquiry)
    return 2 * tokens**2 * d_model + nodes * (2 * tokens**2 * d_model + 4 * tokens * d_model**2)


def _duration(inquiry: Inquiry, operations: int) -> str:
    """How long it will take, from the time of one small product here and now."""
    settings = inquiry.settings
    device = device_of(settings.device)
    rows, columns = PROBE
    dtype = torch.float64 if settings.dtype == "float64" else torch.float32
    values = torch.ones(rows, columns, device=device, dtype=dtype)
    weight = torch.ones(columns, columns, device=device, dtype=dtype)
    seconds = min(_timed(values, weight) for _ in range(3))
    total = REST * operations / (2 * rows * columns * columns) * seconds + NODE * settings.nodes * len(
        inquiry.experiments
    )
    return f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} min" if total < 7200 else f"{total / 3600:.1f} h"


def _timed(values: torch.Tensor, weight: torch.Tensor) -> float:
    begun = time.perf_counter()
    float((values @ weight)[0, 0])  # waits for a GPU
    return time.perf_counter() - begun
