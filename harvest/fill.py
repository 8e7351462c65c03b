"""One harvest, from prompts to a sealed store.

1. Fix the prompts, load the model, and write down everything that decides a byte (`plan`).
2. Open or create the store: the same plan goes on where it was, another plan is refused.
3. For each part that has no commit and that nobody else holds: draw its images batch by batch and keep the chosen rows.
   The part before is written meanwhile; never are there more than these two in memory, so a slow disk slows the model.
4. Wait for parts that others hold, and take them over from processes that died.
5. Seal the store when its last part is in.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from harvest import runs
from harvest.capture import Captured, select_tokens
from harvest.estimate import announce
from harvest.model import DTYPES, too_large
from harvest.plan import Plan, make_plan
from harvest.rehearse import rehearse
from harvest.remaining import is_extension, missing_parts
from harvest.rows import picture_table, prompt_table, truth_of
from harvest.settings import HarvestSettings
from harvest.tiny_flux.scenes import PIXELS
from harvest.trace_writing import KeepTrace, TraceWriter
from harvest.tracing import Tracer
from store.errors import LostLeaseError
from store.format import StoreMeta, part_name
from store.leases import Lease
from store.sites import Point, Site, Stream
from store.tokens import kept_positions
from store.writer import Part, StoreWriter

WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Summary:
    """What a harvest did."""

    store: Path
    images: int
    seconds: float
    finished: bool


def run(settings: HarvestSettings) -> Summary | None:
    """Fill the store that `settings` describe, or go on filling it; what was done.  None for `--plan`, which writes nothing."""
    asked, settings = settings, runs.restored(settings)
    if settings.plan:
        rehearse(asked, settings)
        return None
    assert settings.out is not None
    plan, out = make_plan(settings), settings.out
    extending = is_extension(asked, plan)
    chosen = settings.parts_of(plan.meta.n_parts)
    missing = [part for part in missing_parts(plan, extending) if part in chosen]
    announce(plan, out, missing)

    def begin(meta: StoreMeta) -> None:
        runs.keep_settings(settings, meta, extending)

    opened = StoreWriter.extend if extending else StoreWriter.open_or_create
    writer = opened(out, plan.meta, plan.weights, settings.allow_mixed, begin)
    images = sum(len(plan.meta.part_images(part)) for part in missing)
    begun = time.monotonic()
    with (
        runs.record(settings, images) as note,
        tqdm(total=images, unit="image", desc="harvest", mininterval=0.5, disable=not images) as bar,
    ):
        line, finished = _Line(plan, writer, bar), False
        try:
            done = line.fill(missing)
            finished = writer.seal() if not writer.missing() else False
        finally:
            seconds = time.monotonic() - begun
            note(line.images, seconds, finished)
    summary = Summary(out, done, seconds, finished)
    print(_closing(summary, writer, line.replay))
    return summary


def _closing(summary: Summary, writer: StoreWriter, replay: Mapping[str, float]) -> str:
    rate = f" in {summary.seconds:.1f} s ({summary.images / summary.seconds:.1f} images/s)" if summary.images else ""
    if summary.finished:
        state = f"finished: {writer.meta.n_images} images"
    else:
        state = (
            f"not finished: {len(writer.missing())} of {writer.meta.n_parts} parts are still missing. "
            f"Go on: python -m harvest --resume {summary.store}"
        )
    errors = ", ".join(f"{name} {error:.2g}" for name, error in sorted(replay.items()))
    traces = f"traces are replayed with relative errors of at most: {errors}\n" if errors else ""
    return (
        f"{summary.store}: {summary.images} images harvested{rate}; the store is {state}.\n{traces}"
        f"Look at it: python -m store info {summary.store}"
    )


class _Line:
    """Draws parts and has each written while the next is drawn."""

    def __init__(self, plan: Plan, writer: StoreWriter, bar: "tqdm[None]") -> None:
        self.plan, self.writer, self.bar = plan, writer, bar
        self.images = 0
        self.replay: dict[str, float] = {}
        """the greatest errors of the traces that were drawn here"""
        self._leases: dict[int, Lease] = {}
        self._writing: tuple[int, Future[None]] | None = None
        self._todo: deque[int] = deque()

    def fill(self, parts: Sequence[int]) -> int:
        """Fill parts, waiting at the end for those that other processes hold; how many images were committed here."""
        self._todo.extend(parts)
        idle = 0
        with ThreadPoolExecutor(1, "writer") as pool:
            try:
                while self._todo or self._writing:
                    if not self._todo:
                        self._settle()  # which may find that the part was lost, and is to be waited for
                        continue
                    part = self._todo.popleft()
                    if self._is_committed(part):
                        self.bar.total -= self._count(part)
                        continue
                    lease = self.writer.leases.take(part_name(part))
                    if lease is None:
                        self._todo.append(part)
                        idle = self._wait(part, idle, len(self._todo))
                        continue
                    idle = 0
                    self._leases[part] = lease
                    if self._is_committed(part):  # by the one who held it a moment ago
                        self._give_back(part)
                        self.bar.total -= self._count(part)
                        continue
                    content = self._draw(part, lease)
                    self._settle()
                    if content is None:
                        continue
                    for entry in content.traces.values():
                        self.replay |= {n: max(e, self.replay.get(n, 0.0)) for n, e in entry["replay"].items()}
                    self._writing = part, pool.submit(self.writer.write_part, part, content, lease)
                    del content  # or the part would stay in memory while the one after the next is drawn
            finally:  # a part that is being written is finished; one that is being drawn is dropped
                pool.shutdown(wait=True)
                for part in list(self._leases):
                    self._give_back(part)
        return self.images

    def _draw(self, part: int, lease: Lease) -> Part | None:
        """The content of a part, its traces written already; None when the part was lost meanwhile, and is to be waited for."""
        before = self.bar.n
        try:
            if self.plan.meta.traced is None:
                return fill_part(self.plan, part, self.bar.update)
            return fill_part(self.plan, part, self.bar.update, partial(self.writer.put_trace, lease))
        except torch.OutOfMemoryError as error:
            raise too_large(self.plan.meta, self.plan.meta.batch_size, error) from None
        except LostLeaseError as error:
            self.bar.write(str(error))
            self.bar.update(before - self.bar.n)
            self._todo.append(part)
            self._give_back(part)
            return None

    def _settle(self) -> None:
        """Wait for the part that is being written."""
        if self._writing is None:
            return
        part, job = self._writing
        self._writing = None
        try:
            job.result()
            self.images += self._count(part)
        except LostLeaseError as error:
            self.bar.write(str(error))
            self.bar.update(-self._count(part))
            self._todo.append(part)
        finally:
            self._give_back(part)

    def _wait(self, part: int, idle: int, left: int) -> int:
        """Pause when every part that is left is held by others; how many were met in a row."""
        if idle + 1 < left:
            return idle + 1
        self._settle()
        holder = self.writer.leases.holder(part_name(part))
        if holder is not None:
            self.bar.set_postfix_str(f"waiting for part {part}, held by {holder}")
            time.sleep(WAIT_SECONDS)
        return 0

    def _is_committed(self, part: int) -> bool:
        return self.writer.is_committed(part)

    def _count(self, part: int) -> int:
        return len(self.plan.meta.part_images(part))

    def _give_back(self, part: int) -> None:
        self.writer.leases.give_back(self._leases.pop(part))


def fill_part(
    plan: Plan, part: int, advance: Callable[[int], object] | None = None, keep_trace: KeepTrace | None = None
) -> Part:
    """The content of one part, drawn batch by batch; `advance` is told the images of each batch as it ends.

    `keep_trace` writes each trace as it is captured, and gives its entry in the commit; without it nothing is traced.
    """
    if keep_trace is None:
        return _Filler(plan, part, None).fill(advance)
    with TraceWriter(keep_trace) as traces:
        content = _Filler(plan, part, traces).fill(advance)
    return replace(content, traces=traces.entries)


class _Filler:
    """Draws the images of one part and gathers what is kept."""

    def __init__(self, plan: Plan, part: int, traces: TraceWriter | None) -> None:
        self.plan, self.meta, self.traces = plan, plan.meta, traces
        self.images = plan.meta.part_images(part)
        logical = plan.meta.carrier.logical
        count = len(self.images)
        self.activations: dict[tuple[Site, int, Point], np.ndarray] = {
            (site, step, point): np.empty((count, self.meta.tokens[site.stream].kept, self.meta.d_model), logical)
            for site in self.meta.site_objects
            for step in self.meta.steps
            for point in self.meta.points
        }
        self.errors: dict[tuple[Site, int, Point], float] = dict.fromkeys(self.activations, 0.0)
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
        for first in range(0, count, self.meta.batch_size):
            batch = self.images[first : first + self.meta.batch_size]
            drawn = self.plan.sampler.draw(
                [prompts.prompts[i].text for i in batch],
                [prompts.seed_of(i, self.meta.seed) for i in batch],
                lambda step, captured, first=first: self._keep(first, step, captured),  # type: ignore[misc]
                self._tracer(batch),
            )
            sigma.append(drawn.sigma)
            scheduled.append(drawn.scheduler_sigma)
            pictures += drawn.pictures or [None] * len(batch)
            if advance is not None:
                advance(len(batch))
        tables = self._tables(np.concatenate(sigma), np.concatenate(scheduled), pictures)
        return Part(self.activations, self.positions, *tables, self.errors)

    def _tracer(self, batch: range) -> Tracer | None:
        """What is traced of a batch."""
        images = {row: image for row, image in enumerate(batch) if image in self.meta.traced_images}
        return Tracer(self.meta, images, self.traces.put) if self.traces is not None and images else None

    def _tables(
        self, sigma: np.ndarray, scheduled: np.ndarray, pictures: Sequence[Image.Image | None]
    ) -> tuple[pa.Table, pa.Table | None]:
        meta, prompts = self.meta, self.plan.prompts
        truths = None
        if prompts.prompts[0].scene is not None and (meta.height, meta.width) == (PIXELS, PIXELS):
            truths = [
                truth_of(prompts.prompts[i], p, meta.pixels_per_token)
                for i, p in zip(self.images, pictures, strict=True)
            ]
        rows = prompt_table(
            self.images,
            prompts,
            meta.seed,
            self.plan.tokenized,
            sigma,
            scheduled,
            truths,
            self.plan.columns,
        )
        kept = [picture for picture in pictures if picture is not None]
        return rows, picture_table(self.images, kept, meta.pictures) if kept else None

    def _positions(self, image: int, step: int, stream: Stream) -> np.ndarray:
        length = len(self.plan.tokenized[image].ids)
        return kept_positions(self.meta.tokens[stream], self.meta.seed, image, step, stream, length)

    def _keep(self, first: int, step: int, captured: Captured) -> None:
        if step not in self.meta.steps:
            return
        for (site, point), values in captured.values.items():
            if point not in self.meta.points:
                continue
            expected = (self.meta.tokens[site.stream].total, self.meta.d_model)
            assert tuple(values.shape[1:]) == expected, (str(site), tuple(values.shape), expected)
            rows = slice(first, first + len(values))
            positions = self.positions.get((site.stream, step))
            index = None if positions is None else torch.from_numpy(positions[rows]).long().to(values.device)
            chosen = select_tokens(values, index)
            stored = chosen.to(self.stored_in)
            if stored.dtype != chosen.dtype:
                lost = (stored.float() - chosen.float()).square().nansum(dtype=torch.float64)  # empty slots are NaN
                self.errors[site, step, point] += float(lost)
            self.activations[site, step, point][rows] = _to_numpy(stored)

    @property
    def stored_in(self) -> torch.dtype:
        """What values are handed to the store in; fp8-e4m3 is made from bfloat16 there."""
        return DTYPES["bfloat16" if self.meta.store_dtype == "fp8-e4m3" else self.meta.store_dtype]


def _to_numpy(stored: Tensor) -> np.ndarray:
    """The same values on the host; they were converted on the device, so that fewer bytes travel."""
    here = stored.cpu().contiguous()
    if here.dtype == torch.bfloat16:
        return here.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return here.numpy()
