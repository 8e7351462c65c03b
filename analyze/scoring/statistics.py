"""What each feature does over all counted rows: how often it is active, how strongly; and in words, and how interesting.

A feature is active on a row where z > `active_above` (0 unless told otherwise, the same in every figure of an analysis), and
on an image where its score, the largest z, is.  It is alive when it is active on at least one image.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ACTIVE_ABOVE = 0.0
"""The default of `--active-above`: as training counts."""
CATEGORIES = ("dead", "rare", "common", "very common")
CATEGORY_EDGES = (1e-4, 0.01, 0.1)
"""Shares from which a feature is rare, common, very common; below the first it is dead."""
HISTOGRAM_FIRST, HISTOGRAM_LAST = -20, 20
HISTOGRAM_EDGES = tuple(2.0 ** (half / 2) for half in range(HISTOGRAM_FIRST, HISTOGRAM_LAST + 1))
"""Half octaves from 2**-10 to 2**10, the same for every feature; the bins before the first and from the last on are open."""
HISTOGRAM_BINS = len(HISTOGRAM_EDGES) + 1
FLOAT32_BIAS, FLOAT32_MANTISSA = 127, 23


class RowStatistics:
    """How often each feature was active, the sums of z and its square there (float64), and a histogram of z there."""

    def __init__(self, n_features: int) -> None:
        self.rows = 0
        self.histogram = np.zeros((n_features, HISTOGRAM_BINS), np.int64)
        self.total = np.zeros(n_features, np.float64)
        self.squares = np.zeros(n_features, np.float64)

    def add_active(self, feature: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"]) -> None:
        """Count active entries, in any order; their rows are counted elsewhere."""
        if not len(feature):
            return
        n_features = len(self.total)
        place = feature * HISTOGRAM_BINS + histogram_bin(value * value)
        self.histogram += np.bincount(place, minlength=self.histogram.size).reshape(self.histogram.shape)
        exact = value.astype(np.float64)
        self.total += np.bincount(feature, exact, n_features)
        self.squares += np.bincount(feature, exact * exact, n_features)

    def add_sums(
        self,
        histogram: Int[np.ndarray, "feature bin"],
        total: Float[np.ndarray, " feature"],
        squares: Float[np.ndarray, " feature"],
    ) -> None:
        """Take in sums over other rows; the rows are counted elsewhere."""
        self.histogram += histogram
        self.total += total
        self.squares += squares

    def merge(self, other: "RowStatistics") -> None:
        """Take in what was counted on other rows."""
        self.rows += other.rows
        self.add_sums(other.histogram, other.total, other.squares)

    @property
    def active(self) -> Int[np.ndarray, " feature"]:
        """Rows on which each feature is active."""
        return np.asarray(self.histogram.sum(axis=1))

    def mean_active(self) -> Float[np.ndarray, " feature"]:
        """Mean activation over the rows where the feature is active; 0 where there are none."""
        return np.asarray(self.total / np.maximum(self.active, 1))

    def deviation_active(self) -> Float[np.ndarray, " feature"]:
        """Standard deviation of the activation over the rows where the feature is active."""
        mean = self.mean_active()
        return np.asarray(np.sqrt(np.maximum(self.squares / np.maximum(self.active, 1) - mean * mean, 0)))


def histogram_bin(square: Float[np.ndarray, " entry"]) -> Int[np.ndarray, " entry"]:
    """The bin of each activation, from its square in float32: the exponent of z squared counts half octaves of z."""
    exponent = square.view(np.int32) >> FLOAT32_MANTISSA
    exponent -= FLOAT32_BIAS + HISTOGRAM_FIRST - 1
    return np.asarray(np.minimum(np.maximum(exponent, 0, out=exponent), HISTOGRAM_BINS - 1, out=exponent))


def histogram_bins(square: Tensor) -> Tensor:
    """The same for a tensor on any device."""
    exponent = (square.view(torch.int32) >> FLOAT32_MANTISSA) - (FLOAT32_BIAS + HISTOGRAM_FIRST - 1)
    return exponent.clamp_(0, HISTOGRAM_BINS - 1)


def categories(shares: Float[np.ndarray, " feature"]) -> list[str]:
    """`dead`, `rare`, `common` or `very common`: how often each feature is active, as a share of rows or of images."""
    return [CATEGORIES[place] for place in np.searchsorted(CATEGORY_EDGES, shares, side="right")]


def interest(
    mean_active: Float[np.ndarray, " feature"], image_share: Float[np.ndarray, " feature"]
) -> Float[np.ndarray, " feature"]:
    """DifFRACT's dashboard ranking, z-score times root of frequency: strong among its peers, and on more than a few images.

    The z-score is that of a feature's mean activation (over the rows where it is active) among the alive features of
    its dictionary and step; the frequency is the share of images.  0 for dead features.
    """
    alive = image_share > 0
    if not alive.any():
        return np.zeros(len(mean_active))
    deviation = mean_active[alive].std()
    score = (mean_active - mean_active[alive].mean()) / (deviation if deviation > 0 else 1.0)
    return np.where(alive, score * np.sqrt(image_share), 0.0)
