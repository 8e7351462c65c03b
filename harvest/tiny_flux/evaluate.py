"""The judge's table: how often the committed weights draw what a prompt that they never saw says.

Rows: one and two objects, known and held-out (shape, colour) pairs, at T5 lengths 16 and 512, and how far two seeds of
one prompt differ.  `python -m harvest.tiny_flux.evaluate --n 300`
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging
from tqdm import tqdm

from harvest.tiny_flux.judge import ATTRIBUTES, judge
from harvest.tiny_flux.scenes import PIXELS, Picture, Scene, prompts
from harvest.tiny_flux.tokenizers import SHORT, T5_LENGTH
from store.command import Command, program
from store.errors import UsageError

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class EvaluateSettings:
    """What the judge is shown."""

    n: int = 300
    """Prompts of each kind."""
    lengths: tuple[int, ...] = (SHORT, T5_LENGTH)
    """T5 lengths (`max_sequence_length`) to draw at."""
    seed: int = 1
    """Seed of the prompts and of the noise."""
    batch: int = 20
    """Pictures drawn at once."""
    weights: Path = WEIGHTS
    """Folder of the pipeline."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1 or not self.lengths:
            raise UsageError(f"--n {self.n}, --batch {self.batch} and --lengths {self.lengths}: at least 1 of each")


@dataclass(frozen=True)
class Row:
    """One line of the table: shares of pictures with each attribute right, and with everything right."""

    kind: str
    length: int
    n: int
    right: float
    attributes: dict[str, float]
    seconds: float
    """Per picture, drawing only."""


def load(folder: Path = WEIGHTS) -> FluxPipeline:
    """The pipeline in float32, silent."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, texts: Sequence[str], seeds: Sequence[int], length: int = SHORT, batch: int = 20) -> Picture:
    """Pictures (text, 64, 64, 3) uint8 in 4 steps, guidance 0; one generator a picture."""
    drawn = []
    for start in range(0, len(texts), batch):
        chunk = slice(start, start + batch)
        out = pipe(
            list(texts[chunk]),
            height=PIXELS,
            width=PIXELS,
            num_inference_steps=4,
            guidance_scale=0.0,
            max_sequence_length=length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chunk]],
            output_type="np",
        )
        drawn.append(np.rint(out.images * 255).astype(np.uint8))
    return np.concatenate(drawn)


KINDS: dict[str, dict[str, Any]] = {
    "one object": {"split": "val", "two_share": 0.0},
    "two objects": {"split": "val", "two_share": 1.0},
    "one object, held-out pair": {"two_share": 0.0, "held_out_pairs": True},
    "two objects, held-out pairs": {"two_share": 1.0, "held_out_pairs": True},
}
"""Arguments of `prompts`; nothing with a held-out pair was ever trained on, whatever its split."""


def row(pipe: Any, kind: str, settings: EvaluateSettings, length: int) -> Row:
    """The judge's verdict on `settings.n` prompts of a kind."""
    world: list[tuple[str, Scene]] = prompts(settings.n, settings.seed, **KINDS[kind])
    start = time.perf_counter()
    seeds = range(settings.seed, settings.seed + len(world))
    pictures = draw(pipe, [text for text, _ in world], seeds, length, settings.batch)
    seconds = (time.perf_counter() - start) / len(world)
    verdicts = [judge(picture, scene) for picture, (_, scene) in zip(pictures, world, strict=True)]
    shares = {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in ATTRIBUTES}
    return Row(kind, length, len(world), float(np.mean([v.right for v in verdicts])), shares, seconds)


def table(pipe: Any, settings: EvaluateSettings) -> Iterator[Row]:
    """Every row: each kind at each length."""
    for length in settings.lengths:
        for kind in KINDS:
            yield row(pipe, kind, settings, length)


def seed_difference(pipe: Any, n: int, seed: int = 1) -> float:
    """Mean absolute difference (of 255) between two seeds of one prompt, over `n` held-out prompts."""
    texts = [text for text, _ in prompts(n, seed, "val")]
    first, second = (draw(pipe, texts, [base + i for i in range(n)]).astype(float) for base in (seed, seed + 10**6))
    return float(np.abs(first - second).mean())


def line(one: Row) -> str:
    """A row of the table as Markdown."""
    shares = " | ".join(f"{one.attributes[name]:.3f}" for name in ATTRIBUTES)
    return f"| {one.kind} | {one.length} | {one.n} | **{one.right:.3f}** | {shares} |"


def report(settings: EvaluateSettings) -> list[str]:
    """The whole table as lines of Markdown."""
    logging.set_verbosity_error()
    pipe = load(settings.weights)
    names = " | ".join(ATTRIBUTES)
    lines = [
        f"| prompts never trained on | T5 length | n | everything right | {names} |",
        "|---" * (4 + len(ATTRIBUTES)) + "|",
    ]
    rows = tqdm(table(pipe, settings), total=len(KINDS) * len(settings.lengths), desc="judge", mininterval=0.5)
    lines += [line(one) for one in rows]
    return [*lines, "", f"Two seeds of one held-out prompt differ by {seed_difference(pipe, settings.n):.1f} of 255."]


def run(settings: EvaluateSettings) -> None:
    """Print the table."""
    print("\n".join(report(settings)))


if __name__ == "__main__":
    command = Command(EvaluateSettings, run, "Judge what the weights draw from prompts that they never saw.")
    sys.exit(program("harvest.tiny_flux.evaluate", {"evaluate": command}, default="evaluate"))
