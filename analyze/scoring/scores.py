"""Score matrices: S[image, feature] = the largest activation over the counted tokens of an image, for every site and step.

1. Images are read in blocks of 512, span by span, once for all dictionaries of a site, as far as `--memory` holds their panes
   of 2048 features; rows that do not count are dropped before encoding.
2. z of a pane and 256 rows stays in the cache while it is looked at: a running maximum and its token for each image, statistics
   over rows, text pieces.
3. A block that is done goes to disk: its chunks of the score matrix, then what was found on it (`work.py`).
4. When all blocks of a dictionary and step are there, what was found is merged, in their order, into `features.parquet`.

Memory is bounded whatever the number of images, features and dictionaries; the bytes depend on neither memory nor workers.
"""

import errno
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from analyze.counted import are_lower_bounds
from analyze.inputs import Analysis, Subject, check_claim, claim_output, open_analysis
from analyze.scoring.announcing import announce, refuse_small_disk
from analyze.scoring.matrices import UNFINISHED, step_folder
from analyze.scoring.plan import Group, ScorePlan
from analyze.scoring.settings import ScoresSettings
from analyze.scoring.work import Hands, held, writer_of
from store.errors import GranaryError, MismatchError, NonFiniteError, StoreError
from store.files import write_json
from store.layout import runs_folder
from store.packing.crew import Crew, ThreadCrew
from store.sites import Site
from train.stopping import thread_count

BLOCK_BYTES = 4 * 2**20
BLOCK_ROWS = 256
Pairs: TypeAlias = list[tuple[Subject, int]]


@dataclass(frozen=True)
class ScoresSummary:
    """What a run of `scores` did, or, with `--plan`, would do."""

    computed: int
    """(dictionary, step) pairs computed now."""
    found: int
    """Pairs that were there already."""
    n_images: int
    lower_bounds: tuple[str, ...]
    """Streams whose maxima are lower bounds, because the store keeps a sample of their tokens."""
    seconds: float = field(compare=False)


def run(settings: ScoresSettings) -> ScoresSummary:
    """Compute the scores that are not there yet; the same settings on the same store give the same bytes.

    Errors: `UsageError` for what cannot be analyzed and for too little memory, `NonFiniteError` for an activation that is not
    finite or too large for float16, `StoreError` for a disk too small and for an OUT that another process writes.
    """
    started = time.monotonic()
    analysis = open_analysis(settings)
    check_claim(analysis, settings.choices)
    for note in analysis.notes():
        print(note)
    missing, found = _missing(analysis, settings)
    lower = tuple(s for s in analysis.streams() if are_lower_bounds(analysis.store, s, settings.padding))  # type: ignore[arg-type]
    plan = ScorePlan(analysis, settings, missing)
    if missing:
        announce(plan)
        refuse_small_disk(plan)
    elif settings.plan:
        print(f"plan: nothing to do, all {found} score matrices are in {analysis.out}")
    if not settings.plan:
        missing, found = _do(analysis, settings, missing, found)
    computed = 0 if settings.plan else len(missing)
    summary = ScoresSummary(computed, found, analysis.store.n_images, lower, time.monotonic() - started)
    if not settings.plan:
        print(_sentence(summary, analysis))
        _record(plan, summary)
    return summary


def _do(analysis: Analysis, settings: ScoresSettings, missing: Pairs, found: int) -> tuple[Pairs, int]:
    """Compute what is missing; what that was, and how much was there."""
    if not missing and (analysis.out / "images.parquet").exists():
        if (analysis.out / UNFINISHED).exists():
            with suppress(StoreError), held(analysis.out):  # another process may be at work, and clean up itself
                pass
        return missing, found
    with _said_when_full(analysis.out), held(analysis.out):
        claim_output(analysis, settings.choices)
        missing, found = _missing(analysis, settings)  # another process may have had the lock
        if missing:
            _compute(ScorePlan(analysis, settings, missing))
    return missing, found


def _missing(analysis: Analysis, settings: ScoresSettings) -> tuple[Pairs, int]:
    pairs = [(subject, step) for subject in analysis.subjects for step in analysis.steps]
    there = [pair for pair in pairs if step_folder(analysis.out, pair[0].name, pair[1]).exists()]
    for subject, step in there:
        matrix = analysis.matrix(subject, step)  # refuses what belongs to another dictionary
        if matrix.dtype != settings.dtype:
            raise MismatchError(
                f"{matrix.folder} holds scores in {matrix.dtype}, expected {settings.dtype}: choose another --out, or remove "
                "that folder"
            )
    return [pair for pair in pairs if pair not in there], len(there)


def _compute(plan: ScorePlan) -> None:
    """Do all tasks, group after group; a (dictionary, step) appears when its last group is done."""
    left = {
        pair: sum(pair[0] in dict(group) for groups in plan.groups.values() for group in groups)
        for pair in plan.missing
    }
    for subject, step in plan.missing:
        writer_of(plan.analysis, plan.settings, subject, step, plan.device).begin()
    rounds = [(site, group) for site, groups in plan.groups.items() for group in groups]
    total = sum(len(plan.images(task.block)) for site, group in rounds for task in plan.tasks(site, group))
    with tqdm(total=total, desc="scores", unit="image", mininterval=0.5) as progress, thread_count(1):
        hands: list[Hands] = []

        def made(advance: Any) -> Hands:
            hands.append(Hands(plan, advance))
            return hands[0]

        with _crew(plan, made, progress) as crew:
            merging = hands[0] if hands else made(lambda _count: None)
            for site, group in rounds:
                progress.set_postfix_str(str(site), refresh=False)
                _round(plan, crew, merging, site, group, left)


def _round(
    plan: ScorePlan, crew: Crew, hands: Hands, site: Site, group: Group, left: dict[tuple[Subject, int], int]
) -> None:
    """Do the tasks of a group, then finish what has no other group to wait for."""
    hands.let_go()
    for _done in crew.do(list(plan.tasks(site, group)), plan.lanes):
        pass
    members = {subject for subject, _ in group}
    for pair in [pair for pair in left if pair[0] in members]:
        left[pair] -= 1
        if not left[pair]:
            hands.finish(*pair)


def _crew(plan: ScorePlan, hands: Any, progress: "tqdm[Any]") -> Crew:
    if plan.settings.scheduler is None:
        return ThreadCrew(hands, progress.update)
    from analyze.scoring.cluster import ScoreCluster  # dask is imported when it is needed

    return ScoreCluster(plan, progress.update)


def _sentence(summary: ScoresSummary, analysis: Analysis) -> str:
    count = f"{summary.computed} score matrices" + (f" ({summary.found} were there already)" if summary.found else "")
    text = f"scores: {count} of {summary.n_images} images in {summary.seconds:.1f} s -> {analysis.out}"
    for stream in summary.lower_bounds:
        text += f"\n        {stream}: the store keeps a sample of the tokens, so these maxima are lower bounds"
    return text


def _record(plan: ScorePlan, summary: ScoresSummary) -> None:
    """Note beside OUT how it was computed."""
    about = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": summary.seconds, "threads": plan.lanes,
        "device": plan.device.type, "computed": summary.computed, "memory": plan.memory, "scheduler": plan.settings.scheduler,
    }  # fmt: skip
    write_json(runs_folder(plan.analysis.out) / "scores.json", about)


@contextmanager
def _said_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, GranaryError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"the disk of {out} is full. What is finished is kept: make room, then run the same command again"
        ) from None


def encoded(
    subject: Subject, rows: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]
) -> Iterator[tuple[slice, Float[Tensor, "block feature"]]]:
    """The activations z of the rows, in blocks bounded by memory, each with the slice of rows that it covers.

    `NonFiniteError` names the dictionary when an activation is NaN or infinite.
    """
    size = max(BLOCK_ROWS, BLOCK_BYTES // (4 * subject.n_features))
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            z = subject.dictionary.encode(rows[block].float(), sigma[block])
            if not torch.isfinite(z.sum()):
                raise NonFiniteError(
                    f"{subject.dictionary.name} gives a NaN or an infinite activation on this store: its weights or the store's "
                    "activations are damaged or overflowed; python -m store info shows the range of each site"
                )
            yield block, z
