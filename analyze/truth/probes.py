"""What could be read off activations without a dictionary: a linear probe, and the best single channel as floor.

Neither bounds a feature: a probe that is fitted on few images can fall short of one that was trained on many.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from analyze.truth.choosing import Choice, best_of, choose_columns, diagonal_auroc, empty_choice, judged
from analyze.truth.thresholds import best_threshold, f1_of

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Ridge penalties in units of the variance of one standardised channel"""


def ridge_probe(
    x: Float[np.ndarray, "row d_model"], shown: Bool[np.ndarray, "row label"], part: Int[np.ndarray, " row"]
) -> Choice:
    """A ridge regression for every label: penalty chosen by fits on part 0 and on part 1, each judged on the other; scored on part 2.

    `selection` is the AUROC of those predictions, so that probes of different sites can be compared before they are scored; the
    threshold of F1 is chosen by them too.  What is scored was fitted on both parts.
    """
    enough = judged(shown, part < 2)
    result = empty_choice(shown.shape[1])
    if enough.any() and min(np.bincount(part, minlength=3)) > 1:  # one row has no deviation to be measured in
        result.put(np.flatnonzero(enough), _probe(x, shown[:, enough], part))
    return result


def _probe(
    x: Float[np.ndarray, "row d_model"], shown: Bool[np.ndarray, "row label"], part: Int[np.ndarray, " row"]
) -> Choice:
    label, first, second, score = np.arange(shown.shape[1]), part == 0, part == 1, part == 2
    told = np.concatenate([shown[second], shown[first]])
    tried = np.concatenate([_predictions(x, shown, first, second), _predictions(x, shown, second, first)], axis=1)
    found = np.stack([diagonal_auroc(p, told) for p in tried])
    alpha = np.argmax(found, axis=0)
    threshold = best_threshold(tried[alpha, :, label].T, told)
    final = _predictions(x, shown, first | second, score)[alpha, :, label].T
    cut = f1_of(final, shown[score], threshold)
    return Choice(label, found[alpha, label], diagonal_auroc(final, shown[score]), *cut)


def _predictions(
    x: Float[np.ndarray, "row d_model"],
    shown: Bool[np.ndarray, "row label"],
    fit: Bool[np.ndarray, " row"],
    use: Bool[np.ndarray, " row"],
) -> Float[np.ndarray, "alpha use label"]:
    """Predictions on the rows `use` of regressions fitted on the rows `fit`, one for each penalty.

    The eigenvectors are taken of the products of channels or, where there are fewer, of rows: the regressions are the same.
    """
    mean, deviation = x[fit].mean(axis=0), x[fit].std(axis=0) + 1e-6
    inside, outside = (x[fit] - mean) / deviation, (x[use] - mean) / deviation
    share = shown[fit].mean(axis=0)
    target, count = shown[fit] - share, len(inside)
    if x.shape[1] <= count:
        value, vector = np.linalg.eigh(inside.T @ inside / count)
        projected, basis = vector.T @ (inside.T @ target) / count, outside @ vector
    else:
        value, vector = np.linalg.eigh(inside @ inside.T / count)
        projected, basis = vector.T @ target / count, outside @ (inside.T @ vector)
    fitted = [basis @ (projected / (np.maximum(value, 0) + alpha)[:, None]) + share for alpha in ALPHAS]
    return np.stack(fitted).astype(np.float32)


def best_channel(
    points: Iterable[Float[np.ndarray, "row _"]],
    shown: Bool[np.ndarray, "row label"],
    part: Int[np.ndarray, " row"],
) -> Choice:
    """The single channel that tells each label best, of either sign, chosen on parts 0 and 1, scored on part 2.

    `points` come one after another, so that only one is in memory; columns are counted through all of them.
    """
    return best_of(_by_point(points, shown, part))


def _by_point(
    points: Iterable[Float[np.ndarray, "row _"]],
    shown: Bool[np.ndarray, "row label"],
    part: Int[np.ndarray, " row"],
) -> Iterator[Choice]:
    first = 0
    for x in points:
        yield choose_columns(x, shown, part < 2, sign_free=True).moved(first)
        first += x.shape[1]
