"""SD3's transformer in plain torch, from its weights alone: what goes into the MLP of each stream of each block, and comes out."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Values = dict[tuple[str, str], Tensor]
"""(site, point) -> (image, token, d_model)"""


def sd3_mlps(transformer: Any, inputs: dict[str, Any]) -> Values:
    """mlp_in and mlp_out of every site for what the transformer was called with."""
    w, config = transformer.state_dict(), transformer.config
    x = _patches(w, config, inputs["hidden_states"])
    c = _linear(w, "context_embedder", inputs["encoder_hidden_states"])
    emb = F.silu(_embedded(w, inputs["timestep"], inputs["pooled_projections"]))
    found: Values = {}
    for layer in range(config.num_layers):
        at = f"transformer_blocks.{layer}"
        last, dual = layer == config.num_layers - 1, layer in config.dual_attention_layers
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = _linear(w, f"{at}.norm1.linear", emb)[
            :, None
        ].chunk(9 if dual else 6, -1)
        image = _norm(x) * (1 + scale) + shift
        if last:
            c_scale, c_shift = _linear(w, f"{at}.norm1_context.linear", emb)[:, None].chunk(2, -1)
        else:
            c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = _linear(
                w, f"{at}.norm1_context.linear", emb
            )[:, None].chunk(6, -1)
        text = _norm(c) * (1 + c_scale) + c_shift
        of_image, of_text = _attention(w, f"{at}.attn", config, image, text)
        again = _attention(w, f"{at}.attn2", config, _norm(x) * (1 + second[1]) + second[0], None)[0] if dual else None
        x = x + gate * of_image
        if again is not None:
            x = x + second[2] * again
        x = x + gate_mlp * _mlp(w, f"{at}.ff", _norm(x) * (1 + scale_mlp) + shift_mlp, found, f"img_{layer}")
        if not last:
            c = c + c_gate * _linear(w, f"{at}.attn.to_add_out", of_text)
            c_in = _norm(c) * (1 + c_scale_mlp) + c_shift_mlp
            c = c + c_gate_mlp * _mlp(w, f"{at}.ff_context", c_in, found, f"txt_{layer}")
    return found


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def _mlp(w: dict[str, Tensor], name: str, x: Tensor, found: Values, site: str) -> Tensor:
    hidden = _linear(w, f"{name}.net.0.proj", x)
    hidden = hidden * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    found[site, "mlp_in"], found[site, "mlp_out"] = x, _linear(w, f"{name}.net.2", hidden)
    return found[site, "mlp_out"]


def _patches(w: dict[str, Tensor], config: Any, latents: Tensor) -> Tensor:
    """The latents' patches, row by row, each with the middle of the table of positions."""
    side, most = config.patch_size, config.pos_embed_max_size
    rows, columns = latents.shape[-2] // side, latents.shape[-1] // side
    cut = latents.unfold(2, side, side).unfold(3, side, side)  # image, channel, row, column, side, side
    flat = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    weight = w["pos_embed.proj.weight"].flatten(1)
    top, left = (most - rows) // 2, (most - columns) // 2
    table = w["pos_embed.pos_embed"].view(most, most, -1)[top : top + rows, left : left + columns]
    return flat @ weight.T + w["pos_embed.proj.bias"] + table.flatten(0, 1)


def _embedded(w: dict[str, Tensor], timestep: Tensor, pooled: Tensor) -> Tensor:
    """Time and pooled text, as one vector an image."""
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat([angles.cos(), angles.sin()], -1)
    both = [("timestep_embedder", time), ("text_embedder", pooled)]
    parts = [
        _linear(w, f"time_text_embed.{name}.linear_2", F.silu(_linear(w, f"time_text_embed.{name}.linear_1", value)))
        for name, value in both
    ]
    return parts[0] + parts[1]


def _attention(
    w: dict[str, Tensor], name: str, config: Any, image: Tensor, text: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the image tokens read, through the output layer; what the text tokens read, before theirs."""

    def heads(layer: str, x: Tensor, norm: str | None) -> Tensor:
        made = _linear(w, f"{name}.{layer}", x)
        found = made.reshape(*made.shape[:2], config.num_attention_heads, -1).transpose(1, 2)
        if norm is None or f"{name}.{norm}.weight" not in w:
            return found
        return found / (found.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.{norm}.weight"]

    q, k, v = heads("to_q", image, "norm_q"), heads("to_k", image, "norm_k"), heads("to_v", image, None)
    if text is not None:
        q = torch.cat([q, heads("add_q_proj", text, "norm_added_q")], 2)
        k = torch.cat([k, heads("add_k_proj", text, "norm_added_k")], 2)
        v = torch.cat([v, heads("add_v_proj", text, None)], 2)
    read = ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
    n = image.shape[1]
    return _linear(w, f"{name}.to_out.0", read[:, :n]), read[:, n:]
