"""One pass over the rows of one site and step: sums and maxima over chosen tokens of each image, for all its dictionaries.

Images are read chunk by chunk, rows that do not count are dropped before encoding, and what leaves the pass is a few figures
a feature and image, so the pass itself holds one chunk of images whatever their number.  Those who add the figures up hold, on
top of it, sums of the prompts of which images are still to come (`replicates`): few where the images of a prompt lie together,
all prompts where each seed was harvested by itself.  `--plan` says how much that is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from analyze.counted import counted_chunks
from analyze.inputs import Analysis, Subject, sigmas
from analyze.scoring.scores import encoded
from store.sites import Site
from train.rows.tensors import to_torch


@dataclass(frozen=True)
class ChunkSums:
    """What one dictionary does on some images, inside and outside of the chosen tokens."""

    images: Int[np.ndarray, " image"]
    tokens_in: Int[np.ndarray, " image"]
    tokens_out: Int[np.ndarray, " image"]
    sum_in: Float[np.ndarray, "image feature"]
    sum_out: Float[np.ndarray, "image feature"]
    max_in: Float[np.ndarray, "image feature"]
    token_in: Int[np.ndarray, "image feature"]
    """the first token that has the maximum, a position in the stream"""


@dataclass(frozen=True)
class TokenChoice:
    """Which tokens of a stream are inside, and which others are compared with them; the rest is not read."""

    inside: Bool[np.ndarray, " token"] | Bool[np.ndarray, "image token"]
    """by position in the stream: for every image of the store alike, or for each"""
    outside: Bool[np.ndarray, " token"] | None = None
    """None: nothing is compared"""

    def of(
        self, image: Int[np.ndarray, " row"], position: Int[np.ndarray, " row"]
    ) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
        """Whether rows are inside, and whether they are wanted at all."""
        inside = self.inside[position] if self.inside.ndim == 1 else self.inside[image, position]
        return inside, inside if self.outside is None else inside | self.outside[position]


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that are wanted."""

    image: Int[np.ndarray, " row"]
    """counted from the first of the chunk"""
    slot: Int[np.ndarray, " row"]
    position: Int[np.ndarray, " row"]
    inside: Bool[np.ndarray, " row"]


def _chunks(
    analysis: Analysis, site: Site, step: int, images: Int[np.ndarray, " image"], choice: TokenChoice, padding: bool
) -> Iterator[tuple[int, int, _Rows]]:
    """Start, stop and wanted rows of every chunk that holds some of the images."""
    for chunk in counted_chunks(analysis.store, site.stream, step, images, padding):
        (image, slot), position = chunk.rows, chunk.row_positions
        inside, wanted = choice.of(image + chunk.start, position)
        yield chunk.start, chunk.stop, _Rows(image[wanted], slot[wanted], position[wanted], inside[wanted])


def countable(
    analysis: Analysis, site: Site, step: int, images: Int[np.ndarray, " image"], choice: TokenChoice, padding: bool
) -> Int[np.ndarray, " kept"]:
    """The images of which tokens inside were kept, and outside where they are compared; reads positions only."""
    found = []
    for start, stop, rows in _chunks(analysis, site, step, images, choice, padding):
        there = np.bincount(rows.image[rows.inside], minlength=stop - start) > 0
        if choice.outside is not None:
            there &= np.bincount(rows.image[~rows.inside], minlength=stop - start) > 0
        found.append(start + np.flatnonzero(there))
    return np.concatenate(found) if found else images


def token_pass(
    analysis: Analysis,
    site: Site,
    subjects: Sequence[Subject],
    step: int,
    images: Int[np.ndarray, " image"],
    choice: TokenChoice,
    padding: bool,
) -> Iterator[tuple[int, ChunkSums]]:
    """For every chunk of the store that holds some of `images` (ascending): (place of the subject, its sums), from one read."""
    sigma, subjects = sigmas(analysis.store, step), [_held(subject) for subject in subjects]
    for start, stop, rows in _chunks(analysis, site, step, images, choice, padding):
        here = images[(images >= start) & (images < stop)]
        points = {subject.point for subject in subjects}
        read = analysis.rows.read(site, step, points, start, stop, (rows.image, rows.slot))
        owner = np.searchsorted(here, rows.image + start)
        for place, subject in enumerate(subjects):
            blocks = encoded(subject, to_torch(read[subject.point]), torch.from_numpy(sigma[start:stop][rows.image]))
            yield place, _sums(blocks, here, owner, rows, subject.n_features)


def _held(subject: Subject) -> Subject:
    """The subject with its weights in memory, where they stay for the whole pass however many dictionaries a site has."""
    dictionary = subject.fresh()
    dictionary.place = None
    return replace(subject, outline=dictionary)


def _sums(
    blocks: Iterator[tuple[slice, torch.Tensor]],
    images: Int[np.ndarray, " image"],
    owner: Int[np.ndarray, " row"],
    rows: _Rows,
    n_features: int,
) -> ChunkSums:
    count = len(images)
    sum_in, sum_out = torch.zeros(count, n_features), torch.zeros(count, n_features)
    best, token = torch.full((count, n_features), -torch.inf), torch.full((count, n_features), -1, dtype=torch.int32)
    where = torch.from_numpy(rows.position.astype(np.int32))
    for block, z in blocks:
        cuts = [0, *(np.flatnonzero(np.diff(owner[block])) + 1).tolist(), len(z)]
        for low, high in pairwise(cuts):
            mine, within = int(owner[block.start + low]), rows.inside[block][low:high]
            chosen = torch.from_numpy(np.flatnonzero(within))
            if len(chosen) < high - low:
                sum_out[mine] += z[low:high][torch.from_numpy(~within)].sum(dim=0)
            if not len(chosen):
                continue
            part = z[low:high] if len(chosen) == high - low else z[low:high][chosen]
            sum_in[mine] += part.sum(dim=0)
            value, index = part.max(dim=0)
            better = value > best[mine]
            token[mine] = torch.where(better, where[block.start + low + chosen[index]], token[mine])
            best[mine] = torch.where(better, value, best[mine])
    best[torch.isinf(best)] = 0
    tokens_in = np.bincount(owner[rows.inside], minlength=count)
    tokens_out = np.bincount(owner[~rows.inside], minlength=count)
    return ChunkSums(images, tokens_in, tokens_out, sum_in.numpy(), sum_out.numpy(), best.numpy(), token.numpy())
