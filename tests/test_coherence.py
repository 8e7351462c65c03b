"""Coherence against a loop over all pairs, CLIP against the whole model on pixels prepared by hand, and a cache that mistakes nothing."""

import json
import shutil
import tracemalloc
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from analyze.features import coherence, embeddings
from analyze.features.clip import TINY_FLUX_CLIP, Clip, clip_for, load_clip
from analyze.features.coherence import coherence_record, coherence_table, mean_pairwise_cosine, top_lists
from analyze.features.embeddings import given_embeddings
from analyze.features.settings import CoherenceSettings
from analyze.inputs import open_analysis
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from store import open_store
from store.errors import DamagedError, ForeignError, MismatchError, UsageError
from tests.analyze_planted import Plan, planted_dictionaries, planted_store

PLAN = Plan(n_images=10, chunk_images=4, seeds_per_prompt=2)


def unit_vectors(images: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(images, dim))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small planted store with its dictionaries and scores; never written to."""
    folder = tmp_path_factory.mktemp("analyzed")
    planted_store(folder / "store", PLAN)
    planted_dictionaries(folder / "dictionaries", PLAN)
    scores.run(ScoresSettings(**where(folder), top=5))
    return folder


@pytest.fixture
def case(analyzed: Path, tmp_path: Path) -> Path:
    """A copy of it, with embeddings in a file."""
    for name in ("store", "dictionaries", "out"):
        shutil.copytree(analyzed / name, tmp_path / name)
    np.save(tmp_path / "given.npy", unit_vectors(PLAN.n_images))
    return tmp_path


def where(folder: Path) -> dict[str, Any]:
    return {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out"}


def run(folder: Path, **changes: Any) -> coherence.CoherenceSummary:
    return coherence.run(CoherenceSettings(**{**where(folder), "top_m": 4, **changes}))


lists = st.lists(st.lists(st.integers(0, 8), max_size=6, unique=True), max_size=9)


@settings(max_examples=40, deadline=None)
@given(lists, st.integers(0, 3), st.integers(1, 5))
def test_coherence_is_the_mean_over_all_pairs(groups: list[list[int]], seed: int, most: int) -> None:
    vectors = unit_vectors(9, seed=seed)
    column = pa.chunked_array([pa.array([[7], *groups], pa.list_(pa.int64())).slice(1)])
    offsets, images = top_lists(column, most)
    found = mean_pairwise_cosine(vectors, offsets, images)
    for group, value, start, stop in zip(groups, found, offsets, offsets[1:], strict=False):
        assert images[start:stop].tolist() == group[:most]
        pairs = [float(vectors[a] @ vectors[b]) for a, b in combinations(group[:most], 2)]
        assert np.isnan(value) if not pairs else value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_blocks_of_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, offsets = unit_vectors(9), np.arange(0, 41, 4)
    images = np.concatenate([np.random.default_rng(f).choice(9, 4, replace=False) for f in range(10)])
    whole = mean_pairwise_cosine(vectors, offsets, images)
    monkeypatch.setattr(coherence, "BLOCK_BYTES", 8 * 6 * 3)
    np.testing.assert_allclose(mean_pairwise_cosine(vectors, offsets, images), whole, rtol=0, atol=1e-14)


def test_lengths_divide_the_vectors_of_any_type() -> None:
    """Lists longer than a block, an empty one and one of a single image among them."""
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float16)
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    offsets, images = np.asarray([0, 50, 50, 51, 60]), np.concatenate((np.arange(50), [3], np.arange(9)))
    found = mean_pairwise_cosine(vectors, offsets, images, lengths)
    np.testing.assert_allclose(found, mean_pairwise_cosine(exact / lengths[:, None], offsets, images), atol=1e-14)
    assert np.isnan(found).tolist() == [False, True, True, False]


def test_memory_holds_the_embeddings_as_they_are_and_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy in float64 alone would be 25 MB."""
    monkeypatch.setattr(coherence, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 2**20)
    values = np.random.default_rng(0).normal(size=(6_000, 512)).astype(np.float32)
    np.save(tmp_path / "large.npy", values)
    safetensors.numpy.save_file({"x": values}, tmp_path / "large.safetensors")
    del values
    lists = np.arange(0, 30_001, 10), np.random.default_rng(1).integers(0, 6_000, 30_000)
    for name in ("large.npy", "large.safetensors"):
        tracemalloc.start()
        given_vectors = given_embeddings(str(tmp_path / name), 6_000)
        mean_pairwise_cosine(given_vectors.values, *lists, given_vectors.lengths)
        images = np.arange(6_000)
        mean_pairwise_cosine(given_vectors.values, np.asarray([0, 6_000]), images, given_vectors.lengths)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6e6 + 4 * coherence.BLOCK_BYTES, f"{name}: {peak / 1e6:.0f} MB"


def test_the_table_has_every_step_and_feature_and_says_what_it_is_made_from(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(case, embeddings=str(case / "given.npy"))
    analysis = open_analysis(Inputs(**where(case)))
    vectors = unit_vectors(PLAN.n_images)
    counted = 0
    for subject in analysis.subjects:
        table = coherence_table(analysis, subject)
        assert table is not None
        assert table.column_names == ["step", "feature", "coherence", "images"]
        rows = iter(table.to_pylist())
        for step in analysis.steps:
            for feature, images in enumerate(analysis.matrix(subject, step).features()["unique_image"].to_pylist()):
                row = next(rows)
                assert (row["step"], row["feature"], row["images"]) == (step, feature, images[:4])
                pairs = [float(vectors[a] @ vectors[b]) for a, b in combinations(images[:4], 2)]
                expected = pytest.approx(sum(pairs) / len(pairs), abs=1e-12) if pairs else None
                assert row["coherence"] == expected
                counted += bool(pairs)
        record = coherence_record(table)
        assert (record["top_m"], record["store"]) == (4, analysis.store.id)
        assert record["embeddings"] == found.embeddings
    first = [vectors[image] for image in range(0, PLAN.n_images, 2)]  # one a prompt, should two prompts be equal or not
    assert found.features == counted > 20
    assert -1 < found.baseline < 1
    if len(set(analysis.store.prompts()["prompt"].to_pylist())) == len(first):
        pairs = [float(a @ b) for a, b in combinations(first, 2)]
        assert found.baseline == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert f"{counted} features by their top 4 images" in capsys.readouterr().out


def test_equal_runs_give_equal_bytes_and_steps_may_come_one_by_one(case: Path) -> None:
    given_file = str(case / "given.npy")
    run(case, embeddings=given_file)
    whole = {path: path.read_bytes() for path in sorted((case / "out").glob("*/coherence.parquet"))}
    assert len(whole) == 2
    for path in whole:
        path.unlink()
    for step in ("1", "0"):
        run(case, embeddings=given_file, steps=step)
    assert {path: path.read_bytes() for path in whole} == whole


def test_where_the_embeddings_lie_is_nowhere_in_the_table(case: Path) -> None:
    run(case, embeddings=str(case / "given.npy"), steps="0")
    safetensors.numpy.save_file({"any": unit_vectors(PLAN.n_images)}, case / "elsewhere.safetensors")
    run(case, embeddings=str(case / "elsewhere.safetensors"), steps="1")  # the same numbers: step 0 stays
    split = {path: path.read_bytes() for path in sorted((case / "out").glob("*/coherence.parquet"))}
    run(case, embeddings=str(case / "given.npy"))
    assert {path: path.read_bytes() for path in split} == split
    assert {tuple(pq.read_table(path)["step"].unique().to_pylist()) for path in split} == {(0, 1)}


def test_steps_made_otherwise_are_discarded_and_it_is_said_why(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def steps() -> set[tuple[int, ...]]:
        paths = (case / "out").glob("*/coherence.parquet")
        return {tuple(pq.read_table(path)["step"].unique().to_pylist()) for path in paths}

    np.save(case / "other.npy", unit_vectors(PLAN.n_images, seed=1))
    run(case, embeddings=str(case / "given.npy"))
    assert "note" not in capsys.readouterr().out
    run(case, embeddings=str(case / "other.npy"), steps="1")
    assert "held steps 0 too, made from other embeddings: discarded" in capsys.readouterr().out
    assert steps() == {(1,)}
    run(case, embeddings=str(case / "other.npy"), steps="0", top_m=3)
    assert "held steps 1 too, made with --top-m 4: discarded" in capsys.readouterr().out
    assert steps() == {(0,)}
    run(case, embeddings=str(case / "given.npy"))  # all steps: nothing is lost
    assert "note" not in capsys.readouterr().out


def test_clip_embeds_as_the_whole_model_does_on_pixels_prepared_by_hand(case: Path) -> None:
    from transformers import CLIPModel

    found = run(case, clip=str(TINY_FLUX_CLIP))
    assert not found.cached
    store = open_store(case / "store")
    pictures = [store.picture(image) for image in range(store.n_images)]
    small = [picture.resize((64, 64), Image.Resampling.BICUBIC) for picture in pictures if picture is not None]
    pixels = (np.stack([np.asarray(picture, np.float32) for picture in small]) / 255 - 0.5) / 0.5
    model = CLIPModel.from_pretrained(TINY_FLUX_CLIP, dtype=torch.float32).eval()
    with torch.inference_mode():
        pooled = model.vision_model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).pooler_output
        expected = model.visual_projection(pooled).double()
    expected = (expected / expected.norm(dim=1, keepdim=True)).numpy()
    (file,) = (case / "out" / "embeddings").iterdir()
    values = safetensors.numpy.load_file(file)["image_embedding"].astype(np.float64)
    np.testing.assert_allclose(values / np.linalg.norm(values, axis=1, keepdims=True), expected, atol=1e-5)


def changed_clip(folder: Path, **config: Any) -> Path:
    """tiny-flux's CLIP model with another first weight, or another configuration."""
    shutil.copytree(TINY_FLUX_CLIP, folder)
    if config:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **config}))
    else:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        tensors["visual_projection.weight"][0, 0] += 1
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_embeddings_are_made_once_for_a_store_and_a_model(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(case, clip=str(TINY_FLUX_CLIP))
    cache = case / "out" / "embeddings"
    (file,) = cache.iterdir()
    made = file.read_bytes()
    shutil.copytree(TINY_FLUX_CLIP, case / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(Clip, "embed", None)  # cannot be called
        again = run(case, clip=str(case / "elsewhere"))
    assert (first.cached, again.cached, again.embeddings) == (False, True, first.embeddings)
    others = [changed_clip(case / "weights"), changed_clip(case / "pixels", image_mean=[0.4, 0.5, 0.5])]
    ids = {run(case, clip=str(folder)).embeddings for folder in others}
    assert len(ids | {first.embeddings}) == len(list(cache.iterdir())) == 3
    file.unlink()
    assert not run(case, clip=str(TINY_FLUX_CLIP)).cached
    assert file.read_bytes() == made
    planted_store(
        case / "second", replace(PLAN, seed=1)
    )  # the same OUT would be refused; the cache is told apart by itself
    analysis = open_analysis(Inputs(**{**where(case), "store": case / "second"}))
    found = embeddings.image_embeddings(analysis, CoherenceSettings(**where(case), clip=str(TINY_FLUX_CLIP)))
    assert not found.cached
    assert found.id not in ids | {first.embeddings}


def test_a_cached_file_that_was_damaged_or_exchanged_is_not_used(case: Path) -> None:
    run(case, clip=str(TINY_FLUX_CLIP))
    (file,) = (case / "out" / "embeddings").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match=r"delete .*\.safetensors and run this again"):
            run(case, clip=str(TINY_FLUX_CLIP))
    file.unlink()
    run(case, clip=str(changed_clip(case / "other")))
    (other,) = (case / "out" / "embeddings").iterdir()
    other.rename(file)
    with pytest.raises(ForeignError, match="of another store or model"):
        run(case, clip=str(TINY_FLUX_CLIP))


def test_tiny_flux_has_a_model_of_its_own_and_others_are_asked_for_one(case: Path) -> None:
    store = open_store(case / "store")
    with pytest.raises(UsageError, match="which CLIP model is to embed the pictures of planted"):
        clip_for(store, None)
    store.meta = replace(store.meta, model={"id": "tiny-flux"})
    assert clip_for(store, None) == str(TINY_FLUX_CLIP)
    assert clip_for(store, "mine") == "mine"


def test_what_cannot_be_compared_is_refused_before_anything_is_embedded(case: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keeps 5 top images of each feature: compute scores with --top 6"):
        run(case, top_m=6, embeddings=str(case / "given.npy"))
    with pytest.raises(UsageError, match="it takes 2 images"):
        run(case, top_m=1)
    with pytest.raises(UsageError, match="leave one of them out"):
        run(case, clip="a", embeddings="b")
    for device in ("nonsense", "meta", "cpu:0", "cuda:", "mps", ""):
        with pytest.raises(UsageError, match=f"--device {device}: expected cpu, cuda or cuda:N"):
            load_clip(str(TINY_FLUX_CLIP), device)
    bare = tmp_path / "bare"
    planted_store(bare / "store", replace(PLAN, n_images=4, pictures=False))
    planted_dictionaries(bare / "dictionaries", PLAN)
    with pytest.raises(UsageError, match="run python -m analyze scores"):
        run(bare)
    scores.run(ScoresSettings(**where(bare)))
    with pytest.raises(UsageError, match=r"holds no pictures to embed: give --embeddings FILE"):
        run(bare, clip=str(TINY_FLUX_CLIP))
    np.save(bare / "given.npy", unit_vectors(4))
    assert run(bare, embeddings=str(bare / "given.npy")).features > 0  # which needs none


def test_a_coherence_table_of_another_dictionary_or_form_is_not_taken(case: Path) -> None:
    run(case, embeddings=str(case / "given.npy"))
    analysis = open_analysis(Inputs(**where(case)))
    subject, other = analysis.subjects
    path = coherence.coherence_file(analysis, subject)
    shutil.copy(coherence.coherence_file(analysis, other), path)
    with pytest.raises(MismatchError, match="of another dictionary or store"):
        coherence_table(analysis, subject)
    pq.write_table(pa.table({"step": [0]}), path)
    with pytest.raises(ForeignError, match="holds no coherence in format 1"):
        coherence_table(analysis, subject)
    path.write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match="run python -m analyze coherence again"):
        coherence_table(analysis, subject)
    path.unlink()
    assert coherence_table(analysis, subject) is None
