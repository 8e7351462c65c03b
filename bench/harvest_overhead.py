"""What capturing costs: a harvest against plain generation of the same pictures.

Ours is everything from the first noise to the commit of the last part: the model, the choice of tokens, the conversion, statistics,
checksums, encoding (the pictures as PNG as well), and writing with fsync.  The pipeline alone draws the same prompts with the same seeds in
the same batches, and decodes the same pictures; both have the model loaded.  Once it drops them, and once it keeps them as the same
PNG bytes, as whoever generates pictures does.  Ours writes one part while it draws the next, so the last part's writing is all that
nothing goes on beside: pictures enough for several parts are drawn.

Least work: the operations of the generation, counted by `torch.utils.flop_counter`, and the bytes of the kept rows onto the disk.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.lines import Line, Need, Peer, Size
from bench.timing import by_turns, quiet
from harvest.fill import fill_parts
from harvest.planning.plan import Plan, make_plan
from harvest.rows import picture_table
from harvest.settings import HarvestSettings
from harvest.tiny_flux import scenes
from harvest.workers.progress import Progress
from store.sizes import human_size
from store.writer import StoreWriter

GOAL = 1.15
"""with 64 image tokens and all text tokens of all double sites"""


@dataclass(frozen=True)
class Case:
    """Which image tokens are kept of pictures of what size."""

    tokens: str
    pixels: int
    images: int
    goal: float | None = None


SMALL = (Case("16", 64, 192), Case("all", 64, 192, GOAL))
LARGE = (Case("64", 128, 64, GOAL), Case("all", 128, 64))
SIZES: dict[Size, tuple[tuple[Case, ...], int]] = {
    "tiny": ((Case("4", 64, 2),), 1), "quick": ((*SMALL, *LARGE), 2), "full": ((*SMALL, *LARGE), 7),
}  # fmt: skip
"""cases and rounds"""


def lines(size: Size) -> Iterator[Line]:
    """tiny-flux at 64 pixels, which are 64 image tokens, and at 128, which are 256."""
    cases, rounds = SIZES[size]
    for case in cases:
        yield overhead(case, rounds)


def overhead(case: Case, rounds: int) -> Line:
    """Harvest and generation by turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "prompts.txt"  # captions as plain text: no judge of builtin:shapes looks at the pictures
        file.write_text("\n".join(text for text, _ in scenes.prompts(case.images, 0)))
        settings = HarvestSettings(
            out=folder / "store", prompts=str(file), batch_size=min(16, case.images), tokens=case.tokens, resolution=case.pixels,
            pictures="png",
        )  # fmt: skip
        with quiet():
            plan = make_plan(settings)
        stores = iter(range(rounds + 1))
        ours, its, kept_too = by_turns(
            lambda: harvest(plan, folder / f"store-{next(stores)}"),
            partial(generate, plan),
            partial(generate, plan, keep=True),
            rounds=rounds,
        )
        with FlopCounterMode(display=False) as counted:
            generate(plan, plan.meta.batch_size)
    amount, total = case.images * plan.meta.bytes_per_image, plan.meta.tokens["img"].total
    operations = counted.get_total_flops() * case.images / plan.meta.batch_size
    kept = f"{plan.meta.tokens['img'].kept} of {total} tokens"
    peers = (Peer("the pipeline alone, pictures kept", kept_too, case.goal), Peer("the pipeline alone, dropped", its))
    return Line(
        f"{case.images} pictures of {case.pixels} px, {kept}", ours, peers,
        (Need("float32", operations), Need("write", amount)),
        f"{len(plan.meta.sites)} sites, {plan.meta.n_parts} parts, {human_size(amount / min(ours))}/s onto the disk",
    )  # fmt: skip


def harvest(plan: Plan, store: Path) -> None:
    """Draw and write every part, as `python -m harvest` does once the model is loaded."""
    writer = StoreWriter.open_or_create(store, plan.meta, plan.weights)
    fill_parts(plan, writer, range(plan.meta.n_parts), Progress())
    assert writer.seal()


def generate(plan: Plan, images: int | None = None, keep: bool = False) -> None:
    """The pipeline's own call, batch by batch; the first so many pictures, encoded as PNG if they are to be kept."""
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
                picture_table(batch, drawn, "png")
