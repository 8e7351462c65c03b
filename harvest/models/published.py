"""Configurations of published models, as their repositories hold them: what a model takes is told before a byte of it is here.

Numbers of parameters are never written down: `harvest.planning.parameters` builds the modules without weights and counts.
"""

from typing import Any

from harvest.settings import DEV, SCHNELL, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD35_TURBO

Configuration = tuple[str, str, dict[str, Any]]
"""library, class and configuration of a part"""

T5_XXL: Configuration = (
    "transformers",
    "T5EncoderModel",
    {
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": False, "use_cache": False,
    },
)  # fmt: skip
_CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "max_position_embeddings": 77, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
VAE: Configuration = (
    "diffusers",
    "AutoencoderKL",
    {
        "block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 1024,
        "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
)  # fmt: skip


def _flux_transformer(guidance_embeds: bool) -> Configuration:
    config = {
        "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 64,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768, "patch_size": 1, "guidance_embeds": guidance_embeds,
        "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    return "diffusers", "FluxTransformer2DModel", config


def _flux(guidance_embeds: bool) -> dict[str, Configuration]:
    encoders = {"text_encoder": ("transformers", "CLIPTextModel", _CLIP_L), "text_encoder_2": T5_XXL}
    return {"transformer": _flux_transformer(guidance_embeds), **encoders, "vae": VAE}


def _sd3(blocks: int, positions: int, dual: tuple[int, ...], qk_norm: str | None) -> dict[str, Configuration]:
    heads = blocks  # of 64 channels each, as many as there are blocks
    config = {
        "num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": 64, "caption_projection_dim": 64 * heads,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "sample_size": 128, "pos_embed_max_size": positions, "dual_attention_layers": dual, "qk_norm": qk_norm,
    }  # fmt: skip
    clip = "transformers", "CLIPTextModelWithProjection"
    return {
        "transformer": ("diffusers", "SD3Transformer2DModel", config), "text_encoder": (*clip, _CLIP_L),
        "text_encoder_2": (*clip, _CLIP_G), "text_encoder_3": T5_XXL, "vae": VAE,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Configuration]] = {
    SCHNELL: _flux(False),
    DEV: _flux(True),
    SD3_MEDIUM: _sd3(24, 192, (), None),
    SD35_MEDIUM: _sd3(24, 384, tuple(range(13)), "rms_norm"),
    SD35_LARGE: _sd3(38, 192, (), "rms_norm"),
    SD35_TURBO: _sd3(38, 192, (), "rms_norm"),
}
"""model -> part of its pipeline -> what it is"""

FILES_IN = {SCHNELL: "bfloat16", DEV: "bfloat16", SD3_MEDIUM: "float16"}
"""model -> dtype of the files of all its parts, where it is known"""
