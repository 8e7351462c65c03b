"""A dictionary in the place of an MLP gives what it makes of its input; with what it leaves unexplained added back nothing changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analyze.faithfulness import splicing
from analyze.faithfulness.splicing import Fit, KeptErrors, MeanOutput, Spread, Watch, reconstruct, splice
from analyze.steering.drawing import Painter, open_painter, shots_of
from harvest.replacing import Moment
from store import Site, open_store
from store.errors import MismatchError
from tests.toy_dictionaries import D_MODEL, random_dictionary
from train import Dictionary
from train.dictionaries.collection import load_dictionaries

SITE, TOKENS, SIGMAS = Site.parse("img_3"), 6, (1.0, 0.75390625)
KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk with skip": {"activation": "topk", "k": 5, "skip": True},
    "sae": {"kind": "sae"},
    "flux-sae": {"kind": "sae", "family": "flux-sae", "activation": "topk", "k": 5, "time_embed_dim": None},
}


def batch(dtype: torch.dtype = torch.float32, site: Site = SITE) -> tuple[Moment, Tensor, Tensor]:
    """A moment of step 1, mlp_in and mlp_out of two images."""
    generator = torch.Generator().manual_seed(3)
    given, output = (torch.randn(2, TOKENS, D_MODEL, generator=generator).to(dtype) for _ in range(2))
    return Moment(site, 1, torch.tensor(SIGMAS)), given, output


def change_of(dictionary: Any, site: Site = SITE, **options: Any) -> Any:
    (made,) = splice({site: dictionary}, **options)[site, "mlp"]
    return made


@pytest.mark.parametrize("name", KINDS)
def test_what_stands_in_is_the_dictionary_of_its_own_input_row_by_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary = random_dictionary(**KINDS[name])
    moment, given, output = batch()
    monkeypatch.setattr(splicing, "BLOCK_VALUES", 3 * dictionary.config.n_features)  # blocks of 3 of the 12 rows
    found = change_of(dictionary)(moment, given, output)
    x = output if dictionary.config.kind == "sae" else given
    for image, sigma in enumerate(SIGMAS):
        for token in range(TOKENS):
            alone = dictionary(x[image, token][None], torch.tensor([sigma]))
            assert torch.allclose(found[image, token], alone[0], atol=1e-5)
    _, active = reconstruct(dictionary, x, moment.sigma)
    z = dictionary.encode(x.flatten(0, 1), moment.sigma.repeat_interleave(TOKENS))
    assert torch.equal(active.flatten(), (z > 0).sum(dim=-1)) and 0 < active.float().mean() < z.shape[1]


def test_at_other_steps_the_mlp_is_left_alone() -> None:
    moment, given, output = batch()
    assert change_of(random_dictionary(), steps=(0, 2))(moment, given, output) is None
    assert change_of(random_dictionary(), steps=(1,))(moment, given, output) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_errors_added_back_give_the_output_again(name: str, dtype: torch.dtype) -> None:
    dictionary = random_dictionary(**KINDS[name])
    moment, given, output = batch(dtype)
    kept = KeptErrors()
    (record,) = kept.recording({SITE: dictionary})[SITE, "mlp"]
    assert record(moment, given, output) is None
    without = change_of(dictionary)(moment, given, output)
    assert without.dtype == dtype and (without - output).abs().max() > 0.1
    for errors in (True, kept):
        again = change_of(dictionary, errors=errors)(moment, given, output)
        assert again.dtype == dtype and (again - output).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02)


def test_errors_of_another_batch_are_refused() -> None:
    dictionary = random_dictionary()
    moment, given, output = batch()
    kept = KeptErrors()
    change = change_of(dictionary, errors=kept)
    with pytest.raises(MismatchError, match=r"errors of img_3 at step 1 .* and none were kept: draw the same images"):
        change(moment, given, output)
    (record,) = kept.recording({SITE: dictionary})[SITE, "mlp"]
    record(Moment(SITE, 1, moment.sigma[:1]), given[:1], output[:1])
    with pytest.raises(MismatchError, match=r"those of shape \(1, 6, "):
        change(moment, given, output)


def test_sums_give_fvu_cosine_and_l0_as_numpy_does_from_all_rows_at_once() -> None:
    rng = np.random.default_rng(0)
    target, explained = rng.normal(size=(40, 5)) + 3, rng.normal(size=(40, 5)) + 3
    active = rng.integers(0, 9, 40)
    fit, spread = Fit(), Spread()
    for rows in (slice(0, 7), slice(7, 40)):
        one, other = (torch.from_numpy(values[rows]).float() for values in (explained, target))
        fit.add(one, other, torch.from_numpy(active[rows]))
        spread.add(other)
    residual = ((explained - target) ** 2).sum()
    deviation = ((target - target.mean(axis=0)) ** 2).sum()
    cosine = (explained * target).sum(1) / np.linalg.norm(explained, axis=1) / np.linalg.norm(target, axis=1)
    assert fit.rows == spread.rows == 40
    assert fit.residual == pytest.approx(residual, rel=1e-5) and spread.deviation == pytest.approx(deviation, rel=1e-5)
    assert fit.cosine / 40 == pytest.approx(cosine.mean(), rel=1e-5) and fit.active == active.sum()


def test_padding_of_the_text_is_counted_apart() -> None:
    site = Site.parse("txt_3")
    dictionary = random_dictionary(site=site)
    moment, given, output = batch(site=site)
    watch = Watch(real=torch.tensor([[True] * 4 + [False] * 2, [True] + [False] * 5]))
    watch.observe(moment, given, output)
    change_of(dictionary, site, watch=watch)(moment, given, output)
    assert {name: fit.rows for (_, _, name), fit in watch.fits.items()} == {"real": 5, "padding": 7}
    explained, active = reconstruct(dictionary, given, moment.sigma)
    padding = ~watch.real  # type: ignore[operator]
    assert watch.fits[site, 1, "padding"].active == active[padding].sum()
    assert watch.fits[site, 1, "padding"].residual == pytest.approx(
        float((explained - output)[padding].square().sum()), rel=1e-5
    )
    assert watch.spreads[site, 1, "real"].rows == 5


def test_real_tokens_and_padding_have_a_mean_output_each() -> None:
    site, real = Site.parse("txt_3"), torch.tensor([[True] * 4 + [False] * 2, [True] + [False] * 5])
    moment, given, output = batch(site=site)
    output = torch.where(real[..., None], output + 5, output - 5)  # they lie far apart, as the model's do
    watch = Watch(real=real)
    watch.observe(moment, given, output)
    found = change_of(MeanOutput.of(watch.spreads, site), site, watch=watch)(moment, given, output)
    assert torch.allclose(found[real], output[real].mean(0).expand_as(output[real]), atol=1e-5)
    assert torch.allclose(found[~real], output[~real].mean(0).expand_as(output[~real]), atol=1e-5)
    for name in ("real", "padding"):  # a mean of its own explains nothing of the kind, and no less
        deviation = watch.spreads[site, 1, name].deviation
        assert watch.fits[site, 1, name].residual == pytest.approx(deviation, rel=1e-3)


def test_without_a_mask_the_mean_output_is_that_of_all_rows_and_explains_nothing() -> None:
    site = Site.parse("txt_3")
    moment, given, output = batch(site=site)
    watch = Watch(real=torch.tensor([[True] * 4 + [False] * 2] * 2))
    watch.observe(moment, given, output)
    change = change_of(MeanOutput.of(watch.spreads, site), site, watch=(seen := Watch()))
    found = change(moment, given, output)
    assert torch.allclose(found, output.mean(dim=(0, 1)).expand_as(output), atol=1e-6)
    everything = Spread()
    everything.add(output.flatten(0, 1))
    assert seen.fits[site, 1, "all"].residual == pytest.approx(everything.deviation, rel=1e-5)


@pytest.fixture(scope="module")
def painter(traced_flux: Path) -> Painter:
    return open_painter(open_store(traced_flux / "store"), batch_size=2)


@pytest.fixture(scope="module")
def transcoders(traced_flux: Path) -> dict[Site, Dictionary]:
    found = load_dictionaries(traced_flux / "dictionaries")
    return {dictionary.site: dictionary.requires_grad_(False) for dictionary in found}


def test_in_the_model_errors_added_back_reproduce_the_latents_at_each_site_and_at_all(
    traced_flux: Path, painter: Painter, transcoders: dict[Site, Dictionary]
) -> None:
    shots = shots_of(open_store(traced_flux / "store"), [0, 1])
    plain = painter.draw(shots, pictures=False).latents
    kept = KeptErrors()
    recording = painter.draw(shots, extra=kept.recording(transcoders), pictures=False).latents
    assert torch.equal(recording, plain), "keeping the errors changed something"
    ways: list[tuple[dict[Site, Dictionary], bool | KeptErrors]] = [
        *(({site: transcoders[site]}, kept) for site in transcoders), (transcoders, kept), (transcoders, True),
    ]  # fmt: skip
    for chosen, errors in ways:
        found = painter.draw(shots, extra=splice(chosen, errors=errors), pictures=False).latents
        assert (found - plain).abs().max() < 2e-5, (sorted(map(str, chosen)), errors is True)
    without = painter.draw(shots, extra=splice(transcoders), pictures=False).latents
    assert (without - plain).abs().max() > 0.1, "these dictionaries are too good to show anything"
    assert torch.equal(painter.draw(shots, pictures=False).latents, plain), "a change outlived its run"
