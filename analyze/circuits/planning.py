"""What a run of `graph` will take, printed before it begins: bytes read, sweeps, operations, time."""

import time

import numpy as np
import torch

from analyze.circuits.experiments import device_of
from analyze.circuits.inquiry import Inquiry, tokens_of
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
    read = sum(_bytes(inquiry, count) for count in blocks.values())
    encoding = sum(_encoding(inquiry, count) for count in blocks.values())
    operations = encoding + sum(sweeps[key] * blocks[key] * _operations(inquiry) for key in traces)
    images, steps = sorted({image for image, _ in traces}), sorted({step for _, step in traces})
    print(
        f"plan: {many(len(inquiry.experiments), 'graph')} of at most {settings.nodes:,} expanded nodes, from "
        f"{many(len(traces), 'trace')} (images {spans(images)}, steps {spans(steps)}) and {many(len(inquiry.subjects), 'transcoder')}\n"
        f"  {human_size(read)} of traces are read; at most {many(sum(sweeps.values()), 'sweep')} of "
        f"{many(_batch(inquiry), 'node')} over up to {many(max(blocks.values()), 'block')}; {operations / 1e12:.3g} TFLOP in "
        f"{settings.dtype} on {device_of(settings.device).type}, about {_duration(inquiry, operations)}; "
        f"about {human_size(max(settings.held, 3 * _column(inquiry)))} held of trace and gradients",
        flush=True,
    )


def _sweeps(inquiry: Inquiry) -> dict[tuple[int, int], int]:
    """Sweeps of each trace at most: the targets, then batches, each in as many sweeps as its memory asks for."""
    settings = inquiry.settings
    batches = -(-max(settings.nodes - 1, 0) // settings.batch)
    each = 1 + batches * -(-settings.batch // _batch(inquiry))
    return {key: each * len(wanted) for key, wanted in inquiry.traces.items()}


def _column(inquiry: Inquiry) -> int:
    """About how many bytes one node's gradients take: three arrays (token, d_model)."""
    size = 8 if inquiry.settings.dtype == "float64" else 4
    return 3 * size * sum(tokens_of(inquiry.store).values()) * inquiry.store.meta.d_model


def _batch(inquiry: Inquiry) -> int:
    """How many nodes go backward at once: those of a batch, or about as many as a third of the memory has room for."""
    return max(1, min(inquiry.settings.batch, inquiry.settings.held // (3 * _column(inquiry))))


def memory_note(inquiry: Inquiry) -> str | None:
    """A warning where --memory is less than one node takes; None where it is not."""
    least = 3 * _column(inquiry)
    if inquiry.settings.held >= least:
        return None
    return (
        f"note: --memory {inquiry.settings.memory} is less than one node of this trace takes: about {human_size(least)} are used, "
        "node after node; give more to be quicker"
    )


def _bytes(inquiry: Inquiry, blocks: int) -> int:
    """What is read of one trace, MLP inputs and outputs from the activations included."""
    tokens, d_model = sum(tokens_of(inquiry.store).values()), inquiry.store.meta.d_model
    size = np.dtype(TRACE_DTYPES[inquiry.traced.dtype]).itemsize
    return blocks * (STATES * tokens * d_model * size + 8 * tokens)


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
