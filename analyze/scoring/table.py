"""`features.parquet`: one row a feature, from what the pass found out about it."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from analyze.scoring.findings import Findings
from analyze.scoring.images import Pieces
from analyze.scoring.kinds import kind_columns, rows_by_kind
from analyze.scoring.statistics import HISTOGRAM_BINS, HISTOGRAM_EDGES, categories, interest

LISTS = {"image": pa.int64(), "token": pa.int32(), "score": pa.float32()}


def feature_table(panes: Sequence[Findings], n_images: int, above: float, pieces: Pieces | None) -> pa.Table:
    """The table of a dictionary and step, from its panes in their order.

    `top_*` are the images of the highest scores, `unique_*` those with one image a prompt (equal but for case, spaces and
    flags); only images where the feature is active stand there.  `word` are the text pieces with the highest activations.
    A joint site has `density_real`, `density_image` and so on as well: the figures of each kind of token alone.  Its `unique_*` are
    first the images on whose image tokens a feature is active, with their tokens and scores (`scores_image`), then those of its
    words alone: so sheets, report and coherence show it where there is something to see.
    """
    rows = max(findings.rows.rows for findings in panes)
    active = np.concatenate([findings.rows.active for findings in panes])
    images_active = np.concatenate([findings.images_active for findings in panes])
    mean = np.concatenate([findings.rows.mean_active() for findings in panes])
    density, share = active / max(rows, 1), images_active / max(n_images, 1)
    columns = {
        "feature": np.arange(len(active), dtype=np.int32),
        "rows_active": active,
        "density": density,
        "density_category": pa.array(categories(density), pa.string()),
        "images_active": images_active,
        "image_share": share,
        "image_category": pa.array(categories(share), pa.string()),
        "alive": images_active > 0,
        "mean_active": mean,
        "deviation_active": np.concatenate([findings.rows.deviation_active() for findings in panes]),
        "max": np.concatenate([findings.max for findings in panes]),
        "interest": interest(mean, share),
        "histogram": pa.chunked_array([_histograms(findings) for findings in panes]),
    }
    for name in ("top", "unique"):
        results = [findings.top.result() if name == "top" else findings.examples() for findings in panes]
        for place, (what, kind) in enumerate(LISTS.items()):
            columns[f"{name}_{what}"] = pa.chunked_array([_lists(each[0], each[place], kind) for each in results])
    if panes[0].words is not None:
        columns |= _words(panes, pieces)
    kinds = [findings.kinds for findings in panes if findings.kinds is not None]
    if kinds:
        columns |= kind_columns(kinds)
    about: dict[str, object] = {
        "rows": rows,
        "images": n_images,
        "active_above": above,
        "histogram_edges": list(HISTOGRAM_EDGES),
    }
    if kinds:
        about["rows_by_kind"] = rows_by_kind(kinds)
    return pa.table(columns).replace_schema_metadata({name: json.dumps(value) for name, value in about.items()})


def _histograms(findings: Findings) -> pa.ListArray:
    offsets = np.arange(len(findings.max) + 1, dtype=np.int32) * HISTOGRAM_BINS
    return pa.ListArray.from_arrays(offsets, findings.rows.histogram.reshape(-1))


def _lists(numbers: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """The values (rank, feature) of each feature as a list, as long as there are numbers that are not -1."""
    there = numbers.T >= 0
    offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.T[there], kind))


def _words(panes: Sequence[Findings], pieces: Pieces | None) -> dict[str, pa.ChunkedArray]:
    words, scores = [], []
    for findings in panes:
        assert findings.words is not None
        number, score = findings.words.result()
        lists = _lists(number, number, pa.int32())
        texts = pa.array(pieces.words if pieces is not None else [], pa.string())
        words.append(pa.ListArray.from_arrays(lists.offsets, texts.take(lists.values)))
        scores.append(_lists(number, score, pa.float32()))
    return {"word": pa.chunked_array(words), "word_score": pa.chunked_array(scores)}
