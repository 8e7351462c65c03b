"""Processes that torchrun starts: models shared out, rows shared out, and none left waiting for one that died."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train.distributed
from store.command import guarded
from store.errors import UsageError
from store.shards import open_pack
from store.sites import Site
from tests.small_training import Packs, command_line, digests, small_run
from tests.test_train_models import everything
from tests.test_train_resume import step_of
from train import load_dictionary
from train.dictionaries.checkpoint import RESUME
from train.dictionaries.dictionary import build
from train.distributed import LostRankError, Ranks
from train.learning.objective import Objective, learning_rate
from train.recipe import Recipe
from train.rows.loader import Loader

pytestmark = pytest.mark.usefixtures("without_pictures")


def torchrun(flags: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    """`torchrun -m train FLAGS` on this machine alone, in a session of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(ranks), "-m", "train", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; what does not end in time is told to."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # torchrun ends its ranks
    return process.returncode, out, err


def process_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The pid of a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"\0RANK={rank}\0" in f"\0{(folder / 'environ').read_text()}":
                return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_ranks_that_share_rows_take_the_step_of_the_mean_gradient(packs: Packs, tmp_path: Path) -> None:
    flags = command_line(packs, tmp_path / "out", parallel="rows", rows=5000, batch=128)
    code, out, err = finished(torchrun(flags))
    assert code == 0, err
    assert "2 ranks, --parallel rows" in out and out.count("plan:") == 1
    found = load_dictionary(tmp_path / "out" / "transcoder_img_0")
    training = found.config.training
    assert training is not None and training["world"] == 2 and found.config.rows == 5120
    (same,) = small_run(packs, tmp_path / "one", rows=256, batch=128)
    config = same.config
    dictionary = build(config)
    dictionary.initialise(0)
    recipe = Recipe(**{key: training[key] for key in Recipe.__dataclass_fields__} | {"nested": ()})
    objective = Objective(dictionary, recipe, 20, 256)
    optimizer = torch.optim.AdamW(dictionary.parameters(), weight_decay=0.0, fused=True)
    loader = Loader(open_pack(packs[0]), Site.parse("img_0"), ("mlp_in", "mlp_out"), 128, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, 20, 256)
        for batch in loader.batches(2 * step, 2 * step + 2):
            x, y = batch.at("mlp_in"), batch.at("mlp_out")
            (objective.terms(x, y, batch.sigma, step, False).total / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        objective.after_step(optimizer, x, y, batch.sigma, step)
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    for name, value in dictionary.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_ranks_that_share_models_end_in_the_bytes_of_one_process(packs: Packs, tmp_path: Path) -> None:
    small_run(packs, tmp_path / "one", k="2,4,8", sites="all", rows=3000)
    flags = command_line(packs, tmp_path / "two", k="2,4,8", sites="all", rows=3000)
    code, out, err = finished(torchrun(flags))
    assert code == 0, err
    assert (
        "plan: 6 models at 2 sites; 2 ranks, --parallel models, at most 3 models on one" in out
        and out.count("plan:") == 1
    )
    assert all(
        f"k-{k}/transcoder_{site}:" in out for k in (2, 4, 8) for site in ("img_0", "txt_0")
    )  # those of both ranks
    assert out.count("held-out rows") == 1
    for folder in ("k-2", "k-4", "k-8"):
        assert digests(tmp_path / "two" / folder) == digests(tmp_path / "one" / folder)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_the_same_world_ends_in_the_same_bytes(
    packs: Packs, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "models": everything(tmp_path),
        "parallel": "rows",
        "rows": 20_000,
        "checkpoint_steps": 4,
    }
    flags = {name: command_line(packs, tmp_path / name, **settings) for name in ("whole", "killed")}
    for words in flags.values():
        for name in ("--activation", "--k"):
            del words[words.index(name) : words.index(name) + 2]
    code, _, err = finished(torchrun(flags["whole"]))
    assert code == 0, err
    for rank in (1, 0):
        running = torchrun(flags["killed"])
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob(RESUME)}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob(RESUME)}
            if len(there) == 9 and there != before:
                break
            time.sleep(0.02)
        os.kill(process_of_rank(running, rank), signal.SIGKILL)
        begun = time.monotonic()
        code, _, err = finished(running)
        assert code != 0 and time.monotonic() - begun < 60
        assert "error: " in err
    code, _, err = finished(torchrun(flags["killed"]))
    assert code == 0, err
    folders = [path.parent.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("config.json")]
    assert len(folders) == 9
    for folder in folders:
        assert digests(tmp_path / "killed" / folder) == digests(tmp_path / "whole" / folder)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_that_share_rows_at_one_step(packs: Packs, tmp_path: Path) -> None:
    flags = command_line(packs, tmp_path / "out", parallel="rows", epochs=2000, batch=128, checkpoint_steps=20)
    running = torchrun(flags)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "out").rglob(RESUME)):
        time.sleep(0.02)
    os.kill(process_of_rank(running, 1), signal.SIGTERM)
    code, _, err = finished(running)
    said = re.findall(r"error: (stopped by SIGTERM at step [\d,]+ of .*)", err)
    assert code != 0 and len(said) == 1 and "the state of 1 model of img_0 is saved" in said[0]
    (path,) = (tmp_path / "out").rglob(RESUME)
    assert f"at step {step_of(path):,} of" in said[0]


def test_who_waits_for_a_rank_that_failed_or_fell_silent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    here = Ranks(0, 2, _store=store)
    store.set("the end/1", "here")
    here.wait("the end")
    store.set("failed/1", "the disk is full")
    with pytest.raises(LostRankError, match="rank 1 of 2 failed: the disk is full"):
        here.wait("another end")
    monkeypatch.setattr(train.distributed, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(LostRankError, match=r"rank 0 of 2 has not been heard of for 0 s \(the end\)"):
        Ranks(1, 2, _store=dist.HashStore()).wait("the end")


def test_what_several_ranks_meet_is_said_by_the_first_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(train.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 4)]))

    def said_by(rank: int, error: BaseException) -> str:
        def work() -> None:
            with Ranks(rank, 4).speaking_once():
                raise error

        assert guarded(work) in (1, 2)
        return capsys.readouterr().err

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert said_by(1, UsageError("no such site")) == "error: no such site\n"
    assert said_by(0, UsageError("no such site")) == ""
    assert said_by(2, UsageError("no such device")) == "error: no such device\n"
    assert said_by(3, LostRankError("rank 1 of 4 failed: no such site")) == said_by(0, KeyboardInterrupt()) == ""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")  # no store outlives rank 0: each speaks for itself
    assert said_by(0, UsageError("no such site")) == "error: no such site\n"


def test_models_are_shared_out_in_neighbours_and_each_once() -> None:
    for size in (1, 2, 3, 8):
        shares = [list(Ranks(rank, size).share(13)) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(13)) and max(map(len, shares)) - min(
            map(len, shares)
        ) <= 1


def test_an_environment_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UsageError, match="RANK is 2 of WORLD_SIZE 2"):
        Ranks.of_environment()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK='first', which is no number"):
        Ranks.of_environment()
