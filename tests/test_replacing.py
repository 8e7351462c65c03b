"""Changes reach what the model goes on with, nest, are refused when they cannot be, and leave no trace."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analyze.steering.interventions import FeatureEdit, Intervention, Key, by_key, changes
from harvest import HarvestSettings
from harvest.capture import capture
from harvest.replacing import Moment, Replacement, replace
from harvest.sample import Sampler
from store import Site
from store.errors import NonFiniteError, UsageError
from tests.test_capture import by_hand, hook_count, inputs, transformer  # noqa: F401
from train import Dictionary
from train.dictionaries.collection import load_dictionaries

IMG, TXT = Site("double", 0, "img"), Site("double", 0, "txt")
NEXT = Site("double", 1, "img")


def added(amount: float) -> Callable[[Moment, Tensor, Tensor], Tensor]:
    return lambda _moment, _input, output: output + amount


def runs(model: Any) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = model(**inputs()).sample
    return answer


def out_of(model: Any, site: Site) -> Tensor:
    with torch.inference_mode(), capture(model, (site,)) as captured:
        model(**inputs())
    return captured.values[site, "mlp_out"]


@pytest.mark.parametrize("site", [IMG, TXT, NEXT])
def test_a_change_is_told_the_mlps_input_and_output_the_step_and_sigma(transformer: Any, site: Site) -> None:  # noqa: F811
    told: list[tuple[Moment, Tensor, Tensor]] = []
    plain = runs(transformer)
    with replace(transformer, {(site, "mlp"): [lambda *seen: told.append(seen)]}) as replacement:
        replacement.step = 3
        watched = runs(transformer)
    assert torch.equal(watched, plain)  # what gives None back changes nothing
    [(moment, given, output)] = told
    assert (moment.site, moment.step, moment.sigma.tolist()) == (site, 3, [0.75, 0.75])
    with torch.inference_mode():
        expected = by_hand(transformer, site.layer)
    torch.testing.assert_close(given, expected[f"{site.stream} mlp_in"])
    torch.testing.assert_close(output, expected[f"{site.stream} mlp_out"])


@pytest.mark.parametrize("site", [IMG, TXT])
def test_what_a_change_gives_back_is_what_the_block_adds_through_its_gate(transformer: Any, site: Site) -> None:  # noqa: F811
    """The residual that leaves the block moves by gate * change, and the other stream of the block not at all."""
    block, gates, leaves = transformer.transformer_blocks[0], [], []
    norm = block.norm1 if site.stream == "img" else block.norm1_context
    hooks = [
        norm.register_forward_hook(lambda _m, _i, out: gates.append(out[4])),
        block.register_forward_hook(lambda _m, _i, out: leaves.append(dict(zip(("txt", "img"), out, strict=True)))),
    ]
    try:
        runs(transformer)
        with replace(transformer, {(site, "mlp"): [added(0.5)]}):
            runs(transformer)
    finally:
        for hook in hooks:
            hook.remove()
    plain, changed = leaves
    moved = changed[site.stream] - plain[site.stream]
    torch.testing.assert_close(moved, (0.5 * gates[0])[:, None].expand_as(moved))
    other = "txt" if site.stream == "img" else "img"
    assert torch.equal(changed[other], plain[other])


@pytest.mark.parametrize("site", [IMG, TXT])
def test_attention_off_is_the_residual_that_reaches_the_mlp_unmoved(transformer: Any, site: Site) -> None:  # noqa: F811
    """With a stream's attention silenced its MLP reads the norm of what entered the block; the other's reads what it did."""
    sites = (IMG, TXT)
    with torch.inference_mode(), capture(transformer, sites) as captured:
        transformer(**inputs())
        plain = captured.take().values
        with replace(transformer, {(site, "attn"): [lambda _moment, _input, output: torch.zeros_like(output)]}):
            transformer(**inputs())
        changed = captured.take().values
        block, given = transformer.transformer_blocks[0], inputs()
        temb = transformer.time_text_embed(given["timestep"] * 1000, given["pooled_projections"])
        image = site.stream == "img"
        enters = (
            transformer.x_embedder(given["hidden_states"])
            if image
            else transformer.context_embedder(given["encoder_hidden_states"])
        )
        norm1, norm2 = (block.norm1, block.norm2) if image else (block.norm1_context, block.norm2_context)
        _, _, shift, scale, _ = norm1(enters, emb=temb)
        expected = norm2(enters) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(changed[site, "mlp_in"], expected)
    other = TXT if image else IMG
    assert torch.equal(changed[other, "mlp_in"], plain[other, "mlp_in"])


def test_changes_of_a_spot_run_in_order_and_inner_contexts_see_what_outer_ones_left(transformer: Any) -> None:  # noqa: F811
    plain = out_of(transformer, IMG)
    twice: Any = lambda _moment, _input, output: 2 * output  # noqa: E731
    with replace(transformer, {(IMG, "mlp"): [added(1.0), twice]}):
        assert torch.equal(out_of(transformer, IMG), 2 * (plain + 1))
        with replace(transformer, {(IMG, "mlp"): [added(3.0)]}):
            assert torch.equal(out_of(transformer, IMG), 2 * (plain + 1) + 3)
        assert torch.equal(out_of(transformer, IMG), 2 * (plain + 1))
    assert torch.equal(out_of(transformer, IMG), plain)


def test_capture_inside_reads_downstream_of_the_change_and_capture_outside_the_models_own_output(
    transformer: Any,  # noqa: F811
) -> None:
    with torch.inference_mode(), capture(transformer, (IMG, NEXT)) as outside:
        transformer(**inputs())
        plain = outside.take().values
        with replace(transformer, {(IMG, "mlp"): [added(1.0)]}), capture(transformer, (IMG, NEXT)) as inside:
            transformer(**inputs())
        assert torch.equal(outside.values[IMG, "mlp_out"], plain[IMG, "mlp_out"])
        assert torch.equal(inside.values[IMG, "mlp_out"], plain[IMG, "mlp_out"] + 1)
        assert not torch.allclose(inside.values[NEXT, "mlp_in"], plain[NEXT, "mlp_in"])
        assert torch.equal(inside.values[NEXT, "mlp_in"], outside.values[NEXT, "mlp_in"])


def test_an_empty_mapping_installs_nothing(transformer: Any) -> None:  # noqa: F811
    before = hook_count(transformer)
    with replace(transformer, {}) as replacement, replace(transformer, {(IMG, "mlp"): []}):
        assert hook_count(transformer) == before
        assert replacement == Replacement(step=0)


def test_hooks_are_gone_after_success_after_an_exception_and_after_nesting(transformer: Any) -> None:  # noqa: F811
    before, plain = hook_count(transformer), runs(transformer)
    changes: Any = {(IMG, "mlp"): [added(1.0)], (TXT, "attn"): [added(1.0)]}
    with replace(transformer, changes), replace(transformer, changes):
        assert hook_count(transformer) == before + 2 * 3
    assert hook_count(transformer) == before
    with pytest.raises(RuntimeError, match="boom"), replace(transformer, changes):
        raise RuntimeError("boom")
    assert hook_count(transformer) == before

    def fails(_moment: Moment, _input: Tensor, _output: Tensor) -> Tensor:
        raise RuntimeError("boom inside the model")

    with pytest.raises(RuntimeError, match="inside the model"), replace(transformer, {(IMG, "mlp"): [fails]}):
        runs(transformer)
    assert hook_count(transformer) == before
    assert torch.equal(runs(transformer), plain)


@pytest.mark.parametrize(
    ("spot", "message"),
    [
        ((Site("double", 2, "img"), "mlp"), "img_2: the model has double blocks 0 to 1"),
        ((Site.parse("joint_0"), "mlp"), "joint_0: single-stream blocks cannot be changed yet"),
        ((IMG, "gate"), "img_0: there is no part 'gate' to change; there are mlp and attn"),
    ],
)
def test_a_spot_that_the_model_has_not_is_refused_before_any_hook(transformer: Any, spot: Any, message: str) -> None:  # noqa: F811
    before, changes = hook_count(transformer), {(IMG, "mlp"): [added(1.0)], spot: [added(1.0)]}
    with pytest.raises(UsageError, match=message), replace(transformer, changes):
        pass
    assert hook_count(transformer) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _m, _i, output: output[:, :1], "img_0 at step 2 gave shape .*, expected"),
        (lambda _m, _i, output: output.double(), "img_0 at step 2 gave dtype torch.float64, expected torch.float32"),
        (lambda _m, _i, output: output.to("meta"), "img_0 at step 2 gave device meta, expected cpu"),
    ],
)
def test_what_comes_back_must_be_like_the_output(transformer: Any, change: Any, message: str) -> None:  # noqa: F811
    with replace(transformer, {(IMG, "mlp"): [change]}) as replacement:
        replacement.step = 2
        with pytest.raises(UsageError, match=message):
            runs(transformer)


@pytest.mark.parametrize("amount", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_names_its_site_and_step(transformer: Any, amount: float) -> None:  # noqa: F811
    with replace(transformer, {(TXT, "attn"): [added(amount)]}) as replacement:
        replacement.step = 1
        with pytest.raises(NonFiniteError, match=r"txt_0 at step 1 holds a NaN or an infinity in float32 .*strength$"):
            runs(transformer)


def test_a_transformer_called_with_its_timestep_by_position_is_refused_in_words(transformer: Any) -> None:  # noqa: F811
    given = inputs()
    order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    with replace(transformer, {(IMG, "mlp"): [added(1.0)]}), pytest.raises(UsageError, match="timestep= by name"):
        transformer(*(given[name] for name in order))


# --- the sampling loop --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    from harvest.models.loading import load_pipeline

    pipe = load_pipeline(HarvestSettings(out=Path("unused"), images=1), torch.device("cpu"), "float32")
    return Sampler(pipe, (), 64, 64, 4, 16, 0.0, pictures=True)


PROMPTS, SEEDS = ["a small red circle on a blue background", "a large green square on a white background"], [5, 6]


def draw(sampler: Sampler, changes: Any, **options: Any) -> Any:
    torch.set_num_threads(1)
    with replace(sampler.pipe.transformer, changes) as replacement:
        return sampler.draw(PROMPTS, SEEDS, lambda *_: None, replacement=replacement, latents=True, **options)


def same(one: Any, other: Any) -> bool:
    """Whether pictures are equal, pixel by pixel."""
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))


def test_with_nothing_to_change_latents_and_pictures_are_bit_equal_to_plain_ones(sampler: Sampler) -> None:
    torch.set_num_threads(1)
    plain = sampler.draw(PROMPTS, SEEDS, lambda *_: None)
    assert plain.latents is None  # not asked for
    again, asked = draw(sampler, {}), draw(sampler, {(IMG, "mlp"): [lambda *_: None]})
    assert torch.equal(again.latents, asked.latents)
    assert again.latents.shape == (2, 64, sampler.pipe.transformer.config.in_channels)
    assert (again.latents.dtype, again.latents.device.type) == (torch.float32, "cpu")
    for drawn in (again, asked):
        assert same(plain.pictures, drawn.pictures)
    from harvest.models.text import encode

    known = encode(sampler.pipe, PROMPTS, sampler.max_sequence_length)
    assert torch.equal(draw(sampler, {}, embeddings=known).latents, again.latents)


def test_latents_are_what_the_vae_decodes(sampler: Sampler) -> None:
    pipe, drawn = sampler.pipe, draw(sampler, {})
    unpacked = pipe._unpack_latents(drawn.latents, 64, 64, pipe.vae_scale_factor)
    with torch.inference_mode():
        decoded = pipe.vae.decode(unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    assert same(pictures, drawn.pictures)


def test_the_loop_tells_changes_which_step_it_is_and_begins_anew_with_each_batch(sampler: Sampler) -> None:
    told: list[tuple[int, float]] = []
    changes: Any = {(IMG, "mlp"): [lambda moment, *_: told.append((moment.step, float(moment.sigma[0])))]}
    with replace(sampler.pipe.transformer, changes) as replacement:
        for _ in range(2):
            drawn = sampler.draw(PROMPTS, SEEDS, lambda *_: None, replacement=replacement)
    assert told == 2 * [(step, float(drawn.sigma[0, step])) for step in range(4)]


def test_a_step_that_nobody_kept_is_refused_before_changes_fall_on_another(sampler: Sampler) -> None:
    changes: Any = {(IMG, "mlp"): [added(0.0)]}
    again = r"step 0 with sigma 1, and is called for it again with 0\.75: set Replacement\.step"
    with replace(sampler.pipe.transformer, changes), pytest.raises(UsageError, match=again):
        sampler.draw(PROMPTS, SEEDS, lambda *_: None)


def test_a_change_at_one_step_changes_the_picture_and_leaves_no_trace(sampler: Sampler) -> None:
    before, plain = hook_count(sampler.pipe.transformer), draw(sampler, {})
    changes: Any = {(IMG, "mlp"): [lambda moment, _, output: output + 2 if moment.step == 2 else None]}
    assert not torch.allclose(draw(sampler, changes).latents, plain.latents)
    assert hook_count(sampler.pipe.transformer) == before
    assert torch.equal(draw(sampler, {}).latents, plain.latents)


# --- interventions, drawn -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dictionaries(traced_flux: Path) -> dict[Key, Dictionary]:
    return by_key(load_dictionaries(traced_flux / "dictionaries"))


SET = Intervention("set", (FeatureEdit(NEXT, (3, 5, 8), "set", 40.0, steps=(1, 2)),))
SWAPPED = Intervention("swapped", (FeatureEdit(TXT, (4,), "zero"),), splice=(IMG,), method="replacement")


@pytest.mark.slow  # test_steer shows it through a painter
def test_an_empty_intervention_draws_bit_equal_latents(sampler: Sampler, dictionaries: dict[Key, Dictionary]) -> None:
    plain = draw(sampler, {}).latents
    for asked in (Intervention("empty"), [Intervention("empty"), None]):
        found = changes(asked, dictionaries, (8, 8))  # type: ignore[arg-type]
        assert torch.equal(draw(sampler, found).latents, plain)
    nothing = Intervention("nothing", (FeatureEdit(IMG, (3,), "amplify", 1.0), FeatureEdit(TXT, (4,), "add", 0.0)))
    assert torch.equal(draw(sampler, changes(nothing, dictionaries, (8, 8))).latents, plain)


@pytest.mark.slow  # test_steer shows it through a painter
def test_rows_of_a_batch_are_steered_each_by_its_own_intervention(
    sampler: Sampler, dictionaries: dict[Key, Dictionary]
) -> None:
    """A row without one keeps every bit; a row with one is what it is alone, but for the model's own rounding by batch size."""
    plain = draw(sampler, {}).latents
    first = draw(sampler, changes([SET, None], dictionaries, (8, 8))).latents
    both = draw(sampler, changes([SWAPPED, SET], dictionaries, (8, 8))).latents
    assert torch.equal(first[1], plain[1])
    for row, (intervention, found) in enumerate([(SWAPPED, both[0]), (SET, both[1])]):
        with replace(sampler.pipe.transformer, changes(intervention, dictionaries, (8, 8))) as replacement:
            alone = sampler.draw(
                PROMPTS[row : row + 1], SEEDS[row : row + 1], lambda *_: None, replacement=replacement, latents=True
            )
        assert alone.latents is not None
        torch.testing.assert_close(alone.latents[0], found, rtol=1e-4, atol=1e-4)
        assert float((found - plain[row]).abs().max()) > 0.05


def test_what_the_model_goes_on_with_is_the_output_with_the_edit(
    sampler: Sampler, dictionaries: dict[Key, Dictionary]
) -> None:
    """At its steps mlp_out moves by W_dec (z' - z) of the mlp_in of this run; before them nothing differs, after them all does."""
    seen: list[dict[Any, Tensor]] = []
    reads = dataclasses.replace(sampler, sites=(NEXT,), pictures=False)
    for found in ({}, changes(SET, dictionaries, (8, 8))):
        with replace(sampler.pipe.transformer, found) as replacement:
            reads.draw(PROMPTS, SEEDS, lambda _, took: seen.append(took.values), replacement=replacement)
    plain, changed = seen[:4], seen[4:]
    assert all(torch.equal(plain[0][spot], changed[0][spot]) for spot in plain[0])
    assert torch.equal(plain[1][NEXT, "mlp_in"], changed[1][NEXT, "mlp_in"])
    dictionary = dictionaries[NEXT, "transcoder"]
    with torch.inference_mode():
        x = plain[1][NEXT, "mlp_in"]
        z = dictionary.encode(x.flatten(0, 1), torch.full((x.shape[0] * x.shape[1],), 0.75))
        moved = torch.zeros_like(z)
        moved[:, [3, 5, 8]] = 40.0 - z[:, [3, 5, 8]]
        expected = plain[1][NEXT, "mlp_out"] + (moved @ dictionary.decoder.weight.T).view_as(x)
    torch.testing.assert_close(changed[1][NEXT, "mlp_out"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[3][NEXT, "mlp_in"], changed[3][NEXT, "mlp_in"], atol=1e-2)
