"""Nodes as integers while a graph grows: what feeds a target is counted in millions, and a name each would be slow.

A code holds kind, site, token and feature in 63 bits, so codes in falling order of those are codes in order.  `ActiveIndex` numbers
all active features of a trace without gaps, in order of their codes: scores of candidates are plain arrays.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from analyze.circuits.frozen import FrozenModel
from analyze.circuits.nodes import BIAS_TERMS, Node, NodeKind
from store.sites import Site

KINDS: tuple[NodeKind, ...] = ("supernode", "feature", "error", "input", "rest", "bias", "dropped")
"""their numbers in codes, and their order in tables"""
TERMS = tuple(BIAS_TERMS)
FEATURE_BITS, TOKEN_BITS, SITE_BITS = 24, 24, 12


def encode(
    kind: NodeKind, site: np.ndarray | int = 0, token: np.ndarray | int = 0, feature: np.ndarray | int = 0
) -> np.ndarray:
    """Codes, int64: `site` is a row of the model's sites; `feature` of a bias the row of its term, of a supernode its number."""
    code = np.asarray(KINDS.index(kind), dtype=np.int64)
    for part, bits in ((site, SITE_BITS), (token, TOKEN_BITS), (feature, FEATURE_BITS)):
        code = code << bits | np.asarray(part, dtype=np.int64)
    return np.asarray(code)


def decode(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kind (row of `KINDS`), site, token and feature of codes, int64 each."""
    feature = codes & (1 << FEATURE_BITS) - 1
    token = codes >> FEATURE_BITS & (1 << TOKEN_BITS) - 1
    site = codes >> FEATURE_BITS + TOKEN_BITS & (1 << SITE_BITS) - 1
    return codes >> FEATURE_BITS + TOKEN_BITS + SITE_BITS, site, token, feature


def nodes_of(codes: np.ndarray, sites: Sequence[Site], supernodes: Sequence[str]) -> list[Node]:
    """The nodes that codes mean; `supernodes` are the names of the targets that have one, by number."""
    found = []
    for number, site, token, feature in zip(*(part.tolist() for part in decode(codes)), strict=True):
        kind = KINDS[number]
        if kind == "supernode":
            found.append(Node(kind, term=supernodes[feature]))
        elif kind == "dropped":
            found.append(Node(kind))
        elif kind == "bias":
            found.append(Node(kind, sites[site], term=TERMS[feature]))
        else:
            found.append(Node(kind, sites[site], token, feature if kind == "feature" else None))
    return found


class ActiveIndex:
    """All active features of the sites up to a layer, numbered in order of site, token and feature."""

    def __init__(self, model: FrozenModel, top: int) -> None:
        self._row = {site: row for row, site in enumerate(model.sites)}
        active = {row: model.active(site) for site, row in reversed(self._row.items()) if site.layer <= top}
        self._active = dict(sorted(active.items()))  # a trace is read from above
        self._by_feature: dict[int, np.ndarray] = {}
        self.codes = np.concatenate(
            [encode("feature", row, each.token, each.feature) for row, each in self._active.items()]
            or [np.zeros(0, dtype=np.int64)]
        )
        """(active,) int64, ascending"""

    @cached_property
    def z(self) -> np.ndarray:
        """Activations, float64 (active,)."""
        return np.concatenate([each.z for each in self._active.values()] or [np.zeros(0)])

    def __len__(self) -> int:
        return len(self.codes)

    def find(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of features, int32; -1 for those that are not active."""
        if not len(self.codes):
            return np.full(len(codes), -1, dtype=np.int32)
        at = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[at] == codes, at, -1).astype(np.int32)

    def code_of(self, site: Site, token: int, feature: int) -> np.ndarray:
        """The code of one feature, int64 (1,)."""
        return np.atleast_1d(encode("feature", self._row[site], token, feature))

    def over_tokens(self, site: int, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a feature is active, int32 ascending, and its z there, float64."""
        active = self._active[site]
        if site not in self._by_feature:
            self._by_feature[site] = np.argsort(active.feature, kind="stable")
        order = self._by_feature[site]
        low, high = np.searchsorted(active.feature, [feature, feature + 1], sorter=order)
        rows = order[low:high]
        return active.token[rows], active.z[rows]
