"""What capturing costs: a harvest against plain generation of the same pictures.

Fewest operations: a harvest runs the same model once.  Beyond that it must copy each kept row once
from the model and write it once; everything else is overhead.
"""

import tempfile
from pathlib import Path

import torch

from bench.timing import Comparison, by_turns
from harvest.fill import fill_part
from harvest.plan import make_plan
from harvest.settings import HarvestSettings
from harvest.tiny_flux import scenes
from store.writer import StoreWriter

IMAGES = 32


def compare(tokens: str) -> Comparison:
    """Wall time of a harvest of all double sites with `tokens` image tokens, against the pipeline alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"  # captions as plain text: no judge of builtin:shapes looks at the pictures
        file.write_text("\n".join(text for text, _ in scenes.prompts(IMAGES, 0)))
        settings = HarvestSettings(
            out=Path(folder) / "store", prompts=str(file), batch_size=16, tokens=tokens, pictures="png"
        )
        plan = make_plan(settings)
        meta, prompts = plan.meta, plan.prompts
        writers = iter([StoreWriter.open_or_create(Path(folder) / f"store-{i}", meta) for i in range(4)])

        def harvest() -> None:
            next(writers).write_part(0, fill_part(plan, 0))

        def generate() -> None:
            with torch.inference_mode():
                for first in range(0, IMAGES, meta.batch_size):
                    batch = range(first, first + meta.batch_size)
                    plan.sampler.pipe(
                        [prompts.prompts[i].text for i in batch],
                        height=meta.height,
                        width=meta.width,
                        num_inference_steps=meta.num_inference_steps,
                        guidance_scale=0.0,
                        max_sequence_length=meta.max_sequence_length,
                        generator=[torch.Generator("cpu").manual_seed(i) for i in batch],
                    )

        ours, other = by_turns(harvest, generate)
    megabytes = IMAGES * meta.bytes_per_image / 1e6
    return Comparison(
        f"harvest, {tokens} image tokens", ours, "the pipeline alone, no capture", other, f"{megabytes:.0f} MB to write"
    )


def comparisons() -> list[Comparison]:
    return [compare("16"), compare("all")]
