"""Training learns, is measured on held-out rows only, can be killed, and gives the same bytes again."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import train.trainer
from store.command import program
from store.errors import MismatchError, NonFiniteError, UnfinishedError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import METADATA_KEY, Pack, crc32c_of, open_pack
from store.sites import Site
from tests.toy_stores import toy_store
from train import Dictionary, TrainSettings, load_dictionaries, load_dictionary, run
from train.__main__ import COMMANDS
from train.evaluate import evaluate
from train.loader import Loader
from train.means import TrainingMeans
from train.trainer import learning_rate

SITE = Site.parse("img_0")
QUICK: dict[str, Any] = {
    "activation": "topk",
    "k": 8,
    "batch": 256,
    "lr": 5e-3,
    "schedule": "cosine",
    "epochs": 2,
    "time_embed_dim": 16,
    "expansion": 8,
    "threads": 1,
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A train and a val pack of one store, two sites, d_model 8."""
    folder = tmp_path_factory.mktemp("packs")
    store = toy_store(folder / "store", 220, ("img_0", "txt_0"), (0, 2), 8, 32, chunk_images=64, learnable=True)
    for split in ("train", "val"):
        make_pack(PackSettings(store=store, out=folder / split, split=split))  # type: ignore[arg-type]
    return folder / "train", folder / "val"


def small_run(packs: tuple[Path, Path], out: Path, **changes: Any) -> list[Dictionary]:
    return run(TrainSettings(**{"pack": packs[0], "val": packs[1], "out": out, "sites": "img_0", **QUICK, **changes}))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def trained(packs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    small_run(packs, out, epochs=24)
    return out


def test_loss_falls_and_the_dictionary_beats_the_mean_on_held_out_rows(trained: Path) -> None:
    (dictionary,) = load_dictionaries(trained)
    log = [json.loads(line) for line in (trained / "transcoder_img_0" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert dictionary.metrics is not None
    assert dictionary.metrics["fvu"] < 0.5 and dictionary.metrics["l0"] <= 8
    assert dictionary.metrics["split"] == "val"
    assert dictionary.config.rows == dictionary.config.steps * 256 == log[-1]["rows"]


def test_columns_of_the_decoder_have_unit_norm_after_training(trained: Path) -> None:
    (dictionary,) = load_dictionaries(trained)
    assert torch.allclose(dictionary.decoder.weight.norm(dim=0), torch.ones(64), atol=1e-6)
    assert not dictionary.training and not any(parameter.requires_grad for parameter in dictionary.parameters())


def test_one_seed_gives_one_set_of_bytes_and_another_seed_others(packs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_run(packs, tmp_path / name, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "relu", "k": None, "autocast": "bfloat16", "l1_warmup_rows": 3000, "lr_warmup_rows": 2000}],
)
def test_a_killed_training_goes_on_and_ends_in_the_same_bytes(
    packs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    small_run(packs, tmp_path / "whole", **changes)
    batches = Loader.batches

    def dies(self: Loader, first: int, last: int) -> Any:
        return batches(self, first, min(last, first + 30))

    for _ in range(2):
        monkeypatch.setattr(Loader, "batches", dies)
        monkeypatch.setattr(train.trainer, "save_dictionary", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            small_run(packs, tmp_path / "killed", checkpoint_steps=20, **changes)
        with pytest.raises(UnfinishedError, match="did not finish"):
            load_dictionary(tmp_path / "killed" / "transcoder_img_0")
    monkeypatch.undo()
    (tmp_path / "killed" / "transcoder_img_0" / ".resume.safetensors.0badf00d.tmp").write_bytes(b"torn")
    with pytest.raises(UsageError, match="--seed: there 0, asked for 9"):
        small_run(packs, tmp_path / "killed", seed=9, **changes)
    small_run(packs, tmp_path / "killed", checkpoint_steps=20, **changes)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_not_written_into(packs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "transcoder_img_0").mkdir()
    (tmp_path / "transcoder_img_0" / "notes.txt").touch()
    with pytest.raises(UsageError, match="is no dictionary of ours"):
        small_run(packs, tmp_path)


def test_a_finished_dictionary_is_loaded_and_other_settings_are_refused(
    packs: tuple[Path, Path], trained: Path
) -> None:
    before = digests(trained)
    small_run(packs, trained, epochs=24)
    assert digests(trained) == before
    with pytest.raises(UsageError, match=r"--lr: there 0.005, asked for 0.1"):
        small_run(packs, trained, epochs=24, lr=0.1)


def test_a_finished_dictionary_is_not_said_to_be_measured_on_another_pack(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"pack": packs[0], "out": tmp_path, "expansion": 2, "batch": 32, "time_embed_dim": 8, "rows": 64}
    run(TrainSettings(**settings))
    with pytest.raises(UsageError, match="was measured on no pack"):
        run(TrainSettings(**settings, val=packs[1]))


def test_training_on_the_held_out_split_is_refused(packs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which is held out: pack --split train"):
        run(TrainSettings(pack=packs[1], val=packs[0], out=tmp_path / "out"))


def test_batches_are_a_function_of_seed_epoch_and_number_and_cover_whole_shards(packs: tuple[Path, Path]) -> None:
    loader = Loader(open_pack(packs[0]), SITE, "mlp_in", "mlp_out", 100, 3)
    in_order = [batch.x for batch in loader.batches(0, 2 * len(loader))]
    for number in (len(loader) + 4, 0, 7):
        assert torch.equal(loader.batch(*divmod(number, len(loader))).x, in_order[number])
    assert not torch.equal(in_order[0], in_order[len(loader)])
    other = Loader(open_pack(packs[0]), SITE, "mlp_in", "mlp_out", 100, 4)
    assert not torch.equal(other.batch(0, 0).x, in_order[0])
    (shard,) = open_pack(packs[0]).shards(SITE)
    there = Counter(row.tobytes() for row in shard.columns("mlp_in")["mlp_in"].astype(np.float32))
    seen = Counter(row.numpy().tobytes() for batch in in_order[: len(loader)] for row in batch)
    assert seen <= there and shard.rows - 100 < seen.total() <= shard.rows


def test_figures_equal_a_plain_computation_in_float64(packs: tuple[Path, Path], tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, sites="txt_0", rows=2000)
    metrics = dictionary.metrics
    assert metrics is not None
    columns = {
        name: np.array(column) for name, column in open_pack(packs[1]).shards(dictionary.site)[0].columns().items()
    }
    fit = {name: np.array(column) for name, column in open_pack(packs[0]).shards(dictionary.site)[0].columns().items()}
    x, y = (columns[point].astype(np.float32) for point in ("mlp_in", "mlp_out"))
    z = dictionary.encode(torch.from_numpy(x), torch.from_numpy(columns["sigma"]))
    error = (y.astype(np.float64) - dictionary.decode(z).numpy()) ** 2
    groups = {
        "all": (slice(None), slice(None)),
        "real": (columns["real"] == 1, fit["real"] == 1),
        "padding": (columns["real"] == 0, fit["real"] == 0),
    }
    for group, (mine, theirs) in groups.items():
        found = metrics if group == "all" else metrics[group]
        residual = deviation = 0.0
        for step in (0, 2):
            member, source = (np.zeros(len(c["step"]), bool) for c in (columns, fit))
            member[mine], source[theirs] = True, True
            member &= columns["step"] == step
            source &= fit["step"] == step
            mean = fit["mlp_out"][source].astype(np.float64).mean(axis=0)
            parts = error[member].sum(), ((y[member] - mean) ** 2).sum()
            assert found["steps"][str(step)]["fvu"] == pytest.approx(parts[0] / parts[1], rel=1e-6)
            residual, deviation = residual + parts[0], deviation + parts[1]
        assert found["fvu"] == pytest.approx(residual / deviation, rel=1e-6)
        active = z.numpy()[mine] > 0
        assert found["l0"] == pytest.approx(active.sum(axis=1).mean())
        assert found["dead"] == pytest.approx((~active.any(axis=0)).mean()) and found["rows"] == len(active)
    assert metrics["real"]["rows"] + metrics["padding"]["rows"] == metrics["rows"]


def test_without_a_val_pack_nothing_is_measured_and_it_is_said(
    packs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dictionary,) = small_run(packs, tmp_path, val=None, rows=512)
    assert dictionary.metrics is None and load_dictionary(tmp_path / dictionary.name).metrics is None
    out = capsys.readouterr().out
    assert "not measured" in out and "none" in out.splitlines()[-1]


def test_an_sae_reads_and_writes_mlp_out(packs: tuple[Path, Path], tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, kind="sae", epochs=6, decoder_bias="mean")
    assert dictionary.name == "sae_img_0" and dictionary.input_point == dictionary.target_point == "mlp_out"
    assert dictionary.metrics is not None and dictionary.metrics["fvu"] < 0.5


def test_training_without_the_timestep_has_no_such_parameters(packs: tuple[Path, Path], tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, time_embed_dim=None, rows=512)
    assert set(dictionary.state_dict()) == {
        f"{layer}.{part}" for layer in ("encoder", "decoder") for part in ("weight", "bias")
    }


def test_learning_rate_of_record_falls_once_a_million_rows() -> None:
    settings = TrainSettings(pack=Path("p"), out=Path("o"), batch=4096, lr=2e-4)
    plain = [2e-4 * 0.5 * (1 + np.cos(np.pi * (step * 4096 // 10**6) / 256)) for step in range(0, 70_000, 500)]
    assert np.allclose([learning_rate(settings, step, 70_000) for step in range(0, 70_000, 500)], plain)
    smooth = TrainSettings(pack=Path("p"), out=Path("o"), lr=1.0, schedule="cosine", batch=10, lr_warmup_rows=100)
    assert learning_rate(smooth, 0, 100) == pytest.approx(0.1) and learning_rate(smooth, 99, 100) < 1e-3


def test_l1_defaults_are_those_of_record_for_each_stream() -> None:
    settings = TrainSettings(pack=Path("p"), out=Path("o"))
    assert (settings.l1_of(SITE), settings.l1_of(Site.parse("txt_0"))) == (3e-4, 5e-5)
    assert TrainSettings(pack=Path("p"), out=Path("o"), activation="topk", k=4).l1_of(SITE) == 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": "img_5"}, "no img_5; it has img_0, txt_0"),
        ({"batch": 10**6}, "--batch 1000000 is more than the"),
        ({"k": None}, "needs --k"),
        ({"k": 1000}, "between 1 and the 64 features"),
        ({"activation": "relu"}, "add --activation topk"),
        ({"lr": 0.0}, "--lr 0.0 must be positive"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    packs: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        small_run(packs, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_held_out_packs_that_mean_nothing_are_refused(packs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both"):
        small_run((packs[0], packs[0]), tmp_path / "out")
    store = toy_store(tmp_path / "other", 60, ("img_0",), (0, 2), 8, 4, chunk_images=64, learnable=True)
    for split, sites, reason in (
        ("train", "img_0", "trained on"),
        ("val", "img_0", None),
        ("val", "img_0", "no site txt_0"),
    ):
        make_pack(PackSettings(store=store, out=tmp_path / split, split=split, sites=sites))  # type: ignore[arg-type]
        if reason is not None:
            with pytest.raises(UsageError, match=reason):
                small_run((packs[0], tmp_path / split), tmp_path / "out", sites="all")
    assert not (tmp_path / "out").exists()
    other = toy_store(tmp_path / "steps", 60, ("img_0",), (1,), 8, 4, chunk_images=64)
    make_pack(PackSettings(store=other, out=tmp_path / "steps-val", split="val"))
    with pytest.raises(MismatchError, match="steps"):
        small_run((packs[0], tmp_path / "steps-val"), tmp_path / "out")


def poisoned(pack: Path, out: Path) -> Pack:
    """A copy of a pack's img_0 with a NaN in one row, all checksums right."""
    manifest = read_self_checked(pack / "manifest.json")
    (out / "img_0").mkdir(parents=True)
    for name, entry in manifest["files"].items():
        if name.startswith("img_0/shard"):
            columns = {key: np.array(column) for key, column in open_pack(pack).shards(SITE)[0].columns().items()}
            columns["mlp_in"][5, 2] = np.nan
            about = json.dumps({"pack": manifest["key"], "site": "img_0", "shard": 0})
            (out / name).write_bytes(safetensors.numpy.save(columns, {METADATA_KEY: about}))
            entry |= {"bytes": (out / name).stat().st_size, "crc32c": crc32c_of(out / name)}
        elif name.startswith("img_0"):
            (out / name).write_bytes((pack / name).read_bytes())
    write_json(out / "manifest.json", self_checked(manifest))
    return open_pack(out)


def test_a_row_with_nan_stops_the_run_before_a_step_and_says_where_it_is(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    columns = poisoned(packs[0], tmp_path / "p").shards(SITE)[0].columns("image", "step", "token")
    step, image, token = (int(columns[name][5]) for name in ("step", "image", "token"))
    with pytest.raises(NonFiniteError, match=f"img_0 mlp_in at step {step} of image {image}, token {token}"):
        small_run((tmp_path / "p", packs[1]), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_training_that_diverges_says_so(packs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="diverged: use a lower --lr"):
        small_run(packs, tmp_path / "out", lr=1e30, schedule="constant", epochs=4)


def test_evaluating_again_gives_the_saved_figures(packs: tuple[Path, Path], trained: Path) -> None:
    (dictionary,) = load_dictionaries(trained)
    means = TrainingMeans(open_pack(packs[0]), dictionary.site, dictionary.target_point)
    assert evaluate(dictionary, means, open_pack(packs[1])) == dictionary.metrics


def test_the_command_line_equals_python_and_imports_neither_diffusers_nor_zarr(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from train.__main__ import COMMANDS, program\n"
        "assert program('train', COMMANDS, default='train') == 0\n"
        "sys.exit(any(name in sys.modules for name in ('zarr', 'diffusers', 'transformers')))"
    )
    flags = command_line(packs, tmp_path / "cli")
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FVU" in done.stdout and "row/s" in done.stderr
    small_run(packs, tmp_path / "python", rows=3000)
    assert digests(tmp_path / "cli") == digests(tmp_path / "python")


def test_a_failure_on_the_command_line_is_one_message_and_an_exit_code(
    packs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command_line(packs, tmp_path / "out")
    assert program("train", COMMANDS, [*flags, "--sites", "img_7"], default="train") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert program("train", COMMANDS, [*flags, "--activation", "relu"], default="train") == 2
    assert "--activation topk" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def command_line(packs: tuple[Path, Path], out: Path) -> list[str]:
    flags = ["--pack", str(packs[0]), "--val", str(packs[1]), "--out", str(out), "--sites", "img_0", "--rows", "3000"]
    return flags + [word for key, value in QUICK.items() for word in (f"--{key.replace('_', '-')}", str(value))]
