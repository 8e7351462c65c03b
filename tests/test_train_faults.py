"""What goes wrong in a run costs no more than it must: one model of many, one flag, one of two runs."""

import fcntl
import shutil
from pathlib import Path
from typing import Any

import pytest

from store.command import program
from store.errors import DamagedError, NonFiniteError, StoreError, UsageError
from store.files import read_self_checked, self_checked, write_json
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import open_pack
from tests.small_training import Packs, command_line, digests, killed_after, small_run
from tests.toy_stores import toy_store
from train import TrainSettings, load_dictionary
from train.__main__ import COMMANDS
from train.claim import LOCK, claimed
from train.dictionaries.checkpoint import RESUME
from train.distributed import Ranks
from train.learning.learner import Learner
from train.models import Model, models_of
from train.recipe import Recipe
from train.results.evaluate import evaluate
from train.rows.loader import Loader

ALL_OF_RELU = {"activation": "relu", "k": None}


pytestmark = pytest.mark.usefixtures("without_pictures")


def models(packs: Packs, **changes: Any) -> tuple[Model, ...]:
    settings = {"pack": packs[0], "out": Path("out"), "sites": "img_0", **changes}
    return models_of(TrainSettings(**settings), open_pack(packs[0]))


def test_one_step_that_breaks_a_model_costs_no_other_its_end(packs: Packs, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"lr-1e\+30/.*diverged[\s\S]*1 of 2 models diverged; the others are done"):
        small_run(packs, tmp_path / "out", **ALL_OF_RELU, lr="1e30,1e-4", schedule="constant", rows=256)
    assert load_dictionary(tmp_path / "out" / "lr-0.0001" / "transcoder_img_0").metrics is not None
    assert not (tmp_path / "out" / "lr-1e+30" / "transcoder_img_0" / "config.json").exists()


def test_figures_that_are_no_numbers_cost_no_other_model_its_end(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*args: Any) -> Any:
        first, *others = evaluate(*args)
        return [{**first, "fvu": float("nan")}, *others]

    monkeypatch.setattr("train.trainer.evaluate", spoilt)
    with pytest.raises(NonFiniteError, match="k-2/transcoder_img_0: figures on held-out rows are no numbers"):
        small_run(packs, tmp_path, k="2,4", rows=256)
    assert [path.parent.parent.name for path in tmp_path.rglob("config.json")] == ["k-4"]


def test_a_run_whose_only_model_diverges_says_that_and_no_more(
    packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NonFiniteError, match=r"1 of 1 models diverged$"):
        small_run(packs, tmp_path / "out", lr=1e30, schedule="constant", rows=256)
    said = capsys.readouterr()
    assert "go on" not in said.out + said.err and not (tmp_path / "out").exists()


def test_a_learner_that_was_given_up_holds_no_memory(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Learner] = []
    give_up = Learner.give_up

    def noted(self: Learner) -> None:
        give_up(self)
        given.append(self)

    monkeypatch.setattr(Learner, "give_up", noted)
    with pytest.raises(NonFiniteError):
        small_run(packs, tmp_path, lr=1e30, schedule="constant", rows=256)
    (learner,) = given
    assert not learner.optimizer.state and sum(value.numel() for value in learner.dictionary.parameters()) == 0


def test_what_a_kill_left_in_a_finished_folder_is_gone_after_the_next_run(packs: Packs, tmp_path: Path) -> None:
    small_run(packs, tmp_path / "out", rows=256)
    before = digests(tmp_path / "out")
    for name in (RESUME, f".{RESUME}.0badf00d.tmp"):
        (tmp_path / "out" / "transcoder_img_0" / name).write_bytes(b"left")
    small_run(packs, tmp_path / "out", rows=256, plan=True)
    assert digests(tmp_path / "out") != before
    small_run(packs, tmp_path / "out", rows=256)
    assert digests(tmp_path / "out") == before


def test_a_second_training_into_the_same_folder_is_refused(packs: Packs, tmp_path: Path) -> None:
    runs = tmp_path / "out.runs"
    with claimed(tmp_path / "out", runs), pytest.raises(StoreError, match=r"another training writes into .*out: wait"):
        small_run(packs, tmp_path / "out", rows=256)
    assert not (tmp_path / "out").exists()
    with (runs / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was freed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bandwidth": 0.2}, "--bandwidth 0.2 means nothing with --activation relu: add --activation jumprelu"),
        ({"dead_rows": 5}, "--dead-rows 5 means nothing with --dead none"),
        ({"resample_rows": 5, "dead": "auxk"}, "--resample-rows 5 means nothing with --dead auxk"),
        ({"aux_k": 5, "dead": "resample"}, "--aux-k 5 means nothing with --dead resample"),
        ({"aux_weight": 0.5}, "--aux-weight 0.5 means nothing"),
        ({"l1_warmup_rows": 5, "activation": "topk", "k": 4}, "--l1-warmup-rows 5 means nothing with --l1 0"),
        ({"recipe": "flux-sae", "k": 4, "dead": "none", "dead_rows": 5}, "--dead-rows 5 means nothing"),
        ({"seed": 10**23}, "--seed 1.* must be at most 9223372036854775807"),
        ({"expansion": 10**20}, "--expansion 1.* must be at most 65536"),
        ({"dead": "auxk", "dead_rows": 10**23}, "--dead-rows 1.* must be at most"),
        ({"rows": 10**23}, "--rows 1.* must be at most"),
    ],
)
def test_what_decides_nothing_or_is_too_great_is_refused(packs: Packs, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        models(packs, **changes)


def test_what_decides_nothing_in_one_of_several_models_is_left_out_there(packs: Packs) -> None:
    found = models(packs, activation="relu,jumprelu", bandwidth=0.2)
    assert [model.recipe.bandwidth for model in found] == [Recipe().bandwidth, 0.2]
    assert [model.name.split("/")[0] for model in found] == ["activation-relu", "activation-jumprelu_bandwidth-0.2"]
    (model,) = models(packs, recipe="flux-sae", k=4, dead="none")
    assert (model.recipe.dead_rows, model.recipe.resample_rows) == (Recipe().dead_rows, Recipe().resample_rows)
    assert [m.recipe.l1_warmup_rows for m in models(packs, l1="0,1e-3", l1_warmup_rows=9)] == [0, 9]
    assert models(packs, l1_warmup_rows=9)[0].recipe.l1_warmup_rows == 9  # the default of the stream is no 0


@pytest.mark.parametrize(
    ("content", "flags", "reason"),
    [
        ("- {l1: []}", {}, r"models.yaml, model 1: --l1 \[\] names nothing"),
        ("- {}\n- {seed: [0, 0]}", {}, r"models.yaml, model 2: --seed \[0, 0\] names a value twice"),
        ("- {}\n- {activation: topk, k: 4000}", {}, "models.yaml, model 2: k = 4000 must lie between"),
        ("- {bandwidth: 0.2}", {}, "model 1: --bandwidth 0.2 means nothing"),
        ("- {}\n- {skip: true}", {"bandwidth": 0.2}, "--bandwidth means nothing for any model of"),
        ("- {lr: 1e-3}\n- {lr: 1e-4}", {"lr": 0.1}, "--lr means nothing for any model of .*, or each says its own"),
        (
            "- {}\n- {seed: 3}",
            {"seed": "0,1"},
            "models.yaml, model 2: it names its seed, and --seed 0,1 lists others: leave",
        ),
    ],
)
def test_a_list_of_models_is_refused_by_file_and_number(
    packs: Packs, tmp_path: Path, content: str, flags: dict[str, Any], reason: str
) -> None:
    (tmp_path / "models.yaml").write_text(content)
    with pytest.raises(UsageError, match=reason):
        models(packs, models=tmp_path / "models.yaml", **flags)
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        models(packs, models=tmp_path)


def test_a_flag_is_for_the_models_that_leave_it_out(packs: Packs, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("- {lr: 1e-3}\n- {skip: true}")
    assert [model.recipe.lr for model in models(packs, models=tmp_path / "models.yaml", lr=0.1)] == [1e-3, 0.1]


def test_a_pack_for_saes_says_which_flag_is_missing(packs: Packs, tmp_path: Path) -> None:
    store = toy_store(tmp_path / "store", 60, ("img_0",), (0, 2), 8, 4, chunk_images=64)
    make_pack(PackSettings(store=store, out=tmp_path / "pack", points="mlp_out"))
    with pytest.raises(
        UsageError, match=r"has mlp_out alone, which SAEs read and write: add --kind sae, or pack again"
    ):
        small_run((tmp_path / "pack", packs[1]), tmp_path / "out", val=None, batch=64)
    (sae,) = small_run((tmp_path / "pack", packs[1]), tmp_path / "out", val=None, batch=64, rows=64, kind="sae")
    assert sae.name == "sae_img_0"


def test_a_finished_folder_of_before_a_setting_was_added_is_the_same_training(
    packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run(packs, tmp_path, rows=256)
    path = tmp_path / "transcoder_img_0" / "config.json"
    content = read_self_checked(path)
    older = {key: value for key, value in content["training"].items() if key not in ("bandwidth", "world", "clip")}
    write_json(path, self_checked({**content, "training": {**older, "log_steps": 50}}))
    small_run(packs, tmp_path, rows=256)
    assert "is complete already" in capsys.readouterr().out
    for changes, odd in (
        ({"log_steps": 7}, "--log-steps: there 50, asked for 7"),
        ({"clip": 2.0}, "--clip: there None, asked for 2.0"),
    ):
        with pytest.raises(UsageError, match=odd):
            small_run(packs, tmp_path, rows=256, **changes)


def test_help_names_no_value_that_nobody_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert program("train", COMMANDS, ["--help"], default="train") == 0
    said = capsys.readouterr().out
    assert "{none,auxk,resample,flux-sae}" in said and "{none,bfloat16,auto}" in said and "{None" not in said


def test_none_is_a_word_of_the_command_line(packs: Packs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = command_line(packs, tmp_path / "out", time_embed_dim="none")
    assert program("train", COMMANDS, [*flags, "--plan"], default="train") == 0
    said = capsys.readouterr().out
    assert "1,096 parameters" in said and "mixing" not in said
    assert program("train", COMMANDS, [*flags, "--time-embed-dim", "wide"], default="train") == 2
    assert "--time-embed-dim 'wide' is not a whole number" in capsys.readouterr().err
    assert program("train", COMMANDS, [*flags, "--parallel", "rows"], default="train") == 2
    assert "--parallel rows is for several processes" in capsys.readouterr().err


def test_ranks_without_an_address_or_with_one_device_are_refused(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="the environment has no MASTER_ADDR, MASTER_PORT"):
        small_run(packs, tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Ranks.of_environment().launched
    with pytest.raises(UsageError, match="--device cuda:1 with 2 ranks"):
        small_run(packs, tmp_path, device="cuda:1")


def test_a_group_reads_only_the_columns_of_its_models(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, ...]] = []
    batches = Loader.batches

    def noted(self: Loader, first: int, last: int) -> Any:
        read.append(self.columns)
        return batches(self, first, last)

    monkeypatch.setattr(Loader, "batches", noted)
    small_run(packs, tmp_path, kind="transcoder,sae", together=1, rows=256)
    assert read == [("mlp_in", "mlp_out"), ("mlp_out",)]


def test_out_is_no_store_no_pack_and_no_file(packs: Packs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "zarr.json").write_text("{}")
    for out, reason in (
        (packs[0], "lies in the pack"), (packs[0] / "inside", "lies in the pack"), (tmp_path / "store" / "a", "lies in the store"),
        (tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "is a file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=reason):
            small_run(packs, out)


def test_a_damaged_held_out_row_is_found_before_a_step(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = Path(shutil.copytree(packs[1], tmp_path / "val"))
    shard = val / "img_0" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    monkeypatch.setattr(Learner, "learn", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(DamagedError, match="shard-00000"):
        small_run((packs[0], val), tmp_path / "out")


def test_lambda_decides_how_many_features_a_jumprelu_has_active(packs: Packs, tmp_path: Path) -> None:
    few, many = small_run(packs, tmp_path, activation="jumprelu", k=None, l1="0.1,0.0001", epochs=6)
    assert few.metrics is not None and many.metrics is not None
    assert few.metrics["l0"] < 0.8 * many.metrics["l0"]


def test_the_steps_between_two_lines_of_the_log_are_recorded_and_may_be_spelled_out(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pictures: None
) -> None:
    (whole,) = small_run(packs, tmp_path / "whole")  # 104 steps: usually every second has a line
    assert whole.config.training is not None and whole.config.training["log_steps"] == 2
    assert killed_after(monkeypatch, lambda: small_run(packs, tmp_path / "killed", checkpoint_steps=10), 60)
    with pytest.raises(UsageError, match="--log-steps: there 2, asked for 1"):
        small_run(packs, tmp_path / "killed", log_steps=1)
    small_run(packs, tmp_path / "killed", log_steps=2)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    path = tmp_path / "whole" / "transcoder_img_0" / "config.json"
    content = read_self_checked(path)
    write_json(path, self_checked({**content, "training": {**content["training"], "log_steps": None}}))  # as of before
    for asked in (None, 2):
        small_run(packs, tmp_path / "whole", log_steps=asked)
    with pytest.raises(UsageError, match="--log-steps: there 2, asked for 1"):
        small_run(packs, tmp_path / "whole", log_steps=1)


def test_the_command_line_takes_none_for_no_conditioning(packs: Packs, tmp_path: Path) -> None:
    flags = command_line(packs, tmp_path, rows=256, time_embed_dim="none")
    assert program("train", COMMANDS, flags, default="train") == 0
    dictionary = load_dictionary(tmp_path / "transcoder_img_0")
    assert dictionary.config.time_embed_dim is None
    assert not [name for name in dictionary.state_dict() if name.startswith(("time_mlp", "mod_linear"))]
