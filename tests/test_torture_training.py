"""Packs and trainings that are killed at random moments end in undisturbed bytes: the short run of `make torture-training`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import UsageError
from tests.torture_training import TortureSettings

ROOT = Path(__file__).parent.parent


def torture(*flags: str) -> str:
    """The closing summary of `python -m tests.torture_training`, which must succeed."""
    words = [sys.executable, "-m", "tests.torture_training", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=1200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


def claims(said: str) -> tuple[int, set[str]]:
    """Kills that fell inside a job, and the kinds of jobs in which they did."""
    found = re.search(r"(\d+) of \d+ SIGKILLs fell inside a job \((.*?)\)", said)
    assert found is not None, said
    return int(found[1]), set(re.findall(r"[a-z]+", found[2]))


def test_killed_packs_and_trainings_leave_what_undisturbed_ones_do(tmp_path: Path) -> None:
    flags = (
        "--kills",
        "3",
        "--jobs",
        "scratch,training",
        "--models",
        "2",
        "--no-fresh",
        "--folder",
        str(tmp_path / "t"),
    )
    kills, jobs = claims(torture(*flags))
    assert kills >= 3
    assert jobs == {"scratch", "training"}


@pytest.mark.slow
def test_twenty_kills_of_all_jobs_some_of_them_of_fresh_processes(tmp_path: Path) -> None:
    kills, jobs = claims(torture("--kills", "20", "--seed", "1", "--folder", str(tmp_path / "t")))
    assert kills >= 20
    assert jobs == {"whole", "scratch", "workers", "training"}


def test_a_kind_of_job_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no 'nap'; there are whole, scratch, workers, training"):
        TortureSettings(jobs="whole,nap")
