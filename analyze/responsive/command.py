"""`python -m analyze responsive`: prompts on which steering a feature shows, for demonstrations that deserve the name.

After the responsiveness search of the FLUX SAEs: a feature that is off has nothing to amplify, one at its maximum has nowhere to
go, so prompts are taken from between.  1. The scores of an analysis say on which images a feature is active but not saturated.
2. A model draws these, plain and with the feature changed: this RUNS FLUX, and the runs are counted.  3. Distances say how much
each changed; the table and the pictures are ordered by that.
"""

import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from analyze.features.clip import Clip, load_clip
from analyze.labels.book import LabelBook
from analyze.pictures.drawing import png_bytes
from analyze.responsive.question import Question, Search, ask
from analyze.responsive.responses import respond
from analyze.responsive.settings import ResponsiveSettings
from analyze.responsive.showing import Books, collage, csv_of, steer_words, summary, table_of
from analyze.steering.distances import measured_by, say_what_is_absent
from analyze.steering.drawing import open_painter
from analyze.steering.token_choice import TokenChoice
from store.errors import UsageError
from store.files import is_temporary, json_bytes, read_json, write_bytes, write_json
from store.layout import runs_folder
from store.sizes import human_size, many
from store.tables import write_table
from train.claim import claimed

FORMAT, VERSION = "granary responsive", 1
SHOWN = 80
"""characters of a value in a message"""
RUN, TABLE, CSV = "run.json", "responses.parquet", "responses.csv"


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

    Each feature is published as it ends; the same command goes on with the first that is missing.  Same settings, store,
    dictionaries and kind of device: same bytes.  Errors: those of `question.ask` before the model is loaded, `UsageError` for a
    folder that holds something else or the answer to another question, then those of `open_painter` and `Painter.draw`.
    """
    started = time.monotonic()
    question = ask(settings)
    folder = settings.out / "responsive" / settings.name
    clip = None if question.clip is None else load_clip(question.clip, settings.device)
    asked = json.loads(json_bytes(record(question, clip)))
    _refuse_other(folder, asked)
    books = {search.subject.name: LabelBook.of(search.subject) for search in question.searches}
    there = _published(folder, question, books)
    print(plan_text(question, [search for search in question.searches if search.place not in there]), flush=True)
    say_what_is_absent()
    if settings.plan:
        return Responsive(folder, pa.table({}), 0, time.monotonic() - started)
    runs = runs_folder(settings.out)
    with claimed(folder, runs / f"responsive-{settings.name}", "process draws into"):
        _refuse_other(folder, asked)
        there = _published(folder, question, books)  # another process may have had the lock
        missing = [search for search in question.searches if search.place not in there]
        forwards, seconds = 0, 0.0
        if missing:
            painter = open_painter(
                question.analysis.store, settings.model, settings.device, settings.dtype, settings.batch_size,
                question.shelf, question.peaks, question.canvas,
            )  # fmt: skip
            write_bytes(folder / RUN, json_bytes(asked))
            drawing = time.monotonic()
            for each in respond(question, missing, painter, clip):
                write_bytes(folder / _sheet(each.search), png_bytes(collage(question, each, books)))
                there[each.search.place] = table_of(question, [each], books)
                _publish(folder, [there[search.place] for search in question.searches if search.place in there])
            forwards, seconds = painter.forwards, time.monotonic() - drawing
            _record(runs, folder, forwards, seconds)
    table = _publish(folder, [there[search.place] for search in question.searches])
    done = Responsive(folder, table, forwards, time.monotonic() - started)
    print(summary(table))
    print(_closing(question, done))
    return done


def _sheet(search: Search) -> str:
    return f"{search.subject.name}.{search.feature}.png"


def _published(folder: Path, question: Question, books: Books) -> dict[str, pa.Table]:
    """Place -> the rows of a feature that is drawn already, under the labels that they have now; of one without its picture none."""
    if not (folder / TABLE).is_file():
        return {}
    try:
        table = pq.read_table(folder / TABLE, partitioning=None).replace_schema_metadata(None)
    except (OSError, pa.ArrowInvalid):
        return {}  # damaged: all of it is drawn again
    found = {}
    for search in question.searches:
        label = books[search.subject.name].text(search.feature)
        mine = table.filter((pc.field("dictionary") == search.subject.name) & (pc.field("feature") == search.feature))
        whole = mine["label"].to_pylist() == [label] * len(search.candidates) * len(search.interventions)
        if whole and _readable(folder / _sheet(search)):
            found[search.place] = mine
    return found


def _readable(picture: Path) -> bool:
    try:
        with Image.open(picture) as opened:
            opened.load()
    except OSError:
        return False
    return True


def _publish(folder: Path, tables: list[pa.Table]) -> pa.Table:
    """Write the table of the features that are drawn, which says that they are, and give it back."""
    table = pa.concat_tables(tables, promote_options="default").combine_chunks()
    write_table(folder / TABLE, table)
    write_bytes(folder / CSV, csv_of(table))
    return table


def plan_text(question: Question, missing: Sequence[Search]) -> str:
    """What will be drawn, how often the transformer will run, and how long that took the last time; `missing`: not drawn yet."""
    settings, steps = question.settings, question.canvas.num_inference_steps
    there = len(question.searches) - len(missing)
    lines = [
        f"responsive: {many(len(question.searches), 'feature')}, {many(question.pictures_of(missing), 'picture')}: RUNS "
        f"{question.canvas.model_name}, {many(question.forwards_of(missing), 'transformer run')} ({steps} steps a picture)"
        + (f"; {many(there, 'feature')} drawn already" if there else "")
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
    lines.append(f"  written: a table, and pictures of at most {size}; time: {_expected(question, missing)}")
    return "\n".join(lines)


def _expected(question: Question, missing: Sequence[Search]) -> str:
    """How long it takes, from what earlier runs into this OUT measured on this machine."""
    rates = []
    for path in sorted(runs_folder(question.settings.out).glob("responsive-*.json")):
        about = read_json(path)
        if about.get("host") == platform.node() and about.get("seconds"):
            rates.append(float(about["forwards"]) / float(about["seconds"]))
    if not rates:
        return "unknown before the first run here"
    return (
        f"about {question.forwards_of(missing) / rates[-1]:.0f} s, at the {rates[-1]:.3g} runs/s of an earlier run here"
    )


def _refuse_other(folder: Path, asked: dict[str, Any]) -> None:
    """`UsageError` where the results' folder holds something else, or the answer to another question."""
    if not folder.exists() or (folder.is_dir() and all(is_temporary(path) for path in folder.iterdir())):
        return
    found = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{folder} holds other files: choose another --name, or move them away")
    other = [key for key in asked if found.get(key) != asked[key]]
    if not other:
        return
    key, before, now = other[0], found.get(other[0]), asked[other[0]]
    if isinstance(before, dict) and isinstance(now, dict):
        part = next(part for part in sorted({*before, *now}) if before.get(part) != now.get(part))
        key, before, now = part, before.get(part), now.get(part)
    raise UsageError(
        f"{folder} answers another question ({key.replace('_', ' ')}: {_cut(before)}, now {_cut(now)}): choose another --name, or "
        "move it away"
    )


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def record(question: Question, clip: Clip | None) -> dict[str, Any]:
    """What makes the results: parents' identities and settings, without a path, a time or a host."""
    from harvest.models.model import choose_device

    versions, lpips = measured_by()
    settings, subjects = question.settings, {search.subject.name: search.subject for search in question.searches}
    chosen = ("low", "high", "candidates", "best", "rank", "mode", "strengths", "unit", "at_steps", "method")
    tokens = str(TokenChoice.parse(settings.tokens).resolved(question.canvas.grid))
    return {
        "format": FORMAT, "version": VERSION, "store": question.analysis.store.id,
        "dictionaries": {name: subject.identity for name, subject in sorted(subjects.items())},
        "drawn": {**question.canvas.document(), "batch_size": question.batch_size},
        "device": choose_device(settings.device).type,
        "clip": None if clip is None else clip.identity,
        "scored_steps": list(question.analysis.steps),
        "features": [search.target for search in question.searches],
        "settings": {name: _plain(getattr(settings, name)) for name in chosen} | {"tokens": tokens},
        "versions": versions, "lpips": lpips,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _record(runs: Path, folder: Path, forwards: int, seconds: float) -> None:
    """Note beside OUT how it was made, and how fast."""
    about = {
        "command": sys.argv, "host": platform.node(), "ended": time.time(), "seconds": seconds, "forwards": forwards,
    }  # fmt: skip
    write_json(runs / f"responsive-{folder.name}.json", about)


def _closing(question: Question, done: Responsive) -> str:
    return (
        f"responsive: {many(len(question.searches), 'feature')}, {many(done.forwards, 'transformer run')} in {done.seconds:.0f} s "
        f"-> {done.folder}\n  next: python -m analyze {shlex.join(steer_words(question, done.table))}"
    )
