"""What the plan says of memory is what a training takes: peaks of resident memory, by activation, while it learns and measures.

They are read in a process of their own, whose allocator gives large blocks back at once: after hundreds of other tests a
process has gigabytes of freed memory to take from, and what a training adds to it is chance.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train.plan
from tests.small_training import Packs, leave_out_pictures, small_run
from train.learning.kernels import release_buffers

CASES: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "k": None, "l1": 1e-3},
    "topk": {"activation": "topk", "k": 16},
    "batchtopk": {"activation": "batchtopk", "k": 16},
    "jumprelu": {"activation": "jumprelu", "k": None, "l1": 1e-3},
}
MEASURED = ("topk", "batchtopk")
"""those that also measure, on a validation pack"""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}


def resident(name: str) -> int:
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index(name) + 1])


def taken(packs: Packs, folder: Path, case: str) -> dict[str, int]:
    """Bytes that were planned, of them for measuring, and those that were taken: the peak above what stood there before."""
    planned: list[train.plan.GroupPlan] = []
    with pytest.MonkeyPatch.context() as patch:
        leave_out_pictures(patch)
        lines = train.plan._memory_lines
        patch.setattr(train.plan, "_memory_lines", lambda plan, ranks: planned.append(plan) or lines(plan, ranks))
        of_these = (packs[0], packs[1] if case in MEASURED else None)
        small_run(
            of_these, folder / case / "small", rows=256, **CASES[case]
        )  # what is imported on the way is there now
        release_buffers()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS:")
        small_run(of_these, folder / case / "large", rows=1024, batch=1024, expansion=2048, **CASES[case])
        peak = resident("VmHWM:")
    return {"planned": planned[-1].memory, "measuring": planned[-1].measuring, "taken": peak - before}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What `taken` found of every case, in a process of its own."""
    from tests.small_training import small_packs

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("peaks cannot be counted anew here")
    packs, folder = small_packs(tmp_path_factory), tmp_path_factory.mktemp("memory")
    words = [sys.executable, "-m", "tests.test_train_memory", *map(str, packs), str(folder)]
    done = subprocess.run(words, env={**os.environ, **AT_ONCE}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_memory_that_is_planned_is_what_a_training_takes(figures: dict[str, dict[str, int]], case: str) -> None:
    found = figures[case]
    assert 0.85 * found["taken"] < found["planned"] < 1.2 * found["taken"]
    assert bool(found["measuring"]) == (case in MEASURED)


if __name__ == "__main__":
    train_pack, val_pack, out = map(Path, sys.argv[1:])
    with contextlib.redirect_stdout(sys.stderr):
        all_figures = {case: taken((train_pack, val_pack), out, case) for case in CASES}
    print(json.dumps(all_figures))
