"""FLUX.2's transformer in plain torch, from its weights alone: what goes into each MLP, and what it contributes.

In a single-stream block queries, keys, values and the gated MLP come from one matrix, and what the attention read and the hidden
layer go through another: the hidden layer meets its last columns.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Values = dict[tuple[str, str], Tensor]
"""(site, point) -> (image, token, d_model)"""


def flux2_mlps(transformer: Any, inputs: dict[str, Any]) -> Values:
    """mlp_in and mlp_out of every site for what the transformer was called with."""
    w, config = transformer.state_dict(), transformer.config
    heads, found = config.num_attention_heads, Values()
    x, c = (
        _linear(w, f"{name}_embedder", inputs[key])
        for name, key in (("x", "hidden_states"), ("context", "encoder_hidden_states"))
    )
    turns = _turns(config, torch.cat([inputs["txt_ids"][0], inputs["img_ids"][0]]))
    emb = F.silu(_time(w, config, 1000 * inputs["timestep"]))
    image_mods = _linear(w, "double_stream_modulation_img.linear", emb)[:, None].chunk(6, -1)
    text_mods = _linear(w, "double_stream_modulation_txt.linear", emb)[:, None].chunk(6, -1)
    n = c.shape[1]
    for layer in range(config.num_layers):
        at = f"transformer_blocks.{layer}"
        (shift, scale, gate, *mlp), (c_shift, c_scale, c_gate, *c_mlp) = image_mods, text_mods
        image, text = _norm(x) * (1 + scale) + shift, _norm(c) * (1 + c_scale) + c_shift
        q, k, v = (
            _heads(
                torch.cat([_linear(w, f"{at}.attn.add_{a}_proj", text), _linear(w, f"{at}.attn.to_{a}", image)], 1),
                heads,
            )
            for a in "qkv"
        )
        q, k = (
            torch.cat(
                [_rms(part[:, :, :n], w[f"{norm}_added_{a}.weight"]), _rms(part[:, :, n:], w[f"{norm}_{a}.weight"])], 2
            )
            for norm, a, part in ((f"{at}.attn.norm", "q", q), (f"{at}.attn.norm", "k", k))
        )
        read = _read(q, k, v, turns)
        x = x + gate * _linear(w, f"{at}.attn.to_out.0", read[:, n:])
        c = c + c_gate * _linear(w, f"{at}.attn.to_add_out", read[:, :n])
        for stream, name in (("img", "ff"), ("txt", "ff_context")):
            value, (mlp_shift, mlp_scale, mlp_gate) = (x, mlp) if stream == "img" else (c, c_mlp)
            given = _norm(value) * (1 + mlp_scale) + mlp_shift
            out = _linear(w, f"{at}.{name}.linear_out", _gated(_linear(w, f"{at}.{name}.linear_in", given)))
            found[f"{stream}_{layer}", "mlp_in"], found[f"{stream}_{layer}", "mlp_out"] = given, out
            x, c = (x + mlp_gate * out, c) if stream == "img" else (x, c + mlp_gate * out)
    joint = torch.cat([c, x], 1)
    shift, scale, gate = _linear(w, "single_stream_modulation.linear", emb)[:, None].chunk(3, -1)
    d_model = joint.shape[-1]
    for layer in range(config.num_single_layers):
        at = f"single_transformer_blocks.{layer}.attn"
        given = _norm(joint) * (1 + scale) + shift
        made = _linear(w, f"{at}.to_qkv_mlp_proj", given)
        q, k, v = made[..., : 3 * d_model].chunk(3, -1)
        q, k = (_rms(_heads(part, heads), w[f"{at}.norm_{a}.weight"]) for a, part in (("q", q), ("k", k)))
        weight, hidden = w[f"{at}.to_out.weight"], _gated(made[..., 3 * d_model :])
        out = hidden @ weight[:, d_model:].T
        found[f"joint_{layer}", "mlp_in"], found[f"joint_{layer}", "mlp_out"] = given, out
        joint = joint + gate * (_read(q, k, _heads(v, heads), turns) @ weight[:, :d_model].T + out)
    return found


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T  # none has a bias


def _norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _gated(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * value


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _time(w: dict[str, Tensor], config: Any, time: Tensor) -> Tensor:
    half = config.timestep_guidance_channels // 2
    angles = time.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    name = "time_guidance_embed.timestep_embedder"
    return _linear(
        w, f"{name}.linear_2", F.silu(_linear(w, f"{name}.linear_1", torch.cat([angles.cos(), angles.sin()], -1)))
    )


def _turns(config: Any, ids: Tensor) -> Tensor:
    """By how much each pair of a head's numbers is turned at each position: complex, (token, pair)."""
    angles = [
        ids[:, axis, None].double() / config.rope_theta ** (torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate(config.axes_dims_rope)
    ]
    return torch.exp(1j * torch.cat(angles, -1))


def _read(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    """What each token reads of all."""

    def turned(x: Tensor) -> Tensor:
        pairs = x.double().reshape(*x.shape[:-1], -1, 2)
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).float()

    weights = (turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)
