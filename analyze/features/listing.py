"""The lines that `features` prints: one a feature, columns under their heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from analyze.inputs import Subject
from analyze.labels.book import LabelBook, name_of

BARS = "▁▂▃▄▅▆▇█"
WORDS_SHOWN = 5


def listing(table: pa.Table, subject: Subject, book: LabelBook, steps: Sequence[int]) -> str:
    """The rows of a table of `ranking.run`, as text."""
    rows = table.to_pylist()
    if not rows:
        return ""
    names = [name_of(subject, row["feature"], book) for row in rows]
    width = max(len("feature"), *(len(name) for name in names))
    profile = f"{'over steps':<{max(10, len(steps))}}  " if len(steps) > 1 else ""
    head = (
        f"  {'feature':<{width}}  {'interest':>8}  {'on tokens':<20}  {'on images':<20}  {'mean':>8}  {'max':>8}  {'coherence':>9}  "
        f"{profile}top images"
    )
    lines = [head.rstrip()]
    for row, name in zip(rows, names, strict=True):
        line = (
            f"  {name:<{width}}  {row['interest']:>8.2f}  {_share(row['density'], row['density_category'])}  "
            f"{_share(row['image_share'], row['image_category'])}  {row['mean_active']:>8.3g}  {row['max']:>8.3g}  "
            f"{_number(row['coherence']):>9}  "
        )
        if profile:
            line += f"{sparkline(row['profile_density']):<{max(10, len(steps))}}  "
        line += " ".join(map(str, row["example_images"]))
        if row["word"]:
            line += "  " + " ".join(_word(piece) for piece in row["word"][:WORDS_SHOWN])
        lines.append(line.rstrip())
    return "\n".join(lines)


def sparkline(values: Sequence[float]) -> str:
    """One character a value: its height against the largest; all at the bottom where there is nothing."""
    shares = np.asarray(values) / (max(values) or 1.0)
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares)


def _share(share: float, category: str) -> str:
    return f"{f'{share:.2%} {category}':<20}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _word(piece: str) -> str:
    return "“" + piece.replace("▁", " ").strip() + "”"
