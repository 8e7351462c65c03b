"""`python -m analyze guided`: intervene on the circuit that attribution graphs show, and on as many other features, and judge both.

1. What is asked is checked: graphs, dictionaries, pictures, features and strengths; with `--plan` the cost is printed, and that is all.
2. For each value (each colour, say): its pictures are drawn plain, then once for each arm with the same mode, strength, steps and
   tokens; the arms of --own besides at the strength that suits them best on pictures which are not judged.
3. The judge reads every picture, plain and changed: did the value change, did shape and position stay?
4. Rates over all values, collages, and which arm wins.
"""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from analyze.guided.arms import left_out
from analyze.guided.planning import FEW_TUNING, Case, GuidedPlan, open_plan
from analyze.guided.results import edges_said, goals_of, lines_of, rates_table, verdict_of
from analyze.guided.session import Session, names_of, place_of
from analyze.guided.settings import GuidedSettings
from analyze.inputs import check_results
from analyze.steering.comparing import aligned, markdown
from analyze.steering.drawing import open_painter
from store.files import read_json, write_bytes, write_json
from store.layout import runs_folder
from store.sites import spans
from store.sizes import many
from store.tables import read_table, write_table
from train.claim import claimed, refuse_place

RUN, FORMAT, VERSION, WHAT = "run.json", "granary guided steering", 2, "guided steering"
KILOBYTES = 350
"""of a value's files: nearly all of it is the collage, with six pictures of 64 pixels in ten columns"""


@dataclass(frozen=True)
class Guided:
    """What came of a run; with --plan nothing."""

    rates: pa.Table | None
    """what `OUT/rates.parquet` holds"""
    forwards: int
    """passes through the transformer of this run"""
    seconds: float = field(compare=False)


def run(settings: GuidedSettings) -> Guided:
    """Draw and judge; values that OUT holds already are not drawn again.

    Errors: those of `open_plan`, before the model is loaded; `UsageError` for an OUT of other settings.
    """
    started = time.monotonic()
    refuse_place(settings.out)
    plan = open_plan(settings)
    made_with = record(plan)
    check_results(settings.out, made_with, WHAT)
    announce(plan)
    if settings.plan:
        return Guided(None, 0, time.monotonic() - started)
    with claimed(settings.out, runs_folder(settings.out), "process steers in"):
        check_results(settings.out, made_with, WHAT)  # another process may have had the lock
        write_json(settings.out / RUN, made_with)
        forwards = _draw_all(plan)
        found = rates_table([_judged(settings.out, case) for case in plan.cases], settings.attribute)
        write_table(settings.out / "rates.parquet", found)
        lines = lines_of(found, settings.attribute)
        verdict, notes = verdict_of(found, settings.attribute), _notes(plan, found)
        listed = "\n".join(f"- {note}" for note in notes)
        write_bytes(settings.out / "summary.md", f"# {verdict}\n\n{listed}\n\n{markdown(lines)}\n".encode())
    done = Guided(found, forwards, time.monotonic() - started)
    took = f"guided: {many(forwards, 'run')} of the transformer in {done.seconds:.1f} s -> {settings.out}"
    print("\n".join([aligned(lines), verdict, *notes, took]))
    write_json(
        runs_folder(settings.out) / "guided.json",
        {
            "command": sys.argv,
            "host": platform.node(),
            "ended": time.time(),
            "seconds": done.seconds,
            "forwards": forwards,
        },
    )
    return done


def _judged(out: Path, case: Case) -> pa.Table:
    path = place_of(out, case).with_suffix(".parquet")
    return read_table(path, "remove it and run the command again, which draws that value once more")


def _notes(plan: GuidedPlan, found: pa.Table) -> list[str]:
    """What is to be known beside the rates: the goal, strengths at an end of those tried, choices that stand on few pictures."""
    places = [place_of(plan.settings.out, case).with_suffix(".json") for case in plan.cases]
    few = [f"{case.value} {len(case.tuning)}" for case in plan.cases if len(case.tuning) < FEW_TUNING]
    notes = [goals_of(found, plan.settings.attribute), *edges_said([read_json(place) for place in places])]
    if plan.settings.own_arms and few:
        notes.append(f"own strengths stand on fewer than {FEW_TUNING} tuning pictures: {', '.join(few)}")
    return notes


def record(plan: GuidedPlan) -> dict[str, Any]:
    """What made the results, down to the pictures and features of every value: nothing of it depends on where things lie."""
    settings, analysis = plan.settings, plan.analysis
    names = (
        "attribute", "by", "top", "with_target", "mode", "strength", "steps", "tokens", "images", "shown", "tuning", "seed",
    )  # fmt: skip
    from harvest.models.model import choose_device, library_versions

    return {
        "format": FORMAT, "version": VERSION, "store": analysis.store.id, "model": dict(plan.canvas.known_as),
        "judged_store": plan.judged.id, "truth": plan.truth,
        "dictionaries": {subject.outline.name: subject.identity for subject in analysis.subjects},
        "settings": {name: getattr(settings, name) for name in names}
        | {"arms": list(settings.chosen_arms), "own": list(settings.own_arms), "own_strengths": list(settings.sweep),
           "batch_size": settings.batch_size or analysis.store.meta.batch_size, "device": choose_device(settings.device).type,
           "threads": plan.canvas.threads},
        "circuits": {
            case.value: {
                "targets": names_of(case.targets), "graphs": case.graphs, "features": names_of([s.key for s in case.circuit]),
                "arms": {variant.arm: names_of(variant.features) for variant in case.variants},
                "judged": list(case.judged), "tuned_on": list(case.tuning) if settings.own_arms else [],
            }
            for case in plan.cases
        },
        "versions": library_versions(),
    }  # fmt: skip


def announce(plan: GuidedPlan) -> None:
    """Print the circuits, and what drawing costs."""
    settings, steps = plan.settings, plan.canvas.num_inference_steps
    if single := left_out(plan.analysis):
        layers = spans([site.layer for site in single])
        print(f"note: joint_{layers} left out: single-stream blocks cannot be changed yet")
    if plan.left_out:
        print(
            f"note: {many(plan.left_out, 'graph')} left out, of images that show several values of {settings.attribute}"
        )
    if plan.foreign:
        print(
            f"note: {many(plan.foreign, 'graph')} left out, which explain another feature than the one that tells the {settings.attribute} "
            "of their picture (as python -m analyze targets chooses it)"
        )
    for case in plan.cases:
        print(f"{case.value}: {many(case.graphs, 'graph')} of {_said(case.targets)}")
        for variant in case.variants:
            print(f"  {variant.arm:<9} {_said(variant.features)}")
    todo = [case for case in plan.cases if not _done(settings.out, case)]
    count = sum(_pictures(plan, case) for case in todo)
    there = f" ({many(len(plan.cases) - len(todo), 'value')} finished already)" if len(todo) < len(plan.cases) else ""
    rate = _rate(settings.out)
    took = "time unknown" if rate is None else f"about {count * steps / rate:.0f} s at the rate of the last run"
    print(
        f"{many(count, 'picture')} of {plan.canvas.model} to draw{there}: {many(count * steps, 'run')} of its transformer, {took}; "
        f"about {KILOBYTES * len(todo):,} kB written"
    )


def _rate(out: Path) -> float | None:
    """Runs of the transformer a second, as an earlier run into OUT had it."""
    path = runs_folder(out) / "guided.json"
    found = read_json(path) if path.is_file() else {}
    return found["forwards"] / found["seconds"] if found.get("forwards") and found.get("seconds") else None


def _pictures(plan: GuidedPlan, case: Case) -> int:
    own = len(plan.settings.own_arms)
    tuned = (1 + own * len(plan.settings.sweep)) * len(case.tuning) if own else 0
    return (1 + len(case.variants) + own) * len(case.judged) + tuned


def _said(features: Sequence[Any]) -> str:
    return "+".join(names_of(features)) or "nothing"


def _done(out: Path, case: Case) -> bool:
    return place_of(out, case).with_suffix(".parquet").exists()  # it is written last


def _draw_all(plan: GuidedPlan) -> int:
    """Draw the values that are not finished; how many passes through the transformer that took."""
    settings = plan.settings
    todo = [case for case in plan.cases if not _done(settings.out, case)]
    if not todo:
        return 0
    painter = open_painter(
        plan.analysis.store, settings.model, settings.device, None, settings.batch_size, settings.dictionaries
    )
    with tqdm(
        total=sum(_pictures(plan, case) for case in todo), desc="guided", unit="picture", mininterval=0.5
    ) as progress:
        for case in todo:
            Session(plan, case, painter, progress, place_of(settings.out, case)).finish()
    return painter.forwards
