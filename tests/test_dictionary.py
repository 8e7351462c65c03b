"""Dictionaries compute what their formulas say, and survive the disk."""

from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import numpy as np
import pytest
import torch

from store.errors import DamagedError, ForeignError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.sites import Site
from tests.toy_dictionaries import random_dictionary, rows
from train import load_dictionaries, load_dictionary
from train.__main__ import COMMANDS
from train.dictionaries.checkpoint import RESUME, read_config, save_dictionary
from train.dictionaries.config import Parent
from train.dictionaries.dictionary import sinusoidal
from train.dictionaries.published import to_bytes
from train.learning.loss import residual_term


@pytest.mark.parametrize("dim", [8, 64, 256, 33])
def test_time_embedding_is_that_of_diffusers(dim: int) -> None:
    sigma = torch.tensor([0.0, 0.25, 0.75390625, 1.0])
    assert torch.equal(sinusoidal(sigma, dim), diffusers.models.embeddings.get_timestep_embedding(sigma, dim))


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "topk", "k": 5}, {"time_embed_dim": None}, {"kind": "sae", "site": Site.parse("txt_3")}],
)
def test_forward_equals_the_formulas_written_in_numpy(changes: dict[str, Any]) -> None:
    dictionary = random_dictionary(**changes)
    x, sigma = rows(40)
    p = {name: value.double().numpy() for name, value in dictionary.state_dict().items()}
    modulated = x.double().numpy()
    if dictionary.config.time_embed_dim is not None:
        half = dictionary.config.time_embed_dim // 2
        angles = sigma.double().numpy()[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / (half - 1))
        h = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        for layer in ("time_mlp.0", "time_mlp.2"):
            h = h @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
            h = h / (1 + np.exp(-h))
        scale, shift = np.split(h @ p["mod_linear.weight"].T + p["mod_linear.bias"], 2, axis=1)
        modulated = modulated * (1 + scale) + shift
    z = np.maximum(modulated @ p["encoder.weight"].T + p["encoder.bias"], 0)
    if dictionary.config.k is not None:
        z = np.where(z >= np.sort(z, axis=1)[:, [-dictionary.config.k]], z, 0)
    y = z @ p["decoder.weight"].T + p["decoder.bias"]
    assert np.allclose(dictionary.encode(x, sigma).numpy(), z, atol=1e-4)
    assert np.allclose(dictionary(x, sigma).numpy(), y, atol=1e-3)


def test_rows_do_not_see_each_other_whatever_sigmas_stand_in_their_batch() -> None:
    dictionary = random_dictionary()
    x, sigma = rows(100)
    alone = torch.cat([dictionary.encode(x[i : i + 1], sigma[i : i + 1]) for i in range(100)])
    assert torch.allclose(dictionary.encode(x, sigma), alone, atol=1e-5)
    continuum = torch.linspace(0, 1, 100)
    alone = torch.cat([dictionary.encode(x[i : i + 1], continuum[i : i + 1]) for i in range(100)])
    assert torch.allclose(dictionary.encode(x, continuum), alone, atol=1e-5)


def test_topk_keeps_at_most_k_and_never_a_negative_feature() -> None:
    z = random_dictionary(activation="topk", k=20).encode(*rows(200))
    assert z.min() == 0 and (z > 0).sum(dim=1).max() <= 20


def test_residual_and_its_gradient_are_those_of_the_recipe_of_record() -> None:
    generator = torch.Generator().manual_seed(1)
    y, y_hat = torch.randn(2, 30, 6, generator=generator, dtype=torch.float32)
    y_hat.requires_grad_(True)
    residual = residual_term("record", y, [y_hat])
    residual.backward()
    t, r = y.double().numpy(), y_hat.detach().double().numpy()
    variance = ((t - t.mean(axis=0)) ** 2).mean(axis=0).sum() + 1e-6
    expected = ((t - r) ** 2).sum(axis=1).mean() / variance
    assert float(residual.detach()) == pytest.approx(expected, rel=1e-5)
    assert y_hat.grad is not None
    assert np.allclose(y_hat.grad.numpy(), 2 * (r - t) / len(t) / variance, atol=1e-6)


def test_weights_start_as_the_recipe_of_record_says() -> None:
    dictionary = random_dictionary(d_model=16, n_features=64)
    dictionary.initialise(7)
    decoder, encoder = dictionary.decoder.weight, dictionary.encoder.weight
    assert torch.allclose(decoder.norm(dim=0), torch.ones(64), atol=1e-6)
    assert torch.allclose(encoder.T / encoder.T.norm(dim=0), decoder, atol=1e-6)
    assert encoder.abs().max() <= (6 / 64) ** 0.5 < 1.1 * encoder.abs().max()
    assert not dictionary.mod_linear.weight.any() and not dictionary.encoder.bias.any()
    again = random_dictionary(d_model=16, n_features=64)
    again.initialise(7)
    assert to_bytes(again) == to_bytes(dictionary)


def test_damage_to_a_dictionary_folder_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save_dictionary(folder, random_dictionary(), {"fvu": 0.5}, [])
    assert load_dictionary(folder).metrics == {"fvu": 0.5}
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[:-4])
    with pytest.raises(DamagedError, match="bytes where"):
        load_dictionary(folder)
    (folder / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError, match="checksum"):
        load_dictionary(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(DamagedError, match="missing"):
        load_dictionary(folder)


def test_a_dictionary_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save_dictionary(folder, random_dictionary(), None, [])
    found = read_config(folder).to_json()
    write_json(folder / "config.json", self_checked({**found, "format_version": 7}))
    with pytest.raises(ForeignError, match=r"version 7.*reads versions 1 to 2"):
        load_dictionary(folder)


def test_a_dictionary_of_version_1_loads_as_what_it_was(tmp_path: Path) -> None:
    dictionary = random_dictionary(activation="topk", k=3, parent=Parent("sha256-p", "sha256-s", {"id": "m"}))
    save_dictionary(tmp_path / "d", dictionary, None, [])
    content = read_self_checked(tmp_path / "d" / "config.json")
    assert content["format_version"] == 2 and (content["skip"], content["nested"]) == (False, [])
    del content["skip"], content["nested"], content["sha256"]
    write_json(tmp_path / "d" / "config.json", self_checked({**content, "format_version": 1}))
    again = load_dictionary(tmp_path / "d")
    assert again.config == dictionary.config and not again.config.skip and again.config.nested == ()
    x, sigma = rows(20)
    assert torch.equal(again(x, sigma), dictionary(x, sigma))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_a_config_with_other_keys_than_its_version_has_is_refused(version: int, change: str, tmp_path: Path) -> None:
    save_dictionary(tmp_path / "d", random_dictionary(), None, [])
    content = read_self_checked(tmp_path / "d" / "config.json")
    del content["sha256"]
    if version == 1:
        del content["skip"], content["nested"]
    name = "gates" if change == "unknown" else "k"
    content = {**content, name: 1} if change == "unknown" else {k: v for k, v in content.items() if k != name}
    write_json(tmp_path / "d" / "config.json", self_checked({**content, "format_version": version}))
    with pytest.raises(ForeignError, match=rf"version {version}'s keys.*{name}"):
        load_dictionary(tmp_path / "d")


EVERYTHING: list[dict[str, Any]] = [
    {"activation": "batchtopk", "k": 3},
    {"activation": "jumprelu", "skip": True},
    {"nested": (4, 9), "skip": True, "time_embed_dim": None},
    {"kind": "sae", "family": "flux-sae", "time_embed_dim": None, "activation": "jumprelu"},
]


@pytest.mark.parametrize("changes", EVERYTHING)
def test_every_kind_of_dictionary_survives_the_disk(changes: dict[str, Any], tmp_path: Path) -> None:
    dictionary = random_dictionary(**changes)
    if dictionary.config.activation == "batchtopk":
        dictionary.threshold.fill_(0.8125)
    save_dictionary(tmp_path / "d", dictionary, None, [])
    again = load_dictionary(tmp_path / "d")
    assert again.config == dictionary.config
    assert {name: value.dtype for name, value in again.state_dict().items()} == dict.fromkeys(
        dictionary.state_dict(), torch.float32
    )
    x, sigma = rows(30)
    assert torch.equal(again.encode(x, sigma), dictionary.encode(x, sigma)) and again.encode(x, sigma).any()
    assert torch.equal(again(x, sigma), dictionary(x, sigma))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in again.parameters())


def test_a_parent_of_before_targets_could_be_recomputed_had_stored_ones(tmp_path: Path) -> None:
    parent = Parent("sha256-p", "sha256-s", {"id": "m"})
    save_dictionary(tmp_path / "d", random_dictionary(parent=parent), None, [])
    content = read_self_checked(tmp_path / "d" / "config.json")
    del content["parent"]["targets"]
    write_json(tmp_path / "d" / "config.json", self_checked(content))
    assert load_dictionary(tmp_path / "d").config.parent == parent and parent.targets == "stored"


def test_missing_unfinished_and_double_dictionaries_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        load_dictionaries(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no dictionary"):
        load_dictionaries(tmp_path)
    with pytest.raises(ForeignError, match="is no dictionary"):
        load_dictionary(tmp_path)
    dictionary = random_dictionary()
    save_dictionary(tmp_path / dictionary.name, dictionary, None, [])
    (tmp_path / "transcoder_img_3.pt").write_bytes(to_bytes(dictionary))
    with pytest.raises(UsageError, match="twice"):
        load_dictionaries(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / RESUME).touch()
    with pytest.raises(UnfinishedError, match="half did not finish"):
        load_dictionaries(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"activation": "topk"}, {"k": 3}, {"activation": "topk", "k": 99}, {"family": "flux-sae"}, {"time_embed_dim": 1}],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        random_dictionary(**changes)


def test_the_program_has_train_import_and_export() -> None:
    assert list(COMMANDS) == ["train", "import", "export"]
