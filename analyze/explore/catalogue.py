"""The features of an analysis to look through: listed, searched by what is known of them, shown with their top images.

What is searched: the number, the label, the attribute that a feature stands for (where the truth is known), the text tokens
that it fires on most, and the prompts of its top images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from analyze.explore.settings import ExploreSettings
from analyze.features.coherence import coherence_table
from analyze.inputs import Analysis, Subject, open_analysis
from analyze.labels.book import LabelBook
from analyze.pictures.examples import Example, gather_examples
from analyze.prompts import prompt_texts
from analyze.report.columns import FeatureColumns
from analyze.report.findings import Truth, judged_features, read_truth
from analyze.scoring.matrices import step_folder
from analyze.settings import Inputs
from store.errors import UsageError

Order = Literal["match", "interest", "max", "density", "coherence", "number"]
ORDERS: tuple[Order, ...] = get_args(Order)
TOP = 8
"""top images of a feature that are looked at"""


@dataclass(frozen=True)
class Entry:
    """One feature as it is listed."""

    feature: int
    label: str | None
    """what somebody called it"""
    says: str
    """what it fires on by the truth table, `fires on red patches`; empty where that is not known"""
    words: tuple[str, ...]
    """text tokens that it fires on most; none of images"""
    numbers: dict[str, float]
    """interest, density, image_share, max, coherence (NaN where there is none)"""


@dataclass(frozen=True)
class Listing:
    """One dictionary at one step, its features as columns."""

    subject: Subject
    step: int
    columns: FeatureColumns
    coherence: Float[np.ndarray, " feature"]
    labels: dict[int, str]
    says: dict[int, str]
    named: Sequence[str]
    """of each feature number, label, attribute and words, in small letters"""
    prompts: Sequence[str]
    """of each image, in small letters"""

    def entry(self, feature: int) -> Entry:
        """One feature."""
        words = tuple(self.columns.words[feature]) if self.columns.words else ()
        numbers = {name: float(values[feature]) for name, values in self.columns.numbers.items()}
        numbers["coherence"] = float(self.coherence[feature])
        return Entry(feature, self.labels.get(feature), self.says.get(feature, ""), words, numbers)

    def example(self, feature: int) -> str:
        """The prompt of its top image; empty for a dead feature."""
        image = int(self.columns.images[feature, 0])
        return self.prompts[image] if image >= 0 else ""

    def found(self, text: str, order: Order, most: int) -> tuple[list[Entry], int]:
        """The first `most` alive features that the words of the text lead to, and how many there are in all.

        A word leads to what has a word that begins so.  By `match` come first those whose name (number, label, attribute, tokens)
        has all of them (without words: those that have a label or stand for an attribute), then those with more such prompts among
        their top images, then the more interesting ones.  A number leads to that feature, also to a dead one.
        """
        words = text.lower().split()
        alive = self.columns.images_active > 0
        if len(words) == 1 and words[0].isdigit():
            feature = int(words[0])
            return ([self.entry(feature)], 1) if feature < self.columns.n_features else ([], 0)
        known = {*self.labels, *(feature for feature, text in self.says.items() if text)}
        named = np.array([_begins(hay, words) and (bool(words) or n in known) for n, hay in enumerate(self.named)])
        shown = np.array([_begins(prompt, words) for prompt in self.prompts])
        images = self.columns.images
        matches = np.where(images >= 0, shown[np.maximum(images, 0)], False).sum(1)
        hits = np.flatnonzero(alive & (named | (matches > 0) if words else True))
        interest = self.columns.numbers["interest"][hits]
        if order == "number":
            ranked = hits
        elif order == "match":
            ranked = hits[np.lexsort((hits, -interest, -matches[hits], ~named[hits]))]
        else:
            values = self.coherence[hits] if order == "coherence" else self.columns.numbers[order][hits]
            ranked = hits[np.lexsort((hits, -np.nan_to_num(values, nan=-np.inf)))]
        return [self.entry(int(feature)) for feature in ranked[:most]], len(hits)


def _begins(text: str, words: Sequence[str]) -> bool:
    """Whether for each of `words` there is one in the text that begins with it."""
    return all(f" {word}" in f" {text}" for word in words)


@dataclass
class Catalogue:
    """All dictionaries and steps that an analysis has scores of."""

    analysis: Analysis
    there: dict[str, tuple[int, ...]]
    """dictionary -> its steps, those that have scores"""
    truth: Truth | None
    _listings: dict[tuple[str, int], Listing] = field(default_factory=dict, repr=False)
    _examples: dict[tuple[str, int, int], list[Example]] = field(default_factory=dict, repr=False)

    def subject(self, name: str) -> Subject:
        """The dictionary of that name; `UsageError` where there is none."""
        for subject in self.analysis.subjects:
            if subject.name == name:
                return subject
        raise UsageError(f"there is no dictionary {name!r}; there are {', '.join(self.there)}")

    def listing(self, name: str, step: int) -> Listing:
        """The features of a dictionary at a step, read when they are first asked for."""
        if (name, step) not in self._listings:
            self._listings[name, step] = self._read(self.subject(name), step)
        return self._listings[name, step]

    def examples(self, name: str, step: int, feature: int) -> list[Example]:
        """The top images of a feature, one a prompt, with the heat at every token."""
        if (name, step, feature) not in self._examples:
            subject = self.subject(name)
            table = self.analysis.matrix(subject, step).features()
            self._examples[name, step, feature] = gather_examples(self.analysis, subject, step, table, [feature], TOP)[
                feature
            ]
        return self._examples[name, step, feature]

    def _read(self, subject: Subject, step: int) -> Listing:
        columns = FeatureColumns.of(self.analysis.matrix(subject, step).features(), TOP)
        coherence, table = np.full(columns.n_features, np.nan), coherence_table(self.analysis, subject)
        if table is not None:
            own = table["step"].to_numpy() == step
            values = table["coherence"].to_numpy(zero_copy_only=False).astype(np.float64)
            coherence[table["feature"].to_numpy()[own]] = values[own]
        labels = LabelBook.of(subject).texts()
        judged = judged_features(self.truth, subject, step)
        says = {
            feature: "; ".join(entry["says"] for entry in entries if entry["stands"])
            for feature, entries in judged.items()
        }
        prompts = [prompt.lower() for prompt in prompt_texts(self.analysis.store)]
        return Listing(subject, step, columns, coherence, labels, says, _named(columns, labels, says), prompts)


def _named(columns: FeatureColumns, labels: dict[int, str], says: dict[int, str]) -> list[str]:
    words = columns.words or [[]] * columns.n_features
    return [
        " ".join([str(feature), labels.get(feature, ""), says.get(feature, ""), *words[feature]]).lower()
        for feature in range(columns.n_features)
    ]


def open_catalogue(settings: ExploreSettings) -> Catalogue | None:
    """The features that can be looked through; None without an analysis.

    Errors: `UsageError` for a folder that holds no analysis or scores of none of these dictionaries, `MismatchError` for the
    analysis of another store or of other dictionaries.
    """
    if settings.analysis is None:
        return None
    if not (settings.analysis / "run.json").is_file():
        raise UsageError(
            f"--analysis {settings.analysis} holds no analysis: give the --out of python -m analyze scores"
        )
    analysis = open_analysis(
        Inputs(store=settings.store, dictionaries=Path(settings.dictionaries), out=settings.analysis)
    )
    there: dict[str, tuple[int, ...]] = {}
    for subject in analysis.subjects:
        steps = tuple(step for step in analysis.steps if step_folder(analysis.out, subject.name, step).is_dir())
        for step in steps:
            analysis.matrix(subject, step)  # refuses scores of another dictionary
        if steps:
            there[subject.name] = steps
    if not there:
        raise UsageError(
            f"--analysis {settings.analysis} has scores of none of these dictionaries: run python -m analyze scores over them"
        )
    return Catalogue(analysis, there, read_truth(analysis))
