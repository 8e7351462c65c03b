"""The table of a scan: as CSV that `graph --targets` takes, as JSON of what was asked, and for a terminal."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analyze.inputs import Analysis
from analyze.labels.book import LabelBook, name_of
from analyze.scan.figures import Find
from analyze.scan.images import Catalogue
from analyze.scan.tokens import place_of
from store.files import json_bytes, write_bytes

FORMAT, VERSION = "granary scan", 1
FIRST = (
    "image",
    "step",
    "site",
    "token",
    "feature",
    "rank",
    "score",
    "kind",
    "dictionary",
    "label",
    "at",
    "prompt",
    "seed",
)
"""The columns that every scan has; those of its kind follow"""
PLACES_WIDTH = 44
SHOWN = 10
"""columns of figures in a terminal"""


def rows_of(
    analysis: Analysis, finds: Sequence[Find], known: Catalogue, kind: str, books: Mapping[str, LabelBook]
) -> list[dict[str, Any]]:
    """One row a feature, best first."""
    rows = []
    for rank, find in enumerate(finds, start=1):
        assert find.token is not None
        rows.append(
            {
                "image": find.image, "step": find.step, "site": str(find.subject.site), "token": find.token,
                "feature": find.feature, "rank": rank, "score": find.score, "kind": kind, "dictionary": find.subject.name,
                "label": books[find.subject.name].text(find.feature) or "",
                "at": place_of(analysis, find.subject.site.stream, find.image, find.token),
                "prompt": known.prompts[find.image], "seed": known.seed(find.image), **find.columns,
            }
        )  # fmt: skip
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Publish rows as CSV: 6 digits, empty for what cannot be said."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    write_bytes(path, text.getvalue().encode())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else str(value)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Publish what a scan was asked, so that its table can be understood and made again."""
    write_bytes(path, json_bytes({"format": FORMAT, "version": VERSION, **record}))


def printed(finds: Sequence[Find], rows: Sequence[Mapping[str, Any]], books: Mapping[str, LabelBook]) -> str:
    """The table for a terminal."""
    if not rows:
        return "  no feature: none is active and says what was asked for"
    names = [name_of(find.subject, find.feature, books[find.subject.name]) for find in finds]
    width = min(max(len("feature"), *map(len, names)), 40)
    shown = [name for name in finds[0].columns if name != "tokens"][:SHOWN]
    widths = [max(len(name), *(len(_figure(row[name])) for row in rows)) for name in shown]
    head = f"  {'rank':>4}  {'feature':<{width}} {'step':>4} " + " ".join(
        f"{n:>{w}}" for n, w in zip(shown, widths, strict=True)
    )
    lines = [head + ("  image  at" if "tokens" not in finds[0].columns else "  image  most active at")]
    for name, row in zip(names, rows, strict=True):
        figures = " ".join(f"{_figure(row[n]):>{w}}" for n, w in zip(shown, widths, strict=True))
        label, where = _cut(name, width), _cut(row.get("tokens", row["at"]), PLACES_WIDTH)
        lines.append(f"  {row['rank']:>4}  {label:<{width}} {row['step']:>4} {figures}  {row['image']:>5}  {where}")
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return str(value)
