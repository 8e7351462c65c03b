"""Harvests that are killed at random moments end in the bytes of an undisturbed one: the short run of `make torture`."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harvest import runs
from harvest.__main__ import COMMANDS
from store import open_store
from store.command import program
from tests.test_store import tree
from tests.torture import FLAGS, PROMPTS

ROOT = Path(__file__).parent.parent


def torture(*flags: str) -> str:
    """The closing summary of `python -m tests.torture`, which must succeed."""
    words = [sys.executable, "-m", "tests.torture", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=1200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


def claims(said: str) -> tuple[int, set[str], set[str]]:
    """Kills that fell inside a part, the phases and the numbers of workers in which they did."""
    found = re.search(r"(\d+) of \d+ SIGKILLs fell inside a part", said)
    cases = re.findall(r"(harvest|resume|extend) by (\d): \d", said)
    assert found is not None, said
    return int(found[1]), {phase for phase, _ in cases}, {workers for _, workers in cases}


def test_killed_workers_leave_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    words = ("--kills", "8", "--extended", "3", "--aimed", "--no-fresh", "--folder", str(tmp_path))
    kills, phases, workers = claims(torture(*words))
    assert kills >= 8
    assert phases == {"harvest", "resume", "extend"}
    assert workers == {"1", "3"}


def harvest(*words: str) -> int:
    return program("harvest", COMMANDS, words, default="harvest")


ORPHAN = """
import os, time
from pathlib import Path
import tests.torture_workers as workers

workers.GRACE = 0.3
workers.inherit_orphans()
kills = workers.Herd(Path("."))
for lives in (False, True):
    pid = os.fork()
    if not pid:  # a worker that leaves a child behind, in a session of its own
        if not os.fork():
            os.setsid()
            time.sleep(5 if lives else 0.1)
        os._exit(0)
    kills.alive.append(workers.Worker(pid, [], Path("log")))
    try:
        kills.reap(list(kills.alive))
        print("nobody")
    except workers.GranaryError as error:
        print(error)
"""


def test_a_process_that_outlives_its_worker_is_found(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", ORPHAN]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=60)
    assert re.fullmatch(r"nobody\nprocesses \[\d+\] were left behind by \[\d+\]\n", said.stdout), said


@pytest.mark.slow
def test_thirty_kills_inside_parts_some_of_them_of_fresh_processes(tmp_path: Path) -> None:
    assert claims(torture("--kills", "30", "--seed", "1", "--folder", str(tmp_path)))[0] >= 30


def test_an_extension_that_was_stopped_before_it_changed_the_store_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = runs.keep_settings

    def stopped(*words: Any) -> None:
        keep(*words)
        raise KeyboardInterrupt

    (tmp_path / "prompts.txt").write_text(PROMPTS)
    flags = [*FLAGS, "--prompts", str(tmp_path / "prompts.txt")]
    assert harvest(*flags, "--images", "64", "--out", str(tmp_path / "store")) == 0
    before = tree(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "keep_settings", stopped)
        assert harvest("--extend", str(tmp_path / "store"), "--images", "66") == 1
    assert tree(tmp_path / "store") == before
    assert harvest("--resume", str(tmp_path / "store")) == 0
    assert open_store(tmp_path / "store").n_images == 66
