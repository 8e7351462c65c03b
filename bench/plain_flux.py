"""The FLUX transformer in plain torch, for machines that have no diffusers: the same modules under the same names.

A state dict of diffusers' `FluxTransformer2DModel` (without guidance embedding) fits, and outputs are equal; a test shows it.
Only `bench.gpu_circuits` runs it, with random weights, so that a machine with a GPU needs torch and this checkout.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-6
TIME_CHANNELS, THETA = 256, 10_000.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer; the defaults are those of FLUX.1."""

    heads: int = 24
    d_head: int = 128
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 64
    text_channels: int = 4096
    pooled_channels: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)
    """how a head's dimensions are dealt out to the three axes of a token's position"""

    @property
    def d_model(self) -> int:
        return self.heads * self.d_head


class PlainFlux(nn.Module):
    """The whole transformer; made in the default dtype and on the default device."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.axes = shape.d_model, shape.axes
        self.x_embedder, self.context_embedder = nn.Linear(shape.in_channels, d), nn.Linear(shape.text_channels, d)
        self.time_text_embed = nn.Module()
        self.time_text_embed.timestep_embedder = _TwoLayers(TIME_CHANNELS, d)
        self.time_text_embed.text_embedder = _TwoLayers(shape.pooled_channels, d)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.double_blocks))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.single_blocks))
        self.norm_out = AdaptiveNorm(d, 2)
        self.proj_out = nn.Linear(d, shape.in_channels)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor,
        img_ids: Tensor, txt_ids: Tensor, return_dict: bool = False,
    ) -> tuple[Tensor]:  # fmt: skip
        """(prediction,): latents (1, image token, channel), text (1, text token, channel), pooled text, sigma, ids (token, 3)."""
        img, txt = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        times = sinusoids(1000 * timestep.to(img.dtype)).to(img.dtype)
        embedding = self.time_text_embed.timestep_embedder(times) + self.time_text_embed.text_embedder(
            pooled_projections
        )
        turn = rotations(torch.cat([txt_ids, img_ids]), self.axes)
        for block in self.transformer_blocks:
            txt, img = block(img, txt, temb=embedding, image_rotary_emb=turn)
        for block in self.single_transformer_blocks:
            txt, img = block(img, txt, temb=embedding, image_rotary_emb=turn)
        scale, shift = self.norm_out.modulations(embedding)
        return (self.proj_out(normed(img) * (1 + scale[:, None]) + shift[:, None]),)


class DoubleBlock(nn.Module):
    """Attention over text and image, then an MLP a stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.norm1, self.norm1_context = AdaptiveNorm(d, 6), AdaptiveNorm(d, 6)
        self.norm2, self.norm2_context = (nn.LayerNorm(d, eps=EPS, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(shape, added=True)
        self.ff, self.ff_context = FeedForward(d), FeedForward(d)

    def forward(
        self, img: Tensor, txt: Tensor, temb: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        x_img, *img_parts = self.norm1(img, emb=temb)
        x_txt, *txt_parts = self.norm1_context(txt, emb=temb)
        out_img, out_txt = self.attn(x_img, x_txt, image_rotary_emb=image_rotary_emb)
        img = _after_attention(img, out_img, img_parts, self.norm2, self.ff)
        return _after_attention(txt, out_txt, txt_parts, self.norm2_context, self.ff_context), img


def _after_attention(h: Tensor, out: Tensor, parts: list[Tensor], norm: nn.Module, mlp: nn.Module) -> Tensor:
    gate_msa, shift_mlp, scale_mlp, gate_mlp = (part[:, None] for part in parts)
    h = h + gate_msa * out
    result: Tensor = h + gate_mlp * mlp(norm(h) * (1 + scale_mlp) + shift_mlp)
    return result


class SingleBlock(nn.Module):
    """Attention and MLP side by side over one sequence, text first."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.norm, self.attn = AdaptiveNorm(d, 3), Attention(shape, added=False)
        self.proj_mlp, self.proj_out = nn.Linear(d, 4 * d), nn.Linear(5 * d, d)

    def forward(
        self, img: Tensor, txt: Tensor, temb: Tensor, image_rotary_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        h = torch.cat([txt, img], dim=1)
        x, gate = self.norm(h, emb=temb)
        mlp = functional.gelu(self.proj_mlp(x), approximate="tanh")
        out = torch.cat([self.attn(x, None, image_rotary_emb=image_rotary_emb), mlp], dim=2)
        h = h + gate[:, None] * self.proj_out(out)
        return h[:, : txt.shape[1]], h[:, txt.shape[1] :]


class AdaptiveNorm(nn.Module):
    """adaLN: a norm whose shift, scale and gate come from the conditioning; six of them in double blocks, three in single ones."""

    def __init__(self, d: int, parts: int) -> None:
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(d, parts * d)

    def modulations(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(functional.silu(emb)).chunk(self.parts, dim=1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *others = self.modulations(emb)
        return (normed(x) * (1 + scale[:, None]) + shift[:, None], *others)


class Attention(nn.Module):
    """Projections and qk-norms; what is done with them says `processor`, as in diffusers."""

    def __init__(self, shape: Shape, added: bool) -> None:
        super().__init__()
        d = shape.d_model
        self.heads, self.head_dim, self.processor = shape.heads, shape.d_head, attend
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(shape.d_head, eps=EPS) for _ in range(2))
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(d, d) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(shape.d_head, eps=EPS) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(d, d)]), nn.Linear(d, d)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, image_rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.processor(self, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, d: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(d, 4 * d)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * d, d)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](functional.gelu(self.net[0].proj(x), approximate="tanh"))  # type: ignore[no-any-return, operator, union-attr]


class _TwoLayers(nn.Module):
    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(functional.silu(self.linear_1(x)))  # type: ignore[no-any-return]


def attend(
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention's output: of a double block (image, text), of a single one the whole sequence."""
    q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
    out = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    return out if encoder_hidden_states is None else projected(attn, out, encoder_hidden_states.shape[1])


def queries_keys_values(
    attn: nn.Module, img: Tensor, txt: Tensor | None, turn: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k after qk-norm and RoPE, and v: (1, token, head, d_head), text first; of diffusers' modules and of these."""
    heads = (-1, attn.head_dim)
    q, k = attn.norm_q(attn.to_q(img).unflatten(2, heads)), attn.norm_k(attn.to_k(img).unflatten(2, heads))
    if txt is not None:
        q = torch.cat([attn.norm_added_q(attn.add_q_proj(txt).unflatten(2, heads)), q], dim=1)
        k = torch.cat([attn.norm_added_k(attn.add_k_proj(txt).unflatten(2, heads)), k], dim=1)
    return rotate(q, turn), rotate(k, turn), values(attn, img, txt)


def values(attn: nn.Module, img: Tensor, txt: Tensor | None) -> Tensor:
    """v of both streams (1, token, head, d_head), text first."""
    v = attn.to_v(img) if txt is None else torch.cat([attn.add_v_proj(txt), attn.to_v(img)], dim=1)
    return v.unflatten(2, (-1, attn.head_dim))  # type: ignore[no-any-return]


def projected(attn: nn.Module, out: Tensor, n_txt: int) -> tuple[Tensor, Tensor]:
    """The output projections (image, text) of the heads' outputs (1, token, d), text first."""
    return attn.to_out[0](out[:, n_txt:]), attn.to_add_out(out[:, :n_txt])


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE of (1, token, head, d_head): neighbouring dimensions are turned as one complex number, in float32."""
    cos, sin = (part[None, :, None, :] for part in turn)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def rotations(ids: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (token, d_head) of positions (token, 3), each standing for two neighbouring dimensions."""
    angles = []
    for axis, width in enumerate(axes):
        frequency = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width)
        angles.append(torch.outer(ids[:, axis].double(), frequency).repeat_interleave(2, dim=1))
    turns = torch.cat(angles, dim=1)
    return turns.cos().float(), turns.sin().float()


def sinusoids(timestep: Tensor) -> Tensor:
    """The embedding of 1,000 sigma: cosines, then sines, float32."""
    half = TIME_CHANNELS // 2
    frequency = torch.exp(-math.log(THETA) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep[:, None].float() * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def normed(x: Tensor) -> Tensor:
    """Rows of mean 0 and variance 1."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)
