"""Tiny random pipelines as folders, made in seconds without network: FLUX.1[dev]-, SD3- and FLUX.2[klein]-shaped.

A token of each covers 8 x 8 pixels, so 32 pixels are 16 image tokens.  The same seed gives the same weights.  The words of
tiny-flux's captions are one token each (`builtin:shapes` fits), and every other prompt tokenizes too.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from harvest.quiet import quiet
from harvest.tiny_flux.tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer, words

TEXT_WIDTH, CLIP_WIDTH = 32, 16
KLEIN_ENCODER_LAYERS = 28
"""the klein pipeline reads the text encoder's layers 9, 18 and 27"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def flux_dev(folder: Path, seed: int = 0) -> Path:
    """A FluxPipeline shaped like FLUX.1[dev]: guidance embedding, dynamic shifting, 2 double and 2 single blocks, d_model 32."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = FluxPipeline(
        scheduler=_scheduler(use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=_lively(transformer),
    )
    return _saved(pipe, folder)


def sd3(folder: Path, seed: int = 0, with_t5: bool = True, dual: tuple[int, ...] = (0, 1)) -> Path:
    """A StableDiffusion3Pipeline of 3 blocks, d_model 32, the last without a text MLP; `dual`: as SD3.5-medium's, () for SD3's."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8, dual_attention_layers=dual, qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=_lively(transformer),
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    return _saved(pipe, folder)


def flux2_klein(folder: Path, seed: int = 0, is_distilled: bool = True) -> Path:
    """A Flux2KleinPipeline of 2 double and 2 single blocks, d_model 32."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = _qwen_tokenizer()
    width = 8
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=KLEIN_ENCODER_LAYERS,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * width, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    pipe = Flux2KleinPipeline(
        scheduler=_scheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**_vae_sizes()),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=_lively(transformer),
        is_distilled=is_distilled,
    )
    return _saved(pipe, folder)


def _scheduler(use_dynamic_shifting: bool = False) -> Any:
    """The scheduler of FLUX.1[dev] and, without dynamic shifting, of SD3."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=use_dynamic_shifting, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip


def _vae_sizes() -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (4, 4, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**_vae_sizes(), scaling_factor=1.5, shift_factor=0.06)


def _clip_config() -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=2 * CLIP_WIDTH, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def _qwen_tokenizer() -> Any:
    """Byte-level pieces and the words of the captions, with the marks of a chat."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    merges: list[tuple[str, str]] = []
    for word in (f"Ġ{word}" for word in words()):  # the word as it stands after a space, joined from the left
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=merges,
        model_max_length=512,
        padding_side="right",
        additional_special_tokens=marks[1:],
        chat_template=CHAT_TEMPLATE,
    )


def _lively(transformer: nn.Module) -> nn.Module:
    """The transformer with norms and biases that are not ones and zeros, so that a forgotten one shows."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return transformer.eval()


def _saved(pipe: Any, folder: Path) -> Path:
    with quiet():
        pipe.save_pretrained(folder)
    return folder
