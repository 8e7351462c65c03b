"""Embeddings and CLIP models from elsewhere: what is read, in which forms, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from analyze.features import clip
from analyze.features.clip import TINY_FLUX_CLIP, load_clip
from analyze.features.embeddings import given_embeddings
from store.errors import ForeignError, GranaryError, MismatchError, NonFiniteError, UsageError
from tests.analyze_planted import Plan

PLAN = Plan(n_images=10, chunk_images=4, seeds_per_prompt=2)


def unit_vectors(images: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(images, dim))
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def test_given_embeddings_may_lie_in_either_format_and_any_float_and_length(tmp_path: Path) -> None:
    vectors = unit_vectors(5)
    np.save(tmp_path / "a.npy", (3 * vectors).astype(np.float32))
    safetensors.numpy.save_file({"mine": vectors.astype(np.float16)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"x": vectors, "image_embedding": -vectors}, tmp_path / "two.safetensors")
    for name, error in (("a.npy", 1e-6), ("one.safetensors", 2e-3)):
        found = given_embeddings(str(tmp_path / name), 5)
        np.testing.assert_allclose(found.values / found.lengths[:, None], vectors, atol=error)
        np.testing.assert_allclose(found.lengths, 3 if name == "a.npy" else 1, atol=error)
        assert found.values.dtype == (np.float32 if name == "a.npy" else np.float16)
    named, chosen = (given_embeddings(f"{tmp_path}/two.safetensors{key}", 5) for key in ("", "#x"))
    np.testing.assert_allclose(named.values, -vectors)
    np.testing.assert_allclose(chosen.values, vectors)
    assert named.id != chosen.id


def test_embeddings_that_cannot_be_these_images_are_refused(tmp_path: Path) -> None:
    def refused(values: Any, error: type[GranaryError], words: str, name: str = "e.npy") -> None:
        path = tmp_path / name
        if isinstance(values, bytes):
            path.write_bytes(values)
        elif name.endswith(".npy"):
            np.save(path, values)
        else:
            safetensors.numpy.save_file(values, path)
        with pytest.raises(error, match=words):
            given_embeddings(str(path), 5)

    vectors = unit_vectors(5)
    spoilt, without = vectors.copy(), vectors.copy()
    spoilt[3, 2], without[1] = np.nan, 0
    refused(vectors[:4], MismatchError, "has 4 rows, the store has 5 images")
    refused(spoilt, NonFiniteError, "embedding of image 3 holds a NaN")
    refused(without, NonFiniteError, "embedding of image 1 holds only zeros")
    refused(
        1e200 * vectors,
        NonFiniteError,
        r"image 0 holds numbers too great .* \(the greatest is 6\.9e\+199\), and 4 more",
    )
    refused(1e-200 * vectors, NonFiniteError, "image 0 holds numbers too small for a length in float64")
    refused(vectors[0], UsageError, r"of shape \(6,\): expected floating-point numbers, \(image, dim\)")
    refused(np.ones((5, 2), int), UsageError, "is int64")
    refused(np.asarray([{}, {}]), ForeignError, "cannot be read as .npy")  # a pickle
    refused(b"no numbers", ForeignError, "cannot be read as .npy")
    refused(b"no numbers", ForeignError, "cannot be read as .safetensors", "e.safetensors")
    refused({"a": vectors, "b": vectors}, UsageError, "it holds a, b; say which", "e.safetensors")
    refused(b"1 2 3", UsageError, "expected a .npy or a .safetensors file", "e.txt")
    with pytest.raises(UsageError, match="there is no file"):
        given_embeddings(str(tmp_path / "nowhere.npy"), 5)


def test_a_folder_that_is_no_clip_model_is_refused(tmp_path: Path) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(GranaryError, match=words):
            load_clip(str(tmp_path / name) if name else "nobody")

    refused("nowhere", "there is no such folder")
    refused("", "there is no such folder, and it is no id of the hub")
    shutil.copytree(TINY_FLUX_CLIP.parent / "text_encoder", tmp_path / "text")
    refused("text", "is no CLIP model: it has no preprocessor_config.json")
    for name in ("empty", "type", "unjson", "lost", "torn", "half"):
        shutil.copytree(TINY_FLUX_CLIP, tmp_path / name)
    (tmp_path / "empty" / "model.safetensors").unlink()
    refused("empty", "it has no weights")
    (tmp_path / "type" / "config.json").write_text('{"model_type": "siglip"}')
    refused("type", "is a model of type 'siglip', expected 'clip'")
    (tmp_path / "unjson" / "config.json").write_text("[]")
    refused("unjson", "config.json is not the one of a model")
    (tmp_path / "torn" / "model.safetensors").write_bytes((TINY_FLUX_CLIP / "model.safetensors").read_bytes()[:-9])
    refused("torn", "cannot be read")
    tensors = safetensors.numpy.load_file(TINY_FLUX_CLIP / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if "visual_projection" not in name}
    safetensors.numpy.save_file(kept, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    refused("half", "the image encoder is not whole, visual_projection.weight is missing")


def divided(folder: Path) -> Path:
    """tiny-flux's CLIP model with its weights in two files and an index."""
    shutil.copytree(TINY_FLUX_CLIP, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = safetensors.numpy.load_file(TINY_FLUX_CLIP / "model.safetensors")
    shard = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(shard.values()):
        part = {name: values for name, values in tensors.items() if shard[name] == file}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(values.nbytes for values in tensors.values())}, "weight_map": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_weights_may_be_divided_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = divided(tmp_path / "divided")
    whole = load_clip(str(TINY_FLUX_CLIP), "cpu")
    assert load_clip(str(folder), "cpu").identity == whole.identity
    asked: list[str] = []

    def fetch(place: str, names: tuple[str, ...]) -> Path:
        """A hub that has this model: only what was asked for is in the cache."""
        asked.append(place)
        (tmp_path / "cache").mkdir(exist_ok=True)
        for name in names:
            if (folder / name).exists():
                shutil.copy(folder / name, tmp_path / "cache" / name)
        return tmp_path / "cache"

    monkeypatch.setattr(clip, "fetch", fetch)
    assert load_clip("somebody/divided", "cpu").identity == whole.identity
    assert set(asked) == {"hf://somebody/divided"}
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ForeignError, match=r"model-00002-of-00002.safetensors, which its .*index.json names, is not there"
    ):
        load_clip(str(folder), "cpu")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ForeignError, match=r"index\.json names no weights"):
        load_clip(str(folder), "cpu")
