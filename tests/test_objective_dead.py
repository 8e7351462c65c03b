"""Dead features are counted in rows, woken by AuxK, and resampled without a touch to the living."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.test_objective import FLUX, pair
from tests.toy_dictionaries import N_FEATURES, prepared64, random_dictionary, recipe_of, rows
from train.dictionaries.dictionary import FIRST_THRESHOLD, Dictionary, build
from train.learning.dead import Dead, auxiliary_term
from train.learning.objective import Objective
from train.learning.resample import resample

DEAD = torch.tensor([0, 5, 6, 20])
ALIVE = torch.tensor([f for f in range(N_FEATURES) if f not in DEAD.tolist()])


def with_dead(**changes: Any) -> Dictionary:
    """A dictionary of which the features `DEAD` are active on no row."""
    dictionary = random_dictionary(**changes)
    dictionary.encoder.bias[DEAD] = -1e3
    dictionary.normalise_decoder()
    return dictionary


def double(dictionary: Dictionary) -> dict[str, Tensor]:
    """Its parameters in float64."""
    return {name: value.detach().double() for name, value in dictionary.named_parameters()}


def test_a_feature_is_dead_when_it_was_active_on_none_of_the_last_rows() -> None:
    dead = Dead(3, 100, torch.device("cpu"))
    for fired in ([True, True, False], [False, True, False], [False, True, True]):
        dead.note(torch.tensor(fired))
        dead.advance(50)
    assert dead.quiet_rows.tolist() == [100, 0, 0] and dead.quiet_rows.dtype == torch.int64
    assert dead.features().tolist() == [0]
    assert [float(dead.share(rows)) for rows in (50, 100, 101)] == pytest.approx([1 / 3, 1 / 3, 0])
    dead.revive(torch.tensor([0]))
    assert dead.features().tolist() == [] and int(dead.resampled) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "topk", "k": 3}, {"activation": "batchtopk", "k": 3}, {"nested": (4,)}]
)
def test_the_objective_counts_rows_since_each_feature_was_active(changes: dict[str, Any]) -> None:
    dictionary = with_dead(**changes)
    objective = Objective(dictionary, recipe_of(dictionary, dead="auxk", dead_rows=80), 9, 40)
    optimizer = torch.optim.AdamW(dictionary.parameters())
    expected = torch.zeros(N_FEATURES, dtype=torch.int64)
    for step in range(3):
        x, y, sigma = pair(dictionary, seed=step)
        objective.terms(x, y, sigma, step, count=False)
        pre = dictionary.preactivation(x, sigma).clamp_min(0)
        if dictionary.config.k is not None:
            ranked = pre.sort(dim=1, descending=True).values[:, 2:3]
            if dictionary.config.activation == "batchtopk":
                ranked = pre.flatten().sort(descending=True).values[3 * 40 - 1]
            pre = pre * (pre >= ranked)
        expected = (expected + 40) * ~(pre > 0).any(dim=0)
        objective.after_step(optimizer, x, y, sigma, step)
        assert torch.equal(objective.state()["quiet_rows"], expected)
    assert set(DEAD.tolist()) <= set((expected >= 80).nonzero().flatten().tolist())


@pytest.mark.parametrize("aux_k", [1, 3, 4, 100])
@pytest.mark.parametrize("changes", [{}, FLUX, {"skip": True}, {"nested": (8,)}])
def test_auxk_is_the_loss_of_the_residual_explained_by_the_greatest_dead_features(
    changes: dict[str, Any], aux_k: int
) -> None:
    dictionary = random_dictionary(**changes)
    dictionary.requires_grad_(True)
    recipe = recipe_of(dictionary, dead="auxk", dead_rows=10, aux_k=aux_k, aux_weight=0.25)
    objective = Objective(dictionary, recipe, 9, 40)
    objective.load_state({"quiet_rows": torch.zeros(N_FEATURES).index_fill(0, DEAD, 10).long()})
    x, y, sigma = pair(dictionary)
    terms = objective.terms(x, y, sigma, 0, count=False)
    p = {name: value.detach().double().requires_grad_() for name, value in dictionary.named_parameters()}
    missed = y.double() - dictionary(x, sigma).detach().double()
    pre = prepared64(p, x, sigma) @ p["encoder.weight"].T + p["encoder.bias"]
    guess = torch.zeros_like(missed)
    for row in range(len(x)):
        best = sorted(DEAD.tolist(), key=lambda f: -float(pre[row, f].detach()))[:aux_k]
        for feature in best:
            guess[row] += pre[row, feature].clamp_min(0) * p["decoder.weight"][:, feature]
    variance = ((missed - missed.mean(dim=0)) ** 2).mean(dim=0).sum()
    expected = ((guess - missed) ** 2).sum(dim=1).mean() / (variance + 1e-6)
    assert float(terms.auxiliary.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(float((terms.residual + 0.25 * terms.auxiliary).detach()))
    parameters = dict(dictionary.named_parameters())
    names = [n for n in p if n.split(".")[0] in ("encoder", "decoder", "mod_linear") and n != "decoder.bias"]
    found = torch.autograd.grad(terms.auxiliary, [parameters[n] for n in names])
    for name, ours, slow in zip(names, found, torch.autograd.grad(expected, [p[n] for n in names]), strict=True):
        assert (ours - slow).abs().max() <= 2e-5 * slow.abs().max(), name
    living = dict(zip(names, found, strict=True))["decoder.weight"][:, ALIVE]
    assert not living.any()  # AuxK moves no living feature


def test_auxk_is_zero_when_no_feature_is_dead_and_finite_when_nothing_is_missed() -> None:
    dictionary = random_dictionary().requires_grad_(True)
    x, _ = rows(8)
    nothing = torch.zeros_like(x)
    assert float(auxiliary_term(dictionary, x, nothing, DEAD[:0], 3)) == 0
    term = auxiliary_term(dictionary, x, nothing, DEAD, 3)
    term.backward()
    assert term.isfinite() and dictionary.encoder.weight.grad is not None
    assert dictionary.encoder.weight.grad.isfinite().all()


def stepped(dictionary: Dictionary, x: Tensor, y: Tensor, sigma: Tensor) -> torch.optim.Optimizer:
    """An AdamW whose moments are all set, without a step."""
    optimizer = torch.optim.AdamW(dictionary.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(9)
    for parameter in dictionary.parameters():
        moments = {key: torch.rand(parameter.shape, generator=generator) + 0.1 for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    return optimizer


CHANGES = [{}, {"kind": "sae", "time_embed_dim": None}, {"skip": True}, {"activation": "jumprelu"}, FLUX]


@pytest.mark.parametrize("rule", ["resample", "flux-sae"])
@pytest.mark.parametrize("changes", CHANGES)
def test_resampling_starts_the_dead_at_rows_and_leaves_every_bit_of_the_living(
    changes: dict[str, Any], rule: str
) -> None:
    dictionary = with_dead(**changes)
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    x, y, sigma = pair(dictionary)
    optimizer = stepped(dictionary, x, y, sigma)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in dictionary.named_parameters()}
    recipe = recipe_of(dictionary, dead=rule)
    done = resample(dictionary, optimizer, recipe, DEAD, x, y, sigma, 3)
    assert torch.equal(done, DEAD)

    p = double(dictionary)
    old = {name: value.double() for name, value in before.items()}
    reads, writes = prepared64(old, x, sigma), y.double() - old.get("pre_bias", old.get("decoder.bias"))
    if dictionary.config.skip:
        writes = writes - x.double() @ old["skip.weight"].T
    norm = 0.2 * old["encoder.weight"][ALIVE].norm(dim=1).mean()
    used, scales = [], []
    for feature in DEAD.tolist():
        row, column = p["encoder.weight"][feature], p["decoder.weight"][:, feature]
        wanted = 0.2 * reads if rule == "flux-sae" else norm * reads / reads.norm(dim=1, keepdim=True)
        used.append(int(torch.cosine_similarity(wanted, row[None]).argmax()))
        scales.append(float(row.norm() / wanted[used[-1]].norm()))
        assert (row - scales[-1] * wanted[used[-1]]).norm() < 1e-5
        assert (column - writes[used[-1]] / writes[used[-1]].norm()).norm() < 1e-5
    assert len(set(used)) == len(DEAD)
    assert not dictionary.encoder.bias[DEAD].any()
    halvings = -math.log2(scales[0])
    assert scales == pytest.approx([scales[0]] * len(DEAD), rel=1e-5)  # one factor for all
    assert round(halvings) >= 0 and halvings == pytest.approx(round(halvings), abs=1e-4)
    assert rule == "flux-sae" or round(halvings) == 0  # its features are small enough as they are

    for name, value in dictionary.state_dict().items():
        rows_of, old_rows = (value.T, before[name].T) if name == "decoder.weight" else (value, before[name])
        belongs = name in ("encoder.weight", "encoder.bias", "decoder.weight", "log_threshold")
        assert torch.equal(rows_of[ALIVE] if belongs else value, old_rows[ALIVE] if belongs else before[name])
    for name, parameter in dictionary.named_parameters():
        now, then = optimizer.state[parameter]["exp_avg"], moments[name]
        if name in ("encoder.weight", "encoder.bias", "decoder.weight", "log_threshold") and rule == "resample":
            now, then = (now.T, then.T) if name == "decoder.weight" else (now, then)
            assert not now[DEAD].any() and torch.equal(now[ALIVE], then[ALIVE])
        else:
            assert torch.equal(now, then)
        assert float(optimizer.state[parameter]["step"]) == 7.0
    if "log_threshold" in before:
        assert torch.allclose(dictionary.log_threshold[DEAD].exp(), torch.tensor(FIRST_THRESHOLD))


def test_what_is_drawn_depends_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> Tensor:
        torch.rand(seed + step + 1)  # whatever the global generator did before
        dictionary = with_dead()
        x, y, sigma = pair(dictionary)
        resample(
            dictionary, stepped(dictionary, x, y, sigma), recipe_of(dictionary, seed=seed), DEAD, x, y, sigma, step
        )
        return dictionary.encoder.weight

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3)) and not torch.equal(drawn(1, 2), drawn(2, 2))


@pytest.mark.parametrize("rule", ["resample", "flux-sae"])
def test_rows_are_drawn_by_their_error_as_each_rule_says(rule: str) -> None:
    dictionary = with_dead(kind="sae", time_embed_dim=None)
    for parameter in dictionary.parameters():
        parameter.zero_()  # so that the error of a row is the row
    x = torch.zeros(5, 6)
    squares = [1.0, 4.0] if rule == "resample" else [1.0, 1.05]  # the first rule sees 1 to 16
    x[1, 0], x[3, 1] = (square**0.5 for square in squares)
    share = 16 / 17
    if rule == "flux-sae":
        share = 1 / (1 + math.exp(-10 * 0.05 / float(np.std([0, 1, 0, 1.05, 0]))))
    counts = torch.zeros(6)
    recipe = recipe_of(dictionary, dead=rule)
    for step in range(150):
        resample(dictionary, stepped(dictionary, x, x, x[:, 0]), recipe, DEAD[:1], x, x, x[:, 0], step)
        counts += dictionary.decoder.weight[:, 0]
        dictionary.encoder.weight.zero_()
        dictionary.decoder.weight.zero_()
    assert float(counts[1] / (counts[0] + counts[1])) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("rule", ["resample", "flux-sae"])
def test_no_row_serves_two_dead_features_and_those_without_a_row_wait(rule: str) -> None:
    dictionary = with_dead(kind="sae", time_embed_dim=None)
    x, y, sigma = pair(dictionary, count=3)
    before = dictionary.encoder.weight.clone()
    recipe = recipe_of(dictionary, dead=rule)
    done = resample(dictionary, stepped(dictionary, x, y, sigma), recipe, DEAD, x, y, sigma, 0)
    assert done.tolist() == DEAD[:3].tolist()
    assert torch.equal(dictionary.encoder.weight[DEAD[3]], before[DEAD[3]])


@pytest.mark.parametrize("rule", ["resample", "flux-sae"])
def test_rows_whose_reconstruction_is_infinite_start_no_feature(rule: str) -> None:
    dictionary = with_dead()
    dictionary.decoder.bias[0] = 1e30
    x, y, sigma = pair(dictionary)
    before = dictionary.encoder.weight.clone()
    done = resample(
        dictionary, stepped(dictionary, x, y, sigma), recipe_of(dictionary, dead=rule), DEAD, x, y, sigma, 0
    )
    assert len(done) == 0 and torch.equal(dictionary.encoder.weight, before)


@pytest.mark.parametrize("rule", ["resample", "flux-sae"])
@pytest.mark.parametrize("changes", [{"activation": "topk", "k": 16}, {"activation": "batchtopk", "k": 16}, {}])
def test_a_model_most_of_whose_features_are_dead_survives_their_resampling(changes: dict[str, Any], rule: str) -> None:
    sae = random_dictionary(**{**FLUX, **changes, "d_model": 32, "n_features": 256}).requires_grad_(True)
    sae.initialise(0)
    dead = torch.arange(192)
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(41, 32, generator=generator)

    def batch() -> Tensor:  # rows have a direction in common, and some are many times as long as others
        present = (torch.randn(256, 40, generator=generator) - 1).relu()
        return 3 * torch.exp(0.5 * torch.randn(256, 1, generator=generator)) * (present @ causes[1:]) / 8 + causes[0]

    sigma = torch.ones(256)
    recipe = recipe_of(sae, loss="mse", dead=rule)
    optimizer, objective = torch.optim.AdamW(sae.parameters(), lr=3e-3), Objective(sae, recipe, 999, 256)
    losses = []
    for step in range(70):
        if step < 60:
            sae.encoder.bias.data[dead] = -1e3
        elif step == 60:
            x = batch()
            assert torch.equal(resample(sae, optimizer, recipe, dead, x, x, sigma, step), dead)
            assert sae.encode(x, sigma)[:, dead].any(dim=0).float().mean() > 0.2  # and they are awake
        x = batch()
        optimizer.zero_grad()
        terms = objective.terms(x, x, sigma, step, count=False)
        terms.total.backward()
        losses.append(float(terms.total.detach()))
        optimizer.step()
        sae.normalise_decoder()
    before = sum(losses[50:60]) / 10
    assert losses[60] < 6 * before and losses[-1] < 3 * before, (before, losses[60:])


def test_resampling_is_due_once_in_so_many_rows_and_never_after_the_last_step() -> None:
    dictionary = with_dead()
    recipe = recipe_of(dictionary, dead="resample", dead_rows=40, resample_rows=100)
    objective, due = Objective(dictionary, recipe, steps=10, batch=40), []
    for step in range(10):
        x, y, sigma = pair(dictionary, seed=step)
        dictionary.encoder.bias[DEAD] = -1e3
        objective.terms(x, y, sigma, step, count=False)
        before = dictionary.encoder.weight.clone()
        objective.after_step(stepped(dictionary, x, y, sigma), x, y, sigma, step)
        if not torch.equal(before, dictionary.encoder.weight):
            due.append(step)
            assert not objective.state()["quiet_rows"][DEAD].any()
    assert due == [2, 4, 7]  # after 120, 200, 320 rows; 400 would be the end


def of_two_ranks(work: Callable[[int, Callable[[Tensor], None]], None]) -> None:
    """Run `work(rank, all_reduce)` of two ranks side by side."""
    barrier, slots, errors = threading.Barrier(2, timeout=20), [torch.zeros(0)] * 2, []

    def run(rank: int) -> None:
        def all_reduce(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(slots[0] + slots[1])
            barrier.wait()

        try:
            work(rank, all_reduce)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    ("changes", "rule"), [({}, "resample"), ({"activation": "batchtopk", "k": 3}, "flux-sae"), (FLUX, "auxk")]
)
def test_ranks_that_merge_end_with_the_same_weights_and_counts(changes: dict[str, Any], rule: str) -> None:
    start = with_dead(**changes)
    models = [build(start.config) for _ in range(2)]
    for model in models:
        model.load_state_dict(start.state_dict())
    resampled = {} if rule == "auxk" else {"resample_rows": 160}
    recipe = recipe_of(start, dead=rule, dead_rows=80, **resampled)
    objectives = [Objective(model, recipe, 9, 80) for model in models]

    def work(rank: int, all_reduce: Callable[[Tensor], None]) -> None:
        model, objective = models[rank].requires_grad_(False), objectives[rank]
        for step in range(4):
            x, y, sigma = pair(model, seed=10 * step + rank)
            objective.terms(x, y, sigma, step, count=False)
            objective.merge(all_reduce, rank, 2)
            objective.after_step(torch.optim.AdamW(model.parameters()), x, y, sigma, step)

    of_two_ranks(work)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    for name, value in objectives[0].state().items():
        assert torch.equal(value, objectives[1].state()[name]), name
    if rule != "auxk":
        fresh = [f for f in DEAD.tolist() if not torch.equal(models[0].encoder.weight[f], start.encoder.weight[f])]
        assert fresh == DEAD.tolist()
