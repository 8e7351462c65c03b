"""Training learns, is measured on held-out rows only, and gives the same bytes again, from Python and the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from store.command import program
from store.errors import MismatchError, UsageError
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import open_pack
from tests.small_training import Packs, command_line, digests, small_run
from tests.toy_stores import toy_store
from train import TrainSettings, load_dictionaries, load_dictionary, run
from train.__main__ import COMMANDS
from train.learning.objective import learning_rate
from train.recipe import Recipe
from train.results.evaluate import evaluate
from train.rows.loader import Loader
from train.rows.means import TrainingMeans

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


def test_loss_falls_and_the_dictionary_beats_the_mean_on_held_out_rows(packs: Packs, trained: Path) -> None:
    (dictionary,) = small_run(packs, trained, epochs=8)
    log = [json.loads(line) for line in (trained / "transcoder_img_0" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert 50 <= len(log) <= 101 and [line["step"] for line in log[:2]] == [0, dictionary.config.steps // 50]
    rows = dictionary.config.rows // 10  # no dead rule: over a tenth of the run, and of what was seen before
    assert {line["dead_rows"] for line in log} == {*(line["rows"] for line in log if line["rows"] < rows), rows}
    assert all(0 <= line["dead"] <= 1 and "resampled" not in line for line in log)
    assert dictionary.metrics is not None
    assert dictionary.metrics["fvu"] < 0.5 and dictionary.metrics["l0"] <= 8
    assert dictionary.metrics["split"] == "val"
    assert dictionary.config.rows == dictionary.config.steps * 256 == log[-1]["rows"]
    assert torch.allclose(dictionary.decoder.weight.norm(dim=0), torch.ones(64), atol=1e-6)
    assert not dictionary.training and not any(parameter.requires_grad for parameter in dictionary.parameters())
    means = {dictionary.target_point: TrainingMeans(open_pack(packs[0]), dictionary.site, dictionary.target_point)}
    assert evaluate([dictionary], means, open_pack(packs[1])) == [dictionary.metrics]
    before = digests(trained)
    small_run(packs, trained, epochs=8)
    assert digests(trained) == before
    with pytest.raises(UsageError, match=r"--lr: there 0.005, asked for 0.1"):
        small_run(packs, trained, epochs=8, lr=0.1)


def test_one_seed_gives_one_set_of_bytes_and_another_seed_or_order_others(packs: Packs, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"order_seed": 1})):
        small_run(packs, tmp_path / name, rows=2000, **changes)
    weights = [(tmp_path / name / "transcoder_img_0" / "weights.safetensors").read_bytes() for name in "abcd"]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(set(weights)) == 3


def test_the_log_counts_dead_features_as_the_objective_does_and_those_that_were_resampled(
    packs: Packs, tmp_path: Path
) -> None:
    said = {"activation": "topk", "k": 1, "expansion": 16, "dead": "resample", "dead_rows": 512, "resample_rows": 1024}
    (dictionary,) = small_run(packs, tmp_path, rows=6000, lr=1e-6, log_steps=1, **said)
    log = [json.loads(line) for line in (tmp_path / dictionary.name / "log.jsonl").read_text().splitlines()]
    loader = Loader(open_pack(packs[0]), dictionary.site, ("mlp_in",), 256, 0)
    dictionary.initialise(0)  # at such a rate it hardly learns: features that are active before the first resampling
    active = torch.stack(
        [(dictionary.encode(batch.at("mlp_in"), batch.sigma) > 0).any(dim=0) for batch in loader.batches(0, 3)]
    )
    assert [line["dead_rows"] for line in log[:3]] == [256, 512, 512]
    shares = [~active[0], ~active[:2].any(dim=0), ~active[1:3].any(dim=0)]
    assert [line["dead"] for line in log[:3]] == pytest.approx(
        [float(each.float().mean()) for each in shares], abs=0.02
    )
    counts = [line["resampled"] for line in log]
    assert counts[:3] == [0, 0, 0] and counts[3] > 0 and counts == sorted(counts) and counts[-2] > counts[3]


def test_config_says_how_it_was_trained(packs: Packs, tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, rows=512, dead="auxk", nested="0.125,0.5")
    training = dictionary.config.training
    assert training is not None
    assert {name: training[name] for name in ("batch", "rows", "epochs", "order_seed", "threads", "world", "device")} == {
        "batch": 256, "rows": 512, "epochs": 2, "order_seed": 0, "threads": 1, "world": 1, "device": "cpu",
    }  # fmt: skip
    recipe = Recipe(**{name: training[name] for name in Recipe.__dataclass_fields__} | {"nested": (0.125, 0.5)})
    assert (recipe.lr, recipe.k, recipe.dead, recipe.l1) == (5e-3, 8, "auxk", 0.0)
    assert dictionary.config.nested == (8, 32)


def test_a_folder_of_somebody_else_is_not_written_into(packs: Packs, tmp_path: Path) -> None:
    (tmp_path / "transcoder_img_0").mkdir()
    (tmp_path / "transcoder_img_0" / "notes.txt").touch()
    with pytest.raises(UsageError, match="is no dictionary of ours"):
        small_run(packs, tmp_path)


def test_a_finished_dictionary_is_not_said_to_be_measured_on_another_pack(packs: Packs, tmp_path: Path) -> None:
    small_run(packs, tmp_path, val=None, rows=512)
    with pytest.raises(UsageError, match="was measured on no pack"):
        small_run(packs, tmp_path, rows=512)


def test_training_on_the_held_out_split_is_refused(packs: Packs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which is held out: pack --split train"):
        run(TrainSettings(pack=packs[1], val=packs[0], out=tmp_path / "out"))


def test_without_a_val_pack_nothing_is_measured_and_it_is_said(
    packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dictionary,) = small_run(packs, tmp_path, val=None, rows=512)
    assert dictionary.metrics is None and load_dictionary(tmp_path / dictionary.name).metrics is None
    out = capsys.readouterr().out
    assert "not measured" in out and "none" in out.splitlines()[-2]


def test_an_sae_reads_and_writes_mlp_out(packs: Packs, tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, kind="sae", epochs=3, decoder_bias="mean")
    assert dictionary.name == "sae_img_0" and dictionary.input_point == dictionary.target_point == "mlp_out"
    assert dictionary.metrics is not None and dictionary.metrics["fvu"] < 0.5


def test_training_without_the_timestep_has_no_such_parameters(packs: Packs, tmp_path: Path) -> None:
    (dictionary,) = small_run(packs, tmp_path, time_embed_dim=None, rows=512)
    assert set(dictionary.state_dict()) == {
        f"{layer}.{part}" for layer in ("encoder", "decoder") for part in ("weight", "bias")
    }


def test_learning_rate_of_record_falls_once_a_million_rows() -> None:
    plain = [2e-4 * 0.5 * (1 + np.cos(np.pi * (step * 4096 // 10**6) / 256)) for step in range(0, 70_000, 500)]
    assert np.allclose([learning_rate(Recipe(), step, 70_000, 4096) for step in range(0, 70_000, 500)], plain)
    smooth = Recipe(lr=1.0, schedule="cosine", lr_warmup_rows=100)
    assert learning_rate(smooth, 0, 100, 10) == pytest.approx(0.1) and learning_rate(smooth, 99, 100, 10) < 1e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": "img_5"}, "no img_5; it has img_0, txt_0"),
        ({"batch": 10**6}, "--batch 1000000 is more than the"),
        ({"k": None}, "needs --k"),
        ({"k": 1000}, "between 1 and the 64 features"),
        ({"activation": "relu"}, "add --activation topk"),
        ({"lr": 0.0}, "--lr 0.0 must be positive"),
        ({"lr": "fast"}, "--lr 'fast' is not a number"),
        ({"k": "8.5"}, "--k '8.5' is not a whole number"),
        ({"activation": "gelu"}, "--activation 'gelu' is not one of relu, topk, batchtopk, jumprelu"),
        ({"seed": "0,0"}, "--seed '0,0' names a value twice"),
        ({"nested": "0.5,0.1"}, "--nested .* must be rising shares"),
        ({"threads": 0}, "--threads 0 must be positive"),
        ({"device": "gpu"}, "--device 'gpu' is no device"),
        ({"device": "cuda:7"}, "this machine shows 0 CUDA devices to torch; use --device cpu"),
        ({"activation": "relu", "k": None, "loss": "mse"}, "--loss mse with --activation relu needs --l1"),
        ({"kind": "sae", "skip": True}, "an SAE has no skip connection"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    packs: Packs, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        small_run(packs, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_held_out_packs_that_mean_nothing_are_refused(packs: Packs, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both"):
        small_run((packs[0], packs[0]), tmp_path / "out")
    store = toy_store(tmp_path / "other", 60, ("img_0",), (0, 2), 8, 4, chunk_images=64, learnable=True)
    for split, reason in (("train", "trained on"), ("val", "no site txt_0")):
        make_pack(PackSettings(store=store, out=tmp_path / split, split=split))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=reason):
            small_run((packs[0], tmp_path / split), tmp_path / "out", sites="all")
    other = toy_store(tmp_path / "steps", 60, ("img_0",), (1,), 8, 4, chunk_images=64)
    make_pack(PackSettings(store=other, out=tmp_path / "steps-val", split="val"))
    with pytest.raises(MismatchError, match="steps"):
        small_run((packs[0], tmp_path / "steps-val"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_equals_python_and_imports_neither_diffusers_nor_zarr(packs: Packs, tmp_path: Path) -> None:
    code = (
        "import sys; from train.__main__ import COMMANDS, program\n"
        "assert program('train', COMMANDS, default='train') == 0\n"
        "sys.exit(any(name in sys.modules for name in ('zarr', 'diffusers', 'transformers')))"
    )
    flags = command_line(packs, tmp_path / "cli", rows=3000)
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan: 1 model at 1 site" in done.stdout and "FVU" in done.stdout and "row/s" in done.stderr
    small_run(packs, tmp_path / "python", rows=3000)
    name = "transcoder_img_0"
    assert digests(tmp_path / "cli" / name) == digests(tmp_path / "python" / name)
    assert {path.name for path in (tmp_path / "cli").iterdir()} >= {"sweep.json", "sweep.md", "pareto.png", "plots"}
    assert {path.name for path in (tmp_path / "cli.runs" / name).iterdir()} >= {"log.jsonl"}
    assert [dictionary.name for dictionary in load_dictionaries(tmp_path / "cli")] == [name]


def test_a_failure_on_the_command_line_is_one_message_and_an_exit_code(
    packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command_line(packs, tmp_path / "out")
    for more, message in (
        (["--sites", "img_7"], "no img_7"),
        (["--activation", "relu"], "--activation topk"),
        (["--k", "eight"], "--k 'eight' is not a whole number"),
        (["--models", str(tmp_path / "none.yaml")], "there is no file"),
    ):
        assert program("train", COMMANDS, [*flags, *more], default="train") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_the_flags_of_the_demo_are_understood(packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--activation topk --k 64 --expansion 8 --batch 1024 --epochs 2 --lr 3e-3 --lr-warmup-rows 20000 "
        "--schedule cosine --decoder-bias mean --autocast auto --kind transcoder --sites all --plan"
    )
    where = ["--pack", str(packs[0]), "--val", str(packs[1]), "--out", str(tmp_path / "out")]
    assert program("train", COMMANDS, [*where, *flags.split()], default="train") == 0
    out = capsys.readouterr().out
    assert "plan: 2 models at 2 sites" in out and "transcoder_txt_0: 64 features, topk, k 64, seed 0" in out
    assert not (tmp_path / "out").exists()
