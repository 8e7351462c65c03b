"""Harvests that are killed at random moments end in the bytes of an undisturbed one: the short run of `make torture`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    kills, phases, workers = claims(torture("--kills", "8", "--extended", "3", "--no-fresh", "--folder", str(tmp_path)))
    assert kills >= 8
    assert phases == {"harvest", "resume", "extend"}
    assert workers == {"1", "3"}


@pytest.mark.slow
def test_thirty_kills_inside_parts_some_of_them_of_fresh_processes(tmp_path: Path) -> None:
    assert claims(torture("--kills", "30", "--seed", "1", "--folder", str(tmp_path)))[0] >= 30
