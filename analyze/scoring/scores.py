"""Score matrices: S[image, feature] = the largest activation over the counted tokens of an image, for every site and step.

1. Images are read chunk by chunk, once for all dictionaries of a site; rows that do not count are dropped before encoding.
2. Rows are encoded in blocks of 4 MiB of activations (which stay in the cache), or 256 rows; a running maximum and its token
   are kept per image.
3. In the same pass each feature's active rows are counted, and their sum and sum of squares taken.
4. A block of images goes to disk when it is full; the feature table is made from the matrix, block of features by block.

Memory is bounded by the image block (512 x features x 8 B) whatever the number of images.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from analyze.counted import are_lower_bounds, counted_rows, text_lengths
from analyze.inputs import Analysis, Subject, claim_output, open_analysis, sigmas
from analyze.prompts import prompt_texts
from analyze.scoring.features import RowStatistics, feature_table
from analyze.scoring.matrices import ScoreWriter, step_folder
from analyze.scoring.settings import ScoresSettings
from store.errors import NonFiniteError
from store.sites import Site
from train.rows.tensors import to_torch

BLOCK_BYTES = 4 * 2**20
BLOCK_ROWS = 256


@dataclass(frozen=True)
class ScoresSummary:
    """What a run of `scores` did."""

    computed: int
    """(dictionary, step) pairs computed now."""
    found: int
    """Pairs that were there already."""
    n_images: int
    lower_bounds: tuple[str, ...]
    """Streams whose maxima are lower bounds, because the store keeps a sample of their tokens."""
    seconds: float = field(compare=False)


def run(settings: ScoresSettings) -> ScoresSummary:
    """Compute the scores that are not there yet; the same settings on the same store give the same bytes."""
    started = time.monotonic()
    analysis = open_analysis(settings)
    claim_output(analysis, {"padding": settings.padding, "top": settings.top})
    for note in analysis.notes():
        print(note)
    missing, found = _missing(analysis)
    rounds = [
        (site, step, [s for s in analysis.subjects if s.site == site and (s, step) in missing])
        for site, step in _rounds(analysis)
    ]
    total = sum(analysis.store.n_images for _, _, subjects in rounds if subjects)
    with tqdm(total=total, desc="scores", unit="image", mininterval=0.5) as progress:
        for site, step, subjects in rounds:
            if subjects:
                progress.set_postfix_str(f"{site} step {step}", refresh=False)
                score_site(analysis, subjects, step, settings, progress)
    lower = tuple(s for s in analysis.streams() if are_lower_bounds(analysis.store, s, settings.padding))  # type: ignore[arg-type]
    summary = ScoresSummary(len(missing), found, analysis.store.n_images, lower, time.monotonic() - started)
    print(_sentence(summary, analysis))
    return summary


def _missing(analysis: Analysis) -> tuple[set[tuple[Subject, int]], int]:
    pairs = [(subject, step) for subject in analysis.subjects for step in analysis.steps]
    there = {pair for pair in pairs if step_folder(analysis.out, pair[0].name, pair[1]).exists()}
    for subject, step in there:
        analysis.matrix(subject, step)  # refuses what belongs to another dictionary
    return set(pairs) - there, len(there)


def _rounds(analysis: Analysis) -> list[tuple[Site, int]]:
    sites = [site for site, _ in groupby(subject.site for subject in analysis.subjects)]
    return [(site, step) for site in dict.fromkeys(sites) for step in analysis.steps]


def _sentence(summary: ScoresSummary, analysis: Analysis) -> str:
    count = f"{summary.computed} score matrices" + (f" ({summary.found} were there already)" if summary.found else "")
    text = f"scores: {count} of {summary.n_images} images in {summary.seconds:.1f} s -> {analysis.out}"
    for stream in summary.lower_bounds:
        text += f"\n        {stream}: the store keeps a sample of the tokens, so these maxima are lower bounds"
    return text


def score_site(
    analysis: Analysis, subjects: list[Subject], step: int, settings: ScoresSettings, progress: "tqdm[None]"
) -> None:
    """Write the score matrices of all dictionaries of one site at one step, from one read of the store."""
    store, site = analysis.store, subjects[0].site
    sigma, lengths = sigmas(store, step), text_lengths(store)
    statistics = [RowStatistics(subject.n_features) for subject in subjects]
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(analysis, subject, step, settings)) for subject in subjects]
        for start in range(0, store.n_images, store.chunk_images):
            stop = min(start + store.chunk_images, store.n_images)
            positions = store.tokens(site.stream, step, start, stop)
            counted = counted_rows(
                positions, site.stream, lengths[start:stop], store.meta.max_sequence_length, settings.padding
            )
            rows = analysis.rows.read(site, step, {s.point for s in subjects}, start, stop, counted)
            image = np.nonzero(counted)[0]
            for subject, writer, statistic in zip(subjects, writers, statistics, strict=True):
                blocks = encoded(subject, to_torch(rows[subject.point]), torch.from_numpy(sigma[start:stop][image]))
                scores, tokens = maxima(blocks, image, positions[counted], stop - start, subject.n_features, statistic)
                writer.append(scores, tokens)
            progress.update(stop - start)
        prompts = prompt_texts(store)
        for writer, statistic in zip(writers, statistics, strict=True):
            writer.finish(feature_table(writer.matrix(), statistic, prompts, settings.top))


def _writer(analysis: Analysis, subject: Subject, step: int, settings: ScoresSettings) -> ScoreWriter:
    attributes = {
        "store": analysis.store.id,
        "dictionary": subject.identity,
        "dictionary_name": subject.dictionary.name,
        "site": str(subject.site),
        "step": step,
        "targets": analysis.store.meta.targets,
        "padding_counted": settings.padding,
        "lower_bounds": are_lower_bounds(analysis.store, subject.site.stream, settings.padding),
    }
    return ScoreWriter(
        step_folder(analysis.out, subject.name, step), analysis.store.n_images, subject.n_features, attributes
    )


def encoded(
    subject: Subject, rows: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"]
) -> Iterator[tuple[slice, Float[Tensor, "block feature"]]]:
    """The activations z of the rows, in blocks bounded by memory, each with the slice of rows that it covers.

    `NonFiniteError` names the dictionary when an activation is NaN or infinite.
    """
    size = max(BLOCK_ROWS, BLOCK_BYTES // (4 * subject.n_features))
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            block = slice(start, min(start + size, len(rows)))
            z = subject.dictionary.encode(rows[block].float(), sigma[block])
            if not torch.isfinite(z.sum()):
                raise NonFiniteError(
                    f"{subject.dictionary.name} gives a NaN or an infinite activation on this store: its weights or the store's "
                    "activations are damaged or overflowed; python -m store info shows the range of each site"
                )
            yield block, z


def maxima(
    blocks: Iterator[tuple[slice, Float[Tensor, "block feature"]]],
    image: Int[np.ndarray, " row"],
    position: Int[np.ndarray, " row"],
    n_images: int,
    n_features: int,
    statistics: RowStatistics,
) -> tuple[Float[np.ndarray, "image feature"], Int[np.ndarray, "image feature"]]:
    """The largest activation of each image and the first token that has it; `image` ascends and numbers the images from 0.

    An image without a counted row has score 0 and token -1.  Every block is also added to `statistics`.
    """
    scores = torch.full((n_images, n_features), -torch.inf)
    tokens = torch.full((n_images, n_features), -1, dtype=torch.int32)
    where = torch.from_numpy(np.ascontiguousarray(position, np.int32))
    for block, z in blocks:
        statistics.add(z)
        owners = image[block]
        cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        for low, high in pairwise(cuts):
            value, index = z[low:high].max(dim=0)
            owner = int(owners[low])
            better = value > scores[owner]
            tokens[owner] = torch.where(better, where[block.start + low + index], tokens[owner])
            scores[owner] = torch.where(better, value, scores[owner])
    scores[torch.isinf(scores)] = 0
    return scores.numpy(), tokens.numpy()
