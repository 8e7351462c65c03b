"""What the embedded model promises: a judge that can be trusted, prompts that stay apart, weights that draw."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPModel, CLIPTokenizer

from harvest.tiny_flux import evaluate, flow, text, vae
from harvest.tiny_flux.__main__ import TinyFluxSettings, run
from harvest.tiny_flux.evaluate import KINDS, EvaluateSettings, draw, load, row, seed_difference, table
from harvest.tiny_flux.judge import judge
from harvest.tiny_flux.scenes import HELD_OUT_PAIRS, Jitter, captions, prompt_count, prompts, render, scenes, truth
from harvest.tiny_flux.tokenizers import CLIP_LENGTH, SHORT, clip_tokenizer, t5_tokenizer, twins
from store.errors import UsageError
from store.split import split_of


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load()


# --- scenes and judge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_judge_is_right_on_every_true_picture(kind: str) -> None:
    for i, (prompt, scene) in enumerate(prompts(60, 5, **KINDS[kind])):
        picture, masks = render(scene, np.random.default_rng(i))
        verdict = judge(picture, scene)
        assert verdict.right, prompt
        overlap = (verdict.masks & masks).sum((1, 2)) / (verdict.masks | masks).sum((1, 2))
        assert overlap.min() > 0.7, prompt


@pytest.mark.parametrize("attribute", ["background", "shape", "colour", "size", "position"])
def test_judge_sees_a_single_wrong_attribute(attribute: str) -> None:
    world = scenes("one")
    rng = np.random.default_rng(3)
    for i in rng.choice(len(world), 40, replace=False):
        scene = world[i]
        said = (scene.background, scene.objects[0])
        for other in world:
            differing = {
                name
                for name, same in {
                    "background": said[0] == other.background,
                    "shape": said[1].shape == other.objects[0].shape,
                    "colour": said[1].colour == other.objects[0].colour,
                    "size": said[1].size == other.objects[0].size,
                    "position": said[1].position == other.objects[0].position,
                }.items()
                if not same
            }
            if differing == {attribute}:
                verdict = judge(render(other, rng)[0], scene)
                assert not verdict.right and not getattr(verdict, attribute)
                break
        else:
            pytest.fail(f"no scene differs from {scene} in {attribute} alone")


def test_judge_sees_a_missing_object_and_an_empty_picture() -> None:
    two = next(scene for scene in scenes("two") if scene.background == "black")
    one = next(scene for scene in scenes("one") if scene.background == "black")
    assert not judge(render(one)[0], two).count
    assert not judge(render(two)[0], one).count
    empty = judge(np.full((64, 64, 3), 22, np.uint8), two)
    assert empty.background and not empty.count and not empty.right and not empty.masks.any()


def test_truth_coverage_agrees_with_the_masks() -> None:
    for i, (_, scene) in enumerate(prompts(40, 2)):
        _, masks = render(scene, np.random.default_rng(i))
        said = truth(scene, masks, True)
        assert said["kind"] == ("one" if scene.relation is None else "two") and said["drawn"] is True
        for mask, one in zip(masks, said["objects"], strict=True):
            assert len(one["coverage"]) == 64
            assert np.isclose(sum(one["coverage"]) * 64, mask.sum(), atol=64 * 64 * 5e-4)
            token = int(np.argmax(one["coverage"]))
            tile = mask[8 * (token // 8) :, 8 * (token % 8) :][:8, :8]
            assert one["coverage"][token] == round(tile.mean(), 3)
        nominal = truth(scene, None, None, token=16)
        assert nominal["drawn"] is None and len(nominal["objects"][0]["coverage"]) == 16


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_distinct_and_prefix_stable_and_pure_in_split() -> None:
    for split in ("train", "val"):
        long = prompts(900, 0, split)
        texts = [text for text, _ in long]
        assert len(set(texts)) == 900
        assert long[:250] == prompts(250, 0, split)
        assert {split_of(text) for text in texts} == {split}
        assert sum(scene.relation is not None for _, scene in long) == 300
        assert texts != [text for text, _ in prompts(900, 1, split)]
    assert {split_of(text) for text, _ in prompts(300, 0)} == {"train", "val"}


def test_held_out_pairs_stay_out_of_everything_else() -> None:
    pairs = {(one.shape, one.colour) for _, scene in text.training_prompts(5000) for one in scene.objects}
    assert not pairs & HELD_OUT_PAIRS and len(pairs) == 35
    held = {(one.shape, one.colour) for _, scene in prompts(300, 0, held_out_pairs=True) for one in scene.objects}
    assert held == HELD_OUT_PAIRS


def test_no_two_scenes_share_a_caption_and_each_has_several() -> None:
    said: set[str] = set()
    for scene in [*scenes("one"), *scenes("one", True), *scenes("two", True)]:
        words = captions(scene)
        assert len(words) >= 3 and not said & set(words)
        said |= set(words)


def test_asking_for_more_prompts_than_there_are_says_how_many_there_are() -> None:
    count = prompt_count("one", "val", held_out_pairs=True)
    assert len(prompts(count, 0, "val", two_share=0.0, held_out_pairs=True)) == count
    with pytest.raises(UsageError, match=f"has {count} prompts"):
        prompts(count + 1, 0, "val", two_share=0.0, held_out_pairs=True)
    with pytest.raises(UsageError, match="0 to 1"):
        prompts(3, 0, two_share=1.5)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_every_caption_fits_the_short_length_with_words_as_single_tokens() -> None:
    t5, clip = t5_tokenizer(), clip_tokenizer()
    for kind in ("one", "two"):
        said = [caption for scene in scenes(kind)[::17] for caption in captions(scene)]
        ids = t5(said).input_ids
        assert max(map(len, ids)) < SHORT
        words = [len(caption.replace(",", " ,").replace(":", " :").split()) for caption in said]
        assert [len(i) - 1 for i in ids] == words
        assert [len(i) - 2 for i in clip(said).input_ids] == words


@given(st.text(max_size=300))
@settings(max_examples=80, deadline=None)
def test_any_unicode_string_tokenizes(pipe: Any, prompt: str) -> None:
    short = pipe.tokenizer(prompt, padding="max_length", max_length=CLIP_LENGTH, truncation=True).input_ids
    long = pipe.tokenizer_2(prompt, padding="max_length", max_length=SHORT, truncation=True).input_ids
    assert len(short) == CLIP_LENGTH and len(long) == SHORT
    assert max(long) < pipe.text_encoder_2.config.vocab_size and max(short) < pipe.text_encoder.config.vocab_size


def test_committed_tokenizers_are_those_of_the_code_and_case_changes_nothing(pipe: Any) -> None:
    said = ["A Small RED circle, top left", "ünïcode 日本 --ar 16:9"]
    assert pipe.tokenizer(said).input_ids == clip_tokenizer()(said).input_ids
    assert pipe.tokenizer_2(said).input_ids == t5_tokenizer()(said).input_ids
    weights = pipe.text_encoder_2.get_input_embeddings().weight
    assert all(torch.equal(weights[piece], weights[twin]) for piece, twin in twins().items())
    lower, upper = (
        draw(pipe, [t], [0]) for t in ("a red ring on a black background", "A Red RING on a BLACK background")
    )
    assert np.array_equal(lower, upper)


# --- the committed weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "n"), [(16, 16), pytest.param(512, 8, marks=pytest.mark.slow)])
def test_committed_weights_draw_what_unseen_prompts_say(pipe: Any, length: int, n: int) -> None:
    rows = [row(pipe, kind, EvaluateSettings(n=n), length) for kind in KINDS]
    assert np.mean([one.right for one in rows]) >= 0.95, [evaluate.line(one) for one in rows]


def test_two_seeds_of_one_prompt_differ_visibly(pipe: Any) -> None:
    assert seed_difference(pipe, 10) >= 6


def test_a_picture_does_not_depend_on_its_batch(pipe: Any) -> None:
    texts = [prompt for prompt, _ in prompts(4, 0)]
    together = draw(pipe, texts, range(4)).astype(int)
    alone = np.concatenate([draw(pipe, [texts[i]], [i]) for i in range(4)]).astype(int)
    assert np.abs(together - alone).max() <= 2


def test_padding_tokens_of_t5_are_all_the_same(pipe: Any) -> None:
    ids = pipe.tokenizer_2(["a red ring"], padding="max_length", max_length=64, return_tensors="pt").input_ids
    tokens = pipe.text_encoder_2(ids).last_hidden_state[0, 4:]
    assert (tokens - tokens[0]).abs().max() < 1e-3


def test_weights_folder_is_small_and_says_nothing_of_where_it_was_made() -> None:
    files = [file for file in evaluate.WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10.5e6
    for file in files:
        if file.suffix != ".safetensors":
            said = file.read_text()
            assert "name_or_path" not in said and "/home" not in said and "/root" not in said, file


def test_clip_model_ranks_a_pictures_own_caption_above_others() -> None:
    clip = CLIPModel.from_pretrained(evaluate.WEIGHTS / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(evaluate.WEIGHTS / "clip")
    world = prompts(64, 3, "val")
    pixels = vae.to_pixels(np.stack([render(scene, np.random.default_rng(i))[0] for i, (_, scene) in enumerate(world)]))
    encoded = tokenizer([prompt for prompt, _ in world], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip(pixel_values=pixels, **encoded).logits_per_image
    assert float((logits.argmax(1) == torch.arange(64)).float().mean()) >= 0.9


def test_text_tower_of_the_clip_model_is_the_pipelines_own(pipe: Any) -> None:
    clip = CLIPModel.from_pretrained(evaluate.WEIGHTS / "clip", dtype=torch.float32)
    ids = pipe.tokenizer(["a red ring above a blue cross"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(clip.text_model(ids).pooler_output, pipe.text_encoder(ids).pooler_output)


@pytest.mark.slow
def test_committed_weights_pass_the_whole_table(pipe: Any) -> None:
    for one in table(pipe, EvaluateSettings()):
        assert one.right >= 0.95, evaluate.line(one)
    assert seed_difference(pipe, 300) >= 6


# --- the program that made them -----------------------------------------------------------------------------------


def _tiny(folder: Path, out: str, judged: int = 0) -> TinyFluxSettings:
    few = flow.FlowSettings(steps=3, batch=2, prompts=60, ones_first=1)
    return TinyFluxSettings(
        out=folder / out,
        build=folder / f"build-{out}",
        judged=judged,
        vae=vae.VaeSettings(steps=3, batch=2),
        text=text.TextSettings(steps=3, batch=4, prompts=60),
        flow=few,
        wide=flow.FlowSettings(steps=2, batch=2, prompts=60, ones_first=0, jitter=Jitter()),
        settle=flow.FlowSettings(steps=1, batch=2, prompts=60, ones_first=0),
        vision=text.VisionSettings(steps=3, batch=4, prompts=60),
    )


class Killed(Exception):
    """Stands for a kill in the middle of a stage."""


@pytest.mark.slow
def test_training_goes_on_after_a_kill_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvest.tiny_flux.loop.EVERY", 1)
    run(_tiny(tmp_path, "whole"))
    saves = 0
    real = torch.save

    def killed_every_fifth(state: object, path: Path) -> None:
        nonlocal saves
        saves += 1
        if saves % 5 == 0:
            raise Killed
        real(state, path)

    monkeypatch.setattr("harvest.tiny_flux.loop.torch.save", killed_every_fifth)
    for _ in range(40):
        try:
            run(_tiny(tmp_path, "killed"))
            break
        except Killed:
            continue
    whole, killed = (sorted(p for p in (tmp_path / out).rglob("*") if p.is_file()) for out in ("whole", "killed"))
    assert saves > 10 and len(whole) == len(killed) > 15
    for a, b in zip(whole, killed, strict=True):
        assert a.read_bytes() == b.read_bytes(), a
    assert all(a < b for a, b in pairwise(whole))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    vae.train(vae.VaeSettings(steps=1, batch=2), tmp_path)
    with pytest.raises(UsageError, match="remove it"):
        vae.train(vae.VaeSettings(steps=1, batch=3), tmp_path)
