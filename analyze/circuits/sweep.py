"""One batch of targets going backward through the frozen model, from the highest block that has one down to block 0.

1. At each block, first what the sources there add to the targets above: active features, errors and constants, each the product of
   a vector of its token with the gradients of that token (`encoding.Products`).
2. The targets of the block enter.  A target reads one token, so its first attention is one row of P: per head the gradient is
   carried to d_model first, 2 d_model^2, and spread over the tokens after, 2 heads d_model a token, where a full
   gradient costs 2 d_model^2 a token for each matrix and 2 tokens d_model for P.
3. The others pass the attention: one product with G W_o, per group of heads one with P^T, which is recomputed from q and k
   (once a block and batch, then thrown away), one with W_v A, added to the residual's gradient in place.
4. Block 0 needs no gradient of what enters it, only its product with that: the last matrix is left out (`entering_values`).

Operations of T targets through one block of S tokens, H heads and d = inner width, a active features a token:

    carried   T (4 S d^2 + 2 S^2 d)  +  2 S^2 d for P  +  2 T S d (a + 9) for the edges and constants
    fresh     T (6 d^2 + 4 S d + 2 S H d)

Nothing is approximated, and gradients are kept per stream as (target, token, d_model), so that every product reads them in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from analyze.circuits.terms import BETWEEN, Block, Side, centred, head_groups
from analyze.circuits.trace import STREAMS
from store.sites import Site, Stream

TERMS = {
    "residual": "rounding", "skip-rounding": "rounding", "skip-shift": "shift-mlp", "value-txt": "value", "value-img": "value",
    "shift-txt": "shift-attention", "shift-img": "shift-attention",
}  # fmt: skip
"""what the constants of `terms` count as, where that is another word of `nodes.BIAS_TERMS`"""
ROWS = 16
"""members whose rows are made at once where they are added to gradients that are there already"""


@dataclass(frozen=True)
class Entry:
    """The members that enter at one site: which column each belongs to, and what it reads there."""

    site: Site
    columns: list[int]
    tokens: list[int]
    reads: Tensor
    """(member, d_model): encoder rows with the dictionary's scale, times the member's weight"""
    constant: Tensor
    """(member,): what its pre-activation has besides"""


@dataclass
class Sums:
    """What a sweep found, by column; float64."""

    pre: Tensor
    total: Tensor
    size: Tensor
    """sum of |edges| before thresholds"""
    below: Tensor
    inputs: Tensor
    """(column, token) of the joint sequence"""
    errors: dict[Site, Tensor] = field(default_factory=dict)
    bias: dict[tuple[Site, str], Tensor] = field(default_factory=dict)
    edges: list[tuple[Site, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """of each site: column, place among its active features, value"""

    def add_bias(self, layer: int, site: Site, name: str, columns: slice | Tensor, values: Tensor) -> None:
        """Add what a constant gives to some columns, under the site and term that it counts as."""
        place = (
            Site("double", layer, "txt" if name.endswith("-txt") else "img")
            if name.endswith(("-txt", "-img"))
            else site
        )
        key = (place, TERMS.get(name, name))
        for sums in (self.bias.setdefault(key, torch.zeros_like(self.pre)), self.total):
            _add(sums, columns, values.double())

    def count(self, columns: int, values: Tensor) -> None:
        """Count (column, source) edges of the first columns into `total` and `size`."""
        self.total[:columns] += values.sum(dim=1, dtype=torch.float64)
        self.size[:columns] += values.abs().sum(dim=1, dtype=torch.float64)


class Sweep:
    """One batch of targets, a column each: the highest first, and of a block those of one stream together."""

    def __init__(
        self, tops: Sequence[int], tokens: dict[Stream, int], d_model: int, like: Tensor, threshold: float, memory: int
    ) -> None:
        """`tops`: the block of each target's highest member, falling; `memory`: bytes for the work beside the gradients."""
        self.tops, self.threshold, self.memory = list(tops), threshold, memory
        n_txt, self.n_tokens = tokens["txt"], sum(tokens.values())
        self.spans: dict[Stream, slice] = {"txt": slice(0, n_txt), "img": slice(n_txt, self.n_tokens)}
        zeros = torch.zeros(len(tops), dtype=torch.float64, device=like.device)
        self.sums = Sums(zeros, zeros.clone(), zeros.clone(), zeros.clone(), zeros.new_zeros(len(tops), self.n_tokens))
        self.gradients = {stream: like.new_empty(len(tops), count, d_model) for stream, count in tokens.items()}

    def through(self, block: Block, entries: Sequence[Entry]) -> None:
        """Go backward through one block; its members enter on the way."""
        carried = sum(top > block.layer for top in self.tops)
        present = sum(top >= block.layer for top in self.tops)
        if carried:
            for stream in STREAMS:
                self._sources(block, block.sides[stream], self.gradients[stream][:carried])
            self._attention(block, carried)
        written = {column for entry in entries if self._alone(entry, entries, carried) for column in entry.columns}
        if block.layer and set(range(carried, present)) - written:
            for gradient in self.gradients.values():
                gradient[carried:present] = 0
        for entry in entries:
            self._enter(block, block.sides[entry.site.stream], entry, self._alone(entry, entries, carried))
        if block.layer == 0:
            self.sums.count(len(self.tops), self.sums.inputs)

    @staticmethod
    def _alone(entry: Entry, entries: Sequence[Entry], carried: int) -> bool:
        """Whether an entry's members are the only ones of new columns that follow one another: their rows are then written in place."""
        first = entry.columns[0]
        elsewhere = {column for other in entries if other is not entry for column in other.columns}
        run = list(range(first, first + len(entry.columns)))
        return first >= carried and entry.columns == run and elsewhere.isdisjoint(run)

    def _sources(self, block: Block, side: Side, gradient: Tensor) -> None:
        """What features, errors and constants of a site add; the gradient then also passes the skip path."""
        count = len(gradient)
        values, found = side.above.of(gradient, side.table, self.memory)
        self._edges(side, values)
        errors = found.pop("error").double()
        self.sums.errors[side.site] = functional.pad(errors, (0, 0, 0, len(self.tops) - count))
        self.sums.count(count, errors)
        if side.skip is not None:
            assert side.between is not None
            passed = torch.mm(gradient.view(-1, gradient.shape[2]), side.skip).view_as(gradient)
            gradient.addcmul_(passed, side.r2[:, None])
            found |= side.between.of(gradient, side.table, self.memory)[1]
        if block.layer == 0:
            self.sums.inputs[:count, self.spans[side.site.stream]] += found.pop("input")
        for name, value in found.items():
            self.sums.add_bias(block.layer, side.site, name, slice(0, count), value.sum(dim=1, dtype=torch.float64))

    def _edges(self, side: Side, values: Tensor) -> None:
        """Keep the feature edges that reach the threshold, and the sum of the others."""
        values = values * side.features.z
        size, count = values.abs(), len(values)
        total = values.sum(dim=1, dtype=torch.float64)
        self.sums.total[:count] += total
        self.sums.size[:count] += size.sum(dim=1, dtype=torch.float64)
        where = torch.nonzero(size >= self.threshold)
        kept = values[where[:, 0], where[:, 1]].double()
        if len(kept) < values.numel():
            ends = torch.searchsorted(where[:, 0].contiguous(), torch.arange(count + 1, device=where.device))
            sums = functional.pad(kept.cumsum(0), (1, 0))[ends].diff()
            self.sums.below[:count] += total - sums
        self.sums.edges.append((side.site, where[:, 0].cpu(), where[:, 1].cpu(), kept.cpu()))

    def _attention(self, block: Block, carried: int) -> None:
        """Add what comes back through the attention to the gradients of the carried columns; at block 0 to the inputs."""
        heads, n_tokens, d_head = block.q.shape
        flat = {s: self.gradients[s][:carried].view(-1, self.gradients[s].shape[2]) for s in STREAMS}
        into = {s: (flat[s] @ block.sides[s].from_output).view(carried, -1, heads, d_head) for s in STREAMS}
        size = block.q.element_size()
        for group, parts in head_groups(heads, n_tokens, size, 2 * n_tokens * carried * d_head * size, self.memory):
            mixed = self._mixed(block, into, group, parts)
            if block.entering_values is not None:
                met = torch.matmul(mixed, block.entering_values[group][..., None])[..., 0]
                self.sums.inputs[:carried] += met.sum(dim=0).T
                continue
            for stream, span in self.spans.items():
                target = into[stream][:, :, group].permute(2, 1, 0, 3)
                torch.mul(mixed[:, span], block.r1[span, None, None], out=target)
        if block.entering_values is None:
            for stream in STREAMS:
                flat[stream].addmm_(into[stream].view(len(flat[stream]), -1), block.sides[stream].to_values)

    def _mixed(self, block: Block, into: dict[Stream, Tensor], group: slice, parts: list[slice]) -> Tensor:
        """P^T times the gradients of what some heads mixed: (head, token, column, d_head)."""
        first = into["img"]
        ordered = first.new_empty(group.stop - group.start, self.n_tokens, len(first), first.shape[3])
        for stream, span in self.spans.items():
            ordered[:, span] = into[stream][:, :, group].permute(2, 1, 0, 3)
        if len(parts) == 1:
            return torch.bmm(block.patterns(group).transpose(1, 2), ordered.flatten(2)).view_as(ordered)
        mixed = torch.zeros_like(ordered)
        for rows in parts:
            mixed.flatten(2).baddbmm_(block.patterns(group, rows).transpose(1, 2), ordered[:, rows].flatten(2))
        return mixed

    def _enter(self, block: Block, side: Side, entry: Entry, alone: bool) -> None:
        """The members of one site: what is constant on their way to the attention, then their rows of it."""
        column, token = (torch.tensor(numbers, device=side.r2.device) for numbers in (entry.columns, entry.tokens))
        add = partial(self.sums.add_bias, block.layer, side.site)
        pre = (entry.reads * side.mlp_in[token]).sum(dim=1, dtype=torch.float64) + entry.constant.double()
        _add(self.sums.pre, column, pre)
        add("encoder", column, entry.constant)
        add("shift-mlp", column, entry.reads @ side.shift_mlp)
        add("rounding", column, (entry.reads * side.rounding_in[token]).sum(dim=1))
        gradient = centred(entry.reads * side.gain_mlp) * side.r2[token, None]
        for name in BETWEEN:
            add(name, column, (gradient * side.table[side.rows[name][token]]).sum(dim=1))
        if block.layer == 0:
            own = (gradient * side.table[side.rows["input"][token]]).sum(dim=1, dtype=torch.float64)
            at = token + self.spans[side.site.stream].start
            self.sums.inputs.index_put_((column, at), own, accumulate=True)
        step = len(entry.columns) if alone else ROWS
        for start in range(0, len(entry.columns), step):
            part = slice(start, start + step)
            self._row(block, side, entry.columns[part], token[part], gradient[part], alone)

    def _row(self, block: Block, side: Side, columns: list[int], token: Tensor, gradient: Tensor, alone: bool) -> None:
        """One row of P each: what members at one token get back from every token."""
        heads, _, d_head = block.q.shape
        at = token + self.spans[side.site.stream].start
        pattern = torch.softmax(torch.bmm(block.q[:, at], block.k.transpose(1, 2)), dim=-1)
        mixed = (gradient @ side.from_output).view(-1, heads, d_head).transpose(0, 1)
        if block.entering_values is not None:
            met = (torch.bmm(mixed, block.entering_values.transpose(1, 2)) * pattern).sum(dim=0, dtype=torch.float64)
            _add(self.sums.inputs, torch.tensor(columns, device=met.device), met)
            return
        pattern = (pattern * block.r1).permute(1, 2, 0)
        for stream, span in self.spans.items():
            carried = torch.bmm(mixed, block.sides[stream].to_values.view(heads, d_head, -1)).transpose(0, 1)
            into = self.gradients[stream]
            if alone:
                torch.bmm(pattern[:, span], carried, out=into[columns[0] : columns[-1] + 1])
                continue
            for column, spread in zip(columns, torch.bmm(pattern[:, span], carried), strict=True):
                into[column] += spread
        direct = self.gradients[side.site.stream]
        direct.index_put_((torch.tensor(columns, device=token.device), token), gradient, accumulate=True)


def _add(sums: Tensor, columns: slice | Tensor, values: Tensor) -> None:
    """Add rows of values, of which several may be of one column; the same order every time, on a GPU too."""
    if isinstance(columns, slice):
        sums[columns] += values
    else:
        sums.index_put_((columns,), values, accumulate=True)
