"""The labels of one dictionary: read, looked up, added to, merged, saved beside it.

    book = LabelBook.of(subject)                      # or of the dictionary's folder or .pt file
    book.text(12)                                     # "red circles", or None
    book.set(12, "red circles", "ada", datetime.now(UTC))
    book.save()                                       # adds to the file; whatever others wrote meanwhile stays

The file and the rule by which two of them are merged are `store.labels`: labels travel with push and pull.
"""

import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from analyze.inputs import Subject
from store.errors import MismatchError, UsageError
from store.labels import TIME, Label, add_labels, labels_file, latest, read_labels


class LabelBook:
    """What the features of a dictionary are called, and by whom."""

    def __init__(self, path: Path | None, n_features: int | None = None, labels: Iterable[Label] = ()) -> None:
        """`path`: the label file; None for a dictionary that lies nowhere, whose labels cannot be saved."""
        self.path, self.n_features = path, n_features
        self._labels = frozenset(labels)
        self._texts: dict[int, str] | None = None
        self._refuse_beyond(self._labels, str(path))

    @classmethod
    def of(cls, source: Subject | Path, n_features: int | None = None) -> "LabelBook":
        """The labels of a subject, or of the dictionary at a place (its folder, or its `.pt` file); empty where there are none.

        `n_features`: how many features a place's dictionary has, where that is to be checked.  Labels of features that it has
        not stay in the file and are left out here, with a note.  `DamagedError`, `ForeignError` for a file that holds no
        labels of ours.
        """
        if isinstance(source, Path):
            path: Path | None = labels_file(source)
        else:
            n_features = source.n_features
            path = None if source.place is None else labels_file(source.place)
        if path is None:
            return cls(None, n_features)
        there = read_labels(path)
        own = frozenset(_own(there, n_features))
        if beyond := sorted({label.feature for label in there - own}):
            named = ", ".join(map(str, beyond[:5])) + (f" and {len(beyond) - 5:,} more" if beyond[5:] else "")
            print(
                f"note: {path} names features that the dictionary has not ({named}; it has 0 to {(n_features or 0) - 1}): "
                "they stay in the file and are not used; if all of it is of another dictionary, move it there",
                file=sys.stderr,  # what is exported goes to standard output
            )
        return cls(path, n_features, own)

    @property
    def labels(self) -> list[Label]:
        """Everything that was ever said, by feature, then by time."""
        return sorted(self._labels)

    def text(self, feature: int) -> str | None:
        """What a feature is called now; None where it has no label."""
        return self._shown().get(feature)

    def texts(self) -> dict[int, str]:
        """Feature -> what it is called now, of those that have a label."""
        return dict(self._shown())

    def set(self, feature: int, text: str, author: str, time: datetime) -> None:
        """Call a feature `text` from now on; an empty text takes its label away.  The same text again changes nothing.

        Where a label of the feature is as late as `time` already (its author's clock is ahead, or both are of one second), this
        one is dated a second after it, so that what is said last is what is shown.  `UsageError` for what cannot be a label.
        """
        if text == (self.text(feature) or ""):
            return
        moment = time.astimezone(UTC).strftime(TIME)
        before = max((label.time for label in self._labels if label.feature == feature), default="")
        if before >= moment:
            moment = (datetime.strptime(before, TIME).replace(tzinfo=UTC) + timedelta(seconds=1)).strftime(TIME)
        try:
            label = Label(feature, moment, author, text)
        except ValueError as error:
            raise UsageError(f"no label for feature {feature}: {error}") from None
        self._add((label,), "the label")

    def merge(self, other: "LabelBook | Iterable[Label]") -> int:
        """Add what another book, or a list of labels, holds; returns how many labels were new."""
        before = len(self._labels)
        where = str(other.path) if isinstance(other, LabelBook) else "what is merged"
        self._add(other.labels if isinstance(other, LabelBook) else other, where)
        return len(self._labels) - before

    def save(self) -> int:
        """Add everything to the file; returns how many labels were new there.

        What others wrote there since is kept, and is in this book then too.
        """
        if self.path is None:
            raise UsageError("these labels belong to a dictionary that lies in no folder: save it first")
        there, new = add_labels(self.path, self._labels)
        self._labels, self._texts = frozenset(_own(there, self.n_features)), None
        return new

    def _shown(self) -> dict[int, str]:
        if self._texts is None:
            self._texts = latest(self._labels)
        return self._texts

    def _add(self, labels: Iterable[Label], where: str) -> None:
        new = frozenset(labels)
        self._refuse_beyond(new, where)
        self._labels, self._texts = self._labels | new, None

    def _refuse_beyond(self, labels: Iterable[Label], where: str) -> None:
        highest = max((label.feature for label in labels), default=-1)
        if self.n_features is not None and highest >= self.n_features:
            raise MismatchError(
                f"{where} names feature {highest}, and the dictionary has features 0 to {self.n_features - 1}: "
                "these are labels of another dictionary; put them beside that one, or move the file away"
            )


def _own(labels: Iterable[Label], n_features: int | None) -> Iterable[Label]:
    """The labels of features that a dictionary of so many has."""
    return (label for label in labels if n_features is None or label.feature < n_features)


def name_of(subject: Subject, feature: int, book: LabelBook | None) -> str:
    """How a feature is named wherever it is listed: `img_3/12 · red circles`, or `img_3/12` without a label."""
    text = None if book is None else book.text(feature)
    return f"{subject.name}/{feature}" + (f" · {text}" if text else "")
