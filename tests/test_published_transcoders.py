"""Code written for the published transcoders runs on ours with another import line, from a folder or from the hub."""

import errno
import fnmatch
import shutil
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import pytest
import safetensors.torch
import torch
from huggingface_hub import errors

from store.errors import UnreachableError, UsageError
from store.sites import Site
from tests.toy_dictionaries import random_dictionary, rows
from train.dictionaries.checkpoint import save_dictionary
from train.dictionaries.collection import load_dictionaries
from train.dictionaries.hub import fetch
from train.dictionaries.published import import_file, to_bytes
from train.dictionaries.temporal_aware import TemporalAwareSAE, TemporalAwareTranscoder, load_transcoders

GOLDEN = Path(__file__).parent / "golden" / "circuit_a"
SIZES: dict[str, Any] = {"d_model": 64, "expansion_factor": 4, "time_embed_dim": 64}


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(GOLDEN / "golden_activations.safetensors")


def test_a_folder_of_published_files_loads_as_the_model_page_shows(golden: dict[str, torch.Tensor]) -> None:
    transcoders = load_transcoders(
        str(GOLDEN / "transcoders"), layers=range(4), d_model=64, expansion_factor=4, time_embed_dim=64
    )
    assert list(transcoders) == [f"{stream}_{layer}" for layer in range(4) for stream in ("img", "txt")]
    for name, transcoder in transcoders.items():
        x, y = golden[f"{name}.x"], golden[f"{name}.y"]
        y_hat, z = transcoder(x, torch.tensor([0.75]))
        assert (z - golden[f"{name}.z"]).abs().max() < 1e-4
        assert (y - y_hat - golden[f"{name}.error"]).abs().max() < 1e-4
        assert not transcoder.training and not any(p.requires_grad for p in transcoder.parameters())


def test_one_published_file_loads_into_the_class_of_its_name(golden: dict[str, torch.Tensor]) -> None:
    transcoder = TemporalAwareTranscoder(d_model=64, expansion_factor=4, time_embed_dim=64)
    file = GOLDEN / "transcoders" / "transcoder_img_2.pt"
    transcoder.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    transcoder.eval()
    with torch.no_grad():
        y_hat, z, pre = transcoder.forward_with_preact(golden["img_2.x"], torch.tensor(0.75))
    assert (z - golden["img_2.z"]).abs().max() < 1e-4 and torch.equal(z, pre.clamp_min(0))
    assert torch.equal(y_hat, transcoder.decode(z))
    assert (transcoder.d_model, transcoder.d_feat, transcoder.time_embed_dim) == (64, 256, 64)
    assert TemporalAwareSAE is TemporalAwareTranscoder
    assert set(transcoder.state_dict()) == set(torch.load(file, weights_only=True))


def test_the_published_calls_give_what_ours_give() -> None:
    dictionary = random_dictionary()
    transcoder = TemporalAwareTranscoder.of(dictionary)
    x, sigma = rows(20)
    y_hat, z = transcoder(x, sigma)
    assert torch.allclose(z, dictionary.encode(x, sigma), atol=1e-5)
    assert torch.allclose(y_hat, dictionary(x, sigma), atol=1e-4)
    embedding = diffusers.models.embeddings.get_timestep_embedding(sigma, 8)
    assert torch.equal(transcoder.encode(x, embedding)[0], z)
    batched, _ = transcoder(x.view(4, 5, 6), torch.tensor([0.5]))  # (batch, token, d_model) at one timestep
    assert torch.allclose(batched.view(20, 6), transcoder(x, torch.tensor([0.5]))[0], atol=1e-6)
    assert transcoder.encoder.weight is dictionary.encoder.weight  # nothing is held twice


def test_a_new_one_starts_as_the_reference_says() -> None:
    torch.manual_seed(0)
    fresh = TemporalAwareTranscoder(16, 4, 8, l1_coeff=3e-4)
    decoder, encoder = fresh.decoder.weight, fresh.encoder.weight
    assert torch.allclose(decoder.norm(dim=0), torch.ones(64), atol=1e-6)
    assert torch.allclose(encoder.T / encoder.T.norm(dim=0), decoder, atol=1e-6)
    assert not fresh.mod_linear.weight.any() and fresh.time_mlp[0].weight.any() and fresh.l1_coeff == 3e-4


def test_our_exports_and_our_folders_load_as_published_ones_do(tmp_path: Path) -> None:
    dictionary = random_dictionary(site=Site.parse("img_1"), nested=(4,))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "transcoder_img_1.pt").write_bytes(to_bytes(dictionary))
    save_dictionary(tmp_path / "folders" / "transcoder_img_1", dictionary, None, [])
    x, sigma = rows(10)
    for name in ("files", "folders"):
        found = load_transcoders(tmp_path / name, [1], 6, 4, 8, streams=["img"], dtype=torch.float64)
        assert list(found) == ["img_1"] and found["img_1"].encoder.weight.dtype == torch.float64
        assert torch.allclose(found["img_1"](x.double(), sigma)[0].float(), dictionary(x, sigma), atol=1e-4)


def test_sizes_that_contradict_the_files_are_an_error_that_names_both() -> None:
    with pytest.raises(UsageError, match=r"transcoder_img_0\.pt has d_model 64, features .* 256, time_embed_dim 64; "
                       r"asked for were d_model 3072, features .* 49152, time_embed_dim 256"):  # fmt: skip
        load_transcoders(GOLDEN / "transcoders", layers=[0])


def test_missing_layers_are_listed_or_left_out_when_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no transcoder of img_4, txt_4, img_18, txt_18: name the layers= and"):
        load_transcoders(GOLDEN / "transcoders", layers=[3, 4, 18], **SIZES)
    found = load_transcoders(GOLDEN / "transcoders", layers=[3, 4], streams=("txt",), skip_missing=True, **SIZES)
    assert list(found) == ["txt_3"]
    with pytest.raises(UsageError, match="has no transcoder of img_0, txt_0"):
        load_transcoders(tmp_path, layers=[0], skip_missing=True)
    with pytest.raises(UsageError, match="there is no folder"):
        load_transcoders(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"activation": "topk", "k": 3}, "it is topk"), ({"skip": True}, "skip"), ({"time_embed_dim": None}, "not cond")],
)
def test_ours_of_another_kind_are_refused_with_the_reason(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(**changes)
    save_dictionary(tmp_path / dictionary.name, dictionary, None, [])
    with pytest.raises(UsageError, match=rf"transcoder_img_3 is no TemporalAwareTranscoder: .*{reason}"):
        load_transcoders(tmp_path, [3], 6, 4, 8, streams=["img"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the hub with one repository, owner/name; what it was asked for."""
    repository, cache, asked = tmp_path / "repository", tmp_path / "cache", []
    shutil.copytree(GOLDEN / "transcoders", repository / "temporal-aware-transcoders")
    save_dictionary(repository / "ours" / "transcoder_img_3", random_dictionary(), None, [])

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        asked.append({"revision": revision, "files": []})
        for path in sorted(repository.rglob("*")):
            name = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
                asked[-1]["files"].append(name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("place", ["owner/name", "hf://owner/name", "hf://owner/name/temporal-aware-transcoders"])
def test_a_repository_on_the_hub_gives_the_layers_asked_for_and_fetches_no_other(
    place: str, hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_transcoders(place, layers=[1, 2], streams=["img"], **SIZES)
    assert list(found) == ["img_1", "img_2"]
    files = [f"temporal-aware-transcoders/transcoder_img_{layer}.pt" for layer in (1, 2)]
    assert hub == [{"revision": None, "files": files}]
    with pytest.raises(UsageError, match="has no transcoder of img_7"):
        load_transcoders(place, layers=[7], streams=["img"], **SIZES)


def test_a_revision_may_stand_in_the_address_or_beside_it(hub: list[dict[str, Any]]) -> None:
    load_transcoders("hf://owner/name@v1", [0], revision="v1", **SIZES)
    load_transcoders("owner/name", [0], revision="v2", **SIZES)
    load_transcoders("hf://owner/name@v3/temporal-aware-transcoders", [0], **SIZES)
    assert [call["revision"] for call in hub] == ["v1", "v2", "v3"]
    with pytest.raises(UsageError, match="names the revision v1, and revision=v2"):
        load_transcoders("hf://owner/name@v1", [0], revision="v2", **SIZES)


@pytest.mark.parametrize("as_path", [False, True])
def test_all_dictionaries_of_a_folder_on_the_hub_load(as_path: bool, hub: list[dict[str, Any]]) -> None:
    def found(place: str) -> list[str]:
        return [dictionary.name for dictionary in load_dictionaries(Path(place) if as_path else place)]

    assert found("hf://owner/name/ours") == ["transcoder_img_3"]
    assert found("hf://owner/name/ours/transcoder_img_3/") == ["transcoder_img_3"]
    assert len(found("hf://owner/name/temporal-aware-transcoders")) == 8
    assert all(name.startswith("ours/") for name in hub[0]["files"] + hub[1]["files"])
    with pytest.raises(UsageError, match="there is no folder"):
        found("hf://owner/name/nothing")


def test_of_a_folder_on_the_hub_only_the_sites_asked_for_are_fetched(hub: list[dict[str, Any]]) -> None:
    place, sites = "hf://owner/name/temporal-aware-transcoders", [Site.parse("img_1"), Site.parse("txt_2")]
    assert [d.name for d in load_dictionaries(place, sites)] == ["transcoder_img_1", "transcoder_txt_2"]
    assert hub[0]["files"] == [f"temporal-aware-transcoders/transcoder_{site}.pt" for site in sites]
    for folder in ("ours", "ours/transcoder_img_3"):  # also one that is itself a dictionary
        (found,) = load_dictionaries(f"hf://owner/name/{folder}", [Site.parse("img_3")])
        assert found.name == "transcoder_img_3"
    with pytest.raises(UsageError, match="no dictionary of img_9"):
        load_dictionaries(place, [Site.parse("img_9")])


@pytest.mark.parametrize(
    ("address", "revision", "pattern"),
    [
        ("hf://owner/name@refs/pr/1/ours", "refs/pr/1", "ours/*"),
        ("hf://owner/name@refs/convert/parquet", "refs/convert/parquet", "*"),
        ("hf:/owner/name@main/a/b/", "main", "a/b/*"),
    ],
)
def test_a_revision_of_the_hub_may_be_a_reference_with_slashes(
    address: str, revision: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo_id: str, **asked: Any) -> str:
        assert (repo_id, asked) == ("owner/name", {"revision": revision, "allow_patterns": [pattern]})
        return "cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fetch(address) == Path("cache") / pattern.rstrip("*")


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), TypeError("ours")])
def test_a_full_disk_or_a_fault_of_ours_is_not_blamed_on_the_hub(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(type(raised)) as found:
        fetch("hf://owner/name")
    assert found.value is raised


@pytest.mark.parametrize("kind", ["datasets", "spaces"])
def test_a_data_set_or_space_on_the_hub_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=f"one of the hub's {kind}: dictionaries are fetched from model repositories"):
        fetch(f"hf://{kind}/owner/name/folder")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (errors.GatedRepoError, UnreachableError, r"is gated: accept its terms at https://huggingface.co/owner/name"),
        (errors.RepositoryNotFoundError, UsageError, "the hub has no model repository owner/name, or not for you"),
        (errors.RevisionNotFoundError, UsageError, "owner/name has no revision"),
        (
            errors.LocalEntryNotFoundError,
            UnreachableError,
            "not in the cache of the hub, and the hub cannot be reached",
        ),
        (errors.OfflineModeIsEnabled, UnreachableError, "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, UnreachableError, "could not be fetched"),
        (ConnectionResetError, UnreachableError, "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    raised: type[Exception], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> str:
        raise raised.__new__(raised)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(kind, match=message):
        fetch("hf://owner/name")
    with pytest.raises(kind, match=f"there is no folder owner/name, so it was looked for on the hub: .*{message}"):
        load_transcoders("owner/name")


@pytest.mark.parametrize("place", ["hf://owner", "hf://owner/na me", "hf://"])
def test_what_is_no_address_on_the_hub_is_refused(place: str) -> None:
    with pytest.raises(UsageError, match="no address on the hub"):
        fetch(place)


def test_a_file_of_before_zip_archives_loads_too(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "transcoders" / "transcoder_img_0.pt", weights_only=True)
    torch.save(state, tmp_path / "transcoder_img_0.pt", _use_new_zipfile_serialization=False)
    old, new = (
        import_file(tmp_path / "transcoder_img_0.pt"),
        import_file(GOLDEN / "transcoders" / "transcoder_img_0.pt"),
    )
    assert to_bytes(old) == to_bytes(new)
