"""What is captured is what a hand-written forward pass computes, and hooks leave no trace."""

from typing import Any

import pytest
import torch
from torch import nn

from harvest.capture import capture, mlp_of, select_tokens
from store import Site
from store.errors import UsageError


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 6, 8, generator=generator, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=generator, dtype=dtype),
        "pooled_projections": torch.randn(2, 10, generator=generator, dtype=dtype),
        "timestep": torch.tensor([0.75, 0.75], dtype=dtype),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def by_hand(transformer: Any, layer: int) -> dict[str, torch.Tensor]:
    """mlp_in and mlp_out of a layer from the block's own submodules, following the block's equations."""
    given = inputs()
    h, c = transformer.x_embedder(given["hidden_states"]), transformer.context_embedder(given["encoder_hidden_states"])
    temb = transformer.time_text_embed(given["timestep"] * 1000, given["pooled_projections"])
    rotary = transformer.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    for index in range(layer + 1):
        block = transformer.transformer_blocks[index]
        n, gate, shift, scale, gate_mlp = block.norm1(h, emb=temb)
        nc, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(c, emb=temb)
        attended, c_attended = block.attn(hidden_states=n, encoder_hidden_states=nc, image_rotary_emb=rotary)
        h, c = h + gate[:, None] * attended, c + c_gate[:, None] * c_attended
        x = block.norm2(h) * (1 + scale[:, None]) + shift[:, None]
        xc = block.norm2_context(c) * (1 + c_scale[:, None]) + c_shift[:, None]
        y, yc = block.ff(x), block.ff_context(xc)
        h, c = h + gate_mlp[:, None] * y, c + c_gate_mlp[:, None] * yc
    return {"img mlp_in": x, "img mlp_out": y, "txt mlp_in": xc, "txt mlp_out": yc}


@pytest.mark.parametrize("layer", [0, 1])
def test_mlp_in_and_mlp_out_are_those_of_the_blocks_equations(transformer: Any, layer: int) -> None:
    sites = (Site("double", layer, "img"), Site("double", layer, "txt"))
    with torch.inference_mode(), capture(transformer, sites) as captured:
        transformer(**inputs())
        expected = by_hand(transformer, layer)
        for site in sites:
            for point in ("mlp_in", "mlp_out"):
                torch.testing.assert_close(captured.values[site, point], expected[f"{site.stream} {point}"])


def test_sigma_is_what_the_transformer_received_also_in_bfloat16(transformer: Any) -> None:
    with torch.inference_mode(), capture(transformer, ()) as captured:
        transformer(**inputs())
        taken = captured.take()
        assert taken.sigma is not None
        assert taken.sigma.tolist() == [0.75, 0.75]
        assert captured.sigma is None
        assert captured.values == {}


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hooks_are_gone_after_success_after_an_exception_and_after_nesting(transformer: Any) -> None:
    before = hook_count(transformer)
    site = Site("double", 0, "img")
    with capture(transformer, (site,)), capture(transformer, (site,)):
        assert hook_count(transformer) > before
    assert hook_count(transformer) == before
    with pytest.raises(RuntimeError, match="boom"), capture(transformer, (site,)):
        raise RuntimeError("boom")
    assert hook_count(transformer) == before


def test_a_single_stream_block_has_no_mlp_of_its_own(transformer: Any) -> None:
    with pytest.raises(UsageError, match="joint_0: the MLP of a single-stream block is no module of its own"):
        mlp_of(transformer, Site.parse("joint_0"))


def test_selected_tokens_are_the_rows_at_their_positions_and_empty_slots_are_nan() -> None:
    values = torch.arange(24.0).reshape(2, 4, 3)
    chosen = select_tokens(values, torch.tensor([[0, 3], [2, -1]]))
    assert chosen[0].tolist() == [[0, 1, 2], [9, 10, 11]]
    assert chosen[1, 0].tolist() == [18, 19, 20]
    assert chosen[1, 1].isnan().all()
    assert select_tokens(values, None) is values
