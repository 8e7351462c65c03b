"""Trainings of a second: packs of one small store, settings that learn quickly, kills at any step, digests of folders."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import train.trainer
from store.pack import PackSettings
from store.pack import run as make_pack
from tests.toy_stores import toy_store
from train import Dictionary, TrainSettings, run
from train.learning.learner import Learner

Packs = tuple[Path, Path]
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


@cache
def _packs(folder: Path) -> Packs:
    store = toy_store(folder / "store", 220, ("img_0", "txt_0"), (0, 2), 8, 32, chunk_images=64, learnable=True)
    for split in ("train", "val"):
        make_pack(PackSettings(store=store, out=folder / split, split=split))  # type: ignore[arg-type]
    return folder / "train", folder / "val"


def small_packs(tmp_path_factory: pytest.TempPathFactory) -> Packs:
    """A train and a val pack of one store, two sites, d_model 8; 52 batches of img_0 an epoch, 13 of txt_0; made once a session."""
    return _packs(tmp_path_factory.getbasetemp() / "small-training")


def leave_out_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is made; a third of a second of drawing for each model is not spent."""
    monkeypatch.setattr(train.trainer.sweep, "save", lambda out: list(train.trainer.sweep.finished(out)))


def small_run(packs: Packs, out: Path, **changes: Any) -> list[Dictionary]:
    """Train as `QUICK` says, with changes."""
    return run(TrainSettings(**{"pack": packs[0], "val": packs[1], "out": out, "sites": "img_0", **QUICK, **changes}))


def command_line(packs: Packs, out: Path, **changes: Any) -> list[str]:
    """The same as flags."""
    flags = ["--pack", str(packs[0]), "--val", str(packs[1]), "--out", str(out), "--sites", "img_0"]
    values = {**QUICK, **changes}
    return flags + [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Killed(BaseException):
    """A kill, as far as one can be had within a process."""


def killed_after(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], steps: int) -> bool:
    """Do `work`, and stop it dead when so many more steps and checkpoints of any model were begun; whether it was stopped."""
    left = iter(range(steps))

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Learner, *args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return method(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("learn", "save"):
            patch.setattr(Learner, name, dying(getattr(Learner, name)))
        try:
            work()
        except Killed:
            return True
    return False
