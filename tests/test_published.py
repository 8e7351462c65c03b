"""Files of the two published systems are read as they compute, and ours that they can read are written."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import train.dictionaries.checkpoint
from store.errors import DamagedError, ForeignError, UsageError
from store.labels import Label, add_labels
from store.sites import Site
from tests.test_objective import FLUX
from tests.toy_dictionaries import random_dictionary, recipe_of, rows
from train import SAE, Transcoder, load_dictionaries, load_dictionary
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.dictionary import PreBiasSAE, build
from train.dictionaries.published import ExportSettings, ImportSettings, import_file, run_export, run_import, to_bytes
from train.learning.objective import Objective

GOLDEN = Path(__file__).parent / "golden" / "circuit_a"
SCORES = Path(__file__).parent / "golden" / "scores_a"
TIMESTEP = 0.75


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
            patch.setattr(
                train.dictionaries.checkpoint, name, dying(getattr(train.dictionaries.checkpoint, name), survives)
            )
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


def test_an_export_does_not_write_over_a_file_unless_it_is_told_to(tmp_path: Path) -> None:
    dictionary = random_dictionary()
    save_dictionary(tmp_path / "d", dictionary, None, [])
    (tmp_path / "d.pt").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"d\.pt exists: choose another --out, or say --force"):
        run_export(ExportSettings(tmp_path / "d", tmp_path / "d.pt"))
    assert (tmp_path / "d.pt").read_bytes() == b"mine"
    run_export(ExportSettings(tmp_path / "d", tmp_path / "d.pt", force=True))
    assert (tmp_path / "d.pt").read_bytes() == to_bytes(dictionary)


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
    [
        ({"activation": "topk", "k": 4}, "apply ReLU, and it is topk .k = 4"),
        ({"activation": "batchtopk", "k": 4}, "apply ReLU, and it is batchtopk"),
        ({"activation": "jumprelu"}, "apply ReLU, and it is jumprelu"),
        ({"time_embed_dim": None}, "not conditioned"),
        ({"skip": True}, "no place for a skip connection"),
        ({**FLUX, "activation": "jumprelu"}, "apply ReLU or TopK, and it is jumprelu"),
        ({**FLUX, "activation": "batchtopk", "k": 4}, "apply ReLU or TopK, and it is batchtopk"),
    ],
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


def test_the_published_sae_gives_the_scores_of_the_reference_and_is_written_as_it_was_read(tmp_path: Path) -> None:
    sae = import_file(SCORES / "sae_best.pt", site="img_5")
    golden = safetensors.torch.load_file(SCORES / "first_images.safetensors")
    scores = [sae.encode(image, torch.zeros(len(image))).amax(dim=0) for image in golden["activations"]]
    assert (torch.stack(scores) - golden["S"]).abs().max() < 1e-5
    save_dictionary(tmp_path / sae.name, sae, None, [])
    run_export(ExportSettings(tmp_path / sae.name, tmp_path / "sae_best.pt"))
    there = torch.load(SCORES / "sae_best.pt", weights_only=True)
    here = torch.load(tmp_path / "sae_best.pt", weights_only=True)
    assert here["config"] == there["config"] and set(here) == {"model_state_dict", "config"}
    assert all(torch.equal(value, here["model_state_dict"][name]) for name, value in there["model_state_dict"].items())


@pytest.mark.parametrize("changes", [{"activation": "topk", "k": 4}, {}])
def test_an_sae_of_the_second_family_that_was_trained_here_computes_the_same_from_its_file(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    sae = build(random_dictionary(**FLUX, **changes).config)
    sae.initialise(1, torch.full((6,), 0.5))
    bound = sae.encoder.weight.abs().max()
    assert 0.9 < bound <= 1 and torch.allclose(sae.decoder.weight.norm(dim=0), torch.ones(24))  # sqrt(6 / d_model)
    recipe = recipe_of(sae, loss="mse", l1=0.0 if changes else 1e-2, lr=1e-2)
    optimizer, objective = torch.optim.AdamW(sae.parameters(), lr=recipe.lr), Objective(sae, recipe, 60, 200)
    x, sigma = rows(200)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        terms = objective.terms(x, x, sigma, step, count=False)
        terms.total.backward()
        optimizer.step()
        objective.after_step(optimizer, x, x, sigma, step)
        losses.append(float(terms.total.detach()))
    assert losses[-1] < 0.3 * losses[0]
    (tmp_path / "sae_best.pt").write_bytes(to_bytes(sae))
    again = import_file(tmp_path / "sae_best.pt", site="img_3")
    assert torch.equal(again.encode(x, sigma), sae.encode(x, sigma)) and torch.equal(again(x, sigma), sae(x, sigma))
    content = torch.load(tmp_path / "sae_best.pt", weights_only=True)
    p, about = {name: value.numpy() for name, value in content["model_state_dict"].items()}, content["config"]
    z = np.maximum((x.numpy() - p["pre_bias"]) @ p["encoder.weight"].T + p["encoder.bias"], 0)
    if about["use_topk"]:
        z = np.where(z >= np.sort(z, axis=1)[:, [-about["topk_k"]]], z, 0)
    assert np.allclose(z, sae.encode(x, sigma).detach().numpy(), atol=1e-5)
    assert np.allclose(z @ p["decoder.weight"].T + p["pre_bias"], sae(x, sigma).detach().numpy(), atol=1e-5)
    assert (about["input_dim"], about["hidden_dim"]) == (6, 24)


def test_a_nested_dictionary_is_exported_as_the_whole_that_it_is() -> None:
    nested = random_dictionary(nested=(4, 12))
    state = torch.load(io.BytesIO(to_bytes(nested)), weights_only=True)
    plain = random_dictionary()
    plain.load_state_dict(state)
    x, sigma = rows(12)
    assert torch.equal(plain(x, sigma), nested(x, sigma))


def test_an_export_reads_labels_before_it_writes_and_lets_no_labels_name_another_dictionary(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        dictionary = random_dictionary()
        dictionary.load_state_dict({key: value + seed for key, value in dictionary.state_dict().items()})
        save_dictionary(tmp_path / name, dictionary, None, [])
    out, beside, own = tmp_path / "d.pt", tmp_path / "d.labels.json", tmp_path / "one" / "labels.json"
    for damaged in (own, beside):
        damaged.write_text("{")
        with pytest.raises(DamagedError, match=damaged.name):
            run_export(ExportSettings(tmp_path / "one", out))
        assert not out.exists()
        damaged.unlink()
    with pytest.raises(UsageError, match=r"d\.bin is no \.pt file"):
        ExportSettings(tmp_path / "one", tmp_path / "d.bin")
    add_labels(own, [Label(1, "2026-01-31T12:00:00Z", "ada", "a")])
    for _ in range(2):
        run_export(ExportSettings(tmp_path / "one", out, force=True))  # the same again: its own labels
    before = out.read_bytes(), beside.read_bytes()
    with pytest.raises(UsageError, match=r"holds another dictionary, whose labels .* move both away"):
        run_export(ExportSettings(tmp_path / "two", out, force=True))
    assert (out.read_bytes(), beside.read_bytes()) == before
    beside.write_text("{")
    with pytest.raises(DamagedError):
        run_import(ImportSettings(out, tmp_path / "back", site="img_3", kind="transcoder"))
    assert not (tmp_path / "back").exists()
