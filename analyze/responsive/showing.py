"""What `responsive` leaves: a table of every candidate, and a picture of each feature's best."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from analyze.labels.book import LabelBook, name_of
from analyze.responsive.question import Question, Search
from analyze.responsive.responses import Responses
from analyze.steering.collages import grid

FIRST = pa.schema(
    [
        ("dictionary", pa.string()), ("feature", pa.int32()), ("label", pa.string()), ("rank", pa.int32()),
        ("image", pa.int64()), ("prompt", pa.string()), ("seed", pa.int64()), ("score", pa.float32()), ("percentile", pa.float64()),
        ("intervention", pa.string()), ("response", pa.float64()),
    ]
)  # fmt: skip
"""the columns before the distances, a row a candidate and strength"""
Books = Mapping[str, LabelBook]


def table_of(question: Question, found: Sequence[Responses], books: Books) -> pa.Table:
    """One row a feature, candidate and strength; features as asked for, candidates by response, then strengths."""
    seeds = question.analysis.store.prompts()["seed"]
    rows: list[dict[str, Any]] = []
    for each in found:
        search = each.search
        for rank, place in enumerate(each.order.tolist(), 1):
            candidate = search.candidates[place]
            about = {
                "dictionary": search.subject.name, "feature": search.feature,
                "label": books[search.subject.name].text(search.feature), "rank": rank, "image": candidate.image,
                "prompt": question.prompts[candidate.image], "seed": seeds[candidate.image].as_py(),
                "score": candidate.score, "percentile": candidate.percentile, "response": float(each.response[place]),
            }  # fmt: skip
            for number, intervention in enumerate(search.interventions):
                figures = {name: float(values[number, place]) for name, values in each.measured.items()}
                rows.append({**about, "intervention": intervention.name, **figures})
    schema = FIRST
    for name in found[0].measured:
        schema = schema.append(pa.field(name, pa.float64()))
    return pa.Table.from_pylist(rows, schema=schema)


def csv_of(table: pa.Table) -> bytes:
    """The table as CSV: 6 digits, empty for what is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows([_cell(value) for value in row.values()] for row in table.to_pylist())
    return text.getvalue().encode()


def collage(question: Question, each: Responses, books: Books) -> Image.Image:
    """The feature's most responsive pictures: plain, and with each strength."""
    search, settings = each.search, question.settings
    shown = each.order[: settings.best].tolist()
    rows = [[each.plain[place], *(pictures[place] for pictures in each.changed)] for place in shown]
    labels = []
    for place in shown:
        candidate = search.candidates[place]
        labels.append(
            f"{question.prompts[candidate.image]} (image {candidate.image}, score {candidate.score:.3g}, "
            f"percentile {candidate.percentile:.0f})"
        )
    strengths = range(len(each.changed))
    captions = [["", *(_caption(each, number, place, settings.rank) for number in strengths)] for place in shown]
    name = name_of(search.subject, search.feature, books[search.subject.name])
    notes = [
        f"{len(shown)} of {len(search.candidates)} prompts on which it is active between the percentiles {settings.low:g} and "
        f"{settings.high:g}, by their response ({settings.rank})"
    ]
    columns = ["plain", *(intervention.name for intervention in search.interventions)]
    return grid(rows, labels, columns, f"Where {name} responds", notes, captions)


def summary(table: pa.Table) -> str:
    """What came out, a line a feature, in the order of the table."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault((row["dictionary"], row["feature"]), {}).setdefault(row["rank"], row)
    width = max(len(f"{name}/{feature}") for name, feature in found)
    lines = [f"  {'feature':<{width}}  {'response':>9}  {'median':>8}  images, the most responsive first"]
    for (name, feature), ranks in found.items():
        ordered = [ranks[rank] for rank in sorted(ranks)]
        images = ",".join(str(row["image"]) for row in ordered[:6])
        middle = sorted(row["response"] for row in ordered)[len(ordered) // 2]
        label = ordered[0]["label"]
        lines.append(
            f"  {f'{name}/{feature}':<{width}}  {_figure(ordered[0]['response']):>9}  {_figure(middle):>8}  {images}"
            + (f"  ({label})" if label else "")
        )
    return "\n".join(lines)


def steer_words(question: Question, table: pa.Table) -> list[str]:
    """The words after `python -m analyze` that draw the first feature's best pictures with its first strength; O is the folder to name."""
    settings, search = question.settings, question.searches[0]
    images = table["image"].to_pylist()[: settings.best * len(search.interventions) : len(search.interventions)]
    choices = {
        "--model": settings.model, "--dtype": settings.dtype, "--clip": settings.clip, "--batch-size": settings.batch_size,
        "--device": settings.device, "--method": None if settings.method == "difference" else settings.method,
        "--analysis": settings.out if settings.unit == "peak" else None,
    }  # fmt: skip
    words = ["steer", "--store", str(settings.store), "--dictionaries", str(settings.dictionaries)]
    words += [word for flag, value in choices.items() if value is not None for word in (flag, str(value))]
    return [
        *words, "--images", ",".join(map(str, sorted(images))), "--edit", _steer_edit(question, search), "--out", "O",
    ]  # fmt: skip


def _steer_edit(question: Question, search: Search) -> str:
    """The edit of the first strength, as `analyze steer --edit` takes it."""
    edit = search.interventions[0].edits[0]
    text = str(edit)
    if edit.steps is not None:
        text += f" @steps={','.join(map(str, edit.steps))}"
    if str(edit.tokens) != "all":
        text += f" @tokens={edit.tokens}"
    if sum(site == edit.site for site, _ in question.shelf.outlines) > 1:
        text += f" @kind={edit.kind}"
    return text + (" @unit=peak" if edit.unit == "peak" else "")


def _caption(each: Responses, strength: int, place: int, rank: str) -> str:
    return f"{rank} {_figure(each.measured[rank][strength, place])}"


def _figure(value: Any) -> str:
    value = float(value)
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 100 else f"{value:.4g}"  # + 0.0: no -0.000


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
