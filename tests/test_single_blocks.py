"""Single-stream blocks: what is captured is what the block's equations say, and the double blocks are none the wiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from harvest.capture import Rows, capture, half
from harvest.models.compiling import compile_blocks
from harvest.models.matrices import columns_of, tensor_of
from harvest.models.weights import mlp_tensors
from harvest.planning.choosing import asked_layers, asked_streams
from harvest.settings import HarvestSettings
from store import Store, UsageError
from store.sites import Point, Site
from tests.test_capture import hook_count, inputs
from tests.test_harvest import harvest
from train.rows.recompute import SiteMLP

JOINT = (Site.parse("joint_0"), Site.parse("joint_1"))
TEXT, IMAGE = 3, 6
"""tokens of the streams in `inputs()`"""


def model(dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(2, 2, 4),
        )
        .eval()
        .to(dtype)
    )


@pytest.fixture(scope="module")
def transformer() -> Any:
    return model()


def by_hand(transformer: Any, dtype: torch.dtype = torch.float32) -> dict[tuple[Site, Point], Tensor]:
    """Both points of both single blocks, from matrices: norm and attention are the block's own, the MLP is written out."""
    given = inputs(dtype)
    h, c = transformer.x_embedder(given["hidden_states"]), transformer.context_embedder(given["encoder_hidden_states"])
    temb = transformer.time_text_embed(given["timestep"] * 1000, given["pooled_projections"])
    rotary = transformer.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    for block in transformer.transformer_blocks:
        c, h = block(hidden_states=h, encoder_hidden_states=c, temb=temb, image_rotary_emb=rotary)
    found: dict[tuple[Site, Point], Tensor] = {}
    x = torch.cat([c, h], dim=1)  # text tokens first
    for site, block in zip(JOINT, transformer.single_transformer_blocks, strict=True):
        shift, scale, gate = block.norm.linear(functional.silu(temb)).chunk(3, dim=1)
        n = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        hidden = functional.gelu(n @ block.proj_mlp.weight.T + block.proj_mlp.bias, approximate="tanh")
        attended = block.attn(hidden_states=n, image_rotary_emb=rotary)
        width = attended.shape[-1]
        mlp_out = hidden @ block.proj_out.weight[:, width:].T
        found[site, "mlp_in"], found[site, "mlp_out"] = n, mlp_out
        x = x + gate[:, None] * (attended @ block.proj_out.weight[:, :width].T + mlp_out + block.proj_out.bias)
    return found


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_what_is_captured_is_what_the_equations_say_up_to_rounding(dtype: torch.dtype, most: float) -> None:
    transformer = model(dtype)
    with torch.inference_mode(), capture(transformer, JOINT) as captured:
        transformer(**inputs(dtype))
        expected = by_hand(transformer, dtype)
        for spot, values in captured.values.items():
            assert values.dtype == dtype
            assert values.shape == (2, TEXT + IMAGE, 16)
            worst = (values.float() - expected[spot].float()).abs().max() / expected[spot].float().abs().max()
            assert worst < most, (spot, worst)
        assert set(captured.values) == set(expected)


def test_attention_and_mlp_and_bias_make_the_block_and_nothing_is_counted_twice(transformer: Any) -> None:
    block = transformer.single_transformer_blocks[1]
    seen: list[Tensor] = []
    handle = block.proj_out.register_forward_hook(lambda _module, given, written: seen.extend((given[0], written)))
    with torch.no_grad(), capture(transformer, JOINT) as captured:
        transformer(**inputs())
    handle.remove()
    given, written = seen
    attention = given[..., :16] @ block.proj_out.weight[:, :16].T
    whole = attention + captured.values[JOINT[1], "mlp_out"] + block.proj_out.bias
    torch.testing.assert_close(whole, written)


def test_rows_that_are_kept_are_those_of_the_whole_and_are_multiplied_alone(transformer: Any) -> None:
    positions = torch.tensor([[0, 2, -1, 4], [1, -1, -1, 8]])
    kept: dict[tuple[Site, Point], Tensor] = {}
    widths: list[tuple[int, ...]] = []

    def keep(site: Site, point: Point, rows: Rows) -> None:
        widths.append(tuple(rows.source.shape))
        kept[site, point] = rows.select(positions)

    before = hook_count(transformer)
    with torch.inference_mode(), capture(transformer, JOINT, keep) as captured:
        transformer(**inputs())
        assert captured.values == {}
        assert captured.sigma is not None
    with torch.inference_mode(), capture(transformer, JOINT) as whole:
        transformer(**inputs())
    assert hook_count(transformer) == before
    assert set(widths) == {(2, 9, 16), (2, 9, 64)}  # the hidden layer itself, which is not multiplied as a whole
    for spot, values in kept.items():
        for image, row in ((i, r) for i in range(2) for r in range(4)):
            position = int(positions[image, row])
            if position < 0:
                assert values[image, row].isnan().all()
            else:
                torch.testing.assert_close(values[image, row], whole.values[spot][image, position])


def test_of_a_batch_doubled_for_guidance_the_second_half_is_handed_out(transformer: Any) -> None:
    sites = (*JOINT, Site.parse("img_0"))
    doubled = {name: torch.cat([value + 1, value]) for name, value in inputs().items() if not name.endswith("_ids")}
    ids = {name: value for name, value in inputs().items() if name.endswith("_ids")}
    with torch.inference_mode(), capture(transformer, sites) as alone:
        transformer(**inputs())
    with torch.inference_mode(), capture(transformer, sites, guided=True) as captured:
        transformer(**doubled, **ids)
    assert captured.sigma is not None
    assert captured.sigma.tolist() == [0.75, 0.75]
    assert captured.inputs is not None
    assert len(captured.inputs["hidden_states"]) == 4
    for spot, values in captured.values.items():
        torch.testing.assert_close(values, alone.values[spot])
    with pytest.raises(AssertionError):
        half(torch.zeros(3, 1))


def test_a_pass_that_leaves_a_block_out_is_no_harvest(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from store import GranaryError

    blocks = transformer.single_transformer_blocks
    monkeypatch.setattr(blocks[1], "forward", lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states, hidden_states,
    ))  # fmt: skip
    with (
        torch.inference_mode(),
        pytest.raises(GranaryError, match="without computing mlp_in of joint_1"),
        capture(transformer, JOINT),
    ):
        transformer(**inputs())
    assert hook_count(transformer) == 0


def test_a_layer_that_is_not_there_is_refused(transformer: Any) -> None:
    with (
        pytest.raises(UsageError, match="joint_2: the model has single blocks 0 to 1"),
        capture(transformer, (Site.parse("joint_2"),)),
    ):
        pass


@pytest.mark.slow
def test_compiled_blocks_hand_out_what_plain_ones_do_batch_after_batch_and_are_compiled_once() -> None:
    from torch._dynamo.utils import counters

    sites = (*JOINT, Site.parse("img_0"))
    plain, compiled = model(), model()
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    try:
        compile_blocks(compiled, "aot_eager")
        with torch.inference_mode():
            compiled(**inputs())  # code that knows no hooks
        made = []
        for _ in range(3):
            results = []
            for each in (plain, compiled):
                with torch.inference_mode(), capture(each, sites) as captured:
                    each(**inputs())
                results.append(captured.values)
            made.append(counters["stats"]["unique_graphs"])
            for spot, values in results[0].items():
                torch.testing.assert_close(results[1][spot], values)
        assert made[0] == made[-1]
    finally:
        torch._dynamo.config.skip_nnmodule_hook_guards = before
        torch._dynamo.reset()


# matrices that offloading put elsewhere, or that are quantised


def test_the_columns_are_found_where_accelerate_keeps_them_while_a_block_runs() -> None:
    from accelerate import cpu_offload

    plain, offloaded = model(), model()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.single_transformer_blocks[0].proj_out.weight.device.type == "meta"
    results = []
    for each in (plain, offloaded):
        with torch.inference_mode(), capture(each, JOINT) as captured:
            each(**inputs())
        results.append(captured.values)
    for spot, values in results[0].items():
        assert torch.equal(values, results[1][spot]), spot
    for name, tensor in mlp_tensors(plain, JOINT[0]).items():
        assert torch.equal(tensor, mlp_tensors(offloaded, JOINT[0])[name])


def test_an_output_layer_whose_numbers_do_not_say_what_it_computes_is_refused() -> None:
    layer = torch.nn.Linear(20, 4)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 20, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UsageError, match=r"the output layer of joint_0 is quantised \(Parameter, torch.int8\).*--quantize"
    ):
        tensor_of(layer, "weight", "the output layer of joint_0")
    lost = torch.nn.Linear(20, 4, device="meta")
    with pytest.raises(UsageError, match="its weights are not here while the model runs"):
        columns_of(lost, 16, "the output layer of joint_0")
    with pytest.raises(UsageError, match=r"a weight of shape \(4, 20\) has no 21 last columns"):
        columns_of(torch.nn.Linear(20, 4), 21, "it")


# which sites are asked for


def settings(**options: Any) -> HarvestSettings:
    return HarvestSettings(out=Path("store"), **options)


@pytest.mark.parametrize(
    ("options", "layers", "streams"),
    [
        ({}, {"double": "all"}, ("img", "txt")),
        ({"layers": "0-2,4"}, {"double": "0-2,4"}, ("img", "txt")),
        ({"layers": "double:0-1,3,single:2,5-6"}, {"double": "0-1,3", "single": "2,5-6"}, ("img", "txt", "joint")),
        ({"layers": "all,single:all"}, {"double": "all", "single": "all"}, ("img", "txt", "joint")),
        ({"layers": "single:all"}, {"single": "all"}, ("joint",)),
        ({"layers": "double:0,double:3"}, {"double": "0,3"}, ("img", "txt")),
        ({"layers": "single:1,double:0", "streams": "joint,txt"}, {"single": "1", "double": "0"}, ("txt", "joint")),
    ],
)
def test_a_kind_holds_until_the_next_and_streams_follow_from_the_kinds(
    options: dict[str, str], layers: dict[str, str], streams: tuple[str, ...]
) -> None:
    asked = asked_layers(settings(**options))
    assert asked == layers
    assert asked_streams(settings(**options), tuple(asked)) == streams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "triple:1"}, "--layers 'triple:1': write all, 0-15, double:0-15, or double:0-15,single:0-37"),
        ({"layers": "single:0", "streams": "img"}, "none of these is a stream of the single blocks .*; add joint"),
        (
            {"layers": "all,single:0", "streams": "joint"},
            r"of the double blocks of --layers all,single:0; add img or txt, or",
        ),
        ({"streams": "img,joint"}, "joint is read in single blocks: name some, --layers single:all"),
    ],
)
def test_streams_that_no_block_has_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked_layers(settings(**options))


# harvests of tiny-flux

FEW: dict[str, Any] = {
    "images": 3,
    "num_inference_steps": 2,
    "pictures": "none",
    "tokens": "9",
    "text_tokens": "real+1",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Double block 1 and both single blocks, a float32 store."""
    return harvest(
        tmp_path_factory.mktemp("both") / "store", layers="1,single:all", store_dtype="float32", weights="copy", **FEW
    )


def test_single_blocks_change_nothing_of_the_double_ones(both: Store, tmp_path: Path) -> None:
    alone = harvest(tmp_path / "alone", layers="1", store_dtype="float32", **FEW)
    assert tuple(map(str, both.sites)) == ("img_1", "txt_1", "joint_0", "joint_1")
    for site in alone.sites:
        for point in alone.points:
            for step in alone.steps:
                np.testing.assert_array_equal(both.read(site, step, point), alone.read(site, step, point))


def test_mlp_out_is_recomputed_from_mlp_in_and_the_weights_that_the_store_holds(both: Store) -> None:
    for site in (*JOINT, Site.parse("txt_1")):
        content = both.weights_file(site)
        assert content is not None
        x, y = (torch.from_numpy(both.read(site, 1, point)).reshape(-1, both.meta.d_model) for point in both.points)
        there = ~x.isnan().any(1)
        assert 0 < int(there.sum()) < len(there)  # prompts differ in length
        found = SiteMLP(content, str(site), both.meta.d_model).mlp_out(x[there])
        torch.testing.assert_close(found, y[there], atol=2e-5, rtol=2e-5)


def test_the_file_of_a_single_block_holds_its_mlp_and_neither_attention_nor_the_shared_bias(both: Store) -> None:
    d = both.meta.d_model
    tensors = safetensors.torch.load(both.weights_file(JOINT[0]) or b"")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "proj_mlp.weight": (4 * d, d), "proj_mlp.bias": (4 * d,), "proj_out.weight": (d, 4 * d),
    }  # fmt: skip


def test_traces_are_of_double_blocks_whatever_else_is_harvested(tmp_path: Path) -> None:
    few = {**FEW, "images": 2, "trace": True, "trace_images": "0", "trace_steps": "1"}
    mixed = harvest(tmp_path / "mixed", layers="1,single:1", **few)
    assert mixed.traced is not None
    assert mixed.traced.blocks == (0, 1)
    alone = harvest(tmp_path / "alone", layers="single:0", trace_blocks="0-1", **few)
    assert alone.traced is not None
    assert alone.traced.blocks == (0, 1)
    assert tuple(map(str, alone.sites)) == ("joint_0",)
