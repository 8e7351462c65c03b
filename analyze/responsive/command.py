"""`python -m analyze responsive`: prompts on which steering a feature shows, for demonstrations that deserve the name.

After the responsiveness search of the FLUX SAEs: a feature that is off has nothing to amplify, one at its maximum has nowhere to
go, so prompts are taken from between.  1. The scores of an analysis say on which images a feature is active but not saturated.
2. A model draws these, plain and with the feature changed: this RUNS FLUX, and the runs are counted.  3. Distances say how much
each changed; the table and the pictures are ordered by that.
"""

import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from analyze.features.clip import Clip, load_clip
from analyze.labels.book import LabelBook
from analyze.pictures.drawing import png_bytes
from analyze.responsive.question import Question, ask
from analyze.responsive.responses import respond
from analyze.responsive.settings import ResponsiveSettings
from analyze.responsive.showing import collage, csv_of, steer_edit, summary, table_of
from analyze.steering.distances import say_what_is_absent
from analyze.steering.drawing import open_painter
from store.errors import UsageError
from store.files import json_bytes, read_json, write_bytes, write_json
from store.layout import runs_folder
from store.sizes import human_size, many
from store.tables import write_table

FORMAT, VERSION = "granary responsive", 1
RUN, TABLE = "run.json", "responses.parquet"
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "Pillow", "matplotlib", "scikit-image", "flip-evaluator")
"""whose versions could change a byte of the results"""


@dataclass(frozen=True)
class Responsive:
    """What a run found; with `plan` an empty table."""

    folder: Path
    table: pa.Table
    """one row a feature, candidate and strength, the most responsive candidate first"""
    forwards: int
    """runs of the transformer, an image of a batch and a step counted once"""
    seconds: float = field(compare=False)


def run(settings: ResponsiveSettings) -> Responsive:
    """Draw the candidates of every feature, plain and changed, and write table and pictures to OUT/responsive/NAME.

    Same settings, store, dictionaries and kind of device: same bytes.  Errors: those of `question.ask` before the model is loaded,
    then those of `open_painter` and `Painter.draw`.
    """
    started = time.monotonic()
    question = ask(settings)
    folder = settings.out / "responsive" / settings.name
    _refuse_foreign(folder)
    clip = None if question.clip is None else load_clip(question.clip, settings.device)
    print(plan_text(question), flush=True)
    say_what_is_absent()
    if settings.plan:
        return Responsive(folder, pa.table({}), 0, time.monotonic() - started)
    painter = open_painter(
        question.analysis.store, settings.model, settings.device, settings.dtype, settings.batch_size,
        question.shelf, question.peaks, question.canvas,
    )  # fmt: skip
    books = {search.subject.name: LabelBook.of(search.subject) for search in question.searches}
    found, sheets = [], {}
    drawing = time.monotonic()
    for each in respond(question, painter, clip):
        sheets[f"{each.search.subject.name}.{each.search.feature}.png"] = png_bytes(collage(question, each, books))
        found.append(each)
        each.plain.clear()  # of many features, the pictures of one are held at a time
        each.changed.clear()
    seconds = time.monotonic() - drawing
    table = table_of(question, found, books)
    _write(folder, question, table, sheets, clip, painter.batch_size)
    _record(folder, painter.forwards, seconds)
    done = Responsive(folder, table, painter.forwards, time.monotonic() - started)
    print(summary(question, found, books))
    print(_closing(question, done))
    return done


def plan_text(question: Question) -> str:
    """What will be drawn, how often the transformer will run, and how long that took the last time."""
    settings, steps = question.settings, question.canvas.num_inference_steps
    lines = [
        f"responsive: {many(len(question.searches), 'feature')}, {many(question.pictures, 'picture')}: RUNS "
        f"{question.canvas.model_name}, {many(question.forwards, 'transformer run')} ({steps} steps a picture)"
    ]
    for search in question.searches:
        scores = [candidate.score for candidate in search.candidates]
        names = ", ".join(intervention.name for intervention in search.interventions)
        lines.append(
            f"  {search.place}: {many(len(scores), 'image')} with scores {min(scores):.3g} to {max(scores):.3g}, plain and {names}"
        )
    shown = sum(
        min(settings.best, len(search.candidates)) * (1 + len(search.interventions)) for search in question.searches
    )
    size = human_size(shown * 3 * question.canvas.height * question.canvas.width)
    lines.append(f"  written: a table, and pictures of at most {size}; time: {_expected(question)}")
    return "\n".join(lines)


def _expected(question: Question) -> str:
    """How long it takes, from what earlier runs into this OUT measured on this machine."""
    rates = []
    for path in sorted(runs_folder(question.settings.out).glob("responsive-*.json")):
        about = read_json(path)
        if about.get("host") == platform.node() and about.get("seconds"):
            rates.append(float(about["forwards"]) / float(about["seconds"]))
    if not rates:
        return "unknown before the first run here"
    return f"about {question.forwards / rates[-1]:.0f} s, at the {rates[-1]:.3g} runs/s of an earlier run here"


def _refuse_foreign(folder: Path) -> None:
    """`UsageError` where the results' folder holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UsageError(f"{folder} holds other files: choose another --name, or move them away")


def _write(
    folder: Path, question: Question, table: pa.Table, sheets: dict[str, bytes], clip: Clip | None, batch_size: int
) -> None:
    """Publish everything; pictures of an earlier run under the name that this one has not are removed."""
    for old in folder.glob("*.png"):
        if old.name not in sheets:
            old.unlink()
    for name, data in sheets.items():
        write_bytes(folder / name, data)
    write_table(folder / TABLE, table)
    write_bytes(folder / "responses.csv", csv_of(table))
    write_bytes(folder / RUN, json_bytes(record(question, clip, batch_size)))


def record(question: Question, clip: Clip | None, batch_size: int) -> dict[str, Any]:
    """What made the results: parents' identities and settings, without a path, a time or a host."""
    settings, subjects = question.settings, {search.subject.name: search.subject for search in question.searches}
    chosen = (
        "low", "high", "candidates", "best", "rank", "mode", "strengths", "unit", "at_steps", "tokens", "method",
    )  # fmt: skip
    return {
        "format": FORMAT, "version": VERSION, "store": question.analysis.store.id,
        "dictionaries": {name: subject.identity for name, subject in sorted(subjects.items())},
        "drawn": {**question.canvas.document(), "batch_size": batch_size},
        "clip": None if clip is None else clip.identity,
        "scored_steps": list(question.analysis.steps),
        "features": [search.target for search in question.searches],
        "settings": {name: _plain(getattr(settings, name)) for name in chosen},
        "versions": {name: version(name) for name in LIBRARIES},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _record(folder: Path, forwards: int, seconds: float) -> None:
    """Note beside OUT how it was made, and how fast."""
    about = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": seconds, "forwards": forwards,
    }  # fmt: skip
    write_json(runs_folder(folder.parent.parent) / f"responsive-{folder.name}.json", about)


def _closing(question: Question, done: Responsive) -> str:
    settings, search = question.settings, question.searches[0]
    place = done.table["image"].to_pylist()[: settings.best * len(search.interventions) : len(search.interventions)]
    words = [
        "python -m analyze steer", f"--store {shlex.quote(str(settings.store))}",
        f"--dictionaries {shlex.quote(str(settings.dictionaries))}", f"--images {','.join(map(str, sorted(place)))}",
        f"--edit {shlex.quote(steer_edit(search))}", "--out O",
    ]  # fmt: skip
    return (
        f"responsive: {many(question.pictures, 'picture')}, {many(done.forwards, 'transformer run')} in {done.seconds:.0f} s "
        f"-> {done.folder}\n  next: {' '.join(words)}"
    )
