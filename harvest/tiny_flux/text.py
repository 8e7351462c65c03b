"""The text side: a CLIP text tower, a T5 encoder, and the CLIP vision tower that makes the first one a whole `CLIPModel`.

1. Both encoders learn from captions alone: the scene's attributes must be readable from CLIP's pooled vector and from
   T5's tokens.  Then they are frozen.
2. The vision tower and both projections learn to tell which of the pictures belongs to which caption.

FLUX masks no padding, so what T5 says must not depend on how much padding follows.  Two things see to that: the padding
embedding is so long that no layer can change its direction (all padding tokens come out equal), and real tokens are
trained to come out the same at every length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from harvest.tiny_flux import loop
from harvest.tiny_flux.scenes import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Scene, prompts, render
from harvest.tiny_flux.tokenizers import CLIP_LENGTH, SHORT, T5_LENGTH, clip_tokenizer, t5_tokenizer, twins
from harvest.tiny_flux.vae import to_pixels

CLIP_WIDTH, T5_WIDTH = 64, 96
PADDING = 10_000.0
"""Every entry of the padding embedding is +-this: an update of size 1 turns it by 1e-4, below half precision."""
IGNORED = -100


@dataclass(frozen=True)
class TextSettings:
    """How both text encoders are trained."""

    steps: int = 450
    batch: int = 96
    prompts: int = 60_000
    seed: int = 0
    rate: float = 2e-3
    steady: float = 1.0
    """Weight of the loss that makes real tokens the same at every length."""


@dataclass(frozen=True)
class VisionSettings:
    """How the vision tower is trained against the frozen text tower."""

    steps: int = 700
    batch: int = 96
    prompts: int = 40_000
    seed: int = 0
    rate: float = 1.5e-3


def training_prompts(n: int, two_share: float = 2 / 3) -> list[tuple[str, Scene]]:
    """Captions that training may see: of split train, without held-out (shape, colour) pairs."""
    return prompts(n, seed=0, split="train", two_share=two_share)


def clip_text_config() -> CLIPTextConfig:
    """Two layers, 64 wide."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config() -> T5Config:
    """Two layers, 96 wide."""
    return T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )


FIELDS: dict[str, Sequence[str]] = {
    "background": tuple(BACKGROUNDS),
    "relation": ("", *RELATIONS),
    "shape 1": SHAPES,
    "colour 1": tuple(COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "shape 2": ("", *SHAPES),
    "colour 2": ("", *COLOURS),
}


def answers(scenes: Sequence[Scene]) -> Tensor:
    """What the captions say, (scene, field) as indices into FIELDS; IGNORED where a field does not apply."""
    rows = []
    for scene in scenes:
        first, two = scene.objects[0], scene.relation is not None
        second = scene.objects[-1]
        said = [scene.background, scene.relation or "", first.shape, first.colour]
        said += ["", ""] if two else [first.size, first.position or ""]
        said += [second.shape, second.colour] if two else ["", ""]
        rows.append([v.index(s) if s in v else IGNORED for s, v in zip(said, FIELDS.values(), strict=True)])
    return torch.tensor(rows)


class Encoders(nn.Module):
    """Both encoders and the probes that train them; only `clip` and `t5` are kept."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.clip = CLIPTextModel(clip_text_config())
        self.t5 = T5EncoderModel(t5_config())
        self.clip_tokenizer: CLIPTokenizer = clip_tokenizer()
        self.t5_tokenizer: T5TokenizerFast = t5_tokenizer()
        embedding = self.t5.get_input_embeddings().weight
        nn.init.normal_(embedding, std=1.0)
        signs = torch.where(torch.rand(T5_WIDTH) < 0.5, -1.0, 1.0)
        with torch.no_grad():
            embedding[0] = PADDING * signs
        kept = torch.ones(len(embedding), 1)
        kept[0] = 0
        embedding.register_hook(lambda gradient: gradient * kept)
        self.questions = nn.Parameter(torch.randn(len(FIELDS), T5_WIDTH) * T5_WIDTH**-0.5)
        self.from_t5 = nn.ModuleList(nn.Linear(T5_WIDTH, len(values)) for values in FIELDS.values())
        self.from_clip = nn.ModuleList(nn.Linear(CLIP_WIDTH, len(values)) for values in FIELDS.values())

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """CLIP's pooled vector (text, 64); causal attention makes it independent of padding."""
        ids = self.clip_tokenizer(list(texts), padding="longest", truncation=True, return_tensors="pt").input_ids
        pooled: Tensor = self.clip(ids).pooler_output
        return pooled

    def ids(self, texts: Sequence[str], length: int = SHORT) -> Tensor:
        """T5 ids (text, length), padded and cut as the pipeline does."""
        encoded = self.t5_tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids

    def tokens(self, ids: Tensor) -> Tensor:
        """T5's tokens (text, length, 96), padding unmasked as in FLUX."""
        tokens: Tensor = self.t5(ids).last_hidden_state
        return tokens

    def losses(self, texts: Sequence[str], scenes: Sequence[Scene], length: int, n: int) -> dict[str, Tensor]:
        """Cross-entropies of both sets of probes, and how far the first `n` captions move at `length`."""
        right = answers(scenes)
        ids = self.ids(texts)
        tokens = self.tokens(ids)
        attention = (self.questions @ tokens.transpose(1, 2)).masked_fill((ids == 0)[:, None], -torch.inf)
        read = attention.softmax(-1) @ tokens
        pooled = self.pooled(texts)
        from_t5 = [probe(read[:, i]) for i, probe in enumerate(self.from_t5)]
        from_clip = [probe(pooled) for probe in self.from_clip]
        longer = self.tokens(self.ids(texts[:n], length))[:, :SHORT]
        return {
            "t5": torch.stack([F.cross_entropy(v, right[:, i]) for i, v in enumerate(from_t5)]).mean(),
            "clip": torch.stack([F.cross_entropy(v, right[:, i]) for i, v in enumerate(from_clip)]).mean(),
            "moved": (longer - tokens[:n]).square().mean(),
        }


def train(settings: TextSettings, build: Path) -> Encoders:
    """Both encoders, frozen; upper-case pieces read like the lower-case ones."""
    encoders = Encoders(settings.seed)
    world = training_prompts(settings.prompts)
    optimiser = torch.optim.AdamW(encoders.parameters(), lr=settings.rate, weight_decay=0.0)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([settings.seed, 3, step])
        chosen = [world[i] for i in rng.integers(len(world), size=settings.batch)]
        length = int(rng.choice([24, 32, 64, 128, 256, T5_LENGTH]))
        texts, scenes = [text for text, _ in chosen], [scene for _, scene in chosen]
        parts = encoders.losses(texts, scenes, length, max(2, 2048 // length))
        value = parts["t5"] + parts["clip"] + settings.steady * parts["moved"]
        return value, {name: float(part.detach()) for name, part in parts.items()}

    rate = partial(loop.ramp, steps=settings.steps)
    loop.train(encoders, [optimiser], loss, steps=settings.steps, path=build / "text.pt", settings=settings, rate=rate)
    with torch.no_grad():
        embedding = encoders.t5.get_input_embeddings().weight
        for piece, twin in twins().items():
            embedding[piece] = embedding[twin]
    return encoders.requires_grad_(False)


def fresh_clip(text: CLIPTextModel, seed: int) -> CLIPModel:
    """A CLIPModel around the trained text tower, its vision tower (8-pixel patches, 2 layers, 64 wide) untrained."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    clip = CLIPModel(
        CLIPConfig(text_config=clip_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=CLIP_WIDTH)
    )
    clip.text_model.load_state_dict(
        text.state_dict() if not hasattr(text, "text_model") else text.text_model.state_dict()
    )
    return clip


def train_vision(settings: VisionSettings, text: CLIPTextModel, build: Path) -> CLIPModel:
    """The whole CLIPModel; pictures are normalised to [-1, 1] (mean and deviation .5 in the preprocessor)."""
    clip = fresh_clip(text, settings.seed)
    clip.text_model.requires_grad_(False)
    tokenizer, world = clip_tokenizer(), training_prompts(settings.prompts, two_share=1 / 2)
    trained = [weight for weight in clip.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=0.01)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([settings.seed, 4, step])
        chosen = [world[i] for i in rng.integers(len(world), size=settings.batch)]
        pixels = to_pixels(np.stack([render(scene, rng)[0] for _, scene in chosen]))
        encoded = tokenizer([text for text, _ in chosen], padding="longest", return_tensors="pt")
        logits = clip(pixel_values=pixels, **encoded).logits_per_text
        target = torch.arange(len(logits))
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return value, {"loss": float(value.detach()), "top1": float((logits.argmax(1) == target).float().mean())}

    rate = partial(loop.ramp, steps=settings.steps)
    loop.train(clip, [optimiser], loss, steps=settings.steps, path=build / "vision.pt", settings=settings, rate=rate)
    return clip.requires_grad_(False)
