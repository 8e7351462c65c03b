"""`python -m store import`: activations that somebody already has become a store, part by part.

1. The headers of the arrays, the prompts and the flags settle everything that decides a byte (`import_plan`).
2. The store is opened or created: the same command goes on where it was, another one is refused.
3. For each part that has no commit: its images are read one by one, checked, rounded to the store's dtype, committed.
4. The store is sealed when its last part is in.

Memory holds one part and one image, however large the arrays are; several processes given one command share its parts.

The dump that FLUX-SAE's collection script leaves, rows of 500 images x 20 steps x 4096 tokens in one array, is
`--activations flux_activations_layer15.npy --rows-per-image 20x4096 --site img_15 --step 13 --sigma dev`.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from store import layout
from store.errors import GranaryError, NonFiniteError
from store.files import write_json
from store.foreign.plan import ImportPlan, make_plan
from store.foreign.prompts import prompt_rows
from store.foreign.settings import ImportSettings
from store.foreign.sources import Key, Source
from store.format import StoreMeta, to_float32
from store.opening import refuse_other, uncommitted
from store.sites import Stream
from store.sizes import human_size
from store.strata import RealText
from store.tokens import kept_positions
from store.writer import Part, StoreWriter

BLOCK = 2**20
"""values rounded at once: they stay in the cache"""

__all__ = ["ImportSettings", "ImportSummary", "run"]


@dataclass(frozen=True)
class ImportSummary:
    """What an import did."""

    store: Path
    images: int
    """imported now"""
    seconds: float
    finished: bool


def run(settings: ImportSettings) -> ImportSummary:
    """Fill the store that `settings` describe, or go on filling it; what was done.

    Errors: `UsageError` before anything is written; `NonFiniteError` names site, step, image and file of a NaN or an infinity.
    """
    plan = make_plan(settings)
    meta, _ = refuse_other(settings.out, plan.meta, settings.allow_mixed)
    missing = uncommitted(settings.out, meta)
    images = sum(len(meta.part_images(part)) for part in missing)
    there = next(folder for folder in (settings.out, *settings.out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    print(plan.text(settings.out, images, free), flush=True)
    _refuse_full_disk(settings.out, meta, images, free)
    if settings.plan:
        return ImportSummary(settings.out, 0, 0.0, bool(not missing))
    writer = StoreWriter.open_or_create(settings.out, plan.meta, allow_mixed=settings.allow_mixed)
    _keep_record(settings)
    begun, done = time.monotonic(), 0
    with tqdm(
        total=images * plan.read_per_image,
        unit="B",
        unit_scale=True,
        desc="import",
        mininterval=0.5,
        disable=not images,
    ) as bar:
        for part in missing:
            with writer.claim(part) as lease:
                if lease is None:
                    bar.write(f"part {part} is being filled by another process: left to it")
                    bar.total -= len(meta.part_images(part)) * plan.read_per_image
                elif part in writer.missing():
                    writer.write_part(part, read_part(plan, part, bar.update), lease)
                    done += len(meta.part_images(part))
        finished = writer.seal()
    summary = ImportSummary(settings.out, done, time.monotonic() - begun, finished)
    print(_closing(summary, writer, done * plan.read_per_image))
    return summary


def read_part(plan: ImportPlan, part: int, advance: Callable[[int], object] = lambda _: None) -> Part:
    """The content of one part, rounded to the store's dtype; `advance` is told the bytes read of each image."""
    meta = plan.meta
    images = meta.part_images(part)
    prompts = prompt_rows(plan.prompts, images, meta.seeds_per_prompt, plan.text_tokens, plan.sigmas, plan.scheduled)
    text = RealText.of(prompts)
    positions: dict[tuple[Stream, int], np.ndarray] = {
        (stream, step): np.stack(
            [
                kept_positions(meta.tokens[stream], meta.seed, image, step, stream, *text.of_image(row))
                for row, image in enumerate(images)
            ]
        )
        for stream in meta.streams
        if not meta.tokens[stream].all_kept
        for step in meta.steps
    }
    values, errors = {}, {}
    for key, source in plan.sources.items():
        values[key], errors[key] = _read(plan, key, source, images, positions.get((key[0].stream, key[1])), advance)
    return Part(values, positions, prompts, None, errors)


def _read(
    plan: ImportPlan,
    key: Key,
    source: Source,
    images: range,
    positions: np.ndarray | None,
    advance: Callable[[int], object],
) -> tuple[np.ndarray, float]:
    """One array of a part (image, kept token, d_model), and the sum of its squared rounding errors."""
    meta, array = plan.meta, source.array
    logical = np.dtype(meta.carrier.logical)
    kept = meta.tokens[key[0].stream].kept
    values = np.empty((len(images), kept, meta.d_model), logical)
    if positions is not None:
        values[positions < 0] = np.nan
    error = 0.0
    for place, image in enumerate(images):
        rows = array.read(image, source.step)
        advance(rows.nbytes)
        slots = np.arange(kept) if positions is None else np.flatnonzero(positions[place] >= 0)
        chosen = slots if positions is None else positions[place][slots]
        at_once = max(BLOCK // meta.d_model, 1)
        for first in range(0, len(chosen), at_once):
            tokens = chosen[first : first + at_once]
            block = rows[first : first + at_once] if positions is None else rows[tokens]
            rounded, lost = _rounded(block, logical)
            if not np.isfinite(lost):
                _refuse_non_finite(plan, key, image, array.where(image), block, tokens)
            values[place, slots[first : first + at_once]] = rounded
            error += lost
    return values, error


def _rounded(block: np.ndarray, logical: np.dtype) -> tuple[np.ndarray, float]:
    """Values in the store's dtype, and the sum of squared differences: not finite where a value of either is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = block if block.dtype.itemsize >= 4 and block.dtype.isnative else _widened(block)
        rounded = wide.astype(logical)
        lost = np.subtract(wide, to_float32(rounded), dtype=wide.dtype).ravel().astype(np.float64)
        return rounded, float(np.einsum("i,i->", lost, lost))  # no BLAS, whose sums depend on its threads


def _widened(block: np.ndarray) -> np.ndarray:
    native = block.astype(block.dtype.newbyteorder("="), copy=False)
    return native if native.dtype.itemsize >= 4 else to_float32(native)


def _refuse_non_finite(
    plan: ImportPlan, key: Key, image: int, file: Path, block: np.ndarray, tokens: np.ndarray
) -> None:
    site, step, point = key
    exact = _widened(block)
    bad = np.argwhere(~np.isfinite(exact))
    if len(bad):
        row, channel = bad[0]
        what = f"holds {exact[row, channel]}"
        remedy = "leave the image out, or mend the file"
    else:
        with np.errstate(over="ignore"):
            row, channel = np.argwhere(~np.isfinite(to_float32(exact.astype(plan.meta.carrier.logical))))[0]
        what = f"holds {exact[row, channel]:g}, which {plan.meta.store_dtype} cannot hold"
        remedy = "choose a store dtype of greater range: --store-dtype bfloat16 or float32"
    raise NonFiniteError(
        f"{point} of {site} at step {step}, image {image}, token {tokens[row]}, channel {channel} {what} ({file}). "
        f"Nothing of this part was written: {remedy}."
    )


def _refuse_full_disk(out: Path, meta: StoreMeta, images: int, free: int) -> None:
    needed = images * meta.bytes_per_image
    if needed > free:
        raise GranaryError(
            f"{out}: {human_size(needed)} are still to be written and the disk has {human_size(free)} free. "
            "Keep fewer tokens (--tokens 64), images or steps, or choose a larger disk."
        )


def _keep_record(settings: ImportSettings) -> None:
    """Beside the store: the command that made it, for whoever has to make a part again."""
    file = layout.runs_folder(settings.out) / "import.json"
    if not file.exists():
        said = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
        write_json(file, {"command": sys.argv, "settings": said})


def _closing(summary: ImportSummary, writer: StoreWriter, size: int) -> str:
    rate = f", {human_size(size)} in {summary.seconds:.1f} s" if size else ""
    if summary.finished:
        state = f"finished: {writer.meta.n_images} images"
    else:
        state = f"not finished: {len(writer.missing())} of {writer.meta.n_parts} parts are still missing"
    return (
        f"{summary.store}: {summary.images} images imported{rate}; the store is {state}.\n"
        f"Look at it: python -m store info {summary.store}"
    )
