"""What could be read off activations without a dictionary: a linear probe as ceiling, the best single channel as floor."""

import numpy as np
from jaxtyping import Bool, Float, Int

from analyze.truth.auroc import auroc
from analyze.truth.choosing import Choice, choose_columns, judged

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties in units of the variance of one standardised channel"""


def ridge_probe(
    x: Float[np.ndarray, "row d_model"], shown: Bool[np.ndarray, "row label"], part: Int[np.ndarray, " row"]
) -> Choice:
    """A ridge regression for every label: penalty chosen on part 1 of a fit on part 0, refitted on both, scored on part 2.

    `selection` is the AUROC on part 1, so that probes of different sites can be compared before they are scored.
    """
    label = np.arange(shown.shape[1])
    check = np.stack([np.diagonal(auroc(p, shown[part == 1])) for p in _predictions(x, shown, part == 0, part == 1)])
    alpha = np.argmax(np.nan_to_num(check, nan=-1), axis=0)
    score = np.stack([np.diagonal(auroc(p, shown[part == 2])) for p in _predictions(x, shown, part < 2, part == 2)])
    enough = judged(shown, part < 2)
    selection, scored = check[alpha, label], score[alpha, label]
    return Choice(label, np.where(enough, selection, np.nan), np.where(enough, scored, np.nan))


def _predictions(
    x: Float[np.ndarray, "row d_model"],
    shown: Bool[np.ndarray, "row label"],
    fit: Bool[np.ndarray, " row"],
    use: Bool[np.ndarray, " row"],
) -> list[Float[np.ndarray, "use label"]]:
    """Predictions on the rows `use` of regressions fitted on the rows `fit`, one for each penalty."""
    mean, deviation = x[fit].mean(axis=0), x[fit].std(axis=0) + 1e-6
    inside, outside = (x[fit] - mean) / deviation, (x[use] - mean) / deviation
    target = shown[fit] - shown[fit].mean(axis=0)
    value, vector = np.linalg.eigh(inside.T @ inside / len(inside))
    projected = vector.T @ (inside.T @ target) / len(inside)
    return [(outside @ (vector @ (projected / (value + alpha)[:, None]))).astype(np.float32) for alpha in ALPHAS]


def best_channel(
    x: Float[np.ndarray, "row channel"], shown: Bool[np.ndarray, "row label"], part: Int[np.ndarray, " row"]
) -> Choice:
    """The single channel that tells each label best, of either sign, chosen on parts 0 and 1, scored on part 2."""
    return choose_columns(x, shown, part < 2, sign_free=True)
