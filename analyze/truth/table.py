"""The truth table as rows: one for every dictionary, step and attribute."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analyze.inputs import Subject
from analyze.truth.choosing import Choice
from analyze.truth.judges import Judges
from analyze.truth.tokens import TokenTruth
from store.sites import Site


@dataclass
class Findings:
    """Everything that was found, before the best is picked."""

    judges: Judges
    images: dict[tuple[Subject, int], Choice] = field(default_factory=dict)
    tokens: dict[tuple[Subject, int], TokenTruth] = field(default_factory=dict)
    image_bounds: dict[tuple[Site, int], tuple[Choice, Choice]] = field(default_factory=dict)
    """linear probe and floor over images"""
    token_bounds: dict[tuple[Site, int], tuple[Choice, Choice]] = field(default_factory=dict)
    """linear probe and floor over tokens"""
    channels: dict[tuple[Site, int], Callable[[int], str]] = field(default_factory=dict)
    """what the columns of the floor over images are"""


def found_rows(findings: Findings) -> list[dict[str, Any]]:
    """What `truth.parquet` holds; None where nothing can be said."""
    count = range(len(findings.judges.attributes))
    return [_row(findings, subject, step, number) for subject, step in findings.images for number in count]


def _row(findings: Findings, subject: Subject, step: int, number: int) -> dict[str, Any]:
    attribute, place = findings.judges.attributes[number], (subject.site, step)
    probe, channel = findings.image_bounds[place]
    tokens = findings.tokens.get((subject, step))
    row: dict[str, Any] = {
        "dictionary": subject.name,
        "site": str(subject.site),
        "stream": subject.site.stream,
        "step": step,
        "group": attribute.group,
        "value": attribute.value,
        **_of_feature("image", findings.images[subject, step], number),
        **_of_bound("image_probe", probe, number),
        "image_channel": findings.channels[place](int(channel.column[number])) if _there(channel, number) else None,
        **_of_bound("image_channel", channel, number),
        **_of_feature("token", None if tokens is None else tokens.choice, number),
        "token_auroc_of_image_feature": None if tokens is None else rounded(tokens.of_image_feature[number]),
    }
    over, under = findings.token_bounds.get(place, (None, None))
    return row | {
        **_of_bound("probe", over, number),
        "channel": int(under.column[number]) if under is not None and _there(under, number) else None,
        **_of_bound("channel", under, number),
    }


def _there(choice: Choice, number: int) -> bool:
    return not np.isnan(choice.selection[number])


def _of_feature(kind: str, choice: Choice | None, number: int) -> dict[str, Any]:
    feature = int(choice.column[number]) if choice is not None and _there(choice, number) else None
    return {
        f"{kind}_feature": feature,
        **_of_bound(kind, choice, number),
        f"{kind}_threshold": None if choice is None or feature is None else rounded(choice.threshold[number]),
    }


def _of_bound(kind: str, choice: Choice | None, number: int) -> dict[str, Any]:
    if choice is None or not _there(choice, number):
        return {f"{kind}_selection": None, f"{kind}_auroc": None, f"{kind}_f1": None}
    return {
        f"{kind}_selection": rounded(choice.selection[number]),
        f"{kind}_auroc": rounded(choice.scored[number]),
        f"{kind}_f1": rounded(choice.f1[number]),
    }


def rounded(value: float) -> float | None:
    """As it is written down: 6 digits, None for NaN."""
    return None if np.isnan(value) else round(float(value), 6)


def verdict_line(result: Mapping[str, Any]) -> str:
    """`img: 21 of 28 attributes have a feature with AUROC >= 0.9; txt: 27 of 28`."""
    parts: list[str] = []
    for stream, verdict in result["verdict"].items():
        what = f" attributes have a feature with AUROC >= {result['settings']['threshold']:g}" if not parts else ""
        parts.append(f"{stream}: {verdict['with_feature']} of {verdict['of']}{what}")
    return "; ".join(parts)
