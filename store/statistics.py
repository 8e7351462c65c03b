"""What a commit keeps about each array of its part: enough to see at a glance that a site is alive."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from store.format import to_float32


def array_statistics(values: np.ndarray, kept: np.ndarray | None) -> tuple[dict[str, Any], int | None]:
    """Rows, mean, RMS and greatest magnitude over (image, token, d_model), and the first image with a bad value.

    `kept` (image, token) masks empty slots.  Sums run in float64 over one image after the other, so the
    figures do not depend on how a part was put together.
    """
    total = squares = 0.0
    rows, peak = 0, 0.0
    for index, image in enumerate(values):
        exact = to_float32(image if kept is None else image[kept[index]])
        greatest = float(np.abs(exact).max(initial=0.0))  # a NaN or an infinity anywhere shows up here
        if not np.isfinite(greatest):
            return {}, index
        rows += exact.shape[0]
        total += float(exact.sum(dtype=np.float64))
        flat = exact.ravel().astype(np.float64)
        squares += float(np.einsum("i,i->", flat, flat))  # one pass, and no BLAS, whose sums depend on its threads
        peak = max(peak, greatest)
    count = max(rows * values.shape[-1], 1)
    return {"rows": rows, "mean": total / count, "rms": (squares / count) ** 0.5, "max": peak}, None


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several parts as of one, merged in the order given."""
    rows, total, squares, peak = 0, 0.0, 0.0, 0.0
    for part in parts:
        rows += part["rows"]
        total += part["mean"] * part["rows"]
        squares += part["rms"] ** 2 * part["rows"]
        peak = max(peak, part["max"])
    return {"rows": rows, "mean": total / max(rows, 1), "rms": (squares / max(rows, 1)) ** 0.5, "max": peak}
