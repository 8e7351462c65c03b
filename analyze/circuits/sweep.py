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

Nothing is approximated.  Gradients stand as (token, column, d_model), text tokens first, so that streams are slices and every product
reads them in place; feature edges are made, summed and cut at the threshold a few tokens at a time, while they are in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from analyze.circuits.terms import Block, Side, centred, head_groups
from analyze.circuits.trace import STREAMS
from store.sites import Site, Stream

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


@dataclass(frozen=True)
class Shares:
    """What constants of one site give to some columns."""

    site: Site
    names: tuple[str, ...]
    columns: list[int] | None
    """a member's each, one may stand twice; None: the first ones"""
    values: Tensor
    """float64 (column, name)"""


@dataclass(frozen=True)
class Edges:
    """The feature edges of one site that reach the threshold, and sums of all of them by column, the first columns."""

    site: Site
    place: np.ndarray
    """(edge,): among the site's active features, ascending"""
    column: np.ndarray
    """(edge,)"""
    value: np.ndarray
    """(edge,)"""
    total: np.ndarray
    """float64 (column,)"""
    size: np.ndarray
    """float64 (column,): sum of |edges|"""
    below: np.ndarray
    """float64 (column,): sum of those that do not reach it"""


@dataclass
class Sums:
    """What a sweep found, by column."""

    inputs: Tensor
    """float64 (token, column), of the joint sequence"""
    pre: list[Shares] = field(default_factory=list)
    """pre-activations, in parts"""
    constants: list[Shares] = field(default_factory=list)
    errors: list[tuple[Site, Tensor]] = field(default_factory=list)
    """(token, column) of each site, the first columns"""
    edges: list[Edges] = field(default_factory=list)


class Sweep:
    """One batch of targets, a column each: the highest first, and of a block those of one stream together."""

    def __init__(
        self, tops: Sequence[int], tokens: dict[Stream, int], d_model: int, like: Tensor, threshold: float, memory: int
    ) -> None:
        """`tops`: the block of each target's highest member, falling; `memory`: bytes for the work beside the gradients."""
        self.tops, self.threshold, self.memory = list(tops), threshold, memory
        n_txt, self.n_tokens = tokens["txt"], sum(tokens.values())
        self.spans: dict[Stream, slice] = {"txt": slice(0, n_txt), "img": slice(n_txt, self.n_tokens)}
        self.sums = Sums(torch.zeros(self.n_tokens, len(tops), dtype=torch.float64, device=like.device))
        self.gradients = like.new_empty(self.n_tokens, 0, d_model)

    def through(self, block: Block, entries: Sequence[Entry]) -> None:
        """Go backward through one block; its members enter on the way."""
        carried = self.gradients.shape[1]
        present = sum(top >= block.layer for top in self.tops)
        if carried:
            for stream in STREAMS:
                self._sources(block, block.sides[stream], self.gradients[self.spans[stream]])
            self._attention(block)
        alone = [self._alone(entry, entries, carried) for entry in entries]
        if block.layer and present > carried:
            grown = self.gradients.new_empty(self.n_tokens, present, self.gradients.shape[2])
            grown[:, :carried] = self.gradients
            written = {column for entry, only in zip(entries, alone, strict=True) if only for column in entry.columns}
            if set(range(carried, present)) - written:
                grown[:, carried:] = 0
            self.gradients = grown
        for entry, only in zip(entries, alone, strict=True):
            self._enter(block, block.sides[entry.site.stream], entry, only)

    @staticmethod
    def _alone(entry: Entry, entries: Sequence[Entry], carried: int) -> bool:
        """Whether an entry's members are the only ones of new columns that follow one another: their rows are then written in place."""
        first = entry.columns[0]
        elsewhere = {column for other in entries if other is not entry for column in other.columns}
        run = list(range(first, first + len(entry.columns)))
        return first >= carried and entry.columns == run and elsewhere.isdisjoint(run)

    def _sources(self, block: Block, side: Side, gradient: Tensor) -> None:
        """What features, errors and constants of a site add; the gradient then also passes the skip path."""
        self.sums.edges.append(self._edges(side, gradient))
        names, found = side.above.names, side.above.of(gradient)
        if side.skip is not None:
            passed = (gradient.reshape(-1, gradient.shape[2]) @ side.skip).view_as(gradient)
            gradient.addcmul_(passed, side.r2[:, None, None])
            names, found = names + side.between.names, torch.cat([found, side.between.of(gradient)], dim=2)
        self.sums.errors.append((side.site, found[:, :, names.index("error")]))
        if block.layer == 0:
            self.sums.inputs[self.spans[side.site.stream], : gradient.shape[1]] += found[:, :, names.index("input")]
        self.sums.constants.append(Shares(side.site, names, None, found.sum(dim=0, dtype=torch.float64)))

    def _edges(self, side: Side, gradient: Tensor) -> Edges:
        """The feature edges of a site, by parts."""
        count, z = gradient.shape[1], side.features.z
        parts, sums = [], []
        for places, values in side.products.of(gradient, side.table, self.memory):
            values.mul_(z[places, None])
            size = values.abs()
            reaching = size >= self.threshold
            parts.append(_reaching(values, reaching, places.start))
            total = values.sum(dim=0)
            sums.append(torch.stack([total, size.sum(dim=0), values.masked_fill_(reaching, 0).sum(dim=0)]))
        if not parts:
            none = np.zeros(0, dtype=np.int64)
            return Edges(side.site, none, none, np.zeros(0), *np.zeros((3, count)))
        place, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Edges(side.site, place, column, value, *torch.stack(sums).sum(dim=0, dtype=torch.float64).cpu().numpy())

    def _attention(self, block: Block) -> None:
        """Add what comes back through the attention to the gradients; at block 0 to the inputs."""
        heads, n_tokens, d_head = block.q.shape
        carried, d_model = self.gradients.shape[1:]
        into = self.gradients.new_empty(n_tokens, carried, heads, d_head)
        for stream, span in self.spans.items():
            flat, out = self.gradients[span].view(-1, d_model), into[span].view(-1, heads * d_head)
            torch.mm(flat, block.sides[stream].from_output, out=out)
        size = block.q.element_size()
        for group, parts in head_groups(heads, n_tokens, size, 2 * n_tokens * carried * d_head * size, self.memory):
            mixed = self._mixed(block, into[:, :, group], group, parts)
            if block.entering_values is not None:
                met = torch.matmul(mixed, block.entering_values[group][..., None])[..., 0]
                self.sums.inputs[:, :carried] += met.sum(dim=0)
                continue
            torch.mul(mixed.permute(1, 2, 0, 3), block.r1[:, None, None, None], out=into[:, :, group])
        if block.entering_values is None:
            for stream, span in self.spans.items():
                flat, back = self.gradients[span].view(-1, d_model), into[span].view(-1, heads * d_head)
                flat.addmm_(back, block.sides[stream].to_values)

    def _mixed(self, block: Block, into: Tensor, group: slice, parts: list[slice]) -> Tensor:
        """P^T times the gradients of what some heads mixed: (head, token, column, d_head)."""
        ordered = into.permute(2, 0, 1, 3).contiguous()
        if len(parts) == 1:
            return torch.bmm(block.patterns(group).transpose(1, 2), ordered.flatten(2)).view_as(ordered)
        mixed = torch.zeros_like(ordered)
        for rows in parts:
            mixed.flatten(2).baddbmm_(block.patterns(group, rows).transpose(1, 2), ordered[:, rows].flatten(2))
        return mixed

    def _enter(self, block: Block, side: Side, entry: Entry, alone: bool) -> None:
        """The members of one site: what is constant on their way to the attention, then their rows of it."""
        token = torch.tensor(entry.tokens, device=side.r2.device)
        read = side.mlp_in.at(token, entry.reads)
        gradient = centred(entry.reads * side.gain_mlp) * side.r2[token, None]
        met = side.between.at(token, gradient)
        own = torch.stack([entry.constant, entry.reads @ side.shift_mlp], dim=1).double()
        self.sums.pre.append(Shares(side.site, ("pre",), entry.columns, read[:, :1] + own[:, :1]))
        names = ("encoder", "shift-mlp", "rounding", *side.between.names)
        self.sums.constants.append(Shares(side.site, names, entry.columns, torch.cat([own, read[:, 1:], met], dim=1)))
        at = token + self.spans[side.site.stream].start
        if block.layer == 0:
            self._add_inputs(at, entry.columns, met[:, -1])
        step = len(entry.columns) if alone else ROWS
        for start in range(0, len(entry.columns), step):
            part = slice(start, start + step)
            self._row(block, entry.columns[part], at[part], gradient[part], side.from_output, alone)

    def _row(
        self, block: Block, columns: list[int], at: Tensor, gradient: Tensor, from_output: Tensor, alone: bool
    ) -> None:
        """One row of P each: what members at one token get back from every token."""
        heads, _, d_head = block.q.shape
        pattern = torch.softmax(torch.bmm(block.q[:, at], block.k.transpose(1, 2)), dim=-1)
        mixed = (gradient @ from_output).view(-1, heads, d_head).transpose(0, 1)
        if block.entering_values is not None:
            met = (torch.bmm(mixed, block.entering_values.transpose(1, 2)) * pattern).sum(dim=0, dtype=torch.float64)
            self._add_inputs(None, columns, met.T)
            return
        pattern = (pattern * block.r1).permute(1, 2, 0)
        for stream, span in self.spans.items():
            carried = torch.bmm(mixed, block.sides[stream].to_values.view(heads, d_head, -1)).transpose(0, 1)
            spread = torch.bmm(pattern[:, span], carried).transpose(0, 1)
            if alone:
                self.gradients[span, columns[0] : columns[-1] + 1] = spread
                continue
            for number, column in enumerate(columns):
                self.gradients[span, column] += spread[:, number]
        own = torch.tensor(columns, device=at.device)
        self.gradients.index_put_((at, own), gradient, accumulate=True)

    def _add_inputs(self, at: Tensor | None, columns: list[int], values: Tensor) -> None:
        """Add (token, member) or, at one token each, (member,); several may be of one column."""
        column = torch.tensor(columns, device=values.device)
        if at is None:
            at, column = torch.arange(self.n_tokens, device=values.device)[:, None], column[None]
        self.sums.inputs.index_put_((at, column), values, accumulate=True)


def _reaching(values: Tensor, reaching: Tensor, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place, counted from `begin`, column and value of what reaches the threshold of `values` (place, column)."""
    count = values.shape[1]
    if values.device.type == "cpu":
        where = np.flatnonzero(reaching.numpy())
        kept = values.view(-1).numpy()[where]
    else:
        found = torch.nonzero(reaching.view(-1))[:, 0]
        where, kept = found.cpu().numpy(), values.view(-1)[found].cpu().numpy()
    return where // count + begin, where % count, kept
