"""What the page of steering shows of `analyze guided` and of `analyze faithfulness`: their rates, tables and plots, as they left them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from analyze.faithfulness.table import TEXTS, figure, of_scope, shown_columns
from analyze.guided.results import ALL, GOAL_CHANGED, GOAL_KEPT, kept_of, verdict_of
from analyze.report.folder import ReportFolder
from analyze.report.steering_experiments import Cells, Names, table_of
from store.errors import DamagedError
from store.files import read_json

RATES, FAITHFULNESS = "rates.parquet", "faithfulness.parquet"
PLOTS = {
    "faithfulness.png": "Sparsity against faithfulness",
    "steps.png": "Step by step",
    "blocks.png": "Block by block",
    "pictures.png": "Drawn with dictionaries in the place of MLPs",
}


def guided_view(place: Path, slug: str, folder: ReportFolder, names: Names) -> dict[str, Any]:
    """Circuit-guided steering as the template shows it; its collages are written into the report."""
    record, table = read_json(place / "run.json"), table_of(place / RATES)
    settings = record["settings"]
    attribute = settings["attribute"]
    values = list(dict.fromkeys(table["value"].to_pylist()))
    overall = [value for value in values if value == ALL] or values[:1]
    pictures = []
    for value in record["circuits"]:
        if (source := place / "values" / f"{value.replace(' ', '-')}.png").is_file():
            path = f"pictures/steering/{slug}/{source.name}"
            folder.write(path, _bytes(source))
            pictures.append({"value": value, "path": path})
    steps = "all steps" if settings["steps"] == "all" else f"steps {settings['steps']}"
    kept = [f"{name.removeprefix('kept_')} kept" for name in kept_of(attribute)]
    tokens = "all tokens" if settings["tokens"] == "all" else f"tokens {settings['tokens']}"
    return {
        "slug": slug,
        "name": f"Circuits of {attribute}",
        "verdict": verdict_of(table, attribute),
        "facts": f"every arm: {settings['mode']} {settings['strength']:g}, {steps}, {tokens}; circuit by {settings['by']}",
        "goals": f"changed in at least {100 * GOAL_CHANGED:.0f} %, "
        f"{' and '.join(word.removeprefix('kept_') for word in kept_of(attribute))} kept in at least {100 * GOAL_KEPT:.0f} %",
        "attribute": attribute,
        "overall": rate_lines(table, overall, attribute),
        "each": rate_lines(table, [value for value in values if value not in overall], attribute),
        "head": ["pictures", "changed", *kept, "all of these", "objects lost"],
        "circuits": [_circuit(value, about, record, names) for value, about in record["circuits"].items()],
        "pictures": pictures,
    }  # fmt: skip


def rate_lines(table: pa.Table, values: list[str], attribute: str) -> list[dict[str, Any]]:
    """A line a value and arm: how many pictures, and each share with the interval that holds it with 95 %."""
    found: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for row in table.to_pylist():
        if row["value"] in values:
            found.setdefault((row["value"], row["arm"], row["own_strength"]), {})[row["measure"]] = row
    lines, shown = [], ("changed", *kept_of(attribute), "clean", "lost")
    for (value, arm, own), measures in found.items():
        first = measures["changed"]
        strength = "a strength of its own each" if first["strength"] is None else f"strength {first['strength']:g}"
        lines.append(
            {
                "value": value, "arm": arm, "features": f"{first['features']:.3g}", "strength": strength + (", chosen" if own else ""),
                "pictures": first["n"], "cells": [_rate(measures[name], name) for name in shown],
            }
        )  # fmt: skip
    return lines


def _rate(row: Mapping[str, Any], measure: str) -> dict[str, Any]:
    if row["share"] is None:
        return {"text": "–", "interval": "", "good": False}
    goal = {"changed": GOAL_CHANGED, "clean": 2.0, "lost": 2.0}.get(measure, GOAL_KEPT)
    return {
        "text": f"{100 * row['share']:.0f} %",
        "interval": f"{100 * row['low']:.0f}–{100 * row['high']:.0f}",
        "good": row["share"] >= goal,
    }


def _circuit(value: str, about: Mapping[str, Any], record: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """The circuit of a value: its targets and its features, with links."""
    by_site = {name.partition("_")[2]: identity for name, identity in record["dictionaries"].items()}

    def linked(text: str) -> dict[str, Any]:
        site, _, feature = text.partition(":")
        return {
            "text": text,
            "link": names.link(by_site.get(site), None, int(feature)) if feature.isdecimal() else None,
        }

    return {
        "value": value, "graphs": about["graphs"], "targets": [linked(text) for text in about["targets"]],
        "features": [linked(text) for text in about["features"]],
    }  # fmt: skip


def faithfulness_view(place: Path, folder: ReportFolder) -> dict[str, Any]:
    """Faithfulness as the template shows it: a table a site, one of sites together, and the plots, written into the report."""
    rows = table_of(place / FAITHFULNESS).to_pylist()
    columns = shown_columns(rows)
    head = [TEXTS[name] for name in columns]
    tables = []
    alone = of_scope(rows, "site")
    for site in dict.fromkeys(row["sites"] for row in alone):
        lines = [
            [row["group"], *(figure(name, row.get(name)) for name in columns)] for row in alone if row["sites"] == site
        ]
        tables.append({"title": f"{site} alone", "cells": Cells(["Dictionaries", *head], lines)})
    together = [row for row in rows if row["every_step"] and "site" not in row["scopes"].split(",")]
    if together:
        lines = [[row["group"], row["sites"], *(figure(name, row.get(name)) for name in columns)] for row in together]
        tables.append({"title": "Several sites together", "cells": Cells(["Dictionaries", "Sites", *head], lines, 2)})
    plots = []
    for name, title in PLOTS.items():
        if (place / name).is_file():
            path = f"pictures/steering/faithfulness/{name}"
            folder.write(path, _bytes(place / name))
            plots.append({"path": path, "title": title})
    images = max((row["images"] for row in rows if row.get("images") is not None), default=0)
    return {
        "facts": f"{len(rows):,} splicings of {len({row['group'] for row in rows}):,} groups of dictionaries, {images:,} images",
        "tables": tables,
        "plots": plots,
        "exact": _exact(place),
    }


def _exact(place: Path) -> str:
    """How exactly errors added back reproduce the plain latents, in a sentence; empty where that was left out."""
    if not (place / "exactness.parquet").is_file():
        return ""
    rows = table_of(place / "exactness.parquet").to_pylist()
    worst = max(rows, key=lambda row: row["largest"])
    return (
        f"With errors added back the final latents differ from the plain ones by {worst['largest']:.1e} at most (their RMS is "
        f"{worst['latent_rms']:.2f}), over {len(rows):,} splicings."
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error}): run the command that made it again") from None
