"""Draws a batch of pictures and hands over what the MLPs did, step by step.

Each image has its own generator, seeded by its own seed, so its noise does not depend on the batch it
is in.  The pipeline's own loop runs; at the end of each step it calls back, and that call says which
step it was.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harvest.capture import Captured, Keep, capture
from harvest.models.architectures import Architecture
from harvest.models.embeddings import Embedded, Embeddings
from harvest.models.loading import moves_weights, without_gradients
from harvest.models.text import UNCONDITIONAL, encode, family_of, is_guided
from harvest.replacing import Replacement
from harvest.tracing import Tracer, tracing
from store.errors import GranaryError, UsageError
from store.sites import Site


@dataclass(frozen=True)
class Drawn:
    """What a batch gave besides activations: sigmas (image, step) as received and as scheduled, and the pictures."""

    sigma: np.ndarray
    scheduler_sigma: np.ndarray
    pictures: list[Image.Image] | None
    latents: Tensor | None = None
    """what the VAE decodes, after the last step: float32 on the CPU, a row an image; None unless asked for"""


@dataclass(frozen=True)
class Sampler:
    """How a harvest draws: the pipeline, the sites that are read, and the sampler's settings."""

    pipe: Any
    """a pipeline of diffusers whose family `harvest.models.architectures` knows"""
    sites: tuple[Site, ...]
    height: int
    width: int
    num_inference_steps: int
    max_sequence_length: int
    guidance: float
    pictures: bool
    embeddings: Embeddings | None = None
    """where the prompts' embeddings come from; None: the pipeline's own encoders, batch by batch"""
    _empty: list[Embedded] = field(default_factory=list, repr=False, compare=False)

    @property
    def architecture(self) -> Architecture:
        """The family that the pipeline is of."""
        return family_of(self.pipe)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance doubles the transformer's batch."""
        return is_guided(self.architecture, self.guidance)

    @cached_property
    def _moved(self) -> bool:
        """Whether the pipeline is offloaded: a sampler is made when that is settled."""
        return moves_weights(self.pipe)

    @cached_property
    def _device(self) -> torch.device:
        """Where the pipeline computes, which it finds by a look at every module."""
        device: torch.device = self.pipe._execution_device
        return device

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_step: Callable[[int, Captured], None],
        tracer: Tracer | None = None,
        replacement: Replacement | None = None,
        latents: bool = False,
        embeddings: Embedded | None = None,
        keep: Keep | None = None,
    ) -> Drawn:
        """Draw one picture a prompt; `on_step(step, captured)` is called as each denoising step ends, `tracer` as blocks end.

        `replacement`: what `replace` handed out; its step is kept.  `latents`: hand the final ones over too.  `embeddings`:
        the prompts as `harvest.models.text.encode` gives them, where they were encoded before.  `keep`: as `capture` takes it.
        `UsageError` for a tracer or a replacement with a model whose double blocks circuits do not know.
        """
        transformer, architecture = self.pipe.transformer, self.architecture
        if (tracer is not None or replacement is not None) and not architecture.traceable:
            raise UsageError(f"a {architecture.pipeline} can be harvested, and neither traced nor steered")
        sigmas: list[Tensor] = []
        final: Tensor | None = None
        if replacement is not None:
            replacement.step = 0

        def step_ended(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal final
            taken = captured.take()
            assert taken.sigma is not None, "the transformer ran without a timestep"
            sigmas.append(taken.sigma)  # fetched at the end: a copy now would wait for the device
            on_step(step, taken)
            if tracer is not None:
                tracer.step = step + 1
            if replacement is not None:
                replacement.step = step + 1
            if latents:
                final = tensors["latents"]
            return {}

        given = self._given(prompts, embeddings)
        traces = nullcontext() if tracer is None else tracing(transformer, tracer)
        with (
            capture(transformer, self.sites, keep, self.guided) as captured,
            traces,
            without_gradients(self.pipe, self._moved),
        ):
            output = self.pipe(
                **given,
                height=self.height,
                width=self.width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance,
                max_sequence_length=self.max_sequence_length,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="pil" if self.pictures else "latent",
                callback_on_step_end=step_ended,
            )
        if len(sigmas) != self.num_inference_steps:
            raise GranaryError(
                f"the pipeline ended {len(sigmas)} steps where {self.num_inference_steps} were asked for, so that what was kept of a "
                f"step may be another's: its {type(self.pipe.scheduler).__name__} divides them otherwise; nothing was written of this part"
            )
        scheduled = self.pipe.scheduler.sigmas[: self.num_inference_steps].float().cpu().numpy()
        return Drawn(
            sigma=torch.stack(sigmas, dim=1).cpu().numpy().astype(np.float32),
            scheduler_sigma=np.tile(scheduled.astype(np.float32), (len(prompts), 1)),
            pictures=list(output.images) if self.pictures else None,
            latents=None if final is None else final.float().cpu().clone(),  # a plain tensor, not one of inference
        )

    def _given(self, prompts: Sequence[str], embedded: Embedded | None) -> dict[str, Tensor]:
        """What the pipeline is handed of the prompts, by its own keywords; and of the empty one where guidance needs it."""
        if embedded is None:
            source = self.embeddings
            embedded = self._encoded(prompts) if source is None else source.of(prompts)
        names = self.architecture.embeddings
        given = dict(zip(names, embedded, strict=True))
        if self.guided:
            empty = (part.expand(len(prompts), *part.shape[1:]) for part in self._unconditional())
            given |= {f"negative_{name}": part for name, part in zip(names, empty, strict=True)}
        return given

    def _encoded(self, prompts: Sequence[str]) -> Embedded:
        return encode(self.pipe, prompts, self.max_sequence_length, self._moved, self._device)

    def _unconditional(self) -> Embedded:
        """The empty prompt, encoded by itself and once, so that it does not depend on the batch."""
        if not self._empty:
            source = self.embeddings
            made = self._encoded([UNCONDITIONAL]) if source is None else source.source((UNCONDITIONAL,))
            self._empty.append(tuple(part.to(self._device) for part in made))
        return self._empty[0]
