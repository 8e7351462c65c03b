"""Targets that are recomputed are those that would have been stored, wherever they are used; a missing MLP is named."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.models.attention
import numpy as np
import pytest
import safetensors.torch
import torch

import store.pack
import train.rows.read_ahead
import train.trainer
from analyze.__main__ import main
from analyze.inputs import open_analysis
from analyze.pictures.heat import heats
from analyze.rows import StoreRows
from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from analyze.settings import Inputs
from harvest import HarvestSettings
from harvest import run as harvest
from store import Site, open_store
from store.errors import DamagedError, ForeignError, UsageError
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import Pack, open_pack
from store.strata import GROUPS
from tests.analyze_planted import reading_dictionary
from tests.toy_stores import mlp_in_numpy, toy_store
from train import Dictionary, TrainSettings, load_dictionary, run
from train.dictionaries.checkpoint import save_dictionary
from train.rows.loader import Loader
from train.rows.means import TrainingMeans
from train.rows.recompute import SiteMLP

pytestmark = pytest.mark.usefixtures("without_pictures")
IMG, TXT = Site.parse("img_0"), Site.parse("txt_0")
BFLOAT16 = 2.0**-8
"""largest relative rounding of bfloat16"""
QUICK: dict[str, Any] = {"batch": 128, "lr": 2e-3, "epochs": 2, "time_embed_dim": 8, "expansion": 4, "threads": 1}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`stored/` and `recomputed/` of one run: each a store, its train and its val pack."""
    folder = tmp_path_factory.mktemp("both")
    for targets in ("stored", "recomputed"):
        where = folder / targets
        toy_store(
            where / "store", 120, ("img_0", "img_1", "txt_0"), (0, 2), 8, 12, chunk_images=16, mlp=True, targets=targets
        )
        for split in ("train", "val"):
            make_pack(PackSettings(store=where / "store", out=where / split, split=split, shard_mb=1))  # type: ignore[arg-type]
    return folder


def packs(folder: Path) -> tuple[Pack, Pack]:
    return open_pack(folder / "stored" / "train"), open_pack(folder / "recomputed" / "train")


def trained(folder: Path, out: Path, **changes: Any) -> Dictionary:
    settings = {"pack": folder / "train", "val": folder / "val", "out": out, "sites": "img_0", **QUICK, **changes}
    (dictionary,) = run(TrainSettings(**settings))
    return dictionary


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found - expected).abs() <= BFLOAT16 * expected.abs() + 1e-5).all())


def test_the_mlp_is_the_feed_forward_of_diffusers() -> None:
    theirs = diffusers.models.attention.FeedForward(16, activation_fn="gelu-approximate").bfloat16()
    ours = SiteMLP(safetensors.torch.save(dict(theirs.state_dict())), "here", 16)
    x = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours.mlp_out(x), theirs.float()(x), atol=1e-5)


def test_a_harvest_with_recomputed_targets_gives_the_rows_of_one_with_stored_targets(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "images": 2,
        "layers": "1",
        "steps": "0,3",
        "batch_size": 2,
        "threads": 1,
        "pictures": "none",
    }
    readers = {}
    for targets in ("stored", "recomputed"):
        harvest(HarvestSettings(out=tmp_path / targets, targets=targets, store_dtype="float32", **settings))  # type: ignore[arg-type]
        readers[targets] = StoreRows(open_store(tmp_path / targets))
    assert not (tmp_path / "recomputed" / "activations" / "double.01" / "img" / "step.0" / "mlp_out").exists()
    for site in readers["stored"].store.sites:
        kept = readers["stored"].store.tokens(site.stream, 3) >= 0
        read, computed = (reader.read(site, 3, ("mlp_out",), 0, 2, kept)["mlp_out"] for reader in readers.values())
        assert np.allclose(read, computed, atol=1e-5 * np.abs(read).max())


def test_a_pack_carries_mlp_in_and_the_mlp_of_each_of_its_sites(both: Path, tmp_path: Path) -> None:
    pack = make_pack(PackSettings(store=both / "recomputed" / "store", out=tmp_path / "p", sites="img_1,txt_0"))
    there = open_store(both / "recomputed" / "store")
    assert (pack.points, pack.targets, pack.manifest["plan"]["targets"]) == (("mlp_in",), "recomputed", "recomputed")
    assert {path.name for path in (pack.path / "weights").iterdir()} == {
        there.meta.weights["files"][str(s)] for s in pack.sites
    }
    for site in pack.sites:
        assert pack.weights_file(site) == there.weights_file(site)
    pack.verify()
    assert open_pack(both / "stored" / "train").weights_file(IMG) is None
    with pytest.raises(UsageError, match=r"recomputed by .*use --points mlp_in"):
        make_pack(PackSettings(store=both / "recomputed" / "store", out=tmp_path / "q", points="mlp_in,mlp_out"))
    with pytest.raises(UsageError, match=r"no column mlp_out.*recomputed"):
        pack.shards(TXT)[0].columns("mlp_out")


def test_a_killed_pack_of_a_recomputed_store_ends_in_the_same_bytes(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, left = store.pack.write_bytes, 2

    def dies(file: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        publish(file, data)

    settings = PackSettings(store=both / "recomputed" / "store", out=tmp_path / "p", shard_mb=1)
    monkeypatch.setattr(store.pack, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        make_pack(settings)
    monkeypatch.setattr(store.pack, "write_bytes", publish)
    make_pack(settings)
    assert digests(tmp_path / "p") == digests(both / "recomputed" / "train")


@pytest.mark.parametrize("site", [IMG, Site.parse("img_1"), TXT])
def test_recomputed_rows_of_a_batch_are_the_stored_ones_to_rounding(both: Path, site: Site) -> None:
    stored, recomputed = packs(both)
    for points in (("mlp_in", "mlp_out"), ("mlp_out", "mlp_out")):
        for k in (0, 3):
            read = Loader(stored, site, points, 50, 1).batch(1, k)  # type: ignore[arg-type]
            computed = Loader(recomputed, site, points, 50, 1).batch(1, k)  # type: ignore[arg-type]
            assert torch.equal(read.sigma, computed.sigma)
            y = computed.at("mlp_out")
            assert close(read.at("mlp_out"), y) and not torch.equal(read.at("mlp_out"), y)
            assert computed.at("mlp_out") is y
            if points[0] == "mlp_in":
                assert torch.equal(read.at("mlp_in"), computed.at("mlp_in"))
                expected = mlp_in_numpy(site, computed.at("mlp_in").numpy())
                assert np.allclose(y.numpy(), expected, atol=1e-5)


def test_means_of_recomputed_targets_are_those_of_the_stored_and_are_computed_once(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, recomputed = packs(both)
    read_shard, shards = train.rows.read_ahead.read_shard, []
    monkeypatch.setattr(
        train.rows.read_ahead,
        "read_shard",
        lambda shard, *rest, **stop: shards.append(shard) or read_shard(shard, *rest, **stop),
    )
    for site in (IMG, TXT):
        means = TrainingMeans(recomputed, site, "mlp_out")
        for step in stored.steps:
            for group in GROUPS[site.stream]:
                expected, found = stored.mean(site, step, "mlp_out", group), means.of(step, group)
                assert expected is not None and found is not None and found.dtype == torch.float64
                assert np.abs(found.numpy() - expected).max() < 1e-3
        assert means.of(1) is None
    assert shards == [*recomputed.shards(IMG), *recomputed.shards(TXT)]


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_bias": "mean"},
        {"sites": "txt_0"},
        {"kind": "sae", "decoder_bias": "mean"},
    ],
)
def test_training_on_recomputed_targets_gives_the_losses_and_figures_of_stored_ones(
    both: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stored = trained(both / "stored", tmp_path / "stored", **changes)
    recomputed = trained(both / "recomputed", tmp_path / "recomputed", **changes)
    assert stored.metrics is not None and recomputed.metrics is not None
    logs = [(tmp_path / name / stored.name / "log.jsonl").read_text() for name in ("stored", "recomputed")]
    lines = [[json.loads(line) for line in log.splitlines()] for log in logs]
    assert len(lines[0]) == len(lines[1]) >= 2
    for read, computed in zip(*lines, strict=True):
        assert read["loss"] != computed["loss"] and read["loss"] == pytest.approx(computed["loss"], rel=5e-3)
    for group in (None, "real", "padding") if "txt" in stored.name else (None,):
        read, computed = (found if group is None else found[group] for found in (stored.metrics, recomputed.metrics))
        assert computed["rows"] == read["rows"] and computed["fvu"] == pytest.approx(read["fvu"], rel=5e-3)
        for step in ("0", "2"):
            assert computed["steps"][step]["fvu"] == pytest.approx(read["steps"][step]["fvu"], rel=5e-3)
    assert (stored.metrics["targets"], recomputed.metrics["targets"]) == ("stored", "recomputed")
    parents = stored.config.parent, recomputed.config.parent
    assert [parent and parent.targets for parent in parents] == ["stored", "recomputed"]
    assert load_dictionary(tmp_path / "recomputed" / recomputed.name).config == recomputed.config


def test_a_killed_training_on_recomputed_targets_ends_in_the_same_bytes(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(both / "recomputed", tmp_path / "whole")
    assert "targets are recomputed" in capsys.readouterr().out
    batches = Loader.batches
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batches", lambda self, first, last: batches(self, first, min(last, first + 9)))
        patch.setattr(train.trainer, "save_dictionary", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(both / "recomputed", tmp_path / "killed", checkpoint_steps=7)
    trained(both / "recomputed", tmp_path / "killed", checkpoint_steps=7)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_rows_for_analysis_are_the_stored_ones_to_rounding_however_they_are_chosen(both: Path) -> None:
    stored, recomputed = (StoreRows(open_store(both / name / "store")) for name in ("stored", "recomputed"))
    assert stored.points == recomputed.points == ("mlp_in", "mlp_out")
    mask = np.random.default_rng(0).random((20, 12)) < 0.4
    for chosen in (mask, (np.asarray([3, 0, 19]), np.asarray([11, 0, 5])), np.zeros((20, 12), bool)):
        for points in (("mlp_in", "mlp_out"), ("mlp_out",)):
            read = stored.read(IMG, 2, points, 10, 30, chosen)  # type: ignore[arg-type]
            computed = recomputed.read(IMG, 2, points, 10, 30, chosen)  # type: ignore[arg-type]
            assert read.keys() == computed.keys() == set(points)
            for point in points:
                assert close(*(torch.from_numpy(rows[point].astype(np.float32)) for rows in (read, computed)))  # type: ignore[index]


@pytest.fixture(scope="module")
def scored(both: Path) -> Path:
    """Transcoders and SAEs of two sites, scored on both stores: `both/out-stored`, `both/out-recomputed`."""
    for kind in ("transcoder", "sae"):
        for site in ("img_0", "txt_0"):
            dictionary = reading_dictionary(site, d_model=8, n_features=12, kind=kind)
            save_dictionary(both / "dictionaries" / dictionary.name, dictionary, None, [])
    for name in ("stored", "recomputed"):
        scores.run(ScoresSettings(**inputs(both, name), top=4))
    return both


def inputs(folder: Path, name: str) -> dict[str, Path]:
    return {"store": folder / name / "store", "dictionaries": folder / "dictionaries", "out": folder / f"out-{name}"}


def test_scores_on_recomputed_targets_equal_those_on_stored_ones(scored: Path) -> None:
    stored, recomputed = (open_analysis(Inputs(**inputs(scored, name))) for name in ("stored", "recomputed"))
    assert len(stored.subjects) == 4
    for subject in stored.subjects:
        for step in stored.steps:
            read, computed = stored.matrix(subject, step), recomputed.matrix(subject, step)
            assert (read.attributes["targets"], computed.attributes["targets"]) == ("stored", "recomputed")
            if subject.point == "mlp_in":
                assert np.array_equal(read.scores(), computed.scores())
            else:
                assert np.allclose(read.scores(), computed.scores(), rtol=2 * BFLOAT16, atol=0.02)
                assert not np.array_equal(read.scores(), computed.scores())
            assert read.scores().max() > 0.5


def test_heat_of_an_sae_is_the_same_on_recomputed_targets(scored: Path) -> None:
    found = []
    for name in ("stored", "recomputed"):
        analysis = open_analysis(Inputs(**inputs(scored, name)))
        (subject,) = (subject for subject in analysis.subjects if subject.name == "sae_img_0")
        found.append(heats(analysis, subject, 0, {3: [5, 40], 7: [40]}))
    for feature in (3, 7):
        for read, computed in zip(found[0][feature], found[1][feature], strict=True):
            assert read.image == computed.image and np.array_equal(read.positions, computed.positions)
            assert np.allclose(read.values, computed.values, atol=0.02)


def test_scoring_says_that_targets_are_recomputed(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.run(ScoresSettings(**inputs(scored, "recomputed"), top=4))
    assert "targets are recomputed: mlp_out = MLP(mlp_in)" in capsys.readouterr().out


def test_a_missing_or_damaged_mlp_of_a_store_is_named(tmp_path: Path) -> None:
    path = toy_store(tmp_path / "store", 24, ("img_0",), (0,), 8, mlp=True, targets="recomputed")
    sae = reading_dictionary("img_0", d_model=8, n_features=12, kind="sae")
    save_dictionary(tmp_path / "dictionaries" / sae.name, sae, None, [])
    (file,) = (path / "weights").iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    for damage in (lambda: file.write_bytes(content), file.unlink):
        damage()
        with pytest.raises(DamagedError, match=file.name):
            make_pack(PackSettings(store=path, out=tmp_path / "pack"))
        with pytest.raises(DamagedError, match=file.name):
            scores.run(ScoresSettings(store=path, dictionaries=tmp_path / "dictionaries", out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*/step*"))


@pytest.mark.parametrize("files", [{}, {"img_0": "../../elsewhere.safetensors"}])
def test_a_store_that_names_no_mlp_is_not_packed(
    both: Path, tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = open_store(both / "recomputed" / "store")
    monkeypatch.setattr(there, "meta", replace(there.meta, weights={"policy": "copy", "files": files}))
    monkeypatch.setattr(store.pack, "open_store", lambda _path: there)
    with pytest.raises(DamagedError, match="recomputed, but names no MLP of img_0"):
        make_pack(PackSettings(store=both / "recomputed" / "store", out=tmp_path / "pack", sites="img_0"))
    assert not list(tmp_path.iterdir())


def test_a_missing_or_damaged_mlp_of_a_pack_is_named_before_a_step_is_taken(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(both / "recomputed", folder)
    file = folder / "train" / "weights" / open_pack(folder / "train").weights["img_0"]
    content = file.read_bytes()
    for data, reason in (
        (content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], "checksum"),
        (content[:-1], "bytes where"),
        (None, "missing"),
    ):
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        with pytest.raises(DamagedError, match=f"{file.name}.*{reason}"):
            trained(folder, tmp_path / "out")
        with pytest.raises(DamagedError, match=f"{file.name}.*{reason}"):
            open_pack(folder / "train").verify()
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_weights_that_are_no_mlp_of_the_site_are_refused() -> None:
    content = safetensors.torch.save({"net.0.proj.weight": torch.zeros(32, 8)})
    with pytest.raises(ForeignError, match="the MLP of img_0 in there is not the MLP of a block of width 8"):
        SiteMLP(content, "the MLP of img_0 in there", 8)
    with pytest.raises(DamagedError, match="here is no readable safetensors"):
        SiteMLP(b"nonsense", "here", 8)


def test_an_fp8_store_is_packed_trained_and_scored_in_bfloat16(tmp_path: Path) -> None:
    path = toy_store(
        tmp_path / "store", 120, ("img_0",), (0, 2), 8, 12, store_dtype="fp8-e4m3", chunk_images=16, mlp=True
    )
    for split in ("train", "val"):
        make_pack(PackSettings(store=path, out=tmp_path / split, split=split))  # type: ignore[arg-type]
    pack, there = open_pack(tmp_path / "train"), open_store(path)
    assert pack.manifest["plan"]["dtype"] == "bfloat16"
    columns = pack.shards(IMG)[0].columns()
    for step in there.steps:
        at = columns["step"] == step
        expected = there.read(IMG, step, "mlp_out")[columns["image"][at], columns["token"][at]]
        assert np.array_equal(columns["mlp_out"][at].view(np.uint16), expected.view(np.uint16))
    dictionary = trained(tmp_path, tmp_path / "dictionaries")
    assert dictionary.metrics is not None and dictionary.metrics["rows"] == open_pack(tmp_path / "val").rows(IMG)
    where = {"store": path, "dictionaries": tmp_path / "dictionaries", "out": tmp_path / "out"}
    scores.run(ScoresSettings(**where))
    analysis = open_analysis(Inputs(**where))
    assert analysis.matrix(analysis.subjects[0], 0).scores().max() > 0


def test_a_store_is_packed_and_scored_from_a_url_as_from_its_folder(scored: Path, tmp_path: Path) -> None:
    url = f"file://{scored / 'recomputed' / 'store'}"
    make_pack(PackSettings(store=url, out=tmp_path / "pack", shard_mb=1))
    assert digests(tmp_path / "pack") == digests(scored / "recomputed" / "train")
    scores.run(ScoresSettings(store=url, dictionaries=scored / "dictionaries", out=tmp_path / "out", top=4))
    assert digests(tmp_path / "out") == digests(scored / "out-recomputed")
    command = [word for key, value in inputs(scored, "recomputed").items() for word in (f"--{key}", str(value))]
    assert main(["features", *command[2:], "--store", url]) == 0
