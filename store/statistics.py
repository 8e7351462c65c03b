"""Figures kept with the data: mean and variance of each channel, norms of rows, rounding errors; in float64.

A part keeps sums, which add up: `statistics/part-00000.safetensors` holds, for each array,

    img_6/step.2/mlp_in/sum           (d_model,) float64   over the part's rows
    img_6/step.2/mlp_in/square_sum    (d_model,) float64
    img_6/step.2/mlp_in/norm_counts   (bin,) int64         rows by the logarithm of their norm
    img_6/step.2/mlp_in/norm_first    (1,) int64           the bin that the counts begin with

and of a joint sequence the same of its text tokens and of its image tokens alone, `joint_6/step.2/mlp_in.txt/sum` and so on;
and its commit the scalars that a first look needs.  Parts are merged in their order, so the figures of a store do
not depend on who wrote it when.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.numpy

from store.format import to_float32
from store.sites import Point, Site, Stream
from store.strata import STRATA, STRATA_STREAMS

BINS_PER_OCTAVE = 32
LOWEST, HIGHEST = -40 * BINS_PER_OCTAVE, 72 * BINS_PER_OCTAVE
"""bins of norms from 2^-40 (zero as well) to 2^72; a bin is 2.2 % wide"""
BLOCK = 2**20
GREATEST = 1e120
"""which no sum of squares of float32 reaches"""


@dataclass(frozen=True)
class Statistics:
    """What is known of the rows of one array, or of several parts of it."""

    rows: int
    sum: np.ndarray
    """(d_model,) float64"""
    square_sum: np.ndarray
    """(d_model,) float64"""
    norm_counts: np.ndarray
    """(HIGHEST - LOWEST,) int64"""
    max: float
    """greatest magnitude"""
    error: float
    """sum of squared differences to the values that were to be stored; 0 in a stratum, of which nobody knows it"""
    strata: "Mapping[Stream, Statistics]" = field(default_factory=dict)
    """of a joint sequence: its text tokens (`txt`) and its image tokens (`img`); empty where they were not told apart"""

    @property
    def mean(self) -> np.ndarray:
        """(d_model,) float64"""
        return self.sum / max(self.rows, 1)

    @property
    def variance(self) -> np.ndarray:
        """(d_model,) float64, divided by the number of rows"""
        return np.asarray(np.maximum(self.square_sum / max(self.rows, 1) - self.mean**2, 0.0))

    @property
    def rms(self) -> float:
        """Root of the mean square over rows and channels."""
        return float(np.sqrt(self.square_sum.sum() / max(self.rows * len(self.sum), 1)))

    @property
    def relative_error(self) -> float:
        """Root of the squared rounding error over the squared values: what a lossy store dtype cost."""
        squares = float(self.square_sum.sum())
        return float(np.sqrt(self.error / squares)) if squares else 0.0

    @property
    def fvu_floor(self) -> float:
        """The rounding error over the variance: no dictionary's FVU on the original values can be below it."""
        deviation = float(self.variance.sum()) * self.rows
        return self.error / deviation if deviation else 0.0

    def norm_quantiles(self, *shares: float) -> list[float]:
        """The norms below which such shares of the rows lie, to 1.1 %."""
        upto = np.cumsum(self.norm_counts)
        if not self.rows:
            return [0.0] * len(shares)
        bins = [int(np.searchsorted(upto, max(share * self.rows, 0.5))) for share in shares]
        return [0.0 if index == 0 else 2.0 ** ((index + LOWEST + 0.5) / BINS_PER_OCTAVE) for index in bins]

    def scalars(self) -> dict[str, Any]:
        """What a commit keeps."""
        count = max(self.rows * len(self.sum), 1)
        mean = float(self.sum.sum()) / count
        found: dict[str, Any] = {"rows": self.rows, "mean": mean, "rms": self.rms, "max": self.max, "error": self.error}
        if self.strata:
            parts = {stream: part.scalars() for stream, part in self.strata.items()}
            found[STRATA] = {stream: {n: v for n, v in part.items() if n != "error"} for stream, part in parts.items()}
        return found

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """What the statistics file of a part keeps."""
        strata = {n: t for stream, part in self.strata.items() for n, t in part.tensors(f"{name}.{stream}").items()}
        used = np.flatnonzero(self.norm_counts)
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return {
            f"{name}/sum": self.sum,
            f"{name}/square_sum": self.square_sum,
            f"{name}/norm_counts": self.norm_counts[first:last].copy(),
            f"{name}/norm_first": np.array([first + LOWEST]),
        } | strata

    @classmethod
    def of_part(cls, name: str, tensors: Mapping[str, np.ndarray], scalars: Mapping[str, Any]) -> "Statistics":
        """The inverse of `tensors` and `scalars`; `KeyError`, `TypeError` or `ValueError` for what is no statistics."""
        counts = np.zeros(HIGHEST - LOWEST, np.int64)
        (first,), found = tensors[f"{name}/norm_first"], tensors[f"{name}/norm_counts"]
        place = int(first) - LOWEST
        if found.dtype != np.int64 or not 0 <= place <= len(counts) - len(found):
            raise ValueError(f"norms of {name} from bin {first}")
        counts[place : place + len(found)] = found
        total, squares, rows = tensors[f"{name}/sum"], tensors[f"{name}/square_sum"], int(scalars["rows"])
        peak, error = float(scalars["max"]), float(scalars["error"])
        if not total.ndim == squares.ndim == 1 or total.shape != squares.shape or total.dtype != squares.dtype:
            raise ValueError(f"sums of {name} have shapes {total.shape} and {squares.shape}")
        sane = (squares >= 0).all() and (squares < GREATEST).all() and (np.abs(total) < GREATEST).all()
        if total.dtype != np.float64 or not sane or not (0 <= peak < GREATEST and 0 <= error < GREATEST):
            raise ValueError(f"the sums of {name} are none")
        if (found < 0).any() or (found > rows).any() or found.sum() != rows:
            raise ValueError(f"{name} has {rows} rows and norms of others")
        strata = {
            stream: cls.of_part(f"{name}.{stream}", tensors, {"error": 0.0, **scalars[STRATA][stream]})
            for stream in (STRATA_STREAMS if STRATA in scalars else ())
        }
        return cls(rows, total, squares, counts, peak, error, strata)


def joint_statistics(
    values: np.ndarray, kept: np.ndarray | None, is_text: np.ndarray, error: float = 0.0
) -> Statistics | int:
    """As `array_statistics`, of a joint sequence: the whole, with its strata; `is_text` (image, token) says which are of the text."""
    there = np.ones(values.shape[:2], bool) if kept is None else kept
    found = [array_statistics(values, there & mask) for mask in (is_text, ~is_text)]
    bad = [each for each in found if isinstance(each, int)]
    if bad:
        return min(bad)
    strata = {stream: each for stream, each in zip(STRATA_STREAMS, found, strict=True) if isinstance(each, Statistics)}
    return replace(merged(strata.values()), error=error, strata=strata)


def array_statistics(values: np.ndarray, kept: np.ndarray | None, error: float = 0.0) -> Statistics | int:
    """The statistics of (image, token, d_model), or the number of the first image with a NaN or an infinity.

    `kept` (image, token) masks empty slots.  Squares are exact: those of 16-bit values in float32, of others in float64.
    """
    images, tokens, d_model = values.shape
    total, squares = np.zeros(d_model), np.zeros(d_model)
    counts = np.zeros(HIGHEST - LOWEST, np.int64)
    rows, peak = 0, 0.0
    at_once = max(BLOCK // (tokens * d_model), 1)
    for first in range(0, images, at_once):
        block = values[first : first + at_once].reshape(-1, d_model)
        mask = None if kept is None else kept[first : first + at_once].reshape(-1)
        exact = to_float32(block if mask is None else block[mask])
        square = np.square(exact, dtype=np.float64 if values.dtype == np.float32 else np.float32)
        norms = square.sum(axis=1, dtype=np.float64)
        if not np.isfinite(norms).all():
            bad = _first_bad(values[first : first + at_once], kept, first)
            if bad is not None:
                return first + bad
            square = np.square(exact, dtype=np.float64)  # finite values whose squares are beyond float32
            norms = square.sum(axis=1, dtype=np.float64)
        rows += len(exact)
        total += np.add.reduce(exact, axis=0, dtype=np.float64)
        squares += np.add.reduce(square, axis=0, dtype=np.float64)
        peak = max(peak, float(square.max(initial=0.0)))
        counts += np.bincount(_bins(norms), minlength=len(counts))
    return Statistics(rows, total, squares, counts, float(np.sqrt(peak)), error)


def _bins(square_norms: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        exponent = np.floor(0.5 * BINS_PER_OCTAVE * np.log2(square_norms))
    return np.asarray(np.clip(exponent, LOWEST, HIGHEST - 1).astype(np.int64) - LOWEST)


def _first_bad(values: np.ndarray, kept: np.ndarray | None, first: int) -> int | None:
    for index, image in enumerate(values):
        exact = to_float32(image if kept is None else image[kept[first + index]])
        if not np.isfinite(exact).all():
            return index
    return None


def statistics_bytes(statistics: Mapping[tuple[Site, int, Point], Statistics]) -> bytes:
    """The statistics file of a part."""
    tensors: dict[str, np.ndarray] = {}
    for (site, step, point), found in statistics.items():
        tensors |= found.tensors(f"{site}/step.{step}/{point}")
    return bytes(safetensors.numpy.save(tensors))


def merged(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several parts as of one, added in the order given; at least one part."""
    first, *rest = parts
    result = first
    strata = {s: merged(p.strata[s] for p in (first, *rest)) for s in first.strata if all(s in p.strata for p in rest)}
    for part in rest:
        result = Statistics(
            result.rows + part.rows,
            result.sum + part.sum,
            result.square_sum + part.square_sum,
            result.norm_counts + part.norm_counts,
            max(result.max, part.max),
            result.error + part.error,
        )
    return replace(result, strata=strata)
