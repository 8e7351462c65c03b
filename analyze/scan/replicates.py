"""Means over prompts and seeds: images that share a prompt are replicates of it.

A mean is that of the prompts, each of which is the mean over its seeds, so a prompt with many seeds counts once.  The deviation
over seeds is what is left within prompts, pooled over those with several images; the deviation over images is that of all.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from store.errors import NonFiniteError

ROUNDING = 1e-13
"""A variance below this share of the mean square is the rounding of float64 sums, and none."""


@dataclass(frozen=True)
class Spread:
    """What replicates say about every feature; NaN where there are too few images to say it."""

    mean: Float[np.ndarray, " feature"]
    deviation: Float[np.ndarray, " feature"]
    """over the seeds of a prompt"""
    over_images: Float[np.ndarray, " feature"]
    """over all images"""

    @property
    def effect(self) -> Float[np.ndarray, " feature"]:
        """Mean over the deviation of all images: infinite where they all agree, 0 where the mean is 0."""
        return ratio(self.mean, self.over_images)


def ratio(mean: np.ndarray, deviation: np.ndarray) -> Float[np.ndarray, " feature"]:
    """mean / deviation, 0 where the mean is 0, NaN where the deviation is unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((mean == 0) & ~np.isnan(deviation), 0.0, mean / deviation)


class Replicates:
    """Adds up the figures of images that come in any order; holds the sums of prompts of which images are still to come.

    Memory: 8 bytes a feature for each such prompt (`most_open` says how many there are at most), besides 5 sums a feature.
    """

    def __init__(self, groups: Int[np.ndarray, " image"], n_features: int) -> None:
        """`groups`: the prompt number of every image that may come, from 0."""
        self.groups = groups
        self.sizes = np.bincount(groups)
        self._weighted = np.zeros(n_features)
        self._total, self._squares, self._between = np.zeros(n_features), np.zeros(n_features), np.zeros(n_features)
        self._came = np.zeros(len(self.sizes), np.int64)
        self._open: dict[int, np.ndarray] = {}
        self._images = 0

    def add(self, rows: Int[np.ndarray, " row"], values: Float[np.ndarray, "row feature"]) -> None:
        """Add images, named by their place in `groups`, each once; `NonFiniteError` for a NaN or an infinity."""
        if not np.isfinite(values).all():
            raise NonFiniteError("a NaN or an infinity among the figures of the images")
        order = np.argsort(self.groups[rows], kind="stable")
        group, x = self.groups[rows][order], values[order].astype(np.float64)
        starts = np.flatnonzero(np.concatenate(([True], np.diff(group) != 0)))
        counts = np.diff(np.append(starts, len(group)))
        sums, numbers = np.add.reduceat(x, starts, axis=0), group[starts]
        self._images += len(rows)
        self._total += x.sum(axis=0)
        self._squares += np.einsum("if,if->f", x, x)
        whole = counts == self.sizes[numbers]
        self._close(sums[whole], counts[whole])
        for place in np.flatnonzero(~whole):
            number = int(numbers[place])
            self._open[number] = self._open.get(number, 0) + sums[place]
            self._came[number] += counts[place]
            if self._came[number] == self.sizes[number]:
                self._close(self._open.pop(number)[None], self.sizes[number : number + 1])

    def _close(self, sums: np.ndarray, counts: np.ndarray) -> None:
        self._weighted += (sums / counts[:, None]).sum(axis=0)
        self._between += (sums * sums / counts[:, None]).sum(axis=0)

    def result(self) -> Spread:
        """Mean and deviations, after all images came."""
        if self._open or self._images != len(self.groups):
            raise AssertionError(f"{self._images} images came, {len(self.groups)} were announced")
        within = _root(self._squares - self._between, self._squares, self._images - len(self.sizes))
        every = _root(self._squares - self._total**2 / self._images, self._squares, self._images - 1)
        return Spread(self._weighted / len(self.sizes), within, every)


def _root(squares: np.ndarray, of: np.ndarray, freedom: int) -> np.ndarray:
    if freedom < 1:
        return np.full(len(squares), np.nan)
    return np.sqrt(np.where(squares > ROUNDING * of, squares, 0.0) / freedom)


def most_open(groups: Int[np.ndarray, " image"], chunk: Int[np.ndarray, " image"]) -> int:
    """Of how many prompts sums are held at once, at most, where images come chunk by chunk; `chunk` ascends."""
    place = np.unique(chunk, return_inverse=True)[1].ravel()
    first, last = np.full(int(groups.max()) + 1, len(chunk)), np.zeros(int(groups.max()) + 1, np.int64)
    np.minimum.at(first, groups, place)
    np.maximum.at(last, groups, place)
    begun, done = (np.bincount(ends, minlength=int(place.max()) + 1) for ends in (first, last))
    return int(np.cumsum(begun - done).max())


def spread_of(values: Float[np.ndarray, "row feature"], groups: Int[np.ndarray, " row"]) -> Spread:
    """The same for images that are all there."""
    found = Replicates(groups, values.shape[1])
    found.add(np.arange(len(values)), values)
    return found.result()
