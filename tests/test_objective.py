"""Training terms and their gradients are the formulas of the papers, and what training keeps survives a restart."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import train.learning.forward
from store.errors import UsageError
from tests.toy_dictionaries import N_FEATURES, kept64, prepared64, random_dictionary, recipe_of, rows
from train.dictionaries.activations import jump_relu, keep_top, keep_top_of_batch
from train.dictionaries.dictionary import Dictionary, build
from train.learning.objective import THRESHOLD_BATCHES, Objective, learning_rate, risen
from train.recipe import Recipe

FLUX: dict[str, Any] = {"kind": "sae", "family": "flux-sae", "time_embed_dim": None}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relu": ({}, {"l1": 3e-2}),
    "unconditioned": ({"time_embed_dim": None}, {"l1": 3e-2}),
    "topk": ({"activation": "topk", "k": 5}, {}),
    "topk-l1": ({"activation": "topk", "k": 5}, {"l1": 3e-2}),
    "batchtopk": ({"activation": "batchtopk", "k": 5}, {}),
    "jumprelu": ({"activation": "jumprelu"}, {"l1": 3e-2, "bandwidth": 0.7}),
    "skip": ({"skip": True}, {"l1": 3e-2}),
    "nested": ({"nested": (3, 10)}, {"l1": 3e-2}),
    "nested-skip-topk": ({"nested": (6,), "skip": True, "activation": "topk", "k": 4}, {}),
    "nested-jumprelu": ({"nested": (5, 6, 23), "activation": "jumprelu"}, {"l1": 3e-2, "bandwidth": 0.7}),
    "flux-sae-topk": ({**FLUX, "activation": "topk", "k": 5}, {"loss": "mse"}),
    "flux-sae-relu": ({**FLUX}, {"loss": "mse", "l1": 0.4}),
    "flux-sae-nested": ({**FLUX, "nested": (8, 16)}, {"loss": "mse", "l1": 0.4}),
}


def pair(dictionary: Dictionary, count: int = 40, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Input, target and sigma; one tensor twice for an SAE."""
    x, sigma = rows(count, dictionary.config.d_model, seed)
    y = x if dictionary.config.kind == "sae" else rows(count, dictionary.config.d_model, seed + 100)[0]
    return x, y, sigma


def slow_terms(
    dictionary: Dictionary, recipe: Recipe, x: Tensor, y: Tensor, sigma: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Total, residual, sparsity and l0, and the gradient of every parameter: float64, each prefix decoded by itself."""
    p = {name: value.detach().double().requires_grad_() for name, value in dictionary.named_parameters()}
    y = y.double()
    pre = prepared64(p, x, sigma) @ p["encoder.weight"].T + p["encoder.bias"]
    kept = kept64(recipe, p, pre)
    z = pre * kept
    z.retain_grad()
    bias = p.get("pre_bias", p.get("decoder.bias"))
    residuals = []
    for width in (*dictionary.config.nested, N_FEATURES):
        y_hat = z[:, :width] @ p["decoder.weight"][:, :width].T + bias
        if "skip.weight" in p:
            y_hat = y_hat + x.double() @ p["skip.weight"].T
        squares = (y - y_hat) ** 2
        variance = ((y - y.mean(dim=0)) ** 2).mean(dim=0).sum()
        residuals.append(squares.mean() if recipe.loss == "mse" else squares.sum(dim=1).mean() / (variance + 1e-6))
    residual = sum(residuals) / len(residuals)
    l0 = kept.sum(dim=1).double().mean()
    sparsity = l0
    if recipe.activation != "jumprelu":
        sparsity = z.abs().mean() if recipe.loss == "mse" else z.abs().sum(dim=1).mean()
    total = residual + recipe.l1 * sparsity
    total.backward()
    if recipe.activation == "jumprelu":
        threshold, of_z = p["log_threshold"].detach().exp(), z.grad
        assert of_z is not None
        near = ((pre.detach() - threshold).abs() < recipe.bandwidth / 2).double() / recipe.bandwidth
        of_threshold = -(near * (threshold * of_z + recipe.l1 / len(x))).sum(dim=0)
        p["log_threshold"].grad = of_threshold * threshold
    terms = {"total": total, "residual": residual, "sparsity": sparsity, "l0": l0}
    return {k: v.detach() for k, v in terms.items()}, {k: v.grad for k, v in p.items() if v.grad is not None}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_are_those_of_the_formulas(
    case: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.learning.forward, "sparse_pays", lambda *_: sparse)
    dictionary = random_dictionary(**CASES[case][0]).requires_grad_(True)
    recipe = recipe_of(dictionary, **CASES[case][1])
    x, y, sigma = pair(dictionary)
    terms = Objective(dictionary, recipe, steps=10, batch=len(x)).terms(x, y, sigma, 0, count=True)
    terms.total.backward()
    expected, gradients = slow_terms(dictionary, recipe, x, y, sigma)
    for name, value in expected.items():
        assert float(getattr(terms, name).detach()) == pytest.approx(float(value), rel=1e-5), name
    assert float(terms.auxiliary) == 0 and not terms.l0.requires_grad
    found = {name: p.grad for name, p in dictionary.named_parameters() if p.grad is not None}
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_under_bfloat16_the_terms_and_all_that_is_kept_stay_float32(case: str) -> None:
    dictionary = random_dictionary(**CASES[case][0]).requires_grad_(True)
    recipe = recipe_of(dictionary, **CASES[case][1])
    x, y, sigma = pair(dictionary)
    objective = Objective(dictionary, recipe, steps=10, batch=len(x))
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective.terms(x, y, sigma, 0, count=True)
    terms.total.backward()
    assert {term.dtype for term in terms} == {torch.float32}
    assert {p.grad.dtype for p in dictionary.parameters() if p.grad is not None} == {torch.float32}
    expected, _ = slow_terms(dictionary, recipe, x, y, sigma)
    assert float(terms.total.detach()) == pytest.approx(float(expected["total"]), rel=0.05)
    objective.after_step(torch.optim.AdamW(dictionary.parameters()), x, y, sigma, 0)
    assert {value.dtype for value in objective.state().values()} <= {torch.float32, torch.int64}


def test_without_asking_nothing_is_counted() -> None:
    dictionary = random_dictionary()
    terms = Objective(dictionary, recipe_of(dictionary), 10, 40).terms(*pair(dictionary), 0, count=False)
    assert math.isnan(float(terms.l0))


def test_the_l1_weight_rises_over_its_warmup() -> None:
    dictionary = random_dictionary()
    objective = Objective(dictionary, recipe_of(dictionary, l1=0.5, l1_warmup_rows=160), 10, 40)
    weights = []
    for step in range(6):
        terms = objective.terms(*pair(dictionary), step, count=False)
        weights.append(float((terms.total - terms.residual) / terms.sparsity))
    assert weights == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5], rel=1e-4)


def test_the_kept_of_a_batch_are_its_greatest_whichever_rows_they_stand_in() -> None:
    z = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.5]])
    assert keep_top_of_batch(z, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert keep_top(z, 1).tolist() == [[5.0, 0.0, 0.0], [2.0, 0.0, 0.0]]


def test_jumprelu_keeps_what_is_above_its_threshold_whole_and_counts_it() -> None:
    pre = torch.tensor([[0.4, 2.0, -1.0], [0.6, 0.0, 0.2]], dtype=torch.bfloat16)
    z, l0 = jump_relu(pre, torch.tensor([0.5, 0.5, 0.1]), 1e-3)
    assert z.dtype == torch.bfloat16 and l0.dtype == torch.float32
    assert torch.equal(z, torch.tensor([[0.0, 2.0, 0.0], [0.6, 0.0, 0.2]], dtype=torch.bfloat16)) and l0 == 1.5


def test_a_jumprelu_dictionary_judges_by_its_learned_thresholds() -> None:
    dictionary = random_dictionary(activation="jumprelu")
    x, sigma = rows(50)
    pre, threshold = dictionary.preactivation(x, sigma), dictionary.log_threshold.exp()
    assert torch.equal(dictionary.encode(x, sigma), torch.where(pre > threshold, pre, 0))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_threshold_of_batchtopk_is_the_mean_of_the_least_kept_and_inference_judges_by_it(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.learning.forward, "sparse_pays", lambda *_: sparse)
    dictionary = random_dictionary(activation="batchtopk", k=4)
    dictionary.normalise_decoder()
    objective = Objective(dictionary, recipe_of(dictionary), steps=50, batch=40)
    optimizer = torch.optim.AdamW(dictionary.parameters())
    least = []
    for step in range(5):
        x, y, sigma = pair(dictionary, seed=step)
        objective.terms(x, y, sigma, step, count=False)
        objective.after_step(optimizer, x, y, sigma, step)
        z = dictionary.preactivation(x, sigma).clamp_min(0).flatten()
        least.append(float(z.sort(descending=True).values[4 * 40 - 1]))
    assert float(dictionary.threshold) == pytest.approx(sum(least) / 5, rel=1e-5)
    x, sigma = rows(60, seed=77)
    z = dictionary.preactivation(x, sigma)
    assert torch.equal(dictionary.encode(x, sigma), torch.where(z > dictionary.threshold, z, 0))
    assert torch.equal(dictionary.encode(x, sigma)[:7], dictionary.encode(x[:7], sigma[:7]))


@pytest.mark.parametrize(("steps", "batches"), [(3, 1), (50, 5), (10**6, THRESHOLD_BATCHES)])
def test_the_threshold_forgets_what_is_older_than_a_tenth_of_the_run(steps: int, batches: int) -> None:
    dictionary = random_dictionary(activation="batchtopk", k=4)
    dictionary.threshold.fill_(7.0)
    objective = Objective(dictionary, recipe_of(dictionary), steps, batch=40)
    objective._batches.fill_(10 * THRESHOLD_BATCHES)
    x, y, sigma = pair(dictionary)
    objective.terms(x, y, sigma, 5, count=False)
    objective._move_threshold()
    z = dictionary.preactivation(x, sigma).clamp_min(0).flatten()
    least = float(z.sort(descending=True).values[4 * 40 - 1])
    assert float(dictionary.threshold) == pytest.approx(7 + (least - 7) / batches, rel=1e-6)


def test_a_batch_without_any_active_feature_leaves_the_threshold_and_stays_finite() -> None:
    dictionary = random_dictionary(activation="batchtopk", k=4)
    dictionary.encoder.bias.fill_(-1e3)
    objective = Objective(dictionary, recipe_of(dictionary), steps=10, batch=40)
    x, y, sigma = pair(dictionary)
    assert objective.terms(x, y, sigma, 0, count=True).total.isfinite()
    objective.after_step(torch.optim.AdamW(dictionary.parameters()), x, y, sigma, 0)
    assert float(dictionary.threshold) == 0 and int(objective.state()["threshold_batches"]) == 0


def test_projection_takes_the_gradient_along_each_column_off_and_nothing_else() -> None:
    dictionary = random_dictionary().requires_grad_(True)
    dictionary.normalise_decoder()
    objective = Objective(dictionary, recipe_of(dictionary, project=True), 10, 40)
    objective.terms(*pair(dictionary), 0, count=False).total.backward()
    weight = dictionary.decoder.weight
    assert weight.grad is not None
    before = weight.grad.double().clone()
    objective.before_step()
    column = weight.detach().double()
    expected = before - column * (column * before).sum(dim=0) / (column**2).sum(dim=0)
    assert (weight.grad - expected).abs().max() < 1e-5 * before.abs().max()
    assert (before - expected).abs().max() > 1e-2 * before.abs().max()


def test_columns_have_unit_norm_after_a_step() -> None:
    dictionary = random_dictionary().requires_grad_(True)
    objective = Objective(dictionary, recipe_of(dictionary), 10, 40)
    objective.after_step(torch.optim.AdamW(dictionary.parameters()), *pair(dictionary), 0)
    assert torch.allclose(dictionary.decoder.weight.norm(dim=0), torch.ones(N_FEATURES), atol=1e-6)


def trained(recipe: Recipe, first: Dictionary, steps: range, state: Any = None) -> tuple[Dictionary, Any]:
    """A copy of `first` after those of 12 steps, and all that goes on from there."""
    dictionary = build(first.config)
    dictionary.load_state_dict(first.state_dict())
    optimizer = torch.optim.AdamW(dictionary.parameters(), lr=1e-2, weight_decay=0.0)
    objective = Objective(dictionary, recipe, steps=12, batch=40)
    if state is not None:
        optimizer.load_state_dict(state[0])
        objective.load_state(state[1])
    for step in steps:
        x, y, sigma = pair(dictionary, seed=step)
        optimizer.zero_grad()
        objective.terms(x, y, sigma, step, count=False).total.backward()
        objective.before_step()
        optimizer.step()
        objective.after_step(optimizer, x, y, sigma, step)
    return dictionary, (optimizer.state_dict(), {name: value.clone() for name, value in objective.state().items()})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {"dead": "resample", "dead_rows": 60, "resample_rows": 80, "l1": 0.3}),
        ({"activation": "topk", "k": 1}, {"dead": "auxk", "dead_rows": 60}),
        ({"activation": "batchtopk", "k": 1}, {"dead": "flux-sae", "dead_rows": 60, "resample_rows": 120}),
    ],
)
def test_a_training_that_went_on_from_its_state_ends_with_the_same_bits(
    config: dict[str, Any], changes: dict[str, Any]
) -> None:
    start = random_dictionary(**config)
    start.encoder.bias[:4] = -50.0  # dead from the start
    recipe = recipe_of(start, **changes)
    whole, kept = trained(recipe, start, range(12))
    half, state = trained(recipe, start, range(7))
    assert not any("/" in name for name in state[1])
    again, kept_again = trained(recipe, half, range(7, 12), state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(value, kept_again[1][name]) for name, value in kept[1].items())
    without, _ = trained(recipe_of(start, l1=recipe.l1), start, range(12))
    assert not torch.equal(without.encoder.weight, whole.encoder.weight)  # what was kept had something to say


def test_the_learning_rate_of_record_falls_once_per_million_rows() -> None:
    recipe = Recipe()
    rates = [learning_rate(recipe, step, 62_500, 4096) for step in (0, 244, 245, 31_250, 62_499)]
    assert rates[0] == rates[1] == 2e-4 and rates[2] == pytest.approx(1e-4 * (1 + math.cos(math.pi / 256)), rel=1e-12)
    assert rates[3] == pytest.approx(1e-4, rel=1e-2) and rates[4] < 1e-7
    assert learning_rate(Recipe(schedule="cosine"), 50, 100, 4096) == pytest.approx(1e-4)
    assert learning_rate(Recipe(schedule="constant", lr_warmup_rows=400), 1, 100, 100) == 1e-4
    assert risen(9, 0, 1) == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "batchtopk"}, "need a k"),
        ({"activation": "jumprelu", "k": 3}, "the others have none"),
        ({"nested": (4, 4)}, "rising widths"),
        ({"nested": (24,)}, "rising widths"),
        ({"skip": True, "kind": "sae"}, "no skip connection"),
    ],
)
def test_a_dictionary_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        random_dictionary(**changes)


def test_skip_and_threshold_start_at_nothing_and_are_not_in_decode() -> None:
    dictionary = random_dictionary(skip=True)
    x, sigma = rows(9)
    z = dictionary.encode(x, sigma)
    linear = dictionary.linear(x, sigma)
    assert linear is not None and torch.equal(linear, x @ dictionary.skip.weight.T)
    assert torch.equal(dictionary(x, sigma), dictionary.decode(z) + linear)
    dictionary.initialise(1)
    assert not dictionary.skip.weight.any() and torch.equal(
        dictionary(x, sigma), dictionary.decode(dictionary.encode(x, sigma))
    )
    assert random_dictionary().linear(x, sigma) is None
