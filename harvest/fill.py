"""One harvest, from prompts to a sealed store.

1. Fix the prompts, load the model, and write down everything that decides a byte (`plan`).
2. Open or create the store: the same plan goes on where it was, another plan is refused.
3. For each part that has no commit: draw its images batch by batch, keep the chosen rows, commit.
4. Seal the store when its last part is in.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from harvest.model import DTYPES
from harvest.plan import Plan, make_plan
from harvest.rows import picture_table, prompt_table, truth_of
from harvest.settings import HarvestSettings
from harvest.tiny_flux.scenes import PIXELS
from store.errors import GranaryError
from store.format import StoreMeta
from store.sites import Point, Site, Stream, parse_numbers
from store.tokens import kept_positions
from store.writer import Part, StoreWriter, refuse_other, uncommitted


@dataclass(frozen=True)
class Summary:
    """What a harvest did."""

    store: Path
    images: int
    seconds: float
    finished: bool


def run(settings: HarvestSettings) -> Summary:
    """Fill the store that `settings` describe, or go on filling it; what was done."""
    settings = runs.resumed(settings) if settings.resume is not None else settings
    assert settings.out is not None
    plan = make_plan(settings)
    parts = parse_numbers(settings.parts, plan.meta.n_parts, "part")
    refuse_other(settings.out, plan.meta)
    missing = [part for part in uncommitted(settings.out, plan.meta) if part in parts]
    images = sum(len(plan.meta.part_images(part)) for part in missing)
    print(plan.text(settings.out, images), flush=True)
    _refuse_full_disk(settings.out, plan.meta, images)
    runs.keep_settings(settings, plan.meta)
    writer = StoreWriter.open_or_create(settings.out, plan.meta, plan.weights())
    begun = time.monotonic()
    with (
        runs.record(settings, images) as note,
        tqdm(total=images, unit="image", desc="harvest", mininterval=0.5, disable=not images) as bar,
    ):
        for part in missing:
            with writer.claim(part) as mine:
                if not mine:
                    bar.write(f"part {part} is being filled by another process: left to it")
                    bar.total -= len(plan.meta.part_images(part))
                    continue
                if part in writer.missing():
                    writer.write_part(part, fill_part(plan, part, bar.update))
        finished = writer.seal()
        seconds = time.monotonic() - begun
        note(bar.n, seconds, finished)
    summary = Summary(settings.out, bar.n, seconds, finished)
    print(_closing(summary, writer))
    return summary


def _closing(summary: Summary, writer: StoreWriter) -> str:
    rate = f" in {summary.seconds:.1f} s ({summary.images / summary.seconds:.1f} images/s)" if summary.images else ""
    if summary.finished:
        state = f"finished: {writer.meta.n_images} images"
    else:
        state = f"not finished: {len(writer.missing())} of {writer.meta.n_parts} parts are still missing"
    return (
        f"{summary.store}: {summary.images} images harvested{rate}; the store is {state}.\n"
        f"Look at it: python -m store info {summary.store}"
    )


def _refuse_full_disk(out: Path, meta: StoreMeta, images: int) -> None:
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    needed = images * meta.bytes_per_image
    if needed > free:
        raise GranaryError(
            f"{out}: {needed / 1e9:.2f} GB are still to be written and the disk has {free / 1e9:.2f} GB free. "
            "Keep fewer tokens (--tokens 64), layers, steps or images, or choose a larger disk."
        )


def fill_part(plan: Plan, part: int, advance: Callable[[int], object] | None = None) -> Part:
    """The content of one part, drawn batch by batch; `advance` is told the images of each batch as it ends."""
    return _Filler(plan, part).fill(advance)


class _Filler:
    """Draws the images of one part and gathers what is kept."""

    def __init__(self, plan: Plan, part: int) -> None:
        self.plan, self.meta = plan, plan.meta
        self.images = plan.meta.part_images(part)
        logical = plan.meta.carrier.logical
        count = len(self.images)
        self.activations: dict[tuple[Site, int, Point], np.ndarray] = {
            (site, step, point): np.empty((count, self.meta.tokens[site.stream].kept, self.meta.d_model), logical)
            for site in self.meta.site_objects
            for step in self.meta.steps
            for point in self.meta.points
        }
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
            )
            sigma.append(drawn.sigma)
            scheduled.append(drawn.scheduler_sigma)
            pictures += drawn.pictures or [None] * len(batch)
            if advance is not None:
                advance(len(batch))
        return Part(
            self.activations, self.positions, *self._tables(np.concatenate(sigma), np.concatenate(scheduled), pictures)
        )

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
            expected = (self.meta.tokens[site.stream].total, self.meta.d_model)
            assert tuple(values.shape[1:]) == expected, (str(site), tuple(values.shape), expected)
            rows = slice(first, first + len(values))
            positions = self.positions.get((site.stream, step))
            index = None if positions is None else torch.from_numpy(positions[rows]).long().to(values.device)
            self.activations[site, step, point][rows] = _to_numpy(select_tokens(values, index), self.meta)


def _to_numpy(values: Tensor, meta: StoreMeta) -> np.ndarray:
    """On the host in the store's dtype; the conversion happens on the device, so that fewer bytes travel."""
    stored = values.to(DTYPES[meta.store_dtype]).cpu().contiguous()
    if meta.store_dtype == "bfloat16":
        return stored.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return stored.numpy()
