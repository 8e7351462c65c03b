"""What `make bench-circuits` compares with: the transformer in plain torch, the reference's way, and the script for a GPU."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from analyze.circuits.frozen import FrozenModel
from analyze.circuits.trace import Trace
from bench import circuits, gpu_circuits
from bench.circuit_cases import Case, Node, random_inputs, random_transcoders
from bench.plain_flux import PlainFlux, Shape
from bench.reference_circuits import Reference, record
from store.sites import Site

SHAPE = Shape(2, 16, 3, 2, 12, 20, 10, (4, 6, 6))
CASE = Case(SHAPE, 4, (2, 3), 3, 64, 0.2)


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        in_channels=SHAPE.in_channels, num_layers=SHAPE.double_blocks, num_single_layers=SHAPE.single_blocks,
        attention_head_dim=SHAPE.d_head, num_attention_heads=SHAPE.heads, joint_attention_dim=SHAPE.text_channels,
        pooled_projection_dim=SHAPE.pooled_channels, axes_dims_rope=SHAPE.axes,
    )  # fmt: skip
    return made.requires_grad_(False)


def test_the_plain_transformer_equals_diffusers_own(transformer: FluxTransformer2DModel) -> None:
    plain, inputs = PlainFlux(SHAPE), random_inputs(CASE)
    plain.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(**inputs)[0], transformer(**inputs, return_dict=False)[0])


def test_the_patched_transformer_gives_a_feature_its_preactivation_and_is_whole_afterwards(
    transformer: FluxTransformer2DModel,
) -> None:
    inputs = random_inputs(CASE)
    before = transformer(**inputs, return_dict=False)[0]
    recording = record(transformer, inputs, CASE.traced)
    reference = Reference(recording, random_transcoders(recording, CASE.n_features, CASE.share), 0.0)
    z = reference.z[site := Site("double", 2, "img")]
    token, feature = divmod(int(z.argmax()), z.shape[1])
    with reference.patched():
        found = reference.edges(site, token, feature)
    assert found.pre == pytest.approx(float(z[token, feature]), rel=1e-5)
    assert set(found.features) == {Site("double", layer, stream) for layer in (0, 1) for stream in ("txt", "img")}
    assert torch.equal(transformer(**inputs, return_dict=False)[0], before)


def test_both_ways_give_the_same_edges(transformer: FluxTransformer2DModel) -> None:
    recording = record(transformer, random_inputs(CASE), CASE.traced)
    transcoders = random_transcoders(recording, CASE.n_features, CASE.share)
    model = FrozenModel(Trace(recording, torch.float32), transcoders)
    nodes = []
    for site in model.sites:
        active = model.active(site)
        nodes += [Node(site, int(active.token[at]), int(active.feature[at])) for at in (0, len(active.z) // 2)]
    reference = Reference(recording, transcoders, circuits.THRESHOLD)
    with reference.patched():
        assert circuits.greatest_error(model, reference, nodes) < 1e-5


def test_the_script_for_a_gpu_runs_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_circuits.main(["--small"])
    assert [line["kind"] for line in found["ours"]] == ["float32", "tf32"]
    assert found["reference"]["nodes"] == 3
    assert "1,000 nodes in" in capsys.readouterr().out
