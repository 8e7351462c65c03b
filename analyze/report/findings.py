"""Which features a report shows, and what it says of them in plain words.

Where the truth is known, a dictionary shows the feature that each attribute chose, best first; every feature that the truth
table names is among them.  Elsewhere, or when those do not fill the page, the most interesting ones (`features.interest`).
What is best is always decided on the half of the images that choices are made on; the numbers shown are of the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze.inputs import Analysis, Subject
from analyze.labels.book import LabelBook, name_of
from analyze.pictures.words import fires_on, percent
from analyze.prompts import prompt_texts
from analyze.scoring.matrices import FEATURES
from analyze.truth.attributes import VALUES, Attribute
from analyze.truth.own import OWN_GROUP
from store.errors import MismatchError
from store.files import read_json

HEADLINES = 5
TABLES = ("truth", "attributes")
"""what `truth` calls its tables: of what the prompts say, and of a user's own attributes"""


@dataclass(frozen=True)
class Spotlight:
    """One feature worth showing, and what it was chosen for."""

    subject: Subject
    step: int
    feature: int
    attribute: Attribute | None = None
    selection: float | None = None
    """AUROC on the half that it was chosen on"""
    image_auroc: float | None = None
    """over images of the other half; None when it was chosen by tokens"""
    token_auroc: float | None = None
    """over the tokens of the attribute's population, on the other half"""

    @property
    def link(self) -> str:
        """Where its page is."""
        return feature_link(self.subject.name, self.step, self.feature)


def feature_link(dictionary: str, step: int, feature: int) -> str:
    """Where the page of a feature is: all that the report shows is in the part of the address after `#`."""
    return f"#/feature/{dictionary}/{step}/{feature}"


def figures(analysis: Analysis, subject: Subject, step: int, *columns: str) -> pa.Table:
    """Some columns of the feature table of a dictionary and step, without reading the others."""
    return pq.read_table(analysis.matrix(subject, step).folder / FEATURES, columns=list(columns))


@dataclass(frozen=True)
class Truth:
    """What `truth` left in the folder of results."""

    table: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def threshold(self) -> float:
        """From which AUROC on a feature stands for an attribute."""
        return float(self.table["settings"]["threshold"])


def read_truth(analysis: Analysis) -> Truth | None:
    """The truth table of this analysis, else that of a user's own attributes; None when neither was made.

    `MismatchError`, naming both, when it is of another store or of other dictionaries.
    """
    names = [name for name in TABLES if (analysis.out / f"{name}.json").exists()]
    if not names:
        return None
    path = analysis.out / f"{names[0]}.json"
    table = read_json(path)
    if table.get("store") != analysis.store.id:
        raise MismatchError(
            f"{path} is of store {table.get('store')}, not of {analysis.store.path}, which is {analysis.store.id}: "
            "run python -m analyze truth again, or delete it"
        )
    for subject in analysis.subjects:
        judged = table.get("dictionaries", {}).get(subject.name, subject.identity)
        if judged != subject.identity:
            raise MismatchError(
                f"{path} judges another dictionary {subject.name} ({judged[:16]}…) than the one given "
                f"({subject.identity[:16]}…): run python -m analyze truth again, or delete it"
            )
    return Truth(table, pq.read_table(path.with_suffix(".parquet")).to_pylist())


def spotlights(analysis: Analysis, subject: Subject, truth: Truth | None, best: int) -> list[Spotlight]:
    """The features of one dictionary to show, best first: at least `best` where as many are alive."""
    chosen = [] if truth is None else _of_truth(subject, truth, analysis.steps, best)
    taken = {(spot.step, spot.feature) for spot in chosen}
    for step, feature in _interesting(analysis, subject, best + len(taken)) if len(chosen) < best else []:
        if len(chosen) < best and (step, feature) not in taken:
            chosen.append(Spotlight(subject, step, feature))
            taken.add((step, feature))
    return chosen


def _of_truth(subject: Subject, truth: Truth, steps: Sequence[int], best: int) -> list[Spotlight]:
    own = [row for row in truth.rows if row["dictionary"] == subject.name and row["step"] in steps]
    by_attribute: dict[Attribute, list[Spotlight]] = {}
    for row in own:
        spot = _by_images(subject, row)
        if spot is not None:
            by_attribute.setdefault(Attribute(row["group"], row["value"]), []).append(spot)
    ranked = sorted((max(spots, key=_selection) for spots in by_attribute.values()), key=_selection, reverse=True)
    named = [spot for entry in truth.table["attributes"] for spot in _named(subject, entry, own)]
    found: dict[tuple[int, int], Spotlight] = {}
    for spot in [*ranked[:best], *named]:
        if spot.step in steps:
            found.setdefault((spot.step, spot.feature), spot)
    return sorted(found.values(), key=_selection, reverse=True)


def _named(subject: Subject, entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[Spotlight]:
    """The features of this dictionary (`rows` are its own) that the table names for an attribute: by images, by tokens."""
    spots = []
    stream = entry["streams"].get(subject.site.stream, {})
    attribute = Attribute(entry["group"], entry["value"])
    place = stream.get("images")
    if place is not None and place["dictionary"] == subject.name:
        step, key = place["step"], (entry["group"], entry["value"])
        own = [_by_images(subject, row) for row in rows if row["step"] == step and (row["group"], row["value"]) == key]
        spots += [spot for spot in own if spot is not None]
    place = stream.get("tokens", {}).get("chosen_by_tokens")
    if place is not None and place["dictionary"] == subject.name:
        spots.append(
            Spotlight(subject, place["step"], place["feature"], attribute, place["selection"], None, place["auroc"])
        )
    return spots


def _by_images(subject: Subject, row: dict[str, Any]) -> Spotlight | None:
    if row["image_feature"] is None:
        return None
    attribute = Attribute(row["group"], row["value"])
    over_tokens = row["token_auroc_of_image_feature"]
    selection, scored = row["image_selection"], row["image_auroc"]
    return Spotlight(subject, row["step"], row["image_feature"], attribute, selection, scored, over_tokens)


def _selection(spot: Spotlight) -> float:
    return spot.selection if spot.selection is not None else -1.0


def _interesting(analysis: Analysis, subject: Subject, most: int) -> list[tuple[int, int]]:
    """(step, feature) of the `most` most interesting alive features, one step for each feature."""
    ranked: list[tuple[float, int, int]] = []
    for step in analysis.steps:
        table = figures(analysis, subject, step, "feature", "alive", "interest")
        alive = np.flatnonzero(table["alive"].to_numpy(zero_copy_only=False))
        interest = table["interest"].to_numpy()[alive]
        best = np.lexsort((alive, -interest))[:most]
        ranked += [(-float(interest[place]), step, int(alive[place])) for place in best]
    seen: dict[int, int] = {}
    for _, step, feature in sorted(ranked):
        seen.setdefault(feature, step)
    return [(step, feature) for feature, step in seen.items()][:most]


def headlines(
    analysis: Analysis, truth: Truth | None, shown: Sequence[Spotlight], books: Mapping[str, LabelBook]
) -> list[tuple[Spotlight, str]]:
    """The five best findings, each with its sentence: of different kinds first, image features before text features.

    What was chosen for an attribute on one half of the images and does not stand for it on the other is no finding.
    """
    held_out = truth is not None and truth.table["settings"]["images"] == "val"
    threshold = 1.0 if truth is None else truth.threshold
    known = [spot for spot in shown if spot.attribute is not None and (spot.image_auroc or 0.0) >= threshold]
    ranked = sorted(known, key=lambda spot: (spot.subject.site.stream != "img", -_selection(spot)))
    chosen: list[Spotlight] = []
    for most_of_kind in (1, 2, HEADLINES):
        for spot in ranked:
            alike = [s for s in chosen if _kind(s) == _kind(spot)]
            streams = [s for s in chosen if s.subject.site.stream == spot.subject.site.stream]
            same = [s for s in alike if s.attribute == spot.attribute]
            most_of_stream = 3 if len({s.subject.site.stream for s in known}) > 1 else HEADLINES
            if len(chosen) < HEADLINES and len(alike) < most_of_kind and len(streams) < most_of_stream and not same:
                chosen.append(spot)
    rest = [spot for spot in shown if spot.attribute is None]
    chosen += rest[: HEADLINES - len(chosen)]
    return [(spot, sentence(analysis, spot, held_out, books.get(spot.subject.name))) for spot in chosen]


def _kind(spot: Spotlight) -> tuple[str, str]:
    return spot.subject.site.stream, spot.attribute.group if spot.attribute else ""


def sentence(analysis: Analysis, spot: Spotlight, held_out: bool, book: LabelBook | None) -> str:
    """`img_3/412 at step 1 fires on red patches: AUROC 0.97 over held-out images, 0.93 over object tokens`."""
    name = f"{name_of(spot.subject, spot.feature, book)} at step {spot.step}"
    if spot.attribute is None:
        table = figures(analysis, spot.subject, spot.step, "image_share", "density", "unique_image")
        row = table.slice(spot.feature, 1).to_pylist()[0]
        prompt = prompt_texts(analysis.store)[row["unique_image"][0]]
        prompt = prompt if len(prompt) <= 60 else prompt[:59].rstrip() + "…"
        shares = f"{percent(row['image_share'])} of the images and {percent(row['density'])} of the tokens"
        return f"{name} is active on {shares}, most on “{prompt}”"
    scores = []
    if spot.image_auroc is not None:
        scores.append(f"{spot.image_auroc:.2f} over {'held-out ' if held_out else ''}images")
    if spot.token_auroc is not None:
        scores.append(
            f"{spot.token_auroc:.2f} over {'background' if spot.attribute.group == 'background' else 'object'} tokens"
        )
    return f"{name} {what_it_does(spot.attribute, spot.subject.site.stream)}: AUROC {', '.join(scores)}"


def what_it_does(attribute: Attribute, stream: str) -> str:
    """`fires on red patches`; of a user's own attributes, whose words are not known, `fires on images that show cat`."""
    if attribute.value in dict(VALUES).get(attribute.group, ()):  # type: ignore[call-overload]
        return fires_on(attribute, stream)
    name = attribute.value if attribute.group == OWN_GROUP else f"{attribute.group} {attribute.value}"
    return f"fires on {'prompts of ' if stream == 'txt' else ''}images that show {name}"


def judged_features(truth: Truth | None, subject: Subject, step: int) -> dict[int, list[dict[str, Any]]]:
    """Feature -> the attributes that it tells best of its dictionary and step, each with its scores; {} without the truth."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in [] if truth is None else truth.rows:
        if (row["dictionary"], row["step"]) == (subject.name, step) and row["image_feature"] is not None:
            attribute = Attribute(row["group"], row["value"])
            entry = {
                "group": attribute.group,
                "value": attribute.value,
                "image_auroc": row["image_auroc"],
                "image_f1": row.get("image_f1"),
                "image_threshold": row.get("image_threshold"),
                "ceiling": row.get("image_probe_auroc"),
                "floor": row.get("image_channel_auroc"),
                "token_auroc": row["token_auroc_of_image_feature"],
                "says": what_it_does(attribute, subject.site.stream),
                "stands": truth is not None and (row["image_auroc"] or 0.0) >= truth.threshold,
            }
            found.setdefault(int(row["image_feature"]), []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: (-(entry["image_auroc"] or 0.0), entry["group"], entry["value"]))
    return found
