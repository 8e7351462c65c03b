"""Which features of a transcoder are active in a trace, and the products of every token's gradients with its own few vectors."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from train import Dictionary

DENSE_PAYS = 3.0
"""up to so many times the active features it is cheaper to multiply every token with every distinct one than to gather rows"""
TOGETHER = 8
"""gathers whose products are handed on together"""
FEW = 16
"""fewer gradients are better on the left of a product: at 4 twice as fast"""


@dataclass(frozen=True)
class Features:
    """The active features of a site: where, which, how strong."""

    token: Tensor
    """int32 (active,), rising; features rise within a token"""
    feature: Tensor
    """int32 (active,)"""
    row: Tensor
    """int32 (active,): its place in `distinct`"""
    z: Tensor
    """(active,)"""
    distinct: Tensor
    """int64 (distinct,), rising: every feature that is active anywhere"""


def encoded(dictionary: Dictionary, x: Tensor, sigma: float, memory: int) -> Features:
    """The active features of every row of `x` (token, d_model), in its dtype, by parts that stay within `memory`."""
    weight, bias = dictionary.encoder.weight.detach(), dictionary.encoder.bias.detach().to(x)
    scale, shift = modulation(dictionary, sigma, x)
    prepared, width, size = torch.addcmul(x + shift, x, scale), len(weight), x.element_size()
    rows = max(1, memory // (4 * width * size))
    columns = max(1, memory // (4 * x.shape[1] * size))
    found, values = [], []
    for start in range(0, len(x), rows):
        part = prepared[start : start + rows]
        pre = torch.cat([part @ weight[c : c + columns].to(x).T for c in range(0, width, columns)], dim=1).add_(bias)
        z = activated(dictionary, pre)
        where = torch.nonzero(z > 0)
        values.append(z[where[:, 0], where[:, 1]])
        found.append(where + torch.tensor([start, 0], device=x.device))
    index = torch.cat(found)
    return features_of(index[:, 0].contiguous().int(), index[:, 1].contiguous().int(), torch.cat(values))


def features_of(token: Tensor, feature: Tensor, z: Tensor) -> Features:
    """The same from where, which and how strong."""
    distinct, row = torch.unique(feature, return_inverse=True)
    return Features(token, feature, row.int(), z, distinct.long())


def activated(dictionary: Dictionary, pre: Tensor) -> Tensor:
    """`Dictionary.activate` where `pre` is, whichever device the dictionary's thresholds lie on."""
    if dictionary.config.activation == "jumprelu":
        return pre * (pre > dictionary.log_threshold.detach().exp().to(pre.device))
    if dictionary.config.activation == "batchtopk":
        z = functional.relu(pre)
        return z * (z > dictionary.threshold.to(pre.device))
    return dictionary.activate(pre)


def no_features(like: Tensor) -> Features:
    """Of a site without a transcoder."""
    none = torch.zeros(0, dtype=torch.int32, device=like.device)
    return Features(none, none, none, like.new_zeros(0), none.long())


@torch.no_grad()
def modulation(dictionary: Dictionary, sigma: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that a dictionary gives its input at one sigma, each (d_model,); zeros for one that knows none.

    Computed in float32, as when it was trained.
    """
    if dictionary.config.time_embed_dim is None:
        zeros = like.new_zeros(dictionary.config.d_model)
        return zeros, zeros
    device = dictionary.encoder.weight.device
    scale, shift = dictionary.modulation(torch.tensor([sigma], dtype=torch.float32, device=device))
    return scale[0].to(like), shift[0].to(like)


def reader(dictionary: Dictionary, features: Tensor, sigma: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """What features read from mlp_in, (feature, d_model), and the constants of their pre-activations, (feature,)."""
    chosen = features.to(dictionary.encoder.weight.device)
    weight = dictionary.encoder.weight.detach()[chosen].to(like)
    scale, shift = modulation(dictionary, sigma, like)
    return weight * (1 + scale), weight @ shift + dictionary.encoder.bias.detach()[chosen].to(like)


@dataclass(frozen=True)
class Group:
    """Tokens with about as many active features, multiplied at once."""

    tokens: slice | Tensor
    """which tokens; int64 (token,) where they do not follow one another"""
    rows: Tensor
    """int32 (token, vector): rows of the table, filled up with row 0"""
    vectors: Tensor | None = None
    """those rows, (token, vector, d_model), where they are kept: the transpose of what is contiguous"""


@dataclass(frozen=True)
class Chunk:
    """Active features that follow one another, with all that their tokens have."""

    places: slice
    """among the active features of the site"""
    groups: tuple[Group, ...]
    take: Tensor | None
    """int32 (active,): where their products stand among those of the groups; None: they stand as they are"""

    @property
    def size(self) -> int:
        """How many products the groups make, what they are filled up with included."""
        return sum(group.rows.numel() for group in self.groups)


@dataclass(frozen=True)
class Products:
    """How to multiply each token's gradients with the vectors of its own active features.

    A product needs `gradients * d_model` operations an active feature.  Rows are gathered a few tokens at a time, so that they are
    still in the cache when they are multiplied, and the answer comes by parts that are, too.  In small models rows are gathered once
    and for all; where nearly all features are active nearly everywhere, dense products are cheaper (`DENSE_PAYS`).
    """

    chunks: tuple[Chunk, ...]
    """none: dense products"""
    features: Features
    n_tokens: int

    @property
    def kept_bytes(self) -> int:
        """Memory that its plan and its gathered rows take, beside the features."""
        groups = [group for chunk in self.chunks for group in chunk.groups]
        kept = [chunk.take for chunk in self.chunks] + [group.vectors for group in groups]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def of(self, gradients: Tensor, table: Tensor, memory: int) -> Iterator[tuple[slice, Tensor]]:
        """Places among the active features, in order, and (active, gradient): `gradients` (token, gradient, d_model) times those."""
        if not self.chunks:
            yield from self._dense(gradients, table[: len(self.features.distinct)], memory)
        for chunk in self.chunks:
            found, begin = gradients.new_empty(chunk.size, gradients.shape[1]), 0
            for group in chunk.groups:
                tokens, width = group.rows.shape
                vectors, here = group.vectors, gradients[group.tokens]
                if vectors is None:
                    vectors = table.index_select(0, group.rows.flatten()).view(tokens, width, -1)
                into = found[begin : begin + tokens * width].view(tokens, width, -1)
                begin += tokens * width
                if group.vectors is not None or len(here[0]) < FEW:
                    into.copy_(torch.bmm(here, vectors.transpose(1, 2)).transpose(1, 2))
                else:
                    torch.bmm(vectors, here.transpose(1, 2), out=into)
            yield chunk.places, found if chunk.take is None else found.index_select(0, chunk.take)

    def _dense(self, gradients: Tensor, directions: Tensor, memory: int) -> Iterator[tuple[slice, Tensor]]:
        count, width = gradients.shape[1], len(directions)
        token, row = self.features.token, self.features.row
        step = max(1, memory // (3 * max(1, count * width) * gradients.element_size()))
        for start in range(0, self.n_tokens if width else 0, step):
            stop = min(start + step, self.n_tokens)
            low, high = (int(torch.searchsorted(token, bound)) for bound in (start, stop))
            found = (gradients[start:stop] @ directions.T).transpose(1, 2).reshape(-1, count)
            yield slice(low, high), found.index_select(0, (token[low:high] - start) * width + row[low:high])

    def summed(self, strengths: Tensor, table: Tensor, memory: int) -> Tensor:
        """(token, d_model): of every token the sum of its features' vectors times `strengths` (active,), in the order of the features."""
        out = table.new_zeros(self.n_tokens, table.shape[1])
        if not self.chunks:
            step = max(1, memory // max(1, len(table) * table.element_size()))
            for start in range(0, self.n_tokens, step):
                low, high = (int(torch.searchsorted(self.features.token, bound)) for bound in (start, start + step))
                dense = table.new_zeros(min(step, self.n_tokens - start), len(table))
                dense[self.features.token[low:high] - start, self.features.row[low:high]] = strengths[low:high]
                out[start : start + step] = dense @ table
        for chunk in self.chunks:
            padded, begin = strengths[chunk.places], 0
            if chunk.take is not None:
                padded = strengths.new_zeros(chunk.size)
                padded[chunk.take] = strengths[chunk.places]
            for group in chunk.groups:
                tokens, width = group.rows.shape
                vectors = table.index_select(0, group.rows.flatten()).view(tokens, width, -1)
                out[group.tokens] = torch.bmm(padded[begin : begin + tokens * width].view(tokens, 1, width), vectors)[
                    :, 0
                ]
                begin += tokens * width
        return out


def products(features: Features, n_tokens: int, row_bytes: int, gathered: int) -> Products:
    """The plan of the products of every token with its features; `gathered`: bytes of rows, of `row_bytes` each, to gather at once."""
    if n_tokens * len(features.distinct) <= DENSE_PAYS * len(features.token):
        return Products((), features, n_tokens)
    counts = torch.bincount(features.token, minlength=n_tokens).tolist()
    most, chunks, first, begin = max(1, gathered // row_bytes), [], 0, 0
    while first < n_tokens:
        last, size = first + 1, counts[first]
        while last < n_tokens and size + counts[last] <= TOGETHER * most:
            size += counts[last]
            last += 1
        chunks.append(_chunk(features, counts[first:last], first, begin, most))
        first, begin = last, begin + size
    return Products(tuple(chunks), features, n_tokens)


def kept(plan: Products, table: Tensor, most: int) -> Products:
    """The same with its rows gathered once and for all, if they take no more than `most` bytes: small models are quicker then."""
    row_bytes = table.shape[1] * table.element_size()
    if not plan.chunks or 2 * len(plan.features.token) * row_bytes > most:
        return plan
    counts = torch.bincount(plan.features.token, minlength=plan.n_tokens).tolist()
    whole = _chunk(plan.features, counts, 0, 0, max(1, most // row_bytes))
    groups = (replace(group, vectors=table[group.rows].mT.contiguous().mT) for group in whole.groups)
    return replace(plan, chunks=(replace(whole, groups=tuple(groups)),))


def _chunk(features: Features, counts: list[int], first: int, begin: int, most: int) -> Chunk:
    """The active features, from `begin` on, of the tokens from `first` on; `most`: rows to gather at once."""
    size = sum(counts)
    rows, places = features.row[begin : begin + size], slice(begin, begin + size)
    if not size:
        return Chunk(places, (), None)
    if len(set(counts)) == 1 and size <= most:
        return Chunk(places, (Group(slice(first, first + len(counts)), rows.view(len(counts), -1)),), None)
    if 2 * min(counts) > most:  # one token at a time
        parts = zip(range(first, first + len(counts)), torch.split(rows, counts), strict=True)
        return Chunk(places, tuple(Group(slice(token, token + 1), part[None]) for token, part in parts), None)
    device = rows.device
    count = torch.tensor(counts, device=device)
    start, order = count.cumsum(0) - count, torch.argsort(count, descending=True, stable=True)
    groups, take, at = [], torch.zeros(size, dtype=torch.int32, device=device), 0
    for low, high, width in _cuts(sorted(counts, reverse=True), most):
        tokens = order[low:high]
        slots = start[tokens, None] + torch.arange(width, device=device)
        there = torch.arange(width, device=device) < count[tokens, None]
        groups.append(Group(tokens + first, torch.where(there, rows[slots.clamp(max=size - 1)], 0)))
        take[slots[there]] = torch.arange(at, at + slots.numel(), dtype=torch.int32, device=device).view_as(slots)[
            there
        ]
        at += slots.numel()
    return Chunk(places, tuple(groups), take)


def _cuts(sizes: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of tokens, of falling size over 0, with the size of the first: at most `most` rows, the last at least half its size."""
    first = 0
    while first < len(sizes) and sizes[first]:
        width, last = sizes[first], first + 1
        while last < len(sizes) and 2 * sizes[last] >= width and (last + 1 - first) * width <= most:
            last += 1
        yield first, last, width
        first = last
