"""Coherence: how much alike a feature's best pictures are, as the mean cosine between their image embeddings (FLUX-SAE).

1. Each image has an embedding: of a CLIP model, cached beside the results, or given (`embeddings`).
2. A feature's images are its top M with unique prompts, which `scores` left in the feature table; only images it is active on.
3. The mean over all pairs of n unit vectors is (|their sum|^2 - n) / (n (n - 1)), so one sum a feature is enough, which torch's
   `embedding_bag` takes, block of features by block.  In float64, because the sum of unlike pictures nearly cancels n; only the
   vectors that a block names are made float64, each once.

Memory beside libraries and tables: the embeddings as they are, O(images x dim x 4 B), and two blocks.

A feature with fewer than 2 such images has no coherence (null).  `OUT/<name>/coherence.parquet` has one row a step and feature.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch.nn.functional import embedding_bag
from tqdm import tqdm

from analyze.features.embeddings import Embeddings, image_embeddings
from analyze.features.settings import CoherenceSettings
from analyze.inputs import Analysis, Subject, check_output, open_analysis
from analyze.prompts import prompt_texts
from store.errors import DamagedError, ForeignError, MismatchError, UsageError
from store.split import normalise
from store.tables import write_table

BLOCK_BYTES = 64 * 2**20
"""of sums that are held, and as much of embeddings at most: memory grows neither with features nor lists"""
FORMAT, VERSION = "granary coherence", 1
RECORD = b"granary"


@dataclass(frozen=True)
class CoherenceSummary:
    """What a run of `coherence` did."""

    features: int
    """Features of all dictionaries and steps that have a coherence."""
    embeddings: str
    """The id of the embeddings."""
    cached: bool
    """Whether the embeddings were there already."""
    baseline: float
    """The mean cosine between the store's pictures, one a prompt: what a feature of no meaning comes near."""
    medians: dict[tuple[str, int], float]
    """(dictionary, step) -> the median over its features; only where there are any."""
    seconds: float = field(compare=False)


def run(settings: CoherenceSettings) -> CoherenceSummary:
    """Write `OUT/<name>/coherence.parquet` of every dictionary for the steps asked for; other steps of the same embeddings stay."""
    started = time.monotonic()
    analysis = open_analysis(settings)
    check_top_m(int(check_output(analysis)["top"]), settings.top_m)
    matrices = {(s.name, step): analysis.matrix(s, step) for s in analysis.subjects for step in analysis.steps}
    embeddings = image_embeddings(analysis, settings)
    baseline = mean_cosine_of_prompts(embeddings, prompt_texts(analysis.store))
    medians: dict[tuple[str, int], float] = {}
    features = 0
    with tqdm(total=len(matrices), desc="coherence", unit="step", mininterval=0.5) as progress:
        for subject in analysis.subjects:
            tables = []
            for step in analysis.steps:
                lists = matrices[subject.name, step].features()["unique_image"]
                tables.append(
                    step_table(
                        step,
                        embeddings,
                        *top_lists(lists, settings.top_m),
                        matrices[subject.name, step].n_features,
                    )
                )
                values = tables[-1]["coherence"].drop_null().to_numpy()
                features += len(values)
                if len(values):
                    medians[subject.name, step] = float(np.median(values))
                progress.update()
            _write(analysis, subject, embeddings, settings.top_m, baseline, tables)
    found = CoherenceSummary(features, embeddings.id, embeddings.cached, baseline, medians, time.monotonic() - started)
    print(_sentences(found, embeddings, settings.top_m, analysis))
    return found


def check_top_m(kept: int, top_m: int) -> None:
    """`UsageError` when more images are to be compared than the analysis kept with each feature."""
    if top_m > kept:
        raise UsageError(
            f"--top-m is {top_m}, but this analysis keeps {kept} top images of each feature: compute scores with --top {top_m}"
        )


def top_lists(column: pa.ChunkedArray, most: int) -> tuple[Int[np.ndarray, " offset"], Int[np.ndarray, " place"]]:
    """The first `most` of each list of a column, as offsets and values: list f is `values[offsets[f] : offsets[f + 1]]`."""
    array = column.combine_chunks()
    lists = pa.chunked_array([array]).combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy(zero_copy_only=False)
    length = np.diff(offsets)
    place = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], length)
    short = np.concatenate(([0], np.cumsum(np.minimum(length, most))))
    return short, values[offsets[0] : offsets[-1]][place < most].astype(np.int64)


def mean_pairwise_cosine(
    embeddings: Float[np.ndarray, "image dim"],
    offsets: Int[np.ndarray, " offset"],
    images: Int[np.ndarray, " place"],
    lengths: Float[np.ndarray, " image"] | None = None,
) -> Float[np.ndarray, " feature"]:
    """The mean cosine over all pairs of each list's images (see `top_lists`); NaN for lists of fewer than 2.

    `embeddings`: vectors of any floating-point type and of these `lengths`, without them unit vectors.  Costs one addition of a vector
    in float64 for each image of each list; twice `BLOCK_BYTES` of memory, whatever the number of images.
    """
    features, dim = len(offsets) - 1, embeddings.shape[1]
    size = max(1, BLOCK_BYTES // (8 * dim))
    squared = np.empty(features)
    stop = 0
    while (start := stop) < features:  # as many features as have `size` images, or one that has more
        full = int(np.searchsorted(offsets, offsets[start] + size, side="right")) - 1
        stop = min(max(full, start + 1), start + size, features)
        pieces = (
            _sums(images[first : min(first + size, offsets[stop])], offsets[start:stop] - first, embeddings, lengths)
            for first in range(offsets[start], max(offsets[stop], offsets[start] + 1), size)
        )
        sums = next(pieces)
        for piece in pieces:
            sums += piece
        squared[start:stop] = torch.linalg.vector_norm(sums, dim=1).square().numpy()
    n = np.diff(offsets)
    return np.where(n >= 2, (squared - n) / np.maximum(n * (n - 1), 1), np.nan)


def _sums(
    images: Int[np.ndarray, " place"],
    bags: Int[np.ndarray, " feature"],
    embeddings: Float[np.ndarray, "image dim"],
    lengths: Float[np.ndarray, " image"] | None,
) -> Float[torch.Tensor, "feature dim"]:
    """The sums of unit vectors of lists that begin at `bags`, which may be outside; float64."""
    distinct, some = np.unique(images, return_inverse=True)
    vectors = embeddings[distinct].astype(np.float64)
    if lengths is not None:
        vectors /= lengths[distinct, None]
    begins = np.clip(bags, 0, len(some))
    bags_of = torch.from_numpy(begins)
    return embedding_bag(torch.from_numpy(some), torch.from_numpy(vectors), bags_of, mode="sum")


def mean_cosine_of_prompts(embeddings: Embeddings, prompts: list[str]) -> float:
    """The mean cosine between the first images of all prompts; NaN for a single prompt."""
    first: dict[str, int] = {}
    for image, prompt in enumerate(prompts):
        first.setdefault(normalise(prompt), image)
    images = np.fromiter(first.values(), np.int64)
    return float(mean_pairwise_cosine(embeddings.values, np.asarray([0, len(images)]), images, embeddings.lengths)[0])


def step_table(
    step: int,
    embeddings: Embeddings,
    offsets: Int[np.ndarray, " offset"],
    images: Int[np.ndarray, " place"],
    n_features: int,
) -> pa.Table:
    """The coherence of every feature of one dictionary at one step: step, feature, coherence (null below 2 images), images."""
    values = mean_pairwise_cosine(embeddings.values, offsets, images, embeddings.lengths)
    return pa.table(
        {
            "step": pa.array(np.full(n_features, step, np.int32)),
            "feature": pa.array(np.arange(n_features, dtype=np.int32)),
            "coherence": pa.array(values, mask=np.isnan(values)),
            "images": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(images, pa.int64())),
        }
    )


def coherence_file(analysis: Analysis, subject: Subject) -> Path:
    """Where the coherence of a dictionary lies."""
    return analysis.out / subject.name / "coherence.parquet"


def coherence_table(analysis: Analysis, subject: Subject) -> pa.Table | None:
    """The coherence of a dictionary's features at all steps computed; None when it was never computed.

    Columns as of `step_table`; `coherence_record` reads its metadata.  `MismatchError` when it is of another dictionary or store,
    `DamagedError` and `ForeignError` when it is none.
    """
    path = coherence_file(analysis, subject)
    if not path.exists():
        return None
    again = "run python -m analyze coherence again"
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): delete it and {again}") from None
    record = coherence_record(table)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ForeignError(f"{path} holds no coherence in format {VERSION}: delete it and {again}")
    if (record["store"], record["dictionary"]) != (analysis.store.id, subject.identity):
        raise MismatchError(f"{path} is the coherence of another dictionary or store: delete it and {again}")
    return table


def coherence_record(table: pa.Table) -> dict[str, str | int | float | None]:
    """What a coherence table says of itself: store, dictionary, embeddings, source, top_m, baseline."""
    said = json.loads((table.schema.metadata or {}).get(RECORD, b"{}"))
    return dict(said)


def _write(
    analysis: Analysis, subject: Subject, embeddings: Embeddings, top_m: int, baseline: float, tables: list[pa.Table]
) -> None:
    """Publish the table; what it held of other steps stays when it was made from the same embeddings in the same way, else we say so."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "store": analysis.store.id,
        "dictionary": subject.identity,
        "embeddings": embeddings.id,
        "source": embeddings.source,
        "top_m": top_m,
        "baseline": None if np.isnan(baseline) else baseline,
    }
    before = coherence_table(analysis, subject)
    if before is not None:
        others = before.filter(pa.array(~np.isin(before["step"].to_numpy(), analysis.steps)))
        if changed := _changed(coherence_record(before), record):
            _tell_discarded(analysis, subject, others, changed)
        else:
            tables = [*tables, others.replace_schema_metadata(None)]
    table = pa.concat_tables(tables).combine_chunks().sort_by([("step", "ascending"), ("feature", "ascending")])
    write_table(
        coherence_file(analysis, subject), table.replace_schema_metadata({RECORD: json.dumps(record, sort_keys=True)})
    )


def _changed(before: dict[str, str | int | float | None], now: dict[str, Any]) -> list[str]:
    """In what way a table was made otherwise; its dictionary and store are known to be the same."""
    changed = ["from other embeddings"] if before["embeddings"] != now["embeddings"] else []
    return changed if before["top_m"] == now["top_m"] else [*changed, f"with --top-m {before['top_m']}"]


def _tell_discarded(analysis: Analysis, subject: Subject, others: pa.Table, changed: list[str]) -> None:
    if steps := others["step"].unique().to_pylist():
        print(
            f"note: {coherence_file(analysis, subject)} held steps {', '.join(map(str, steps))} too, made {' and '.join(changed)}: "
            "discarded; compute them again to compare them with these"
        )


def _sentences(found: CoherenceSummary, embeddings: Embeddings, top_m: int, analysis: Analysis) -> str:
    origin = "were there already" if found.cached else embeddings.source
    lines = [
        f"coherence: {found.features} features by their top {top_m} images with unique prompts in {found.seconds:.1f} s -> {analysis.out}",
        f"           embeddings of {len(embeddings.values)} images x {embeddings.values.shape[1]}: {origin}",
        f"           any two prompts' images: {found.baseline:.3f}",
    ]
    for subject in analysis.subjects:
        values = [
            f"{found.medians[subject.name, step]:.3f}" if (subject.name, step) in found.medians else "-"
            for step in analysis.steps
        ]
        lines.append(
            f"           {subject.name}: median over its features {', '.join(values)} at steps {', '.join(map(str, analysis.steps))}"
        )
    return "\n".join(lines)
