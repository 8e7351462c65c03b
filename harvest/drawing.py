"""Draws the content of one part, batch by batch, and gathers what is kept of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image

from harvest.capture import Captured
from harvest.planning.plan import Plan
from harvest.quiet import quiet
from harvest.rows import picture_table, prompt_table, truth_of
from harvest.staging import Staging
from harvest.tiny_flux.scenes import PIXELS
from harvest.trace_writing import KeepTrace, TraceWriter
from harvest.tracing import Tracer
from store.sites import Stream
from store.tokens import kept_positions
from store.writer import Part


def fill_part(
    plan: Plan,
    part: int,
    advance: Callable[[int], object] | None = None,
    keep_trace: KeepTrace | None = None,
    staging: Staging | None = None,
) -> Part:
    """The content of one part, drawn batch by batch; `advance` is told the images of each batch as it ends.

    `keep_trace` writes each trace as it is captured, and gives its entry in the commit; without it nothing is traced.
    `staging` is that of a harvest of many parts; without it one is made for this part.  The part's pictures are encoded when
    the writer asks for them.
    """
    if staging is None:
        with Staging(plan.meta) as own:
            return fill_part(plan, part, advance, keep_trace, own)
    if keep_trace is None:
        with quiet():
            return _Filler(plan, part, None, staging).fill(advance)
    with quiet(), TraceWriter(keep_trace, staging.waiting.waited_for_trace) as traces:
        content = _Filler(plan, part, traces, staging).fill(advance)
    return replace(content, traces=traces.entries)


class _Filler:
    """Draws the images of one part."""

    def __init__(self, plan: Plan, part: int, traces: TraceWriter | None, staging: Staging) -> None:
        self.plan, self.meta, self.traces, self.staging = plan, plan.meta, traces, staging
        self.images = plan.meta.part_images(part)
        self.positions: dict[tuple[Stream, int], np.ndarray] = {
            (stream, step): np.stack([self._positions(image, step, stream) for image in self.images])
            for stream in self.meta.streams
            if not self.meta.tokens[stream].all_kept
            for step in self.meta.steps
        }

    def fill(self, advance: Callable[[int], object] | None) -> Part:
        prompts, count = self.plan.prompts, len(self.images)
        sigma: list[np.ndarray] = []
        scheduled: list[np.ndarray] = []
        pictures: list[Image.Image | None] = []
        self.staging.begin(count, self.positions)
        for first in range(0, count, self.meta.batch_size):
            batch = self.images[first : first + self.meta.batch_size]
            self.staging.batch(first, len(batch))
            drawn = self.plan.sampler.draw(
                [prompts.prompts[i].text for i in batch],
                [prompts.seed_of(i, self.meta.seed) for i in batch],
                self._step_ended,
                self._tracer(batch),
                keep=self.staging.keep,
            )
            sigma.append(drawn.sigma)
            scheduled.append(drawn.scheduler_sigma)
            pictures += drawn.pictures or [None] * len(batch)
            if advance is not None:
                advance(len(batch))
        activations, errors = self.staging.finish()
        table = self._table(np.concatenate(sigma), np.concatenate(scheduled), pictures)
        return Part(activations, self.positions, table, self._pictures(pictures), errors)

    def _step_ended(self, step: int, _captured: Captured) -> None:
        self.staging.step_ended(step)

    def _tracer(self, batch: range) -> Tracer | None:
        """What is traced of a batch."""
        images = {row: image for row, image in enumerate(batch) if image in self.meta.traced_images}
        return Tracer(self.meta, images, self.traces.put) if self.traces is not None and images else None

    def _table(self, sigma: np.ndarray, scheduled: np.ndarray, pictures: Sequence[Image.Image | None]) -> pa.Table:
        meta, prompts = self.meta, self.plan.prompts
        truths = None
        if prompts.prompts[0].scene is not None and (meta.height, meta.width) == (PIXELS, PIXELS):
            truths = [
                truth_of(prompts.prompts[i], p, meta.pixels_per_token)
                for i, p in zip(self.images, pictures, strict=True)
            ]
        return prompt_table(
            self.images,
            prompts,
            meta.seed,
            self.plan.tokenized,
            sigma,
            scheduled,
            truths,
            self.plan.columns,
        )

    def _pictures(self, pictures: Sequence[Image.Image | None]) -> Callable[[], pa.Table] | None:
        """The table of pictures, to be encoded by a thread of the writer."""
        kept = [picture for picture in pictures if picture is not None]
        return partial(picture_table, self.images, kept, self.meta.pictures) if kept else None

    def _positions(self, image: int, step: int, stream: Stream) -> np.ndarray:
        text = self.plan.tokenized[image]
        return kept_positions(
            self.meta.tokens[stream], self.meta.seed, image, step, stream, len(text.ids), text.padding or ()
        )
