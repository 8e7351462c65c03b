"""A training that is killed, stopped or broken off goes on from its checkpoints and ends in the same bytes, or says why not."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import train.trainer
from store.command import program
from store.errors import (
    DamagedError,
    ForeignError,
    Interrupted,
    MismatchError,
    NonFiniteError,
    UnfinishedError,
    UsageError,
)
from store.files import read_self_checked, self_checked, write_json
from store.shards import open_pack, shard_file
from store.sites import Site
from tests.small_training import (
    Packs,
    command_line,
    digests,
    killed_after,
    leave_out_pictures,
    small_run,
)
from tests.test_train_models import everything
from tests.written_pack import telling_rows, written_pack
from train import TrainSettings, load_dictionary, run
from train.__main__ import COMMANDS
from train.dictionaries.checkpoint import METADATA_KEY, RESUME
from train.learning.learner import Learner
from train.rows.loader import Batch

SITE = Site.parse("img_0")


pytestmark = pytest.mark.usefixtures("without_pictures")


def test_nine_models_killed_anywhere_end_in_the_bytes_of_a_run_that_was_not(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills fall between the steps of two models and between two checkpoints of one step, so models stand at different steps."""
    settings = {"models": everything(tmp_path), "activation": None, "k": None, "rows": 5000, "log_steps": 7}
    small_run(packs, tmp_path / "whole", **settings, checkpoint_steps=1000)
    draw, kills, ahead = np.random.default_rng(4), 0, 0
    while killed_after(
        monkeypatch,
        lambda: small_run(packs, tmp_path / "killed", **settings, checkpoint_steps=4),
        int(draw.integers(30, 90)),
    ):
        kills += 1
        steps = {step_of(path) for path in (tmp_path / "killed").rglob(RESUME)}
        ahead += len(steps) > 1
        next((tmp_path / "killed").rglob(RESUME)).with_name(f".{RESUME}.0badf00d.tmp").write_bytes(b"torn")
    assert kills >= 3 and ahead >= 1
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def step_of(path: Path) -> int:
    """The step that a checkpoint is of."""
    with safetensors.safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()[METADATA_KEY])["step"])


def test_what_was_killed_while_it_was_measured_is_not_trained_again(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(packs, tmp_path / "whole", rows=4000)
    with monkeypatch.context() as patch:
        patch.setattr(train.trainer, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            small_run(packs, tmp_path / "killed", rows=4000, checkpoint_steps=6)
        with pytest.raises(UnfinishedError, match="did not finish"):
            load_dictionary(tmp_path / "killed" / "transcoder_img_0")
        patch.undo()
        leave_out_pictures(patch)
        patch.setattr(Learner, "learn", lambda *_, **__: pytest.fail("a step was taken"))
        small_run(packs, tmp_path / "killed", rows=4000, checkpoint_steps=6)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_after_the_step_and_says_so(
    packs: Packs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    small_run(packs, tmp_path / "whole", rows=4000, seed=(0, 1))
    learn = Learner.learn

    def signalled(self: Learner, batch: Batch, check: bool = False) -> Any:
        if self.step == 12 and self.model.recipe.seed == 0:
            os.kill(os.getpid(), number)
        return learn(self, batch, check)

    flags = command_line(packs, tmp_path / "stopped", rows=4000, seed="0,1")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", signalled)
        assert program("train", COMMANDS, flags, default="train") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        f"error: stopped by {number.name} at step 13 of 16; the state of 2 models of img_0 is saved: the same command goes on "
        "from there"
    )
    assert {step_of(path) for path in (tmp_path / "stopped").rglob(RESUME)} == {13}
    assert program("train", COMMANDS, flags, default="train") == 0
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_second_signal_does_not_wait_for_the_step(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_self: Learner, _batch: Batch, check: bool = False) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one was not heard")

    monkeypatch.setattr(Learner, "learn", twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        small_run(packs, tmp_path)
    assert not isinstance(stopped.value, Interrupted) and not list(tmp_path.rglob(RESUME))


def test_a_model_that_diverges_is_named_and_the_others_come_to_their_end(packs: Packs, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as failed:
        small_run(packs, tmp_path, lr="5e-3,1e30", schedule="constant", rows=14_000, checkpoint_steps=5)
    for words in ("lr-1e+30/transcoder_img_0: the loss is nan at step ", "use a lower --lr", "1 of 2 models diverged"):
        assert words in str(failed.value)
    assert load_dictionary(tmp_path / "lr-0.005" / "transcoder_img_0").metrics is not None
    assert not (tmp_path / "lr-1e+30" / "transcoder_img_0" / "config.json").exists()
    for path in tmp_path.rglob(RESUME):
        assert all(bool(value.isfinite().all()) for value in safetensors.torch.load_file(path).values())


@pytest.fixture
def begun(packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that was killed after its checkpoint at step 10."""
    work = lambda: small_run(packs, tmp_path / "begun", rows=4000, checkpoint_steps=10)  # noqa: E731
    assert killed_after(monkeypatch, work, 15)
    return tmp_path / "begun"


def test_a_state_that_cannot_be_gone_on_from_is_refused_before_a_step(packs: Packs, begun: Path) -> None:
    path = begun / "transcoder_img_0" / RESUME
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"--seed: there 0, asked for 9"):
        small_run(packs, begun, rows=4000, seed=9)
    with pytest.raises(UsageError, match="--batch: there 256, asked for 128"):
        small_run(packs, begun, rows=4000, batch=128)
    path.write_bytes(whole[:-9])
    with pytest.raises(DamagedError, match=r"cannot be read .* remove it to train that model from the start"):
        small_run(packs, begun, rows=4000)
    tensors = safetensors.torch.load(whole)
    path.write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: json.dumps({"config": {}, "step": 3, "log": []})}))
    with pytest.raises(ForeignError, match=r"another version of Granary .version None, expected 3"):
        small_run(packs, begun, rows=4000)
    path.write_bytes(whole)
    small_run(packs, begun, rows=4000)
    assert not path.exists()


def test_a_shard_that_cannot_be_trained_on_is_named_before_a_step_is_taken(packs: Packs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"out": tmp_path / "out", "expansion": 2, "batch": 32, "time_embed_dim": 8, "threads": 1}
    rows = telling_rows(0, 64)
    rows["mlp_in"][5, 2] = np.nan
    written_pack(tmp_path / "nan", [rows])
    with pytest.raises(NonFiniteError, match="img_0 mlp_in at step 0 of image 0, token 5 holds a NaN"):
        run(TrainSettings(pack=tmp_path / "nan", **settings))
    for name in ("cut", "other"):
        written_pack(tmp_path / name, [telling_rows(0, 64), telling_rows(1, 64)])
    second = tmp_path / "cut" / shard_file(SITE, 1)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="bytes where the manifest names"):
        run(TrainSettings(pack=tmp_path / "cut", **settings))
    manifest = read_self_checked(tmp_path / "other" / "manifest.json")
    write_json(tmp_path / "other" / "manifest.json", self_checked({**manifest, "key": "another"}))
    with pytest.raises(MismatchError, match="is a shard of another pack or place"):
        run(TrainSettings(pack=tmp_path / "other", **settings))
    assert open_pack(tmp_path / "other").key == "another"
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_finished_dictionary_of_another_version_or_with_damage_is_refused(packs: Packs, tmp_path: Path) -> None:
    small_run(packs, tmp_path, rows=512)
    path = tmp_path / "transcoder_img_0" / "config.json"
    config = read_self_checked(path)
    write_json(path, self_checked({**config, "format_version": 99}))
    with pytest.raises(ForeignError, match="has format version 99"):
        small_run(packs, tmp_path, rows=512)
    write_json(path, config)
    weights = path.with_name("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DamagedError, match="differs from the checksum"):
        small_run(packs, tmp_path, rows=512)
