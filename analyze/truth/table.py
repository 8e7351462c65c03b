"""The truth table as rows, as a summary and as text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analyze.inputs import Subject
from analyze.truth.attributes import ATTRIBUTES, POPULATIONS, Scene, image_labels
from analyze.truth.choosing import Choice
from analyze.truth.halves import Halves
from analyze.truth.tokens import TokenTruth
from store.sites import Site


@dataclass
class Findings:
    """Everything that was found, before the best is picked."""

    scenes: Sequence[Scene]
    halves: Halves
    images: dict[tuple[Subject, int], Choice] = field(default_factory=dict)
    tokens: dict[tuple[Subject, int], TokenTruth] = field(default_factory=dict)
    bounds: dict[tuple[Site, int], tuple[Choice, Choice]] = field(default_factory=dict)


def found_rows(findings: Findings) -> list[dict[str, Any]]:
    """One row for every dictionary, step and attribute: what `truth.parquet` holds; None where nothing can be said."""
    return [
        _row(findings, subject, step, number) for subject, step in findings.images for number in range(len(ATTRIBUTES))
    ]


def _row(findings: Findings, subject: Subject, step: int, number: int) -> dict[str, Any]:
    over_images = findings.images[subject, step]
    row: dict[str, Any] = {
        "dictionary": subject.name,
        "site": str(subject.site),
        "stream": subject.site.stream,
        "step": step,
        "group": ATTRIBUTES[number].group,
        "value": ATTRIBUTES[number].value,
        **_choice("image", over_images, number),
        **_choice("token", None, number),
        "token_auroc_of_image_feature": None,
        "probe_selection": None,
        "probe_auroc": None,
        "channel": None,
        "channel_selection": None,
        "channel_auroc": None,
    }
    tokens = findings.tokens.get((subject, step))
    if tokens is not None:
        probe, channel = findings.bounds[subject.site, step]
        row |= _choice("token", tokens.choice, number)
        row["token_auroc_of_image_feature"] = _number(tokens.of_image_feature[number])
        row["probe_selection"], row["probe_auroc"] = _number(probe.selection[number]), _number(probe.scored[number])
        if not np.isnan(channel.selection[number]):
            row["channel"] = int(channel.column[number])
        row["channel_selection"], row["channel_auroc"] = (
            _number(channel.selection[number]),
            _number(channel.scored[number]),
        )
    return row


def _choice(kind: str, choice: Choice | None, number: int) -> dict[str, Any]:
    if choice is None or np.isnan(choice.selection[number]):
        return {f"{kind}_feature": None, f"{kind}_selection": None, f"{kind}_auroc": None}
    return {
        f"{kind}_feature": int(choice.column[number]),
        f"{kind}_selection": _number(choice.selection[number]),
        f"{kind}_auroc": _number(choice.scored[number]),
    }


def _number(value: float) -> float | None:
    """As it is written down: 6 digits, None for NaN."""
    return None if np.isnan(value) else round(float(value), 6)


def summary(findings: Findings, threshold: float) -> dict[str, Any]:
    """The table: for every attribute and stream the best of all sites and steps by the half that choices are made on."""
    rows = found_rows(findings)
    shown, defined = image_labels(findings.scenes)
    scored = findings.halves.score
    attributes = []
    for number, attribute in enumerate(ATTRIBUTES):
        own = [row for row in rows if (row["group"], row["value"]) == (attribute.group, attribute.value)]
        present = int((shown[:, number] & defined[:, number] & scored).sum())
        entry: dict[str, Any] = {
            "group": attribute.group,
            "value": attribute.value,
            "present": present,
            "absent": int((defined[:, number] & scored).sum()) - present,
            "streams": {},
        }
        for stream in dict.fromkeys(row["stream"] for row in rows):
            entry["streams"][stream] = _stream_entry([row for row in own if row["stream"] == stream])
        attributes.append(entry)
    verdict = {
        stream: _verdict(attributes, stream, threshold) for stream in dict.fromkeys(row["stream"] for row in rows)
    }
    return {"attributes": attributes, "verdict": verdict, "populations": dict(POPULATIONS)}


def _stream_entry(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_images = _best(rows, "image_selection")
    entry: dict[str, Any] = {"images": _place(by_images, "image")}
    by_tokens = _best(rows, "token_selection")
    probe, channel = _best(rows, "probe_selection"), _best(rows, "channel_selection")
    if by_tokens is not None and probe is not None and channel is not None:
        entry["tokens"] = {
            "chosen_by_tokens": _place(by_tokens, "token"),
            "chosen_by_images": None if by_images is None else by_images["token_auroc_of_image_feature"],
            "ceiling": {key: probe[key] for key in ("site", "step")} | {"auroc": probe["probe_auroc"]},
            "floor": {key: channel[key] for key in ("site", "step", "channel")} | {"auroc": channel["channel_auroc"]},
        }
    return entry


def _best(rows: Iterable[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """The row with the highest value, the first of equals; None where no row has one."""
    having = [row for row in rows if row[key] is not None]
    return max(having, key=lambda row: row[key]) if having else None


def _place(row: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
    if row is None:
        return None
    return {key: row[key] for key in ("dictionary", "site", "step")} | {
        "feature": row[f"{kind}_feature"],
        "selection": row[f"{kind}_selection"],
        "auroc": row[f"{kind}_auroc"],
    }


def _verdict(attributes: list[dict[str, Any]], stream: str, threshold: float) -> dict[str, Any]:
    with_feature, without, untested = 0, [], []
    for entry in attributes:
        name = f"{entry['group']} {entry['value']}"
        best = entry["streams"][stream]["images"]
        if best is None:
            untested.append(name)
        elif best["auroc"] >= threshold:
            with_feature += 1
        else:
            without.append(name)
    return {
        "with_feature": with_feature,
        "of": len(attributes) - len(untested),
        "without": without,
        "untested": untested,
    }


def verdict_line(result: dict[str, Any]) -> str:
    """`img: 21 of 28 attributes have a feature with AUROC >= 0.9; txt: 27 of 28`."""
    parts: list[str] = []
    for stream, verdict in result["verdict"].items():
        what = f" attributes have a feature with AUROC >= {result['settings']['threshold']:g}" if not parts else ""
        parts.append(f"{stream}: {verdict['with_feature']} of {verdict['of']}{what}")
    return "; ".join(parts)


def printed(result: dict[str, Any]) -> str:
    """The table for a terminal, 120 columns."""
    streams = list(result["verdict"])
    images = result["images"]
    which = "held-out images" if result["settings"]["images"] == "val" else "images"
    lines = [
        f"truth: features chosen on {images['chosen_on']} {which}, scored on {images['scored_on']} others"
        + (
            f" ({images['left_out']} do not show what their prompt says and are left out)" if images["left_out"] else ""
        ),
        "",
        f"{'':22}{'over images':<{31 * len(streams)}}over image tokens",
        f"{'attribute':<22}"
        + "".join(f"{stream + ' feature':<24}{'AUROC':<7}" for stream in streams)
        + f"{'feature':<9}{'(above)':<9}{'probe':<9}channel",
    ]
    for entry in result["attributes"]:
        line = f"{entry['group'] + ' ' + entry['value']:<22}"
        for stream in streams:
            line += _cell(entry["streams"][stream]["images"])
        tokens = entry["streams"].get("img", {}).get("tokens")
        if tokens:
            values = (
                tokens["chosen_by_tokens"]["auroc"],
                tokens["chosen_by_images"],
                tokens["ceiling"]["auroc"],
                tokens["floor"]["auroc"],
            )
            line += "".join(f"{'–':<9}" if value is None else f"{value:<9.3f}" for value in values)
        lines.append(line.rstrip())
    lines.append("")
    for stream, verdict in result["verdict"].items():
        if verdict["without"]:
            lines.append(f"{stream}: no feature stands for {', '.join(verdict['without'])}")
        if verdict["untested"]:
            lines.append(f"{stream}: too few images to judge {', '.join(verdict['untested'])}")
    return "\n".join([*lines, verdict_line(result)])


def _cell(place: dict[str, Any] | None) -> str:
    if place is None:
        return f"{'–':<24}{'':<7}"
    return f"{place['dictionary']} step {place['step']} f{place['feature']}"[:23].ljust(24) + f"{place['auroc']:<7.3f}"
