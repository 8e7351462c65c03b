"""Dictionaries compute what the published ones compute, and survive the disk."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import numpy as np
import pytest
import safetensors.torch
import torch

import train.checkpoint
from store.errors import DamagedError, ForeignError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.sites import Site
from train import SAE, DictionaryConfig, Transcoder, load_dictionaries, load_dictionary
from train.__main__ import COMMANDS
from train.checkpoint import RESUME, read_config, save_dictionary
from train.config import Parent
from train.dictionary import Dictionary, PreBiasSAE, build, sinusoidal
from train.loss import loss_of_record
from train.published import ExportSettings, ImportSettings, import_file, run_export, run_import, to_bytes

GOLDEN = Path(__file__).parent / "golden" / "circuit_a"
TIMESTEP = 0.75


def random_dictionary(**changes: Any) -> Dictionary:
    settings: dict[str, Any] = {
        "kind": "transcoder",
        "site": Site.parse("img_3"),
        "d_model": 6,
        "n_features": 24,
        "time_embed_dim": 8,
    }
    dictionary = build(DictionaryConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.normal_(generator=generator)
    return dictionary.requires_grad_(False)


def rows(count: int, d_model: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sigma = torch.tensor([1.0, 0.75390625, 0.5, 0.25])[torch.arange(count) % 4]
    return torch.randn(count, d_model, generator=generator), sigma


@pytest.mark.parametrize("site", [f"{stream}_{layer}" for stream in ("img", "txt") for layer in range(4)])
def test_published_transcoders_give_the_activations_and_errors_of_the_reference(site: str) -> None:
    dictionary = import_file(GOLDEN / "transcoders" / f"transcoder_{site}.pt")
    golden = safetensors.torch.load_file(GOLDEN / "golden_activations.safetensors")
    x, y = golden[f"{site}.x"], golden[f"{site}.y"]
    sigma = torch.full((len(x),), TIMESTEP)
    z = dictionary.encode(x, sigma)
    assert (z - golden[f"{site}.z"]).abs().max() < 1e-4
    assert (y - dictionary.decode(z) - golden[f"{site}.error"]).abs().max() < 1e-4
    assert dictionary.config.parent is None and dictionary.metrics is None
    assert isinstance(dictionary, Transcoder) and (dictionary.input_point, dictionary.target_point) == (
        "mlp_in",
        "mlp_out",
    )


def test_every_published_file_of_a_folder_is_found_in_order() -> None:
    names = [dictionary.name for dictionary in load_dictionaries(GOLDEN / "transcoders")]
    assert names == [f"transcoder_{stream}_{layer}" for layer in range(4) for stream in ("img", "txt")]


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


def test_loss_and_gradient_are_those_of_the_recipe_of_record() -> None:
    generator = torch.Generator().manual_seed(1)
    y, y_hat = torch.randn(2, 30, 6, generator=generator, dtype=torch.float32)
    z = torch.rand(30, 24, generator=generator)
    y_hat.requires_grad_(True)
    z.requires_grad_(True)
    loss = loss_of_record(y, y_hat, z, 3e-2)
    loss.total.backward()
    t, r, a = y.double().numpy(), y_hat.detach().double().numpy(), z.detach().double().numpy()
    variance = ((t - t.mean(axis=0)) ** 2).mean(axis=0).sum() + 1e-6
    expected = ((t - r) ** 2).sum(axis=1).mean() / variance + 3e-2 * np.abs(a).sum(axis=1).mean()
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert y_hat.grad is not None and z.grad is not None
    assert np.allclose(y_hat.grad.numpy(), 2 * (r - t) / len(t) / variance, atol=1e-6)
    assert np.allclose(z.grad.numpy(), 3e-2 / len(t), atol=1e-8)


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


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "sae", "family": "flux-sae", "time_embed_dim": None, "activation": "topk", "k": 4}]
)
def test_export_then_import_gives_the_same_dictionary(changes: dict[str, Any], tmp_path: Path) -> None:
    dictionary = random_dictionary(**changes)
    save_dictionary(tmp_path / dictionary.name, dictionary, None, [])
    run_export(ExportSettings(tmp_path / dictionary.name, tmp_path / f"{dictionary.name}.pt"))
    run_import(ImportSettings(tmp_path / f"{dictionary.name}.pt", tmp_path / "back"))
    again = load_dictionary(tmp_path / "back" / dictionary.name)
    assert again.config == dictionary.config and type(again) is type(dictionary)
    assert to_bytes(again) == to_bytes(dictionary) == (tmp_path / f"{dictionary.name}.pt").read_bytes()
    x, sigma = rows(9)
    assert torch.equal(again(x, sigma), dictionary(x, sigma))
    run_import(
        ImportSettings(tmp_path / f"{dictionary.name}.pt", tmp_path / "back")
    )  # the same again: nothing to complain about


@pytest.mark.parametrize("survives", range(4))
def test_a_killed_import_goes_on_with_the_same_command(
    survives: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = GOLDEN / "transcoders" / "transcoder_img_0.pt"
    run_import(ImportSettings(file, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        for name in ("write_bytes", "write_json"):
            patch.setattr(train.checkpoint, name, dying(getattr(train.checkpoint, name), survives))
        with pytest.raises(KeyboardInterrupt):
            run_import(ImportSettings(file, tmp_path / "killed"))
    run_import(ImportSettings(file, tmp_path / "killed"))
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "transcoder_img_0").iterdir()}
        for name in ("whole", "killed")
    ]
    assert contents[0] == contents[1]


def dying(write: Any, survives: int) -> Any:
    """`write` for so many files of a dictionary (config.json is the fourth), and then a kill in the middle of the next."""
    written = ["weights.safetensors", "metrics.json", "log.jsonl", "config.json"][survives]

    def dies(path: Path, content: Any) -> None:
        if path.name == written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0badf00d.tmp").write_bytes(b"torn")
            raise KeyboardInterrupt
        write(path, content)

    return dies


def test_an_import_does_not_write_over_something_else(tmp_path: Path) -> None:
    file = GOLDEN / "transcoders" / "transcoder_img_0.pt"
    save_dictionary(tmp_path / "transcoder_img_0", random_dictionary(site=Site.parse("img_0")), None, [])
    with pytest.raises(UsageError, match="holds something else"):
        run_import(ImportSettings(file, tmp_path))
    (tmp_path / "letters" / "transcoder_img_0").mkdir(parents=True)
    (tmp_path / "letters" / "transcoder_img_0" / "to mother.txt").touch()
    with pytest.raises(UsageError, match="holds something else"):
        run_import(ImportSettings(file, tmp_path / "letters"))


def test_an_exported_transcoder_has_the_keys_and_shapes_of_the_published_ones(tmp_path: Path) -> None:
    published = torch.load(GOLDEN / "transcoders" / "transcoder_img_0.pt", weights_only=True)
    ours = random_dictionary(d_model=64, n_features=256, time_embed_dim=64)
    exported = torch.load(io.BytesIO(to_bytes(ours)), weights_only=True)
    assert {k: (v.shape, v.dtype) for k, v in exported.items()} == {k: (v.shape, v.dtype) for k, v in published.items()}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"activation": "topk", "k": 4}, "apply ReLU"), ({"time_embed_dim": None}, "not conditioned")],
)
def test_what_the_published_layout_cannot_say_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(**changes)
    save_dictionary(tmp_path / "d", dictionary, None, [])
    with pytest.raises(UsageError, match=reason):
        run_export(ExportSettings(tmp_path / "d", tmp_path / "d.pt"))
    assert not (tmp_path / "d.pt").exists()


def test_a_flux_sae_file_loads_by_its_keys_and_needs_its_site_named(tmp_path: Path) -> None:
    dictionary = random_dictionary(kind="sae", family="flux-sae", time_embed_dim=None, activation="topk", k=4)
    file = tmp_path / "sae_best.pt"
    file.write_bytes(to_bytes(dictionary))
    with pytest.raises(UsageError, match="--site"):
        import_file(file)
    again = import_file(file, site="img_3")
    assert isinstance(again, PreBiasSAE) and isinstance(again, SAE) and again.config.k == 4
    x, sigma = rows(20)
    p = {name: value.numpy() for name, value in again.state_dict().items()}
    z = np.maximum((x.numpy() - p["pre_bias"]) @ p["encoder.weight"].T + p["encoder.bias"], 0)
    z = np.where(z >= np.sort(z, axis=1)[:, [-4]], z, 0)
    assert np.allclose(again(x, sigma).numpy(), z @ p["decoder.weight"].T + p["pre_bias"], atol=1e-4)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_a_file_with_pickled_code_is_refused_and_the_code_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Payload()}, tmp_path / "sae_img_0.pt")
    (tmp_path / "sae_img_1.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("sae_img_0.pt", "sae_img_1.pt"):
        with pytest.raises(ForeignError, match=r"refused|no file that torch"):
            import_file(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"PK\x03\x04 torn", b"\x80\x02.", b"}q\x01(X", b"\x89PNG\r\n"]
)
def test_a_file_that_torch_did_not_write_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "sae_img_0.pt").write_bytes(content)
    with pytest.raises(ForeignError, match=r"sae_img_0\.pt is no file that torch\.save wrote"):
        import_file(tmp_path / "sae_img_0.pt")


@pytest.mark.parametrize("k", [None, "x", 2.7, True])
def test_a_topk_file_whose_k_is_no_whole_number_is_refused(k: object, tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in PRE_BIAS_SHAPES.items()}
    about = {"use_topk": True} | ({} if k is None else {"topk_k": k})
    torch.save({"model_state_dict": state, "config": about}, tmp_path / "sae_img_0.pt")
    with pytest.raises(ForeignError, match="expected a whole number"):
        import_file(tmp_path / "sae_img_0.pt")


PRE_BIAS_SHAPES = {"encoder.weight": (8, 4), "encoder.bias": (8,), "decoder.weight": (4, 8), "pre_bias": (4,)}


def test_a_state_dict_of_something_else_is_refused_with_its_keys(tmp_path: Path) -> None:
    torch.save({"lin.weight": torch.zeros(2, 2)}, tmp_path / "sae_img_0.pt")
    with pytest.raises(ForeignError, match=r"lin\.weight"):
        import_file(tmp_path / "sae_img_0.pt")
    state = torch.load(GOLDEN / "transcoders" / "transcoder_img_0.pt", weights_only=True)
    state["decoder.weight"] = state["decoder.weight"].T.contiguous()
    torch.save(state, tmp_path / "transcoder_img_0.pt")
    with pytest.raises(ForeignError, match=r"decoder.weight: found \(256, 64\), expected \(64, 256\)"):
        import_file(tmp_path / "transcoder_img_0.pt")


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
    with pytest.raises(ForeignError, match=r"version 7.*reads version 1"):
        load_dictionary(folder)


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
