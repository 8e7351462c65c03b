"""The results of an analysis without the pass that makes them: feature tables drawn from a seed, in any size, for the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from analyze.features import coherence
from analyze.inputs import Analysis, Subject, claim_output, open_analysis
from analyze.scoring.matrices import FEATURES, FORMAT, VERSION, step_folder
from analyze.scoring.statistics import ACTIVE_ABOVE, HISTOGRAM_BINS, HISTOGRAM_EDGES, categories, interest
from analyze.settings import Inputs
from store.tables import write_table
from tests.analyze_planted import Plan, planted_store, reading_dictionary
from train.dictionaries.checkpoint import save_dictionary

TOP = 8


def synthetic_analysis(
    folder: Path,
    plan: Plan,
    n_features: int,
    coherent: bool = False,
    metrics: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """A planted store, a dictionary of this width for each of its sites, and random tables for them: what `Inputs` takes."""
    planted_store(folder / "store", plan)
    for site in plan.sites:
        dictionary = reading_dictionary(site, plan.d_model, n_features, seed=seed)
        save_dictionary(folder / "dictionaries" / dictionary.name, dictionary, metrics, [])
    inputs = {"store": folder / "store", "dictionaries": folder / "dictionaries", "out": folder / "out"}
    analysis = open_analysis(Inputs(**inputs))
    claim_output(analysis, {"padding": False, "top": TOP, "active_above": ACTIVE_ABOVE, "dtype": "float32"})
    rng = np.random.default_rng(seed)
    for subject in analysis.subjects:
        for step in analysis.steps:
            _write_step(analysis, subject, step, feature_table(rng, plan, subject), rng)
        if coherent:
            _write_coherence(analysis, subject, rng)
    return inputs


def feature_table(rng: np.random.Generator, plan: Plan, subject: Subject) -> pa.Table:
    """A table as `analyze scores` writes it; a twentieth of the features never fires."""
    n, tokens = subject.n_features, plan.grid[0] * plan.grid[1]
    share = np.minimum(0.9, rng.lognormal(-4, 2, n))
    share[rng.random(n) < 0.05] = 0
    images_active = np.round(share * plan.n_images).astype(np.int64)
    share = images_active / plan.n_images
    density = share * rng.uniform(0.02, 0.5, n)
    mean = np.where(images_active > 0, rng.gamma(2, 0.5, n), 0)
    most = mean * rng.uniform(2, 6, n)
    counts = np.minimum(images_active, TOP)
    apart = rng.integers(1, max(2, plan.n_images // TOP), n)  # an image stands once with a feature
    image = (rng.integers(0, plan.n_images, n)[:, None] + apart[:, None] * np.arange(TOP)) % plan.n_images
    scores = np.sort(rng.uniform(0.5, 1, (n, TOP)))[:, ::-1] * most[:, None]
    scores[:, 0] = most
    lists = {
        "image": (image, pa.int64()),
        "token": (rng.integers(0, tokens, (n, TOP)), pa.int32()),
        "score": (scores, pa.float32()),
    }
    rows_active = np.round(density * plan.n_images * tokens).astype(np.int64)
    centre = np.clip(np.log2(np.maximum(mean, 1e-3)) * 2 + HISTOGRAM_BINS / 2, 3, HISTOGRAM_BINS - 4)
    shape = np.exp(-0.5 * ((np.arange(HISTOGRAM_BINS) - centre[:, None]) / 2.5) ** 2)
    histogram = np.floor(shape / shape.sum(axis=1, keepdims=True) * rows_active[:, None]).astype(np.int64)
    columns: dict[str, Any] = {
        "feature": np.arange(n, dtype=np.int32),
        "rows_active": rows_active,
        "density": density,
        "density_category": categories(density),
        "images_active": images_active,
        "image_share": share,
        "image_category": categories(share),
        "alive": images_active > 0,
        "mean_active": mean,
        "deviation_active": mean * 0.4,
        "max": np.where(images_active > 0, most, 0),
        "interest": interest(mean, share),
        "histogram": _lists(histogram, np.full(n, HISTOGRAM_BINS), pa.int64()),
    }
    for name in ("top", "unique"):
        columns |= {f"{name}_{what}": _lists(values, counts, kind) for what, (values, kind) in lists.items()}
    if subject.site.stream != "img":
        words = np.asarray(["▁red", "▁circle", "▁a", "▁background", "▁blue", "▁cross", "▁top"])
        chosen = words[rng.integers(0, len(words), (n, 3))]
        columns["word"] = _lists(chosen, np.minimum(counts, 3), pa.string())
        columns["word_score"] = _lists(scores[:, :3], np.minimum(counts, 3), pa.float32())
    about = {
        "rows": plan.n_images * tokens,
        "images": plan.n_images,
        "active_above": ACTIVE_ABOVE,
        "histogram_edges": list(HISTOGRAM_EDGES),
    }
    return pa.table(columns).replace_schema_metadata({key: json.dumps(value) for key, value in about.items()})


def _lists(values: np.ndarray, counts: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """The first so many values of each row."""
    there = np.arange(values.shape[1]) < counts[:, None]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values[there], kind))


def _write_step(analysis: Analysis, subject: Subject, step: int, table: pa.Table, rng: np.random.Generator) -> None:
    folder = step_folder(analysis.out, subject.name, step)
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs.update(
        {
            "format": FORMAT, "version": VERSION, "store": analysis.store.id, "dictionary": subject.identity,
            "dictionary_name": subject.dictionary.name, "site": str(subject.site), "step": step, "lower_bounds": False,
            "padding_counted": False, "active_above": ACTIVE_ABOVE,
        }
    )  # fmt: skip
    shape = (analysis.store.n_images, subject.n_features)
    for name, dtype in (("scores", "float32"), ("argmax_token", "int32")):
        group.create_array(name, shape=shape, chunks=(min(512, shape[0]), min(256, shape[1])), dtype=dtype)
    write_table(folder / FEATURES, table)


def _write_coherence(analysis: Analysis, subject: Subject, rng: np.random.Generator) -> None:
    n, steps = subject.n_features, len(analysis.steps)
    values = np.where(rng.random(n * steps) < 0.1, np.nan, rng.uniform(0.3, 0.9, n * steps))
    table = pa.table(
        {
            "step": np.repeat(np.asarray(analysis.steps, np.int32), n),
            "feature": np.tile(np.arange(n, dtype=np.int32), steps),
            "coherence": pa.array(values, pa.float64(), from_pandas=True),
            "images": pa.array([[]] * (n * steps), pa.list_(pa.int64())),
        }
    )
    about = {
        "format": coherence.FORMAT,
        "version": coherence.VERSION,
        "store": analysis.store.id,
        "dictionary": subject.identity,
    }
    write_table(
        coherence.coherence_file(analysis, subject),
        table.replace_schema_metadata({coherence.RECORD: json.dumps(about)}),
    )
