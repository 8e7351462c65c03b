"""The figures of spatial, temporal and top scans: what is taken from each image, and what the images together say."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from analyze.scan.figures import Figures
from analyze.scan.passes import ChunkSums
from analyze.scan.replicates import Replicates, spread_of
from analyze.scan.settings import Pattern, Rank


class Inside:
    """A spatial scan: mean activation inside the region against outside, image by image, and the share of heat inside.

    The share of a feature says little where it is hardly ever active, so ranking by it takes `min_images` that are active inside;
    the share that a feature of equal activity everywhere would have stands beside it.
    """

    def __init__(
        self,
        images: Int[np.ndarray, " image"],
        groups: Int[np.ndarray, " image"],
        n_features: int,
        above: float,
        min_images: int = 1,
    ) -> None:
        self.images, self._above, self._min_images = images, above, min(min_images, len(images))
        self._inside, self._outside, self._difference = (Replicates(groups, n_features) for _ in range(3))
        self._heat_in, self._heat = np.zeros(n_features), np.zeros(n_features)
        self._active = np.zeros(n_features, np.int64)
        self._tokens_in = self._tokens = 0
        self._best = _Best(n_features)

    def add(self, found: ChunkSums) -> None:
        """Add the images of a chunk."""
        rows = np.searchsorted(self.images, found.images)
        inside = found.sum_in.astype(np.float64) / found.tokens_in[:, None]
        outside = found.sum_out.astype(np.float64) / found.tokens_out[:, None]
        for sums, values in ((self._inside, inside), (self._outside, outside), (self._difference, inside - outside)):
            sums.add(rows, values)
        heat_in = found.sum_in.sum(axis=0, dtype=np.float64)
        self._heat_in += heat_in
        self._heat += heat_in + found.sum_out.sum(axis=0, dtype=np.float64)
        self._active += (found.max_in > self._above).sum(axis=0)
        self._tokens_in += int(found.tokens_in.sum())
        self._tokens += int(found.tokens_in.sum() + found.tokens_out.sum())
        self._best.add(inside - outside, found)

    def figures(self, step: int, rank: Rank) -> Figures:
        """What all images say; only features with more inside than outside are listed."""
        spread = self._difference.result()
        share = np.divide(self._heat_in, self._heat, out=np.zeros_like(self._heat), where=self._heat > 0)
        by = {"difference": spread.mean, "effect": spread.effect, "share": share}[rank]
        count = len(by)
        columns = {
            "mean_inside": self._inside.result().mean, "mean_outside": self._outside.result().mean, "difference": spread.mean,
            "deviation": spread.deviation, "n": np.full(count, len(self.images)), "effect": spread.effect, "share": share,
            "share_base": np.full(count, self._tokens_in / self._tokens), "images_active": self._active,
        }  # fmt: skip
        listed = (spread.mean > 0) & (self._best.height > self._above)
        if rank == "share":
            listed &= self._active >= self._min_images
        return Figures(np.where(listed, by, np.nan), np.full(count, step), self._best.image, self._best.token, columns)


class Strongest:
    """A top scan of chosen tokens: the largest activation over them, image by image."""

    def __init__(
        self, images: Int[np.ndarray, " image"], groups: Int[np.ndarray, " image"], n_features: int, above: float
    ) -> None:
        self.images, self._above = images, above
        self._level = Replicates(groups, n_features)
        self._best = _Best(n_features)

    def add(self, found: ChunkSums) -> None:
        """Add the images of a chunk."""
        self._level.add(np.searchsorted(self.images, found.images), found.max_in)
        self._best.add(found.max_in, found)

    def figures(self, step: int, _rank: Rank) -> Figures:
        """What all images say."""
        spread, best = self._level.result(), self._best
        return _top(
            spread.mean, spread.deviation, len(self.images), best.height, step, best.image, best.token, self._above
        )


class _Best:
    """The image that says most, and its strongest token inside; ties go to the image that came first."""

    def __init__(self, n_features: int) -> None:
        self._value = np.full(n_features, -np.inf)
        self.image, self.token = np.zeros(n_features, np.int64), np.full(n_features, -1, np.int64)
        self.height = np.zeros(n_features)

    def add(self, values: Float[np.ndarray, "image feature"], found: ChunkSums) -> None:
        """Compare the images of a chunk."""
        place, feature = np.argmax(values, axis=0), np.arange(values.shape[1])
        better = values[place, feature] > self._value
        self._value = np.where(better, values[place, feature], self._value)
        self.image = np.where(better, found.images[place], self.image)
        self.token = np.where(better, found.token_in[place, feature], self.token)
        self.height = np.where(better, found.max_in[place, feature], self.height)


def _top(
    mean: np.ndarray,
    deviation: np.ndarray,
    n: int,
    highest: np.ndarray,
    step: int,
    image: np.ndarray,
    token: np.ndarray | None,
    above: float,
) -> Figures:
    columns = {"mean": mean, "deviation": deviation, "n": np.full(len(mean), n), "highest": highest}
    return Figures(np.where(highest > above, mean, np.nan), np.full(len(mean), step), image, token, columns)


def top_figures(
    scores: Float[np.ndarray, "row feature"],
    images: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"],
    step: int,
    above: float,
) -> Figures:
    """A top scan over whole images, of a block of features; ties go to the lower image."""
    spread, place = spread_of(scores, groups), np.argmax(scores, axis=0)
    highest = scores[place, np.arange(len(place))].astype(np.float64)
    return _top(spread.mean, spread.deviation, len(images), highest, step, images[place], None, above)


def temporal_figures(
    scores: Sequence[Float[np.ndarray, "row feature"]],
    steps: Sequence[int],
    images: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"],
    pattern: Pattern,
    above: float,
) -> Figures:
    """A temporal scan of a block of features: how the activation on each image changes over the steps.

    Ranked by the mean over prompts and seeds of: the deviation over the steps (any), last minus first (rise), first minus last
    (fall), or the activation at the only step where the feature is active on any of the images (only).
    """
    x = np.stack([score.astype(np.float64) for score in scores])
    means = np.stack([spread_of(score, groups).mean for score in x])
    active = (x > above).any(axis=1)
    peak = np.argmax(means, axis=0)
    only = active.sum(axis=0) == 1
    peak = np.where(only, np.argmax(active, axis=0), peak)
    feature = np.arange(x.shape[2])
    at_peak = x[peak, :, feature].T
    change = x[-1] - x[0]
    figure = {"any": x.std(axis=0, ddof=1), "rise": change, "fall": -change, "only": at_peak}[pattern]
    spread = spread_of(figure, groups)
    place = np.argmax(at_peak, axis=0)
    listed = active.any(axis=0) & (only if pattern == "only" else spread.mean > 0)
    columns: dict[str, np.ndarray] = {
        "pattern": _patterns(means, only, peak, steps),
        "change": means[-1] - means[0],
        "over_steps": spread_of(x.std(axis=0, ddof=1), groups).mean,
        "deviation": spread.deviation,
        "n": np.full(len(feature), len(images)),
    } | {f"step_{step}": mean for step, mean in zip(steps, means, strict=True)}
    return Figures(np.where(listed, spread.mean, np.nan), np.asarray(steps)[peak], images[place], None, columns)


def _patterns(
    means: Float[np.ndarray, "step feature"], only: np.ndarray, peak: np.ndarray, steps: Sequence[int]
) -> np.ndarray:
    """In a word what the means do: `only step 2`, `rises`, `falls`, `peaks at 1`, `dips at 1`, `mostly falls`, `level`.

    A peak lies above both the first and the last step, a dip below both; what has neither and still goes up and down rises or
    falls for the most part.
    """
    moves, step = np.diff(means, axis=0), np.asarray(steps)
    highest, lowest = np.argmax(means, axis=0), np.argmin(means, axis=0)
    ends_high, ends_low = np.maximum(means[0], means[-1]), np.minimum(means[0], means[-1])
    names = np.where(means[-1] > means[0], "mostly rises", "mostly falls")
    names = np.where(means.min(axis=0) < ends_low, np.char.add("dips at ", step[lowest].astype(str)), names)
    names = np.where(means.max(axis=0) > ends_high, np.char.add("peaks at ", step[highest].astype(str)), names)
    names = np.where((moves <= 0).all(axis=0), "falls", np.where((moves >= 0).all(axis=0), "rises", names))
    names = np.where((moves == 0).all(axis=0), "level", names)
    return np.where(only, np.char.add("only step ", step[peak].astype(str)), names)
