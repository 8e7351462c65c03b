"""How often and how strongly features of a joint site are active on each kind of its tokens: real text, padding, the image.

While an image of such a site is looked at, each kind of its tokens is a segment of its own, in the order of the sequence, so that
the maxima of the kinds come with the maxima of the images.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Integer

from analyze.scoring.contenders import count_above
from store.strata import CODES, Group


def kind_numbers(codes: Integer[np.ndarray, " row"], kinds: Sequence[Group]) -> Int[np.ndarray, " row"]:
    """The place among `kinds` of each row's kind, from its code in `CODES`."""
    place = np.full(len(CODES), -1)
    place[[CODES[kind] for kind in kinds]] = np.arange(len(kinds))
    return np.asarray(place[codes])


class KindStatistics:
    """Rows, rows and images where each feature is active, the sum of z there, and its maximum; for each of some kinds."""

    def __init__(self, kinds: Sequence[Group], n_features: int) -> None:
        self.kinds, shape = tuple(kinds), (len(kinds), n_features)
        self.rows = np.zeros(len(kinds), np.int64)
        self.active = np.zeros(shape, np.int64)
        self.total = np.zeros(shape, np.float64)
        self.images_active = np.zeros(shape, np.int64)
        self.max = np.zeros(shape, np.float32)

    def add_rows(self, kind: Int[np.ndarray, " row"]) -> None:
        """Count rows, active or not."""
        self.rows += np.bincount(kind, minlength=len(self.rows))

    def add_active(
        self,
        kind: Int[np.ndarray, " entry"],
        feature: Int[np.ndarray, " entry"],
        value: Float[np.ndarray, " entry"],
    ) -> None:
        """Count active entries, in any order."""
        place, shape = kind * self.active.shape[1] + feature, self.active.shape
        self.active += np.bincount(place, minlength=self.active.size).reshape(shape)
        self.total += np.bincount(place, value.astype(np.float64), self.active.size).reshape(shape)

    def add_sums(self, kind: int, active: Int[np.ndarray, " feature"], total: Float[np.ndarray, " feature"]) -> None:
        """The same of all active entries of one kind, added up already."""
        self.active[kind] += active
        self.total[kind] += total

    def take_images(self, scores: Float[np.ndarray, "segment feature"], above: float) -> None:
        """Take in the maxima of images, each image's kinds in their order; 0 where an image has no row of a kind."""
        for kind in range(len(self.rows)):
            mine = scores[kind :: len(self.rows)]
            self.images_active[kind] += count_above(mine, above)
            self.max[kind] = np.maximum(self.max[kind], mine.max(axis=0, initial=0))

    def merge(self, other: "KindStatistics") -> None:
        """Take in what was found on other images."""
        for name, mine in self.arrays().items():
            if name != "kind_max":
                mine += other.arrays()[name]
        self.max = np.maximum(self.max, other.max)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file keeps of it."""
        return {
            "kind_rows": self.rows, "kind_active": self.active, "kind_total": self.total,
            "kind_images_active": self.images_active, "kind_max": self.max,
        }  # fmt: skip


def kind_columns(panes: Sequence[KindStatistics]) -> dict[str, np.ndarray]:
    """The columns of a feature table, `density_image` and so on, from all features' panes in their order."""
    arrays = {name: np.concatenate([pane.arrays()[name] for pane in panes], axis=-1) for name in panes[0].arrays()}
    found: dict[str, np.ndarray] = {}
    for place, kind in enumerate(panes[0].kinds):
        active, rows = arrays["kind_active"][place], max(int(pane.rows[place]) for pane in panes)
        found |= {
            f"rows_active_{kind}": active,
            f"density_{kind}": active / max(rows, 1),
            f"images_active_{kind}": arrays["kind_images_active"][place],
            f"mean_active_{kind}": arrays["kind_total"][place] / np.maximum(active, 1),
            f"max_{kind}": arrays["kind_max"][place],
        }
    return found


def rows_by_kind(panes: Sequence[KindStatistics]) -> Mapping[Group, int]:
    """How many rows of each kind were looked at."""
    return {kind: max(int(pane.rows[place]) for pane in panes) for place, kind in enumerate(panes[0].kinds)}


def overall(
    scores: Float[np.ndarray, "segment feature"], tokens: Int[np.ndarray, "segment feature"], kinds: int
) -> tuple[Float[np.ndarray, "image feature"], Int[np.ndarray, "image feature"]]:
    """The maxima of whole images and their tokens, from those of their kinds; of equals the first in the sequence."""
    n_features = scores.shape[1]
    by_kind = scores.reshape(-1, kinds, n_features)
    best = by_kind.argmax(axis=1)[:, None]
    return (
        np.take_along_axis(by_kind, best, axis=1)[:, 0],
        np.take_along_axis(tokens.reshape(-1, kinds, n_features), best, axis=1)[:, 0],
    )
