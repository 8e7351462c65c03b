"""What a frozen model is made of, and what is refused on the way."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analyze.circuits.expansion import expand
from analyze.circuits.frozen import FrozenModel, Member, Target, perturbed
from analyze.circuits.nodes import Node
from analyze.circuits.terms import head_groups
from analyze.circuits.trace import Trace, stored_trace
from analyze.circuits.transcoders import frozen_transcoders
from store.errors import DamagedError, MismatchError, NonFiniteError, UsageError
from store.sites import Site
from tests.circuit_oracle import hand_made, random_transcoders
from tests.small_store import SmallStore
from tests.toy_dictionaries import random_dictionary


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    transcoders = random_transcoders(1, 2, 12)
    del transcoders[Site.parse("txt_1")]
    return FrozenModel(Trace(hand_made(1, n_blocks=2)), transcoders)


@pytest.mark.parametrize(
    ("site", "token", "feature", "says"),
    [
        ("img_2", 0, 0, "no site img_2; it has img and txt of blocks 0 to 1"),
        ("txt_1", 0, 0, "no transcoder of txt_1"),
        ("img_1", 6, 0, "no token 6: it has 6, 0 to 5"),
        ("img_1", -1, 0, "no token -1"),
        ("img_1", 0, 20, "no feature 20: it has 20, 0 to 19"),
    ],
)
def test_a_target_that_is_not_there_is_refused(
    model: FrozenModel, site: str, token: int, feature: int, says: str
) -> None:
    member = Member(Site.parse(site), token, feature)
    with pytest.raises(UsageError, match=says):
        model.attribute([Target((member,))])
    with pytest.raises(UsageError, match=says):
        model.activation(member.site, token, feature)


def test_a_target_without_members_is_refused() -> None:
    with pytest.raises(UsageError, match="no members"):
        Target((), "nobody")


def test_only_single_sources_are_perturbed(model: FrozenModel) -> None:
    target = Target((Member(Site.parse("img_1"), 0, 0),))
    with pytest.raises(UsageError, match="rest_L0_img_p1 cannot be perturbed"):
        perturbed(model, [Node("rest", Site.parse("img_0"), 1)], [target])


def test_active_features_are_those_with_z_above_zero(model: FrozenModel) -> None:
    site = Site.parse("img_1")
    active = model.active(site)
    assert (active.z > 0).all() and (np.diff(active.token.astype(int) * 20 + active.feature) > 0).all()
    strengths = {(int(t), int(f)): z for t, f, z in zip(active.token, active.feature, active.z, strict=True)}
    for token in range(6):
        for feature in range(20):
            pre = model.preactivation(site, token, feature)
            assert model.activation(site, token, feature) == strengths.get((token, feature), 0.0)
            assert model.activation(site, token, feature) == pytest.approx(max(pre, 0), rel=1e-12)


def test_a_feature_that_is_not_active_can_be_traced_all_the_same(model: FrozenModel) -> None:
    site = Site.parse("img_1")
    quiet = next(f for f in range(20) if model.activation(site, 0, f) == 0)
    found = model.attribute([Target((Member(site, 0, quiet),))])
    assert found.pre[0] == pytest.approx(model.preactivation(site, 0, quiet)) and found.conservation[0] < 1e-12


def test_thresholds_move_edges_into_what_is_below(model: FrozenModel) -> None:
    targets = [Target((Member(Site.parse("img_1"), token, 3),)) for token in range(3)]
    every, few = model.attribute(targets), model.attribute(targets, threshold=0.02)
    assert not every.below.any() and 0 < len(few.value) < len(every.value) and np.abs(few.value).min() >= 0.02
    for row in range(3):
        assert few.value[few.row == row].sum() + few.below[row] == pytest.approx(
            every.value[every.row == row].sum(), abs=1e-12
        )
    np.testing.assert_array_equal(every.conservation, few.conservation)


def test_no_targets_are_no_edges(model: FrozenModel) -> None:
    found = model.attribute([])
    assert len(found.value) == len(found.pre) == 0


def test_a_trace_that_lacks_an_array_is_damaged() -> None:
    source = hand_made(1, n_blocks=2)
    del source.blocks[1]["r2.txt"]
    with pytest.raises(DamagedError, match=r"block 1 of the trace: r2.txt is missing, expected \(5,\)"):
        FrozenModel(Trace(source), {}).replay_error()


def test_a_transcoder_of_another_width_is_refused() -> None:
    with pytest.raises(MismatchError, match="transcoder of txt_0 has d_model 8, the trace 12"):
        FrozenModel(Trace(hand_made(1, n_blocks=1)), random_transcoders(1, 1, 8)).replay_error()


def test_saes_missing_and_doubled_transcoders_are_named() -> None:
    sites = [Site.parse(name) for name in ("img_0", "img_3", "txt_0")]
    transcoder = random_dictionary()
    sae = random_dictionary(kind="sae", site=Site.parse("img_0"))
    with pytest.raises(UsageError, match=r"no transcoder for img_0, txt_0 \(sae_img_0: an SAE does not say"):
        frozen_transcoders([transcoder, sae], sites)
    assert list(frozen_transcoders([transcoder, sae], sites, allow_missing=True)) == [Site.parse("img_3")]
    with pytest.raises(UsageError, match="several transcoders of img_3"):
        frozen_transcoders([transcoder, transcoder], sites)


def test_a_transcoder_of_another_model_is_refused(small_store: Callable[..., SmallStore]) -> None:
    store = small_store(sites=("img_0",)).store
    dictionary = random_dictionary(site=Site.parse("img_0"), d_model=7)
    with pytest.raises(MismatchError, match=r"d_model 7, the activations of .* have 16"):
        frozen_transcoders([dictionary], [Site.parse("img_0")], store=store)


def test_a_store_without_traces_says_how_to_get_some(small_store: Callable[..., SmallStore], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no traces: harvest it with --trace --trace-images 3 --trace-steps 1"):
        stored_trace(small_store().store, 3, 1)


def test_a_trace_without_bias_vectors_is_one_with_zeros() -> None:
    source = hand_made(2, n_blocks=2)
    bare = replace(source, matrices=[{k: v for k, v in m.items() if k.endswith("weight")} for m in source.matrices])
    zero = replace(
        source, matrices=[{k: v if k.endswith("weight") else 0 * v for k, v in m.items()} for m in source.matrices]
    )
    target = Target((Member(Site.parse("img_1"), 0, 0),))
    one, other = (
        FrozenModel(Trace(s, torch.float32), random_transcoders(1, 2, 12)).attribute([target]) for s in (bare, zero)
    )
    np.testing.assert_array_equal(one.value, other.value)
    assert one.bias[Site.parse("img_0"), "value"][0] == 0


def test_each_block_of_a_trace_is_read_once_on_the_way_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though preparing a block needs what enters the one above."""
    source, reads = hand_made(2, n_blocks=5), Counter[int]()
    read = source.block
    monkeypatch.setattr(type(source), "block", lambda _, layer: reads.update([layer]) or read(layer))
    model = FrozenModel(Trace(source), random_transcoders(2, 5, 12), 20_000)
    for layer in range(4, -1, -1):
        model._block(layer)
    assert reads == dict.fromkeys(range(5), 1)


def storages(part: object) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in dataclasses, mappings and tuples."""
    if isinstance(part, torch.Tensor):
        yield part.untyped_storage()
    elif is_dataclass(part):
        yield from storages(tuple(getattr(part, field.name) for field in fields(part)))
    elif isinstance(part, Mapping | tuple):
        for one in part.values() if isinstance(part, Mapping) else part:
            yield from storages(one)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("memory", [60_000, 2 << 30])
def test_a_block_takes_the_memory_that_it_says(skip: bool, memory: int) -> None:
    transcoders = random_transcoders(3, 3, 12, skip=skip, activation="topk")
    model = FrozenModel(Trace(hand_made(3, n_txt=20, n_img=70)), transcoders, memory)
    for layer in range(3):
        block = model._block(layer)
        taken = {storage.data_ptr(): storage.nbytes() for storage in storages(block)}
        assert 0.9 * sum(taken.values()) <= block.size_bytes <= 1.3 * sum(taken.values())


def test_what_is_below_a_threshold_that_all_reach_is_nothing(model: FrozenModel) -> None:
    active = model.active(Site.parse("img_1"))
    targets = [
        Target((Member(Site.parse("img_1"), int(t), int(f)),))
        for t, f in zip(active.token, active.feature, strict=True)
    ]
    least = np.abs(model.attribute(targets).value)
    assert (model.attribute(targets, float(least[least > 0].min())).below == 0).all()


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.float32, "try --dtype float64"), (torch.float64, "in float64: check")]
)
def test_what_is_not_finite_is_refused_by_the_name_of_its_target(dtype: torch.dtype, remedy: str) -> None:
    source = hand_made(1, n_blocks=2)
    model = FrozenModel(Trace(source, dtype), random_transcoders(1, 2, 12))
    site = model.sites[-1]
    token, feature = int(model.active(site).token[0]), int(model.active(site).feature[0])
    source.blocks[0]["resid.txt"][0, 0] = np.inf
    model = FrozenModel(Trace(source, dtype), random_transcoders(1, 2, 12))
    with pytest.raises(NonFiniteError, match=rf"{site}:{token}:{feature}: what feeds it is not finite .*{remedy}"):
        expand(model, [Target((Member(site, token, feature),))], "influence", 3, 2, 1e-4)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("memory", [0, 500, 2_000, 10_000, 1 << 30])
def test_heads_and_rows_are_each_in_one_group_and_within_memory(heads: int, memory: int) -> None:
    tokens, size, beside = 10, 4, 100
    row, groups = 2 * tokens * size, head_groups(heads, tokens, size, beside, memory)
    assert [head for group, _ in groups for head in range(heads)[group]] == list(range(heads))
    for group, parts in groups:
        assert [each for part in parts for each in range(tokens)[part]] == list(range(tokens))
        here = len(range(heads)[group])
        least = here == 1 and all(len(range(tokens)[part]) == 1 for part in parts)
        assert least or here * (max(len(range(tokens)[part]) for part in parts) * row + beside) <= memory
