"""What was found out about some features on some images: kept in a file until all images are done, then merged into a table."""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from analyze.scoring.contenders import count_above
from analyze.scoring.images import ImageFacts
from analyze.scoring.kinds import KindStatistics
from analyze.scoring.reduction import Pane
from analyze.scoring.statistics import HISTOGRAM_BINS, RowStatistics
from analyze.scoring.top import TopImages, TopWords
from store.files import write_bytes
from store.strata import Group


class Findings:
    """Statistics over rows and images, top images, top words; merging is exact but for the last bits of sums."""

    def __init__(
        self,
        n_features: int,
        top: int,
        above: float,
        facts: ImageFacts,
        words: bool,
        kinds: tuple[Group, ...] = ("all",),
    ) -> None:
        self.above = above
        self.rows = RowStatistics(n_features)
        self.images_active = np.zeros(n_features, np.int64)
        self.max = np.zeros(n_features, np.float32)
        self.top = TopImages(n_features, top, None, above)
        self.unique = TopImages(n_features, top, facts.groups, above)
        self.words = TopWords(n_features, top) if words else None
        self.kinds = KindStatistics(kinds, n_features) if len(kinds) > 1 else None
        self.pictured = TopImages(n_features, top, facts.groups, above) if len(kinds) > 1 else None
        """of a joint site the images with the highest scores of image tokens, one of a prompt"""

    def take(self, pane: Pane, first_image: int) -> None:
        """Take in a finished pane of a block of images."""
        self.rows.merge(pane.rows)
        self._take_images(pane.scores)
        for top in (self.top, self.unique):
            top.add(first_image, pane.scores, pane.tokens)
        if self.words is not None and pane.words is not None:
            self.words.merge(pane.words)
        if self.kinds is not None and pane.kinds is not None:
            self.kinds.merge(pane.kinds)
        if self.pictured is not None and pane.image_tokens is not None:
            self.pictured.add(first_image, pane.by_kind["image"], pane.image_tokens)

    def _take_images(self, scores: Float[np.ndarray, "image feature"]) -> None:
        self.images_active += count_above(scores, self.above)
        self.max = np.maximum(self.max, scores.max(axis=0, initial=0))

    def merge(self, other: "Findings") -> None:
        """Take in what was found on other images."""
        self.rows.merge(other.rows)
        self.images_active += other.images_active
        self.max = np.maximum(self.max, other.max)
        self.top.merge(other.top)
        self.unique.merge(other.unique)
        if self.words is not None and other.words is not None:
            self.words.merge(other.words)
        if self.kinds is not None and other.kinds is not None:
            self.kinds.merge(other.kinds)
        if self.pictured is not None and other.pictured is not None:
            self.pictured.merge(other.pictured)

    def examples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, tokens and scores (rank, feature) that a feature is shown on, one of a prompt; -1 where there are no more.

        Best first; of a joint site first those whose image tokens it is active on, by these, then those of its words alone, by
        these: where words are strongest there may be nothing to see.
        """
        every = self.unique.result()
        if self.pictured is None:
            return every
        seen, groups = self.pictured.result(), self.unique.groups
        assert groups is not None
        known, other = (np.where(images >= 0, groups[images], -1) for images in (seen[0], every[0]))
        more = (every[0] >= 0) & ~(other[:, None] == known[None]).any(axis=1)
        there = np.concatenate([seen[0] >= 0, more])
        order = np.argsort(~there, axis=0, kind="stable")[: len(known)]
        listed = np.take_along_axis(there, order, axis=0)
        images, tokens, scores = (
            np.where(listed, np.take_along_axis(np.concatenate(pair), order, axis=0), -1)
            for pair in zip(seen, every, strict=True)
        )
        return images, tokens, scores

    def save(self, path: Path) -> None:
        """Publish as a file."""
        if self.words is not None:
            self.words.settle()
        arrays = {**self._arrays(), "rows": np.asarray([self.rows.rows], np.int64)}
        write_bytes(path, safetensors.numpy.save(arrays))

    def load(self, path: Path) -> bool:
        """Fill this one from a file; False where that is not there or not such a file."""
        try:
            arrays = safetensors.numpy.load(path.read_bytes())
        except (FileNotFoundError, safetensors.SafetensorError):
            return False
        mine = self._arrays()
        if set(arrays) != {*mine, "rows"} or any(arrays[name].shape != mine[name].shape for name in mine):
            return False
        self.rows.rows = int(arrays["rows"][0])
        for name, array in mine.items():
            array[:] = arrays[name]
        return True

    def _arrays(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {
            "histogram": self.rows.histogram, "total": self.rows.total, "squares": self.rows.squares,
            "images_active": self.images_active, "max": self.max, "top": self.top.keys, "top_token": self.top.where,
            "unique": self.unique.keys, "unique_token": self.unique.where,
        }  # fmt: skip
        if self.words is not None:
            found["words"] = self.words.keys
        if self.pictured is not None:
            found |= {"pictured": self.pictured.keys, "pictured_token": self.pictured.where}
        return found if self.kinds is None else {**found, **self.kinds.arrays()}


def bytes_of_feature(top: int, words: bool, kinds: int = 1) -> int:
    """What `Findings` hold of one feature; `kinds` of tokens told apart."""
    of_kinds = 28 * kinds + top * 12 if kinds > 1 else 0
    return HISTOGRAM_BINS * 8 + 8 + 8 + 8 + 4 + 2 * top * 12 + (top * 8 if words else 0) + of_kinds
