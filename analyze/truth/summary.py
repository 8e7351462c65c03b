"""The truth table in short: the best of all sites and steps for every attribute and stream, and every dictionary and step in a line.

The best is chosen by AUROC on the half that choices are made on; what is said of it was measured on the other.
"""

from collections.abc import Iterable
from typing import Any

from analyze.truth.attributes import POPULATIONS
from analyze.truth.table import Findings, rounded

Row = dict[str, Any]


def summary(findings: Findings, rows: list[Row], threshold: float) -> dict[str, Any]:
    """`attributes`, `verdict`, `overall`, `by_dictionary` and `populations`: what `truth.json` holds beside its settings."""
    judges = findings.judges
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    count = len(judges.attributes)
    attributes = []
    for number, attribute in enumerate(judges.attributes):
        own = rows[number::count]  # every dictionary and step has a row for each attribute, in their order
        known, scored = judges.defined[:, number], judges.halves.score
        present = int((judges.shown[:, number] & known & scored).sum())
        of_stream = {stream: _stream_entry([row for row in own if row["stream"] == stream]) for stream in streams}
        attributes.append(
            {
                "group": attribute.group,
                "value": attribute.value,
                "present": present,
                "absent": int((known & scored).sum()) - present,
                "streams": of_stream,
                "best": _overall(of_stream),
            }
        )
    verdict = {stream: _verdict(attributes, stream, threshold) for stream in streams}
    return {
        "attributes": attributes,
        "verdict": verdict,
        "overall": _verdict(attributes, None, threshold),
        "by_dictionary": [_line(rows[start : start + count], threshold) for start in range(0, len(rows), count)],
        "populations": dict(POPULATIONS) if judges.scenes is not None else {},
    }


def _stream_entry(rows: list[Row]) -> dict[str, Any]:
    by_images = _best(rows, "image_selection")
    entry: dict[str, Any] = {"images": _place(by_images, "image")}
    probe, channel = _best(rows, "image_probe_selection"), _best(rows, "image_channel_selection")
    entry["images_ceiling"], entry["images_floor"] = _bound(probe, "image_probe"), _bound(channel, "image_channel")
    by_tokens = _best(rows, "token_selection")
    probe, channel = _best(rows, "probe_selection"), _best(rows, "channel_selection")
    if by_tokens is not None and probe is not None and channel is not None:
        entry["tokens"] = {
            "chosen_by_tokens": _place(by_tokens, "token"),
            "chosen_by_images": None if by_images is None else by_images["token_auroc_of_image_feature"],
            "ceiling": _bound(probe, "probe"),
            "floor": _bound(channel, "channel"),
        }
    return entry


def _best(rows: Iterable[Row], key: str) -> Row | None:
    """The row with the highest value, the first of equals; None where no row has one."""
    having = [row for row in rows if row[key] is not None]
    return max(having, key=lambda row: row[key]) if having else None


def _place(row: Row | None, kind: str) -> Row | None:
    if row is None:
        return None
    found = {key: row[key] for key in ("dictionary", "site", "step")}
    return found | {key: row[f"{kind}_{key}"] for key in ("feature", "selection", "auroc", "f1", "threshold")}


def _bound(row: Row | None, kind: str) -> Row | None:
    if row is None:
        return None
    found = {key: row[key] for key in ("site", "step")} | {key: row[f"{kind}_{key}"] for key in ("auroc", "f1")}
    return found | ({"channel": row[kind]} if kind.endswith("channel") else {})


def _overall(streams: dict[str, dict[str, Any]]) -> Row | None:
    """The best feature of any stream over images, beside the linear probe and floor of its stream."""
    having = [stream for stream, entry in streams.items() if entry["images"] is not None]
    if not having:
        return None
    stream = max(having, key=lambda name: streams[name]["images"]["selection"])
    entry = streams[stream]
    bounds: Row = {name: (entry[f"images_{name}"] or {}).get("auroc") for name in ("ceiling", "floor")}
    return {**entry["images"], "stream": stream, **bounds}


def _verdict(attributes: list[dict[str, Any]], stream: str | None, threshold: float) -> dict[str, Any]:
    """How many attributes have a feature of the stream (None: of any, the one that was selected), and which have none."""
    with_feature, without, untested = 0, [], []
    for entry in attributes:
        name = f"{entry['group']} {entry['value']}"
        found = entry["best"] if stream is None else entry["streams"][stream]["images"]
        if found is None:
            untested.append(name)
        elif found["auroc"] >= threshold:
            with_feature += 1
        else:
            without.append(name)
    return {
        "with_feature": with_feature,
        "of": len(attributes) - len(untested),
        "without": without,
        "untested": untested,
    }


def _line(rows: list[Row], threshold: float) -> Row:
    """One dictionary at one step: how many attributes a feature of its own stands for, and mean figures over attributes."""
    found = {key: rows[0][key] for key in ("dictionary", "site", "stream", "step")}
    judged = [row for row in rows if row["image_auroc"] is not None]
    found["of"] = len(judged)
    found["with_feature"] = sum(row["image_auroc"] >= threshold for row in judged)
    names = ("image_auroc", "image_f1", "image_probe_auroc", "image_channel_auroc", "token_auroc", "token_f1", "probe_auroc",
             "channel_auroc")  # fmt: skip
    return found | {name: _mean(row[name] for row in rows) for name in names}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return rounded(sum(there) / len(there)) if there else None
