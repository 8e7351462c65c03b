"""Make `tiny-flux` again: `python -m harvest.tiny_flux`, about 45 minutes on two cores; it goes on after a kill.

1. `vae`     the autoencoder, from random pictures
2. `text`    CLIP text tower and T5 encoder, from captions
3. `flow`    the transformer, objects nearly in place
4. `wide`    the same, trained on with the whole range of places, so that seeds differ
5. `settle`  the same, over the range of places that it can draw cleanly
6. `vision`  the CLIP vision tower, against the frozen text tower
7. `judge`   the weights folder, then the judge's table on prompts that were never trained on
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers

from harvest.tiny_flux import assemble, evaluate, flow, text, vae
from harvest.tiny_flux.evaluate import WEIGHTS, EvaluateSettings
from harvest.tiny_flux.flow import SETTLING, WIDENING, FlowSettings
from harvest.tiny_flux.text import TextSettings, VisionSettings
from harvest.tiny_flux.vae import VaeSettings
from store.command import Command, program

Stage = Literal["vae", "text", "flow", "wide", "settle", "vision", "judge"]


@dataclass(frozen=True)
class TinyFluxSettings:
    """Where the weights go and how each stage is trained; the defaults made the committed weights."""

    out: Path = WEIGHTS
    """Folder to write the pipeline into."""
    build: Path = Path("build/tiny-flux")
    """Folder of the checkpoints; delete it to begin anew."""
    until: Stage = "judge"
    """Stop after this stage."""
    judged: int = 300
    """Prompts of each kind that the judge is shown at the end; 0 for none."""
    vae: VaeSettings = field(default_factory=VaeSettings)
    """The autoencoder."""
    text: TextSettings = field(default_factory=TextSettings)
    """CLIP text tower and T5 encoder."""
    flow: FlowSettings = field(default_factory=FlowSettings)
    """The transformer, objects nearly in place."""
    wide: FlowSettings = WIDENING
    """The transformer again, over the whole range of places."""
    settle: FlowSettings = SETTLING
    """The transformer at last, over the range of places that it can draw cleanly."""
    vision: VisionSettings = field(default_factory=VisionSettings)
    """The CLIP vision tower."""


def card(settings: TinyFluxSettings, table: list[str]) -> str:
    """The model card: what made these weights and what the judge says of them."""
    stages = ("vae", "text", "flow", "wide", "settle", "vision")
    versions = ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (torch, diffusers, transformers))
    return "\n".join(
        [
            "# tiny-flux",
            "",
            "A real, small `FluxPipeline` that draws coloured shapes: 64 x 64 pixels, 4 steps, guidance 0.  Its `CLIPModel` is in",
            "`clip/`.  Pass a dtype, a height and a width:",
            "",
            "```python",
            "pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)",
            'pipe("a small red circle on a blue background", height=64, width=64, num_inference_steps=4, guidance_scale=0.0)',
            "```",
            "",
            "Made by `python -m harvest.tiny_flux` from nothing but procedural pictures and their captions; float16.",
            "",
            "## What the judge says",
            "",
            "Prompts that were never trained on, 4 steps; held-out pairs are (shape, colour) pairs absent from all training.",
            "",
            *table,
            "",
            "## What made it",
            "",
            f"{versions}",
            "",
            *(f"- `{name}`: `{getattr(settings, name)!r}`" for name in stages),
            "",
            "## Limits",
            "",
            "It knows its own captions' words only.  Any prompt tokenizes, but what it draws for other words means nothing.",
            "",
        ]
    )


def run(settings: TinyFluxSettings) -> list[str]:
    """Every stage up to `settings.until`, resumed from its checkpoint; the judge's table as lines of Markdown."""
    build = settings.build
    autoencoder = vae.train(settings.vae, build).requires_grad_(False)
    if settings.until == "vae":
        return []
    encoders = text.train(settings.text, build)
    if settings.until == "text":
        return []
    flux = flow.train(settings.flow, encoders, autoencoder, build, name="flow")
    if settings.until == "flow":
        return []
    flux = flow.train(settings.wide, encoders, autoencoder, build, name="wide", start=flux)
    if settings.until == "wide":
        return []
    flux = flow.train(settings.settle, encoders, autoencoder, build, name="settle", start=flux)
    if settings.until == "settle":
        return []
    clip = text.train_vision(settings.vision, encoders.clip, build)
    if settings.until == "vision":
        return []
    assemble.save(settings.out, assemble.pipeline(encoders, autoencoder, flux), clip)
    table = evaluate.report(EvaluateSettings(n=settings.judged, weights=settings.out)) if settings.judged else []
    (settings.out / "README.md").write_text(card(settings, table))
    return table


def print_table(settings: TinyFluxSettings) -> None:
    """Make the model and print the judge's table."""
    print("\n".join(run(settings)))


if __name__ == "__main__":
    command = Command(TinyFluxSettings, print_table, "Make tiny-flux again, from procedural pictures; resumable.")
    sys.exit(program("harvest.tiny_flux", {"make": command}, default="make"))
