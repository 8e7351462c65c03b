"""Draws a batch of pictures and hands over what the MLPs did, step by step.

Each image has its own generator, seeded by its own seed, so its noise does not depend on the batch it
is in.  The pipeline's own loop runs; at the end of each step it calls back, and that call says which
step it was.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harvest.capture import Captured, capture
from harvest.replacing import Replacement
from harvest.text import encode
from harvest.tracing import Tracer, tracing
from store.sites import Site

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@dataclass(frozen=True)
class Drawn:
    """What a batch gave besides activations: sigmas (image, step) as received and as scheduled, and the pictures."""

    sigma: np.ndarray
    scheduler_sigma: np.ndarray
    pictures: list[Image.Image] | None
    latents: Tensor | None = None
    """what the VAE decodes, after the last step: (image, token, channel) float32 on the CPU; None unless asked for"""


@dataclass(frozen=True)
class Sampler:
    """How a harvest draws: the pipeline, the sites that are read, and the sampler's settings."""

    pipe: "FluxPipeline"
    sites: tuple[Site, ...]
    height: int
    width: int
    num_inference_steps: int
    max_sequence_length: int
    guidance: float
    pictures: bool

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_step: Callable[[int, Captured], None],
        tracer: Tracer | None = None,
        replacement: Replacement | None = None,
        latents: bool = False,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Drawn:
        """Draw one picture a prompt; `on_step(step, captured)` is called as each denoising step ends, `tracer` as blocks end.

        `replacement`: what `replace` handed out; its step is kept.  `latents`: hand the final ones over too.  `embeddings`:
        the prompts as `harvest.text.encode` gives them, where they were encoded before.
        """
        transformer = self.pipe.transformer
        embeds, pooled = embeddings or encode(self.pipe, prompts, self.max_sequence_length)
        sigmas: list[np.ndarray] = []
        final: Tensor | None = None
        if replacement is not None:
            replacement.step = 0

        def step_ended(_pipe: "FluxPipeline", step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal final
            taken = captured.take()
            assert taken.sigma is not None, "the transformer ran without a timestep"
            sigmas.append(taken.sigma.cpu().numpy())
            on_step(step, taken)
            if tracer is not None:
                tracer.step = step + 1
            if replacement is not None:
                replacement.step = step + 1
            if latents:
                final = tensors["latents"]
            return {}

        traces = nullcontext() if tracer is None else tracing(transformer, tracer)
        with capture(transformer, self.sites) as captured, traces, torch.inference_mode():
            output = self.pipe(
                prompt_embeds=embeds,
                pooled_prompt_embeds=pooled,
                height=self.height,
                width=self.width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance,
                max_sequence_length=self.max_sequence_length,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pil" if self.pictures else "latent",
                callback_on_step_end=step_ended,
            )
        scheduled = self.pipe.scheduler.sigmas[: self.num_inference_steps].float().cpu().numpy()
        return Drawn(
            sigma=np.stack(sigmas, axis=1).astype(np.float32),
            scheduler_sigma=np.tile(scheduled.astype(np.float32), (len(prompts), 1)),
            pictures=list(output.images) if self.pictures else None,
            latents=None if final is None else final.float().cpu().clone(),  # a plain tensor, not one of inference
        )
