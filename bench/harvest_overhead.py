"""What capturing costs: a harvest against plain generation of the same pictures.

Ours is everything from the first noise to the commit of the last part: the model, the choice of tokens, the conversion, statistics,
checksums, encoding (the pictures as well), and writing with fsync.  It is what `python -m harvest --prompts FILE` does when nothing
else is said (all double sites, all text tokens, batches of 8, pictures as WebP) but for `--tokens` and `--resolution`.  The
pipeline alone draws the same prompts with the same seeds in the same batches, and decodes the same pictures; both have the
model loaded.  It drops them: that is the plain generation which the goal is about, the hardest to stand beside.  A second row
keeps them as the same WebP bytes, as whoever generates pictures does.

Ours writes one part while it draws the next, and only the last one's writing is waited for.  A part is 64 pictures at the most: the
384 pictures of the line with the goal are six parts, over which this wait is spread, so that it weighs little, as it does in longer
harvests.

Least work: the operations of the generation, counted by `torch.utils.flop_counter`, and the bytes of the kept rows onto the disk.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.lines import Line, Need, Peer, Seconds, Size
from bench.timing import by_turns, quiet
from harvest.fill import fill_parts
from harvest.planning.plan import Plan, make_plan
from harvest.rows import picture_table
from harvest.settings import HarvestSettings
from harvest.tiny_flux import scenes
from harvest.workers.progress import Progress
from store.sizes import human_size
from store.writer import StoreWriter

DROPPED, KEPT = "the pipeline alone, pictures dropped", "the pipeline alone, pictures kept"
GOAL = 1.15
"""of ours / the pipeline alone, pictures dropped; with 64 image tokens and all text tokens of all double sites, at tiny-flux's own size"""


@dataclass(frozen=True)
class Case:
    """Pictures of one size, drawn once by each way."""

    pixels: int
    images: int
    tokens: tuple[str, ...]
    """how many image tokens are kept: a harvest, and a line, for each"""
    goal: float | None = None
    kept_too: bool = False
    """whether the pipeline alone is timed keeping its pictures as well"""


SMALL, LARGE = Case(64, 384, ("all",), GOAL, kept_too=True), Case(128, 128, ("64", "all"))
SIZES: dict[Size, tuple[tuple[Case, ...], int]] = {
    "tiny": ((Case(64, 2, ("4",), kept_too=True),), 1),
    "quick": ((SMALL, LARGE), 2),
    "full": ((replace(SMALL, tokens=("16", "all")), LARGE), 5),
}  # fmt: skip
"""cases and rounds; the cases have six parts and two"""


def lines(size: Size) -> Iterator[Line]:
    """tiny-flux at 64 pixels, which are 64 image tokens, and at 128, which are 256."""
    cases, rounds = SIZES[size]
    for case in cases:
        yield from overhead(case, rounds)


def overhead(case: Case, rounds: int) -> Iterator[Line]:
    """Harvests and generation by turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "prompts.txt"  # captions as plain text: no judge of builtin:shapes looks at the pictures
        file.write_text("\n".join(text for text, _ in scenes.prompts(case.images, 0)))
        with quiet():
            plans = [make_plan(asked(case, tokens, file)) for tokens in case.tokens]
        plan = plans[0]
        store = folder / "store"
        works = [partial(generate, plan), *([partial(generate, plan, keep=True)] if case.kept_too else [])]
        harvest(plan, store, range(1))  # these two warm up: a part, and a batch
        generate(plan, plan.meta.batch_size)
        harvests = [partial(harvest, plan, store) for plan in plans]
        gone = partial(shutil.rmtree, store, ignore_errors=True)
        times = by_turns(*harvests, *works, rounds=rounds, warm_up=False, before=gone)
        with FlopCounterMode(display=False) as counted:
            generate(plan, plan.meta.batch_size)
    operations = counted.get_total_flops() * case.images / plan.meta.batch_size
    dropped, *kept = times[len(plans) :]
    peers = (Peer(DROPPED, dropped, case.goal), *(Peer(KEPT, seconds) for seconds in kept))
    for plan, ours in zip(plans, times, strict=False):
        yield _line(case, plan, ours, peers, operations)


def asked(case: Case, tokens: str, prompts: Path) -> HarvestSettings:
    """What the command line would be asked."""
    return HarvestSettings(
        out=prompts.parent / "store", prompts=str(prompts), tokens=tokens, resolution=case.pixels,
        batch_size=min(HarvestSettings.batch_size, case.images),
    )  # fmt: skip


def _line(case: Case, plan: Plan, ours: Seconds, peers: tuple[Peer, ...], operations: float) -> Line:
    image, amount = plan.meta.tokens["img"], case.images * plan.meta.bytes_per_image
    return Line(
        f"{case.images} pictures of {case.pixels} px, {image.kept} of {image.total} tokens", ours, peers,
        (Need("float32", operations), Need("write", amount)),
        f"{len(plan.meta.sites)} sites, {plan.meta.n_parts} parts, {human_size(amount / min(ours))}/s onto the disk",
    )  # fmt: skip


def harvest(plan: Plan, store: Path, parts: range | None = None) -> None:
    """Draw and write every part, or some, as `python -m harvest` does once the model is loaded."""
    writer = StoreWriter.open_or_create(store, plan.meta, plan.weights)
    fill_parts(plan, writer, parts or range(plan.meta.n_parts), Progress())
    assert parts is not None or writer.seal()


def generate(plan: Plan, images: int | None = None, keep: bool = False) -> None:
    """The pipeline's own call, batch by batch; the first so many pictures, encoded as ours are if they are to be kept."""
    meta, prompts = plan.meta, plan.prompts
    with torch.inference_mode():
        for first in range(0, images or meta.n_images, meta.batch_size):
            batch = range(first, min(first + meta.batch_size, meta.n_images))
            drawn = plan.sampler.pipe(
                [prompts.prompts[image].text for image in batch],
                height=meta.height,
                width=meta.width,
                num_inference_steps=meta.num_inference_steps,
                guidance_scale=0.0,
                max_sequence_length=meta.max_sequence_length,
                generator=[torch.Generator("cpu").manual_seed(prompts.seed_of(image, meta.seed)) for image in batch],
            ).images
            if keep:
                picture_table(batch, drawn, meta.pictures)
