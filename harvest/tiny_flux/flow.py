"""The transformer: rectified flow from noise to the latents of a picture, told by a caption.

What made shape come out right (each alone is not enough, both together are): objects of 3 x 3 to 5 x 5 tokens, and
sampling sigma where the 4-step sampler really looks: 40 % exactly 1, 40 % one of the four steps, 20 % anywhere.  At
sigma 1 the whole picture comes from the prompt; the usual mix trains that on 6 % of the samples.

Every text length costs the same here.  All padding tokens of FLUX's text stream are equal (`text.PADDING`) and have no
position, so k of them are one token whose attention logit is raised by log k: a batch of 16 text tokens, the last one
weighted, trains every `max_sequence_length` from 16 to 512 exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from harvest.tiny_flux import loop
from harvest.tiny_flux.muon import Muon
from harvest.tiny_flux.scenes import WIDE, Jitter, render
from harvest.tiny_flux.text import CLIP_WIDTH, T5_WIDTH, Encoders, training_prompts
from harvest.tiny_flux.tokenizers import SHORT, T5_LENGTH
from harvest.tiny_flux.vae import CHANNELS, encode

SIDE = 8
"""Image tokens along each side of a 64-pixel picture."""


NARROW = Jitter(place=1.5, radius=1.0)
"""Where learning begins: shape is not learned in minutes unless objects stay nearly in place."""


@dataclass(frozen=True)
class FlowSettings:
    """How the transformer is trained."""

    steps: int = 1300
    batch: int = 32
    prompts: int = 60_000
    two_share: float = 0.6
    """Share of two-object pictures, after the first `ones_first` steps, which show one object only."""
    ones_first: int = 500
    seed: int = 0
    muon: float = 0.02
    adam: float = 2e-3
    exactly_one: float = 0.4
    on_steps: float = 0.4
    decay: float = 0.3
    """Share of the steps over which the learning rates fall to zero."""
    jitter: Jitter = NARROW


WIDENING = FlowSettings(steps=1600, ones_first=0, seed=1, muon=0.01, adam=1e-3, jitter=WIDE)
"""How the transformer is trained on, over the whole range of places: seeds then differ by 10 of 255, at .94 to .99 right."""

SETTLING = FlowSettings(
    steps=850, ones_first=0, seed=2, muon=0.008, adam=8e-4, decay=0.8, jitter=Jitter(place=3.0, radius=1.5)
)
"""How it ends: places within 3 of 128, where corners and curves come out clean again."""


def fresh(seed: int) -> FluxTransformer2DModel:
    """An untrained transformer: 5 double and 2 single blocks, 4 heads of 32; 3.5 M weights.

    Five double blocks and two single ones cost what three and four do, and give circuits more room.
    """
    torch.manual_seed(seed)
    flux = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=5,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    width = flux.inner_dim
    for name, module in flux.named_modules():
        if name.startswith(("transformer_blocks", "single_transformer_blocks")) and name.endswith(".linear"):
            assert isinstance(module, nn.Linear)
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
            for start in (2, 5) if module.out_features == 6 * width else (2,):
                nn.init.constant_(module.bias[start * width : (start + 1) * width], 0.5)
    nn.init.zeros_(flux.proj_out.weight)
    nn.init.zeros_(flux.proj_out.bias)
    return flux


def image_ids() -> Tensor:
    """Positions (token, 3) of the image tokens, as the pipeline makes them: (0, row, column)."""
    ids = torch.zeros(SIDE, SIDE, 3)
    ids[..., 1] = torch.arange(SIDE)[:, None]
    ids[..., 2] = torch.arange(SIDE)[None, :]
    return ids.view(-1, 3)


def sample_sigma(settings: FlowSettings, rng: np.random.Generator) -> Tensor:
    """Sigma of each picture of a batch, (batch,), mostly where four sampling steps will look."""
    kind = rng.random(settings.batch)
    sigma = rng.random(settings.batch)
    sigma = np.where(
        kind < settings.exactly_one + settings.on_steps, rng.choice([1.0, 0.75, 0.5, 0.25], settings.batch), sigma
    )
    return torch.from_numpy(np.where(kind < settings.exactly_one, 1.0, sigma)).float()


def padded_bias(batch: int, rng: np.random.Generator) -> Tensor:
    """What is added to attention logits, (batch, 1, 1, text and image tokens): the last text token stands for k.

    Half of the pictures are trained at length 16 (k = 1), the others at a log-uniform length up to 512.
    """
    lengths = np.where(rng.random(batch) < 0.5, SHORT, np.exp(rng.uniform(np.log(SHORT), np.log(T5_LENGTH), batch)))
    bias = torch.zeros(batch, 1, 1, SHORT + SIDE * SIDE)
    bias[:, 0, 0, SHORT - 1] = torch.from_numpy(np.log(lengths - SHORT + 1)).float()
    return bias


def groups(flux: FluxTransformer2DModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside blocks but adaLN, everything else): the first go to Muon, the second to AdamW."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in flux.named_parameters():
        block = name.startswith(("transformer_blocks", "single_transformer_blocks"))
        (inner if block and weight.ndim == 2 and ".norm" not in name else rest).append(weight)
    return inner, rest


def velocity(
    flux: FluxTransformer2DModel, noisy: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, bias: Tensor | None
) -> Tensor:
    """What the transformer says of noisy latents (picture, 64, 32): the direction from picture to noise."""
    kwargs = None if bias is None else {"attention_mask": bias}
    (out,) = flux(
        hidden_states=noisy,
        timestep=sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=image_ids(),
        joint_attention_kwargs=kwargs,
        return_dict=False,
    )
    prediction: Tensor = out
    return prediction


def train(
    settings: FlowSettings,
    encoders: Encoders,
    vae: AutoencoderKL,
    build: Path,
    *,
    name: str = "flow",
    start: FluxTransformer2DModel | None = None,
) -> FluxTransformer2DModel:
    """The trained transformer (a running average of its weights), from `start` or from scratch."""
    flux = fresh(settings.seed)
    if start is not None:
        flux.load_state_dict(start.state_dict())
    ones, twos = (training_prompts(settings.prompts // 3, share) for share in (0.0, 1.0))
    inner, rest = groups(flux)
    optimisers = [Muon(inner, lr=settings.muon), torch.optim.AdamW(rest, lr=settings.adam, weight_decay=0.0)]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([settings.seed, 5, step])
        two = (rng.random(settings.batch) < settings.two_share) & (step >= settings.ones_first)
        chosen = [
            twos[i] if second else ones[i]
            for i, second in zip(rng.integers(len(ones), size=len(two)), two, strict=True)
        ]
        texts: Sequence[str] = [text for text, _ in chosen]
        with torch.no_grad():
            clean = encode(vae, np.stack([render(scene, rng, settings.jitter)[0] for _, scene in chosen]))
            tokens, pooled = encoders.tokens(encoders.ids(texts)), encoders.pooled(texts)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        sigma = sample_sigma(settings, rng)
        share = sigma[:, None, None]
        said = velocity(flux, (1 - share) * clean + share * noise, sigma, tokens, pooled, padded_bias(len(clean), rng))
        errors = (said - (noise - clean)).square().mean(dim=(1, 2))
        one = errors[sigma == 1]
        return errors.mean(), {"loss": float(errors.mean().detach()), "sigma1": float(one.mean().detach())}

    rate = partial(loop.ramp, steps=settings.steps, decay=settings.decay)
    path = build / f"{name}.pt"
    loop.train(flux, optimisers, loss, steps=settings.steps, path=path, settings=settings, rate=rate, averaged=True)
    return flux
