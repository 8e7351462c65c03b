"""What a run of `scores` will take, printed before it begins; a disk that is too small is refused then."""

import shutil
import time

import torch

from analyze.scoring.encoding import PANE, ROWS
from analyze.scoring.matrices import UNFINISHED, step_folder
from analyze.scoring.plan import ScorePlan
from store.errors import StoreError
from store.sizes import human_size

REST = 1.3
"""time of a pass over that of its products: what is made of the active entries, reading and writing"""


def announce(plan: ScorePlan) -> None:
    """Print bytes, files, memory, reads and time."""
    settings, store = plan.settings, plan.store
    subjects = {subject.name: subject for subject, _ in plan.missing}
    features = sum(subject.n_features for subject in subjects.values())
    reads = (
        "once" if plan.reads == 1 else f"up to {plan.reads} times (so that --memory holds and all threads have work)"
    )
    who = "each worker of the cluster" if settings.scheduler else f"{plan.lanes} thread{'s' * (plan.lanes > 1)}"
    print(
        f"plan: {len(plan.missing)} score matrices of {store.n_images:,} images, {len(subjects)} dictionaries with {features:,} features: "
        f"at most {human_size(plan.array_bytes)} in {settings.dtype} and {human_size(plan.table_bytes)} of tables before compression, "
        f"{plan.files:,} files; {human_size(plan.scratch_bytes)} beside them meanwhile\n"
        f"  each site and step is read {reads}: {human_size(plan.read_bytes)}; {plan.operations / 1e12:.3g} TFLOP on {plan.device.type}, "
        f"about {_duration(plan)}; memory {human_size(plan.held_bytes())} of {human_size(plan.memory)} for {who}, beside Python's own",
        flush=True,
    )


def _duration(plan: ScorePlan) -> str:
    """How long it will take, from the time of one small product here and now."""
    shape = min(PANE, max(subject.n_features for subject, _ in plan.missing))
    rows, d_model = ROWS if plan.device.type == "cpu" else 32 * ROWS, plan.store.meta.d_model
    random = torch.Generator(plan.device).manual_seed(0)
    x = torch.randn(rows, d_model, device=plan.device, generator=random)
    weight = torch.randn(d_model, shape, device=plan.device, generator=random)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = min(_timed(x, weight) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    total = REST * plan.operations / (2 * rows * d_model * shape) * seconds / plan.lanes
    return f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} min" if total < 7200 else f"{total / 3600:.1f} h"


def _timed(x: torch.Tensor, weight: torch.Tensor) -> float:
    begun = time.perf_counter()
    float((x @ weight)[0, 0])  # waits for a GPU
    return time.perf_counter() - begun


def refuse_small_disk(plan: ScorePlan) -> None:
    """`StoreError` where OUT's disk has less room than the results take before compression, less what a killed run left of them."""
    folder = plan.analysis.out.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    begun = [step_folder(folder / UNFINISHED, subject.name, step) for subject, step in plan.missing]
    there = sum(path.stat().st_size for place in begun for path in place.rglob("*") if path.is_file())
    need = plan.array_bytes + plan.table_bytes + plan.scratch_bytes - there
    if free < need:
        raise StoreError(
            f"{plan.analysis.out}: up to {human_size(need)} are to be written and {human_size(free)} are free on that disk: make "
            "room, choose another --out, fewer --sites or --steps, or --dtype float16"
        )
