"""The activation of chosen features at every token of chosen images: what overlays and highlighted prompts are drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from analyze.counted import counted_rows, text_lengths
from analyze.inputs import Analysis, Subject, sigmas
from analyze.scoring.scores import encoded
from train.rows.tensors import to_torch


@dataclass(frozen=True)
class Heat:
    """One feature on one image."""

    image: int
    positions: Int[np.ndarray, " token"]
    """kept tokens, ascending"""
    values: Float[np.ndarray, " token"]
    """z at those tokens"""


def heats(analysis: Analysis, subject: Subject, step: int, wanted: dict[int, Sequence[int]]) -> dict[int, list[Heat]]:
    """For every feature asked for, its heat on the images asked for, in their order; each chunk of the store is read once.

    Of text only the real tokens are there: the others have no words to be shown on.
    """
    store, stream = analysis.store, subject.site.stream
    lengths = text_lengths(store)
    sigma = sigmas(store, step)
    images = np.unique(np.asarray([image for group in wanted.values() for image in group], np.int64))
    features = sorted(wanted)
    found: dict[tuple[int, int], Heat] = {}
    for start in np.unique(images // store.chunk_images) * store.chunk_images:
        stop = min(int(start) + store.chunk_images, store.n_images)
        here = images[(images >= start) & (images < stop)]
        positions = store.tokens(stream, step, int(start), stop)
        shown = counted_rows(
            positions, stream, lengths[int(start) : stop], store.meta.max_sequence_length, padding=False
        )
        shown[~np.isin(np.arange(start, stop), here)] = False
        owner = np.nonzero(shown)[0]
        chunk = analysis.rows.read(subject.site, step, [subject.point], int(start), stop, shown)[subject.point]
        for image in here:
            kept = shown[image - start]
            rows = to_torch(chunk[owner == image - start])
            blocks = encoded(subject, rows, torch.full((len(rows),), float(sigma[image])))
            z = torch.cat([block[:, features] for _, block in blocks]).numpy()
            for column, feature in enumerate(features):
                if image in wanted[feature]:
                    found[feature, int(image)] = Heat(int(image), positions[image - start][kept], z[:, column])
    return {feature: [found[feature, int(image)] for image in group] for feature, group in wanted.items()}
