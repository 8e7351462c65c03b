"""What the plan says of memory is what a training takes: peaks of resident memory, by activation, while it learns and measures."""

import gc
from pathlib import Path
from typing import Any

import pytest

import train.plan
from tests.small_training import Packs, small_run
from train.learning.kernels import release_buffers

pytestmark = pytest.mark.usefixtures("without_pictures")


def resident(name: str) -> int:
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index(name) + 1])


@pytest.mark.parametrize(
    ("measured", "changes"),
    [
        (False, {"activation": "relu", "k": None, "l1": 1e-3}),
        (True, {"activation": "topk", "k": 16}),
        (True, {"activation": "batchtopk", "k": 16}),
        (False, {"activation": "jumprelu", "k": None, "l1": 1e-3}),
    ],
)
def test_the_memory_that_is_planned_is_what_a_training_takes(
    packs: Packs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool, changes: dict[str, Any]
) -> None:
    planned: list[train.plan.GroupPlan] = []
    lines = train.plan._memory_lines
    monkeypatch.setattr(train.plan, "_memory_lines", lambda plan, ranks: planned.append(plan) or lines(plan, ranks))
    val = packs[1] if measured else None
    small_run((packs[0], val), tmp_path / "small", rows=256, **changes)  # what is imported on the way is there now
    release_buffers()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    except OSError:
        pytest.skip("peaks cannot be counted anew here")
    before = resident("VmRSS:")
    small_run((packs[0], val), tmp_path / "large", rows=1024, batch=1024, expansion=2048, **changes)
    taken = resident("VmHWM:") - before
    assert 0.75 * taken < planned[-1].memory < 1.35 * taken
    assert bool(planned[-1].measuring) == measured
