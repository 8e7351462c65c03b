"""What feeds nodes: the answers of the frozen model, one compact record a node, small parts counted but not listed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analyze.circuits.frozen import Attribution, FrozenModel, Target
from analyze.circuits.nodes import NodeKind
from analyze.circuits.sources import KINDS, TERMS, ActiveIndex, encode
from store.errors import NonFiniteError
from store.sites import Site

TOGETHER, EDGE_BYTES = 128, 72
"""targets traced back together at most, where an eighth of the model's memory holds their answers: dense arrays over tokens, and
the edges, of which a target is reckoned to have as many as any before it, the first as many as there are; with the copies that are
made in passing"""


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


class Feeder:
    """Traces nodes of one model, as many at once as its memory allows, and remembers how many edges they have."""

    def __init__(self, model: FrozenModel, index: ActiveIndex, least: float, least_z: float = 0.0) -> None:
        """Parts of at least `least` are listed, and features only where z is over `least_z`."""
        self.model, self.index, self.least, self.least_z = model, index, least, least_z
        self._places = sum(model.tokens[site.stream] for site in model.sites)
        self._edges: int | None = None

    @property
    def edges(self) -> int:
        """How many features feed a node: as many as any that was traced had, before the first every one that is active."""
        return len(self.index) if self._edges is None else self._edges

    def feeds(self, targets: Sequence[Target]) -> list[Feed]:
        """The feed of each target.

        Traced back `TOGETHER` at a time or as memory allows, those of high layers together: a sweep begins no higher than it must.
        """
        layers = [max(member.site.layer for member in target.members) for target in targets]
        order = np.argsort(-np.asarray(layers, dtype=np.int64), kind="stable").tolist()
        found: dict[int, Feed] = {}
        while len(found) < len(order):
            most = self.model.memory // (8 * (32 * self._places + EDGE_BYTES * self.edges))
            some = order[len(found) : len(found) + max(1, min(TOGETHER, most))]
            answer = self.model.attribute([targets[row] for row in some], self.least)
            self._check_finite([targets[row] for row in some], answer)
            here = int(np.bincount(answer.row, minlength=len(some)).max())
            self._edges = max(here, self._edges or 0)
            found.update(zip(some, _split(self.model, self.index, answer, self.least, self.least_z), strict=True))
        return [found[row] for row in range(len(targets))]

    def _check_finite(self, targets: Sequence[Target], answer: Attribution) -> None:
        """`NonFiniteError` names the first of the targets whose pre-activation, or a part of it, is no number."""
        wrong = ~np.isfinite(answer.pre) | ~np.isfinite(answer.total)
        wrong[answer.row[~np.isfinite(answer.value)]] = True
        if wrong.any():
            target = targets[int(np.argmax(wrong))]
            name = target.name or ", ".join(f"{m.site}:{m.token}:{m.feature}" for m in target.members)
            dtype = str(self.model.trace.dtype).removeprefix("torch.")
            remedy = "try --dtype float64, and " if dtype == "float32" else ""
            raise NonFiniteError(
                f"{name}: what feeds it is not finite in {dtype}: {remedy}check the store with python -m store verify"
            )


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
    number = {site: row for row, site in enumerate(model.sites)}
    dense: list[tuple[NodeKind, int, np.ndarray]] = [
        *(("error", number[site], values) for site, values in answer.errors.items()),
        *(("input", number[Site("double", 0, stream)], values) for stream, values in answer.inputs.items()),
    ]
    dense.sort(key=lambda part: (KINDS.index(part[0]), part[1]))
    terms = sorted(answer.bias, key=lambda term: (number[term[0]], TERMS.index(term[1])))
    constant = encode(
        "bias", np.asarray([number[site] for site, _ in terms]), 0, np.asarray([TERMS.index(term) for _, term in terms])
    )
    codes = np.concatenate(
        [*(encode(kind, site, np.arange(values.shape[1])) for kind, site, values in dense), constant]
    )
    values = np.concatenate([part[2] for part in dense] + [answer.bias[term][:, None] for term in terms], axis=1)
    row, place = np.nonzero(values)
    return row, codes[place], values[row, place], place >= len(codes) - len(terms)
