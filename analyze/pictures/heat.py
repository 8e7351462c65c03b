"""The activation of chosen features at every token of chosen images: what overlays and highlighted prompts are drawn from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from analyze.counted import counted_chunks
from analyze.inputs import Analysis, Subject, sigmas
from analyze.pictures.narrowed import activations_of, judged_alone
from analyze.scoring.encoding import Encoder
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


def heats(
    analysis: Analysis, subject: Subject, step: int, wanted: Mapping[int, Sequence[int]]
) -> dict[int, list[Heat]]:
    """For every feature asked for, its heat on the images asked for, in their order; each chunk of the store is read once.

    Of text only the real tokens are there: the others have no words to be shown on.
    """
    found = {(feature, heat.image): heat for feature, heat in each_heat(analysis, subject, step, wanted)}
    return {feature: [found[feature, int(image)] for image in group] for feature, group in wanted.items()}


def each_heat(
    analysis: Analysis, subject: Subject, step: int, wanted: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, Heat]]:
    """The same heats as pairs of feature and heat, image after image as they are read: only one chunk of the store is held.

    On each image only the features asked for there are computed, where the dictionary's activation allows it (all but TopK).
    """
    store = analysis.store
    sigma = sigmas(store, step)
    features_on = _by_image(wanted)
    images = np.asarray(sorted(features_on), np.int64)
    alone = judged_alone(subject.dictionary)
    for chunk in counted_chunks(store, subject.site.stream, step, images, padding=False):
        start, owner = chunk.start, chunk.rows[0]
        read = analysis.rows.read(subject.site, step, [subject.point], start, chunk.stop, chunk.rows)[subject.point]
        together = {}
        if not alone:
            together = _together(subject, to_torch(read), sigma[start + owner], start + owner, features_on)
        for image in images[(images >= start) & (images < chunk.stop)].tolist():
            mine, features = owner == image - start, features_on[image]
            if alone:
                z = _activations(subject, to_torch(read[mine]), float(sigma[image]), features)
            else:
                z = together.get(image, np.zeros((0, len(features)), np.float32))
            for column, feature in enumerate(features):
                yield feature, Heat(image, chunk.row_positions[mine], z[:, column])


def _together(
    subject: Subject,
    rows: torch.Tensor,
    sigma: Float[np.ndarray, " row"],
    image: Int[np.ndarray, " row"],
    features_on: Mapping[int, list[int]],
) -> dict[int, Float[np.ndarray, "token feature"]]:
    """Image -> z of its features, from rows of several images that are encoded at once, in blocks bounded by memory."""
    found: dict[int, list[np.ndarray]] = {}
    for block, z in encoded(subject, rows, torch.from_numpy(np.ascontiguousarray(sigma))):
        for each in np.unique(image[block]).tolist():
            mine = torch.from_numpy(np.flatnonzero(image[block] == each))
            found.setdefault(each, []).append(z[mine][:, features_on[each]].float().cpu().numpy())
    return {each: np.concatenate(parts) for each, parts in found.items()}


def _by_image(wanted: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Image -> the features asked for on it, each once."""
    found: dict[int, dict[int, None]] = {}
    for feature in sorted(wanted):
        for image in wanted[feature]:
            found.setdefault(int(image), {})[feature] = None
    return {image: list(features) for image, features in found.items()}


def _activations(
    subject: Subject, rows: torch.Tensor, sigma: float, features: list[int]
) -> Float[np.ndarray, "token feature"]:
    """z of these features alone, of a dictionary that judges each by itself; `NonFiniteError` as `encoded` raises it."""
    if not len(rows):
        return np.zeros((0, len(features)), np.float32)
    dictionary = subject.dictionary
    z = activations_of(dictionary, features, rows, torch.full((len(rows),), sigma))
    if not bool(torch.isfinite(z).all()):
        Encoder(dictionary, z.device).refuse_non_finite(z)
    return z.numpy()
