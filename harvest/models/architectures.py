"""What Granary knows of each family of models: one row a family, and the only place that names a model's modules.

A site is read at a spot, and a spot is one of two kinds:

    whole   a feed-forward module of its own: its input is mlp_in, its output mlp_out
    fused   a single-stream block's: mlp_in is what `reads` is given; what `hidden` gives, times the columns of `writes` that
            are for it (the last ones; those before are the attention's), is mlp_out, without the bias, which belongs to neither
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from store.errors import UsageError
from store.sites import Kind, Site, Stream


@dataclass(frozen=True)
class Spot:
    """Where the MLP of a stream is read in a block."""

    kind: Kind
    reads: str
    """the module, seen from the block, whose input is mlp_in"""
    hidden: str | None = None
    """fused: the module whose output is the hidden layer; None where the output of `reads` is mlp_out"""
    writes: str | None = None
    """fused: the linear layer that the hidden layer goes through together with the attention"""
    rows_before: int = 0
    """fused: outputs of `reads` that come before the MLP's own, by d_model"""
    recomputable: bool = True
    """whether mlp_out follows from mlp_in by W2 gelu_tanh(W1 mlp_in + b1) + b2"""
    last_without: bool = False
    """the last block has no such MLP (SD3's last block writes no text)"""

    @property
    def fused(self) -> bool:
        """Whether the MLP shares its output layer with the attention."""
        return self.hidden is not None


@dataclass(frozen=True)
class Architecture:
    """A family of models, as far as it differs from another."""

    name: str
    pipeline: str
    """class of diffusers that draws"""
    transformer: str
    """class of diffusers that is read"""
    blocks: Mapping[Kind, str]
    """where the transformer keeps its blocks"""
    streams: Mapping[Stream, Spot]
    parts: tuple[str, ...]
    """components whose weights are hashed"""
    may_lack: tuple[str, ...] = ()
    """those of them that a model may come without"""
    embeddings: tuple[str, ...] = ("prompt_embeds", "pooled_prompt_embeds")
    """what the pipeline calls what its text encoders say of prompts"""
    text_before: int = 0
    """places of the text sequence before those that --max-sequence-length counts: CLIP's 77 of SD3"""
    gives_sigmas: bool = True
    """the pipeline hands its scheduler the noise levels, and how far they shift, itself"""
    vae_always: bool = False
    """the pipeline needs its VAE for latents, too"""
    sigma_divisor: float = 1.0
    """sigma = timestep / divisor, as the transformer received it"""
    guided_half: bool = False
    """classifier-free guidance doubles the batch, and the second half is the conditional one"""
    traceable: bool = False
    """whether circuits know its double blocks"""

    @property
    def recomputable(self) -> bool:
        """Whether mlp_out can be recomputed from mlp_in in every stream."""
        return all(spot.recomputable for spot in self.streams.values())

    def spot(self, site: Site) -> Spot:
        """Where a site is read; `UsageError` for a stream that these models have not."""
        spot = self.streams.get(site.stream)
        if spot is None or spot.kind != site.kind:
            raise UsageError(f"{site}: a {self.transformer} has no such stream; it has {', '.join(self.streams)}")
        return spot

    def block(self, transformer: Any, site: Site) -> Any:
        """The block that a site is in; `UsageError` for one that the model has not."""
        self.spot(site)
        blocks = getattr(bare(transformer), self.blocks[site.kind])
        if site.layer >= len(blocks):
            raise UsageError(f"{site}: the model has {said(site.kind, len(blocks))}")
        return blocks[site.layer]

    def module(self, transformer: Any, site: Site, name: str) -> Any:
        """The module of that dotted name in the site's block; `UsageError` where there is none."""
        found = self.block(transformer, site)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise UsageError(f"{site}: this block of the model has no {name}, and so no such site")
        return found

    def sites(self, counts: Mapping[Kind, int]) -> tuple[Site, ...]:
        """Every site of a model with so many blocks of each kind, stream by stream."""
        return tuple(
            Site(spot.kind, layer, stream)
            for stream, spot in self.streams.items()
            for layer in range(max(0, counts.get(spot.kind, 0) - spot.last_without))
        )


FLUX = Architecture(
    name="flux",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    blocks=MappingProxyType({"double": "transformer_blocks", "single": "single_transformer_blocks"}),
    streams=MappingProxyType(
        {
            "img": Spot("double", "ff"),
            "txt": Spot("double", "ff_context"),
            "joint": Spot("single", "proj_mlp", hidden="act_mlp", writes="proj_out"),
        }
    ),
    parts=("transformer", "text_encoder", "text_encoder_2", "vae"),
    traceable=True,
)

SD3 = Architecture(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    blocks=MappingProxyType({"double": "transformer_blocks"}),
    streams=MappingProxyType({"img": Spot("double", "ff"), "txt": Spot("double", "ff_context", last_without=True)}),
    parts=("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"),
    may_lack=("text_encoder_3",),
    text_before=77,
    gives_sigmas=False,
    sigma_divisor=1000.0,
    guided_half=True,
)

FLUX2 = Architecture(
    name="flux2",
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    blocks=MappingProxyType({"double": "transformer_blocks", "single": "single_transformer_blocks"}),
    streams=MappingProxyType(
        {  # the MLPs are gated (SwiGLU)
            "img": Spot("double", "ff", recomputable=False),
            "txt": Spot("double", "ff_context", recomputable=False),
            "joint": Spot(
                "single",
                "attn.to_qkv_mlp_proj",
                hidden="attn.mlp_act_fn",
                writes="attn.to_out",
                rows_before=3,
                recomputable=False,
            ),
        }
    ),
    parts=("transformer", "text_encoder", "vae"),
    embeddings=("prompt_embeds",),
    vae_always=True,
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in (FLUX, SD3, FLUX2)})


def bare(transformer: Any) -> Any:
    """The transformer itself, out of what `torch.compile` wraps around it."""
    return getattr(transformer, "_orig_mod", transformer)


def architecture_of(model: Any) -> Architecture:
    """The row of a transformer or a pipeline; `UsageError` names those that are known."""
    transformer = bare(getattr(model, "transformer", model))
    names = [kind.__name__ for kind in type(transformer).__mro__]
    for row in ARCHITECTURES.values():
        if row.transformer in names:
            return row
    known = ", ".join(row.transformer for row in ARCHITECTURES.values())
    raise UsageError(f"a {names[0]} is no transformer that Granary reads; it reads {known}")


def architecture_of_pipeline(name: str) -> Architecture | None:
    """The row of a pipeline by the name of its class; None for one that Granary does not know."""
    return next((row for row in ARCHITECTURES.values() if row.pipeline == name), None)


def architecture_named(name: str | None) -> Architecture:
    """The row that a store's metadata names; FLUX where it names none."""
    return ARCHITECTURES[name or FLUX.name]


def counts_of(architecture: Architecture, transformer: Any) -> dict[Kind, int]:
    """How many blocks of each kind the model has."""
    return {kind: len(getattr(bare(transformer), name, ())) for kind, name in architecture.blocks.items()}


def sites_of(architecture: Architecture, transformer: Any) -> tuple[Site, ...]:
    """Every site that the model has, stream by stream."""
    return architecture.sites(counts_of(architecture, transformer))


def said(kind: Kind, count: int) -> str:
    """`double blocks 0 to 18`, or that there are none."""
    return f"{kind} blocks 0 to {count - 1}" if count else f"no {kind} blocks"
