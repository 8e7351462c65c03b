"""The truth table for people: in a terminal, and as Markdown and CSV beside the JSON and Parquet that programs read."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from analyze.labels.book import LabelBook
from analyze.truth.table import verdict_line
from store.files import write_bytes, write_json
from store.tables import write_table

Books: TypeAlias = Mapping[str, LabelBook]
"""the labels of every dictionary, by its name"""

TEXTS = ("dictionary", "site", "stream", "group", "value", "image_channel")
ABOUT = (
    "pos.: images of the scored half that show it; probe: a linear probe (ridge) on the raw activations, which a feature may",
    "beat, for it is fitted on few images: a reference and no bound; floor: the best single channel",
)
OF_JOINT = (
    "joint: judged by its image tokens alone; what a feature does on text tokens is in its table (columns ..._real)"
)
NUMBERS = ("step", "image_feature", "token_feature", "channel")


def write_truth(
    out: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    books: Books,
) -> None:
    """Publish `name.parquet` and `name.csv` (all rows), `name.md` and last `name.json` (the table)."""
    write_table(out / f"{name}.parquet", _table(rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out / f"{name}.csv", text.getvalue().encode())
    write_bytes(out / f"{name}.md", markdown(result, books).encode())
    write_json(out / f"{name}.json", result)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A column keeps its type where all of it is missing."""
    kinds = {name: pa.string() for name in TEXTS} | {name: pa.int64() for name in NUMBERS}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in rows[0]])
    return pa.Table.from_pylist([dict(row) for row in rows], schema)


def printed(result: Mapping[str, Any], books: Books) -> str:
    """The table for a terminal, 120 columns: one for each stream, every dictionary and step in short, and the verdict."""
    lines = [_judged_on(result), *ABOUT, *([OF_JOINT] if "joint" in result["verdict"] else [])]
    for stream in result["verdict"]:
        lines += ["", *_stream_lines(result, stream, books)]
    lines += ["", *_dictionary_lines(result), "", *_without(result), verdict_line(result)]
    return "\n".join(lines)


def _judged_on(result: Mapping[str, Any]) -> str:
    images = result["images"]
    which = "held-out images" if result["settings"]["images"] == "val" else "images"
    left = f" ({images['left_out']} do not show what their prompt says and are left out)" if images["left_out"] else ""
    return f"truth: features chosen on {images['chosen_on']} {which}, scored on {images['scored_on']} others{left}"


def _stream_lines(result: Mapping[str, Any], stream: str, books: Books) -> list[str]:
    tokens = any("tokens" in entry["streams"][stream] for entry in result["attributes"])
    lines = [f"{stream:<23}{'over images':<57}" + ("over image tokens" if tokens else "")]
    figures = f"{'AUROC':<6}{'F1':<6}{'probe':<6}{'floor':<6}"
    lines.append(
        f"{'attribute':<23}{'pos.':<5}{'feature':<28}{figures}" + (f"{'feature':<8}(above) {figures}" if tokens else "")
    )
    for entry in result["attributes"]:
        found = entry["streams"][stream]
        line = f"{entry['group'] + ' ' + entry['value']:<22.22} {entry['present']:<4} {feature_name(found['images'], books):<27.27} "
        line += _figures(found["images"], found["images_ceiling"], found["images_floor"])
        if "tokens" in found:
            own = found["tokens"]
            line += f"{own['chosen_by_tokens']['feature']:<8}{_figure(own['chosen_by_images']):<8}"
            line += _figures(own["chosen_by_tokens"], own["ceiling"], own["floor"])
        lines.append(line.rstrip())
    return [line.rstrip() for line in lines]


def _figures(
    place: Mapping[str, Any] | None, ceiling: Mapping[str, Any] | None, floor: Mapping[str, Any] | None
) -> str:
    values = [
        (place or {}).get("auroc"),
        (place or {}).get("f1"),
        (ceiling or {}).get("auroc"),
        (floor or {}).get("auroc"),
    ]
    return "".join(f"{_figure(value):<{width}}" for value, width in zip(values, (6, 6, 6, 6), strict=True))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def feature_name(place: Mapping[str, Any] | None, books: Books) -> str:
    """`img_4/275 step 0 · red`, with the label where the feature has one."""
    if place is None:
        return "–"
    label = books[place["dictionary"]].text(place["feature"])
    return f"{place['dictionary']}/{place['feature']} step {place['step']}" + (f" · {label}" if label else "")


def _dictionary_lines(result: Mapping[str, Any]) -> list[str]:
    """Attributes with a feature of their own, dictionary by dictionary and step by step."""
    steps = list(dict.fromkeys(line["step"] for line in result["by_dictionary"]))
    cells = {(line["dictionary"], line["step"]): line for line in result["by_dictionary"]}
    width = max(len("dictionary"), *(len(name) for name, _ in cells)) + 2
    shown = steps if len(steps) <= 8 else [steps[place * (len(steps) - 1) // 7] for place in range(8)]
    lines = ["attributes with a feature (mean AUROC; mean of the linear probe) at each step, over images",
             f"{'dictionary':<{width}}" + "".join(f"{'step ' + str(step):<19}" for step in shown)]  # fmt: skip
    for name in dict.fromkeys(name for name, _ in cells):
        row = [cells[name, step] for step in shown]
        texts = [f"{c['with_feature']} ({_figure(c['image_auroc'])}; {_figure(c['image_probe_auroc'])})" for c in row]
        lines.append((f"{name:<{width}}" + "".join(f"{text:<19}" for text in texts)).rstrip())
    if left := [str(step) for step in steps if step not in shown]:
        lines.append(
            f"left out here: step{'s' if len(left) > 1 else ''} {', '.join(left)}; the Markdown file has them all"
        )
    return lines


def _without(result: Mapping[str, Any]) -> list[str]:
    lines = []
    verdicts = {stream: (f"{stream}: no feature", verdict) for stream, verdict in result["verdict"].items()}
    of_joint = [entry["streams"]["joint"] for entry in result["attributes"] if "joint" in entry["streams"]]
    if (
        result["populations"] and of_joint and not any("tokens" in entry for entry in of_joint)
    ):  # made by an older Granary
        lines.append("joint: no figures over tokens, which are told apart in img streams alone")
    for stream, (nobody, verdict) in verdicts.items():
        if verdict["without"]:
            lines.append(f"{nobody} stands for {', '.join(verdict['without'])}")
        if verdict["untested"]:
            lines.append(f"{stream}: too few images to judge {', '.join(verdict['untested'])}")
    if len(verdicts) > 1 and result["overall"]["without"]:
        lines.append(f"no feature of any stream stands for {', '.join(result['overall']['without'])}")
    return lines


def markdown(result: Mapping[str, Any], books: Books) -> str:
    """The whole table as Markdown."""
    lines = [
        f"# {verdict_line(result)}",
        "",
        _judged_on(result) + ".",
        "",
        "Positives are the images of the scored half that show the attribute.  The linear probe (ridge) reads the raw activations and is "
        "fitted on few images, so a feature may beat it: it is a reference and no bound.  The floor is the best single channel.",
        "",
        *([OF_JOINT.capitalize() + ".", ""] if "joint" in result["verdict"] else []),
        "## The best feature of each attribute, over images",
        "",
    ]
    lines += _markdown_table(
        ("attribute", "positives", "stream", "feature", "AUROC", "F1", "linear probe", "floor"),
        [_best_cells(entry, books) for entry in result["attributes"]],
    )
    lines += ["", *(_without(result) or ["Every attribute has a feature."])]
    for stream in result["verdict"]:
        lines += ["", f"## {stream}", ""]
        head = ["attribute", "positives", "feature", "AUROC", "F1", "linear probe", "floor"]
        tokens = any("tokens" in entry["streams"][stream] for entry in result["attributes"])
        head += (
            ["over tokens", "AUROC", "F1", "linear probe", "floor", "AUROC of the feature of images"] if tokens else []
        )
        lines += _markdown_table(head, [_stream_cells(entry, stream, tokens, books) for entry in result["attributes"]])
    lines += ["", "## Every dictionary and step: attributes with a feature, means over attributes", ""]
    names = ("image_auroc", "image_f1", "image_probe_auroc", "image_channel_auroc", "token_auroc", "token_f1", "probe_auroc",
             "channel_auroc")  # fmt: skip
    head = [
        "dictionary",
        "step",
        "with a feature",
        "AUROC",
        "F1",
        "linear probe",
        "floor",
        "over tokens: AUROC",
        "F1",
        "linear probe",
        "floor",
    ]
    lines += _markdown_table(head, [
        [c["dictionary"], str(c["step"]), f"{c['with_feature']} of {c['of']}", *(_figure(c[name]) for name in names)]
        for c in result["by_dictionary"]
    ])  # fmt: skip
    return "\n".join(lines) + "\n"


def _best_cells(entry: Mapping[str, Any], books: Books) -> list[str]:
    best, names = entry["best"], [f"{entry['group']} {entry['value']}", str(entry["present"])]
    if best is None:
        return [*names, "–", "–", "–", "–", "–", "–"]
    return [
        *names,
        best["stream"],
        feature_name(best, books),
        *(_figure(best[key]) for key in ("auroc", "f1", "ceiling", "floor")),
    ]


def _stream_cells(entry: Mapping[str, Any], stream: str, tokens: bool, books: Books) -> list[str]:
    found = entry["streams"][stream]
    cells = [f"{entry['group']} {entry['value']}", str(entry["present"]), feature_name(found["images"], books)]
    cells += _figures(found["images"], found["images_ceiling"], found["images_floor"]).split()
    own = found.get("tokens")
    if own is not None:
        cells += [feature_name(own["chosen_by_tokens"], books)]
        cells += [
            *_figures(own["chosen_by_tokens"], own["ceiling"], own["floor"]).split(),
            _figure(own["chosen_by_images"]),
        ]
    elif tokens:
        cells += ["–"] * 6
    return cells


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *escaped)]
