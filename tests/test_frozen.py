"""The frozen model against a brute-force oracle, and what it refuses."""

import numpy as np
import pytest
import torch

from analyze.circuits import encoding
from analyze.circuits.encoding import features_of, kept, products
from analyze.circuits.frozen import Attribution, FrozenModel, Member, Target, perturbed
from analyze.circuits.nodes import Node
from analyze.circuits.trace import Trace
from store.sites import Site
from store.traces import TraceDtype
from tests.circuit_flux import N_BLOCKS, flux_traces
from tests.circuit_oracle import HandMade, Oracle, Shares, hand_made, random_transcoders

SHAPES = [
    {"n_blocks": 1, "heads": 1, "d_head": 8, "n_txt": 3, "n_img": 4},
    {"n_blocks": 2, "heads": 2, "d_head": 6, "n_txt": 5, "n_img": 6},
    {"n_blocks": 4, "heads": 3, "d_head": 5, "n_txt": 1, "n_img": 15},
    {"n_blocks": 3, "heads": 4, "d_head": 4, "n_txt": 7, "n_img": 1},
]


def targets_of(model: FrozenModel, seed: int, count: int = 6) -> list[Target]:
    """Active features drawn from every depth and both streams, and one supernode over several blocks."""
    rng = np.random.default_rng(seed)
    members = []
    for number in range(count):
        site = model.sites[(len(model.sites) - 1 - number) % len(model.sites)]
        active = model.active(site)
        at = rng.integers(len(active.token))
        members.append(Member(site, int(active.token[at]), int(active.feature[at])))
    mixed = Target(
        tuple(
            Member(m.site, m.token, m.feature, float(w)) for m, w in zip(members, rng.normal(size=count), strict=True)
        ),
        "mixed",
    )
    return [Target((member,)) for member in members] + [mixed]


def dense(model: FrozenModel, found: Attribution, row: int, site: Site, n_features: int) -> np.ndarray:
    """The feature edges of one target and site as a matrix (token, feature)."""
    matrix = np.zeros((model.tokens[site.stream], n_features))
    chosen = (found.row == row) & (found.site == model.sites.index(site))
    matrix[found.token[chosen], found.feature[chosen]] = found.value[chosen]
    return matrix


def assert_agree(model: FrozenModel, found: Attribution, row: int, oracle: Shares, tolerance: float) -> None:
    """Every share of one target is the oracle's, relative to the largest."""
    every = [
        *oracle.features.values(),
        *oracle.errors.values(),
        *oracle.inputs.values(),
        np.array(list(oracle.bias.values())),
    ]
    bound = tolerance * max(float(np.abs(values).max(initial=0)) for values in every)
    for site, values in oracle.features.items():
        np.testing.assert_allclose(dense(model, found, row, site, values.shape[1]), values, rtol=0, atol=bound)
    for site, values in oracle.errors.items():
        np.testing.assert_allclose(found.errors[site][row], values, rtol=0, atol=bound)
    for stream, values in oracle.inputs.items():
        np.testing.assert_allclose(found.inputs[stream][row], values, rtol=0, atol=bound)
    for key, value in oracle.bias.items():
        share = found.bias[key][row] if key in found.bias else 0.0
        assert share == pytest.approx(value, rel=0, abs=bound), key
    assert all(shares[row] == 0 for key, shares in found.bias.items() if key not in oracle.bias)
    assert found.pre[row] == pytest.approx(oracle.pre, rel=0, abs=bound)


def check(
    source: HandMade, transcoders: dict, seed: int, dtype: torch.dtype = torch.float64, memory: int = 2 << 30
) -> FrozenModel:
    """Compare a handful of targets with the oracle, and their sums with their pre-activations."""
    model = FrozenModel(Trace(source, dtype), transcoders, memory)
    targets = targets_of(model, seed)
    found, oracle = model.attribute(targets), Oracle(source, transcoders)
    for row, target in enumerate(targets):
        shares = oracle.attribute([(m.site, m.token, m.feature, m.weight) for m in target.members])
        assert_agree(model, found, row, shares, 1e-9 if dtype == torch.float64 else 1e-4)
    assert found.conservation.max() <= (1e-12 if dtype == torch.float64 else 1e-5)
    return model


@pytest.mark.parametrize("trace_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_every_share_is_the_oracles_in_float64(number: int, trace_dtype: str) -> None:
    source = hand_made(number, dtype=trace_dtype, **SHAPES[number])
    check(source, random_transcoders(number, source.n_blocks, source.blocks[0]["resid.img"].shape[1]), number)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_share_is_the_oracles_for_other_transcoders(activation: str, skip: bool) -> None:
    source = hand_made(5, sigma=0.25)
    check(source, random_transcoders(6, 3, 12, activation=activation, skip=skip, time=None if skip else 8), 7)


def test_what_fits_no_memory_is_the_same_in_small_parts() -> None:
    source, transcoders = hand_made(1, n_txt=6, n_img=8), random_transcoders(1, 3, 12)
    small = check(source, transcoders, 2, memory=40_000)
    assert small.batch() < 7 and len(small._kept) < 3
    whole = FrozenModel(Trace(source), transcoders)
    targets = targets_of(whole, 2)
    one, other = small.attribute(targets, 1e-3), whole.attribute(targets, 1e-3)
    np.testing.assert_array_equal(one.row, other.row)
    np.testing.assert_allclose(one.value, other.value, rtol=0, atol=1e-13)
    np.testing.assert_allclose(one.below, other.below, rtol=0, atol=1e-13)


def test_float32_agrees_within_its_precision() -> None:
    check(hand_made(3, n_blocks=4), random_transcoders(4, 4, 12), 5, torch.float32)


def test_a_site_without_a_transcoder_is_all_error() -> None:
    source, transcoders = hand_made(8), random_transcoders(8, 3, 12, skip=True)
    for name in ("img_1", "txt_0"):
        del transcoders[Site.parse(name)]
    model = FrozenModel(Trace(source), transcoders)
    members = [
        Member(site, 0, int(active.feature[0]))
        for site in transcoders
        if len((active := model.active(site)).token) and active.token[0] == 0
    ]
    found, oracle = model.attribute([Target((member,)) for member in members]), Oracle(source, transcoders)
    for row, m in enumerate(members):
        assert_agree(model, found, row, oracle.attribute([(m.site, m.token, m.feature, 1.0)]), 1e-9)


@pytest.mark.parametrize("skip", [False, True])
def test_every_edge_is_what_a_perturbation_of_its_source_does(skip: bool) -> None:
    model = FrozenModel(Trace(hand_made(11)), random_transcoders(12, 3, 12, skip=skip))
    targets = targets_of(model, 13)
    found = model.attribute(targets)
    sources = [
        Node("feature", model.sites[s], int(t), int(f))
        for s, t, f in zip(found.site[:40], found.token[:40], found.feature[:40], strict=True)
    ]
    sources += [Node("error", site, 1) for site in model.sites] + [
        Node("input", Site("double", 0, stream), 2) for stream in ("img", "txt")
    ]
    changed = perturbed(model, sources, targets)
    for number, source in enumerate(sources):
        assert source.site is not None and source.token is not None
        for row in range(len(targets)):
            if source.kind == "feature":
                edge = dense(model, found, row, source.site, 20)[source.token, source.feature]
            elif source.kind == "error":
                edge = found.errors[source.site][row, source.token]
            else:
                edge = found.inputs[source.site.stream][row, source.token]
            assert changed[number, row] == pytest.approx(edge, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rows", "columns", "n_txt", "trace_dtype"), [(3, 4, 5, "float32"), (5, 2, 1, "bfloat16")])
def test_every_share_is_the_oracles_in_traces_of_a_transformer(
    rows: int, columns: int, n_txt: int, trace_dtype: TraceDtype
) -> None:
    for step, source in enumerate(flux_traces(rows, rows, columns, n_txt, trace_dtype)):
        model = check(source, random_transcoders(step, N_BLOCKS, 32), step)
        assert max(model.replay_error().values()) < (1e-5 if trace_dtype == "float32" else 0.03)


@pytest.mark.parametrize("columns", [3, 20])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.9])
@pytest.mark.parametrize("rows", [1, 30, 1000])
@pytest.mark.parametrize("keeps", [False, True])
def test_products_are_those_of_each_tokens_own_features(columns: int, share: float, rows: int, keeps: bool) -> None:
    """Tokens with none, few and many features, one token a gather and all in one, rows gathered anew and kept, dense products."""
    generator = torch.Generator().manual_seed(0)
    n_tokens, n_features, d_model = 12, 50, 6
    active = torch.rand(n_tokens, n_features, generator=generator) < share
    active[3] = False
    active[5, :40] |= share > 0
    token, feature = torch.nonzero(active).int().T.contiguous()
    z = torch.rand(len(token), generator=generator)
    features = features_of(token, feature, z)
    table = torch.randn(len(features.distinct), d_model, generator=generator)
    gradients = torch.randn(n_tokens, columns, d_model, generator=generator)
    plan = products(features, n_tokens, d_model * 4, rows * d_model * 4)
    plan = kept(plan, table, 1 << 20) if keeps else plan
    assert (not plan.chunks) == (n_tokens * len(features.distinct) <= encoding.DENSE_PAYS * len(token))
    expected = torch.einsum("acd,ad->ac", gradients[token.long()], table[features.row.long()])
    places, found = zip(*plan.of(gradients, table, 3000), strict=True) if len(token) else ((), ())
    assert [place for part in places for place in range(len(token))[part]] == list(range(len(token)))
    torch.testing.assert_close(torch.cat([*found, torch.zeros(0, columns)]), expected)
    summed = torch.zeros(n_tokens, d_model).index_add_(0, token.long(), z[:, None] * table[features.row.long()])
    torch.testing.assert_close(plan.summed(z, table, 3000), summed)
