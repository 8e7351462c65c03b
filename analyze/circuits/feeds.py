"""What feeds nodes: the answers of the frozen model, one compact record a node, small parts counted but not listed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analyze.circuits.frozen import Attribution, FrozenModel, Target
from analyze.circuits.nodes import NodeKind
from analyze.circuits.sources import TERMS, ActiveIndex, encode

TOGETHER = 128
"""targets whose answers are held as dense arrays over tokens: 50 MB at FLUX's size"""


@dataclass(frozen=True)
class Feed:
    """What feeds one node: its parts add up to its pre-activation."""

    pre: float
    conservation: float
    features: np.ndarray
    """int32 (feature,): numbers in the `ActiveIndex`, ascending"""
    values: np.ndarray
    """float64 (feature,): what each adds"""
    others: np.ndarray
    """int64 (other,): codes of errors, inputs and constant paths"""
    other_values: np.ndarray
    """float64 (other,)"""
    strength: float
    """sum of |a| of all features, errors and inputs that are listed"""
    dropped: float
    """sum of all that is under the threshold"""


def feeds(
    model: FrozenModel, index: ActiveIndex, targets: Sequence[Target], least: float, least_z: float = 0.0
) -> list[Feed]:
    """The feed of each target, parts of at least `least` listed, and features only where z is over `least_z`.

    Traced back `TOGETHER` at a time, those of high layers together, so that a sweep begins no higher than it must.
    """
    layers = [max(member.site.layer for member in target.members) for target in targets]
    order = np.argsort(-np.asarray(layers, dtype=np.int64), kind="stable").tolist()
    found: dict[int, Feed] = {}
    for begin in range(0, len(order), TOGETHER):
        some = order[begin : begin + TOGETHER]
        answer = model.attribute([targets[row] for row in some], least)
        found.update(zip(some, _split(model, index, answer, least, least_z), strict=True))
    return [found[row] for row in range(len(targets))]


def _split(model: FrozenModel, index: ActiveIndex, answer: Attribution, least: float, least_z: float) -> list[Feed]:
    """The answer by target."""
    count = len(answer.pre)
    ids = index.find(encode("feature", answer.site, answer.token, answer.feature))
    assert (ids >= 0).all(), "a feature that feeds a node is active"
    row, value = answer.row, answer.value
    listed = (np.abs(value) >= least) & (index.z[ids] > least_z)
    dropped = answer.below + np.bincount(row[~listed], value[~listed], minlength=count)
    ids, row, value = ids[listed], row[listed], value[listed]
    strength = np.bincount(row, np.abs(value), minlength=count).astype(np.float64)  # of nothing they are integers
    other_row, other_code, other_value, constant = _others(model, answer)
    listed = np.abs(other_value) >= least
    dropped += np.bincount(other_row[~listed], other_value[~listed], minlength=count)
    strength += np.bincount(other_row, np.abs(other_value) * (listed & ~constant), minlength=count)
    other_row, other_code, other_value = other_row[listed], other_code[listed], other_value[listed]
    cuts, other_cuts = np.searchsorted(row, range(count + 1)), np.searchsorted(other_row, range(count + 1))
    spans = [(slice(*cuts[at : at + 2]), slice(*other_cuts[at : at + 2])) for at in range(count)]
    return [
        Feed(
            pre=float(answer.pre[at]),
            conservation=float(answer.conservation[at]),
            features=ids[mine].copy(),
            values=value[mine].copy(),
            others=other_code[other].copy(),
            other_values=other_value[other].copy(),
            strength=float(strength[at]),
            dropped=float(dropped[at]),
        )
        for at, (mine, other) in enumerate(spans)
    ]


def _others(model: FrozenModel, answer: Attribution) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, code and value of what is no feature, and whether it is a constant path; zeros left out, sorted by (row, code)."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = []
    entry = {site.stream: row for row, site in reversed(list(enumerate(model.sites))) if site.layer == 0}
    dense: list[tuple[NodeKind, int, np.ndarray]] = [
        *(("error", model.sites.index(site), values) for site, values in answer.errors.items()),
        *(("input", entry[stream], values) for stream, values in answer.inputs.items()),
    ]
    for kind, site, values in dense:
        row, token = np.nonzero(values)
        parts.append((row, encode(kind, site, token), values[row, token], False))
    for (place, term), values in answer.bias.items():
        row = np.flatnonzero(values)
        code = encode("bias", model.sites.index(place), feature=np.full(len(row), TERMS.index(term)))
        parts.append((row, code, values[row], True))
    rows = np.concatenate([part[0] for part in parts])
    codes = np.concatenate([part[1] for part in parts])
    values = np.concatenate([part[2] for part in parts])
    constant = np.repeat([part[3] for part in parts], [len(part[0]) for part in parts])
    order = np.lexsort((codes, rows))
    return rows[order], codes[order], values[order], constant[order]
