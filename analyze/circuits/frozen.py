"""The local replacement model of one trace as a linear operator: what every feature, error, input and constant adds to a pre-activation.

Attention patterns, norms, modulations and the choice of active features are frozen at the trace, so a pre-activation is a sum
over everything below it, exactly (DESIGN section 6).  `FrozenModel.attribute` finds the summands of many targets at once by going
backward (`sweep`); `perturbed` finds some of them again by going forward, to check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analyze.circuits.encoding import Features, features_of, reader
from analyze.circuits.members import Member, Target
from analyze.circuits.nodes import Node
from analyze.circuits.perturbation import changes
from analyze.circuits.sweep import Entry, Sums, Sweep
from analyze.circuits.terms import Block, prepare, reckoned_bytes
from analyze.circuits.trace import STREAMS, Trace
from store.errors import MismatchError, UsageError
from store.sites import Site, Stream
from train import Dictionary

__all__ = ["Active", "Attribution", "FrozenModel", "Member", "Target", "perturbed"]

TERMS = {
    "residual": "rounding", "skip-rounding": "rounding", "skip-shift": "shift-mlp", "value-txt": "value", "value-img": "value",
    "shift-txt": "shift-attention", "shift-img": "shift-attention",
}  # fmt: skip
"""what the constants of `terms` count as, where that is another word of `nodes.BIAS_TERMS`"""
GATHERED = {"cpu": 4 << 20, "cuda": 512 << 20}
"""bytes of decoder rows that are gathered at once, where `memory` allows: on a CPU they stay in its cache, 64 MB take twice the time"""


@dataclass(frozen=True)
class Active:
    """The active features of a site, sorted by (token, feature): all with z > 0."""

    token: np.ndarray
    """int32 (active,)"""
    feature: np.ndarray
    """int32 (active,)"""
    z: np.ndarray
    """float64 (active,)"""


@dataclass(frozen=True)
class Attribution:
    """What adds up to the pre-activations of T targets: NumPy, float64 (computed in the model's dtype)."""

    pre: np.ndarray
    """(T,)"""
    row: np.ndarray
    """int32 (edge,): of each feature edge its target; edges are sorted by (row, site, token, feature)"""
    site: np.ndarray
    """int16 (edge,): its source's place in `FrozenModel.sites`"""
    token: np.ndarray
    """int32 (edge,)"""
    feature: np.ndarray
    """int32 (edge,)"""
    value: np.ndarray
    """float64 (edge,): at least the threshold in size"""
    below: np.ndarray
    """(T,): sum of the feature edges under the threshold"""
    errors: dict[Site, np.ndarray]
    """(T, token) of every site: what transcoders leave unexplained"""
    inputs: dict[Stream, np.ndarray]
    """(T, token): the residual that enters block 0"""
    bias: dict[tuple[Site, str], np.ndarray]
    """(T,) of every constant path, named as in `nodes.BIAS_TERMS`"""
    total: np.ndarray
    """(T,): the sum of everything, before thresholds"""
    conservation: np.ndarray
    """(T,): |pre - total| / max(|pre|, sum of |edges| before thresholds); edges of features, errors and inputs"""


class FrozenModel:
    """The frozen linear model of one trace, in the trace's dtype and on its device."""

    memory: int = 2 << 30
    """bytes that its work may take; what is found, a row an edge, comes on top"""

    def __init__(self, trace: Trace, transcoders: Mapping[Site, Dictionary], memory: int = 2 << 30) -> None:
        """A site that `transcoders` lacks counts as all error.

        `memory`: bytes.  Half of it keeps prepared blocks; those that do not fit are prepared again in every sweep.  The rest
        is for gradients: it decides how many targets go backward at once.  Active features, 16 bytes each, and the edges that are
        found come on top.  Where it is less than one block takes, work goes on as if it were that: by parts of useful size.
        `MismatchError` for a transcoder of another width.
        """
        self.trace, self.transcoders, self.memory = trace, transcoders, memory
        self.n_blocks, self.d_model, self.tokens = trace.n_blocks, trace.d_model, dict(trace.tokens)
        self.sites = tuple(
            sorted(Site("double", layer, stream) for layer in range(self.n_blocks) for stream in STREAMS)
        )
        """every site below `n_blocks`, sorted; `Attribution.site` counts them"""
        self._work = max(memory, reckoned_bytes(sum(self.tokens.values()), self.d_model, trace.dtype.itemsize)) // 8
        """bytes that may be taken in passing"""
        self._kept: dict[int, Block] = {}
        self._active: dict[Site, Active] = {}
        self._replay: dict[int, dict[str, float]] = {}
        self._widths: dict[Site, int] = {}

    def active(self, site: Site) -> Active:
        """Every active feature of a site."""
        self._check(site)
        if site not in self._active:
            self._block(site.layer)
        return self._active[site]

    def activation(self, site: Site, token: int, feature: int) -> float:
        """z of one feature at one token; 0 where it is not active."""
        self.check(Member(site, token, feature))
        active = self.active(site)
        first, last = np.searchsorted(active.token, (token, token + 1))
        at = first + int(np.searchsorted(active.feature[first:last], feature))
        return float(active.z[at]) if at < last and active.feature[at] == feature else 0.0

    def preactivation(self, site: Site, token: int, feature: int) -> float:
        """What its activation function is applied to."""
        self.check(Member(site, token, feature))
        side = self._block(site.layer).sides[site.stream]
        reads, constant = reader(self.transcoders[site], torch.tensor([feature]), self.trace.sigma, side.table)
        return float(reads[0] @ side.mlp_in.vectors[token, 0] + constant[0])

    def replay_error(self, top: int | None = None) -> dict[str, float]:
        """The largest relative error of what is replayed up to block `top`: `attention`, `mlp_in`, `residual`; NaN where one is."""
        layers = range(self.n_blocks if top is None else top + 1)
        for layer in reversed(layers):
            if layer not in self._replay:
                self._block(layer)
        found = [self._replay[layer] for layer in layers]
        return {name: float(np.max([replay[name] for replay in found])) for name in found[0]}

    def batch(self, top: int | None = None) -> int:
        """How many targets go backward at once: as many as a third of the memory has room for, gradients and edges.

        `top`: the block of the highest one; default: the last.
        """
        below = [site for site in self.sites if top is None or site.layer <= top]
        heads, d_head = self.trace.heads
        tokens, most = sum(self.tokens.values()), max(len(self.active(site).token) for site in below)
        wide = max(
            self.d_model, heads * d_head
        )  # gradients grow by a copy; else what goes through the attention is beside them
        size = self.trace.dtype.itemsize
        return max(1, self.memory // (3 * column_bytes(size, tokens, 2 * self.d_model + wide, most, self.n_blocks)))

    def attribute(self, targets: Sequence[Target], threshold: float = 0.0) -> Attribution:
        """What every source adds to each target; feature edges under `threshold` in size only as a sum.

        `UsageError` for a target that the model has not, or at a site without a transcoder.
        """
        for target in targets:
            for member in target.members:
                self.check(member)
        order = sorted(range(len(targets)), key=lambda number: _depth(targets[number]))
        found = _Found(self, len(targets))
        most = self.batch(-_depth(targets[order[0]])[0]) if order else 1
        for start in range(0, len(order), most):
            rows = order[start : start + most]
            found.add(rows, self._swept([targets[row] for row in rows], threshold))
        return found.attribution()

    @torch.no_grad()
    def _swept(self, targets: Sequence[Target], threshold: float) -> Sums:
        tops = [max(member.site.layer for member in target.members) for target in targets]
        like = torch.empty(0, dtype=self.trace.dtype, device=self.trace.device)
        sweep = Sweep(tops, self.tokens, self.d_model, like, threshold, self._work)
        for layer in range(tops[0], -1, -1):
            block = self._block(layer)
            sweep.through(
                block, [entry for stream in STREAMS if (entry := self._entry(block, stream, targets)) is not None]
            )
        return sweep.sums

    def _entry(self, block: Block, stream: Stream, targets: Sequence[Target]) -> Entry | None:
        """The members of these targets at one site, in the order of their columns."""
        side = block.sides[stream]
        here = [(column, m) for column, target in enumerate(targets) for m in target.members if m.site == side.site]
        if not here:
            return None
        features = torch.tensor([member.feature for _, member in here], device=side.table.device)
        distinct = side.features.distinct
        place = torch.searchsorted(distinct, features).clamp(max=max(0, len(distinct) - 1))
        if len(distinct) and bool((distinct[place] == features).all()):
            reads, constants = side.reads[place], side.constants[place]
        else:  # of a feature that is active nowhere nothing is kept
            reads, constants = reader(self.transcoders[side.site], features, self.trace.sigma, side.table)
        weights = torch.tensor([member.weight for _, member in here], dtype=reads.dtype, device=reads.device)
        columns, tokens = [column for column, _ in here], [member.token for _, member in here]
        return Entry(side.site, columns, tokens, reads * weights[:, None], constants * weights)

    @torch.no_grad()
    def _block(self, layer: int) -> Block:
        if layer in self._kept:
            return self._kept[layer]
        sites = {stream: Site("double", layer, stream) for stream in STREAMS}
        there = {stream: self.transcoders.get(site) for stream, site in sites.items()}
        for site, dictionary in zip(sites.values(), there.values(), strict=True):
            if dictionary is not None and dictionary.config.d_model != self.d_model:
                raise MismatchError(
                    f"the transcoder of {site} has d_model {dictionary.config.d_model}, the trace {self.d_model}: "
                    "it was trained on another model"
                )
        gathered = min(self._work, GATHERED.get(self.trace.device.type, GATHERED["cpu"]))
        known = {stream: self._known(self._active[site]) for stream, site in sites.items() if site in self._active}
        block = prepare(self.trace, layer, there, known, self._work, gathered)
        self._replay[layer] = block.replay
        for stream, site in sites.items():
            features = block.sides[stream].features
            if site not in self._active:
                self._active[site] = Active(
                    _numpy(features.token, np.int32), _numpy(features.feature, np.int32), _numpy(features.z)
                )
        if sum(kept.size_bytes for kept in self._kept.values()) + block.size_bytes <= self.memory // 2:
            self._kept[layer] = block
        return block

    def _known(self, active: Active) -> Features:
        """Active features as a block that is prepared again needs them: encoding costs more than all the rest of it."""
        token, feature = (torch.from_numpy(numbers).to(self.trace.device) for numbers in (active.token, active.feature))
        return features_of(token, feature, torch.from_numpy(active.z).to(self.trace.device, self.trace.dtype))

    def _check(self, site: Site) -> None:
        if site not in self.sites:
            raise UsageError(f"the trace has no site {site}; it has img and txt of blocks 0 to {self.n_blocks - 1}")

    def check(self, member: Member) -> None:
        """`UsageError` for a site without a transcoder, a token or a feature that is not there."""
        self._check(member.site)
        if member.site not in self.transcoders:
            raise UsageError(f"there is no transcoder of {member.site}, so it has no feature to trace back")
        tokens, width = self.tokens[member.site.stream], self._width(member.site)
        if not 0 <= member.token < tokens:
            raise UsageError(f"{member.site} has no token {member.token}: it has {tokens}, 0 to {tokens - 1}")
        if not 0 <= member.feature < width:
            raise UsageError(
                f"the transcoder of {member.site} has no feature {member.feature}: it has {width}, 0 to {width - 1}"
            )

    def _width(self, site: Site) -> int:
        if site not in self._widths:
            self._widths[site] = int(self.transcoders[site].config.n_features)
        return self._widths[site]


def column_bytes(itemsize: int, tokens: int, widths: int, active: int, n_blocks: int) -> int:
    """About what one target takes while it goes backward: `widths` of gradients a token, edges of a site's active features, inputs."""
    return itemsize * (tokens * widths + 5 * active) + 8 * tokens * n_blocks


def perturbed(model: FrozenModel, sources: Sequence[Node], targets: Sequence[Target]) -> np.ndarray:
    """What each source adds to each target's pre-activation: float64 (source, target), equal to the source's edge.

    What a source writes is sent forward through the frozen model, which is linear, as its equations stand (`perturbation`).
    Sources are features, errors and inputs at a token; `UsageError` for another.
    """
    for target in targets:
        for member in target.members:
            model.check(member)
    for source in sources:
        if source.site is not None and source.token is not None and source.kind == "feature":
            model.check(Member(source.site, source.token, source.feature or 0))
    return changes(model.trace, model.transcoders, sources, targets, model.memory // 3)


class _Found:
    """What the batches of one call found, put together."""

    def __init__(self, model: FrozenModel, count: int) -> None:
        self.model, self.count = model, count
        self.pre, self.below, self.edge_total, self.edge_size = np.zeros((4, count))
        self.errors = {site: np.zeros((count, model.tokens[site.stream])) for site in model.sites}
        self.inputs = np.zeros((count, sum(model.tokens.values())))
        self.bias: dict[tuple[Site, str], np.ndarray] = {}
        self.edges: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: Sequence[int], sums: Sums) -> None:
        """Take over what one batch found of these targets."""
        at = np.array(rows, np.int32)
        self.inputs[at] = _numpy(sums.inputs).T
        for site, errors in sums.errors:
            self.errors[site][at[: errors.shape[1]]] = _numpy(errors).T
        for shares in sums.pre:
            np.add.at(self.pre, at[shares.columns], _numpy(shares.values)[:, 0])
        for shares in sums.constants:
            columns = at[: len(shares.values)] if shares.columns is None else at[shares.columns]
            for name, values in zip(shares.names, _numpy(shares.values).T, strict=True):
                if name not in ("error", "input"):
                    np.add.at(self._bias(shares.site, name), columns, values)
        number = {site: place for place, site in enumerate(self.model.sites)}
        for edges in sums.edges:
            first, active = at[: len(edges.total)], self.model.active(edges.site)
            self.edge_total[first] += edges.total
            self.edge_size[first] += edges.size
            self.below[first] += edges.below
            which, place = np.full(len(edges.place), number[edges.site], np.int16), edges.place
            self.edges.append((at[edges.column], which, active.token[place], active.feature[place], edges.value))

    def _bias(self, site: Site, name: str) -> np.ndarray:
        """The sums of the site and term that a constant counts as."""
        place = Site("double", site.layer, name[-3:]) if name.endswith(("-txt", "-img")) else site  # type: ignore[arg-type]
        return self.bias.setdefault((place, TERMS.get(name, name)), np.zeros(self.count))

    def attribution(self) -> Attribution:
        """All of it, edges in order."""
        kinds = (np.int32, np.int16, np.int32, np.int32, np.float64)
        row, site, token, feature, value = (
            np.concatenate([np.zeros(0, kind), *(part[i] for part in self.edges)]).astype(kind)
            for i, kind in enumerate(kinds)
        )
        order = np.lexsort((site, row))  # stable, and within a site they are in order
        others, n_txt = [self.inputs, *self.errors.values()], self.model.tokens["txt"]
        total = self.edge_total + sum(values.sum(axis=1) for values in others) + sum(self.bias.values())
        size = self.edge_size + sum(np.abs(values).sum(axis=1) for values in others)
        scale = np.maximum(np.maximum(np.abs(self.pre), size), np.finfo(np.float64).tiny)
        return Attribution(
            self.pre, row[order], site[order], token[order], feature[order], value[order], self.below, self.errors,
            {"txt": self.inputs[:, :n_txt], "img": self.inputs[:, n_txt:]}, self.bias, total, np.abs(self.pre - total) / scale,
        )  # fmt: skip


def _depth(target: Target) -> tuple[int, str]:
    """Targets of the highest block first, and those of one stream together."""
    top = max(target.members, key=lambda member: member.site.layer)
    return -top.site.layer, top.site.stream


def _numpy(values: Tensor, dtype: type = np.float64) -> np.ndarray:
    return values.cpu().numpy().astype(dtype)
