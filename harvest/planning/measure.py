"""Measures what a harvest will be held up by: drawing a batch, and writing a chunk.

Neither leaves a trace.  A batch's pictures come from generators of their own, so drawing one more changes no byte of
what is drawn later; the file that is written has no name, and is gone even if the process is killed.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from harvest.models.model import too_large
from harvest.planning.plan import Plan
from harvest.staging import Staging

WARM_SECONDS = 1.5
"""a first batch that took less than this says more about warming up than about the next one: it is drawn again"""
PROBE_BYTES = 64 * 2**20
PROBE_SECONDS = 0.2


def seconds_a_batch(plan: Plan, first_image: int) -> tuple[float, int]:
    """How long a batch at about `first_image` takes to draw, with all that is done to it before it is written, and its images.

    What was drawn is dropped.
    """
    from harvest.drawing import fill_part

    size = min(plan.meta.batch_size, plan.meta.chunk_images)
    batches = replace(plan, meta=replace(plan.meta, chunk_images=size))  # every part of it is one batch
    if plan.sampler.embeddings is not None:
        batches = replace(batches, sampler=replace(plan.sampler, embeddings=plan.sampler.embeddings.loosely()))
    index = first_image // size
    try:
        with Staging(batches.meta) as staging:
            staging.reserve(plan.sampler.pipe._execution_device)  # once a harvest, and pinning gigabytes takes seconds
            seconds = _timed(lambda: fill_part(batches, index, None, None, staging))
            if seconds < WARM_SECONDS:
                seconds = min(seconds, _timed(lambda: fill_part(batches, index, None, None, staging)))
    except torch.OutOfMemoryError as error:
        raise too_large(plan.meta, size, error) from None
    return seconds, len(batches.meta.part_images(index))


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def bytes_a_second(folder: Path, chunk: int) -> float | None:
    """The rate at which files of `chunk` bytes (at most 64 MiB) reach the disk of `folder`; None where none can be written."""
    block = os.urandom(min(chunk, PROBE_BYTES))
    written, begun = 0, time.perf_counter()
    try:
        while written == 0 or (time.perf_counter() - begun < PROBE_SECONDS and written < PROBE_BYTES):
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            written += len(block)
    except OSError:
        return None
    return written / (time.perf_counter() - begun)
