"""Which features of a transcoder are active in a trace, and the products of every token's gradients with its own few vectors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from train import Dictionary

DENSE_PAYS = 3.0
"""up to so many times the active features it is cheaper to multiply every token with every distinct one than to gather rows:
a row gathered costs as much as some 40 products with it"""


@dataclass(frozen=True)
class Features:
    """The active features of a site: where, which, how strong."""

    token: Tensor
    """int64 (active,), rising; features rise within a token"""
    feature: Tensor
    """int64 (active,)"""
    row: Tensor
    """int64 (active,): its place in `distinct`"""
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
        z = _activated(dictionary, pre)
        where = torch.nonzero(z > 0)
        values.append(z[where[:, 0], where[:, 1]])
        found.append(where + torch.tensor([start, 0], device=x.device))
    index = torch.cat(found)
    return features_of(index[:, 0].contiguous(), index[:, 1].contiguous(), torch.cat(values))


def features_of(token: Tensor, feature: Tensor, z: Tensor) -> Features:
    """The same from where, which and how strong."""
    distinct, row = torch.unique(feature, return_inverse=True)
    return Features(token, feature, row, z, distinct)


def _activated(dictionary: Dictionary, pre: Tensor) -> Tensor:
    """`Dictionary.activate` where `pre` is, whichever device the dictionary's thresholds lie on."""
    if dictionary.config.activation == "jumprelu":
        return pre * (pre > dictionary.log_threshold.detach().exp().to(pre.device))
    if dictionary.config.activation == "batchtopk":
        z = functional.relu(pre)
        return z * (z > dictionary.threshold.to(pre.device))
    return dictionary.activate(pre)


def no_features(like: Tensor) -> Features:
    """Of a site without a transcoder."""
    none = torch.zeros(0, dtype=torch.int64, device=like.device)
    return Features(none, none, none, like.new_zeros(0), none)


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

    tokens: Tensor
    """int64 (token,)"""
    rows: Tensor
    """int64 (token, vector): rows of the table, a token's features first, filled up with row 0, then its constants"""
    vectors: Tensor | None = None
    """those rows, (token, vector, d_model), where they are kept"""


@dataclass(frozen=True)
class Products:
    """How to multiply each token's gradients with its own rows of a table: features, and constants by name.

    A product needs `gradients * d_model` operations a (token, vector).  Tokens are taken in falling order of their active features, so
    that little is filled up; where nearly all features are active nearly everywhere, one dense product is cheaper (`DENSE_PAYS`).
    """

    groups: tuple[Group, ...]
    take: Tensor | None
    """int64 (active,): where the products of the features stand among those of the groups; None: one dense product"""
    constants: Mapping[str, Tensor]
    """int64 (token,): likewise of each constant"""
    features: Features
    n_tokens: int

    def kept(self, table: Tensor, memory: int) -> "Products":
        """The same with its rows gathered once and for all, if they fit `memory`: in small models that is half of a sweep's time."""
        if sum(group.rows.numel() for group in self.groups) * table.shape[1] * table.element_size() > memory:
            return self
        return replace(self, groups=tuple(replace(group, vectors=table[group.rows]) for group in self.groups))

    def of(self, gradients: Tensor, table: Tensor, memory: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(gradient, active) of `gradients` (gradient, token, d_model) with the features, and (gradient, token) with each constant."""
        found = []
        for group in self.groups:
            right = group.vectors
            if right is None:
                right = table.index_select(0, group.rows.flatten()).view(*group.rows.shape, -1)
            left = gradients.index_select(1, group.tokens).transpose(0, 1)
            found.append(torch.bmm(left, right.transpose(1, 2)).transpose(0, 1).reshape(len(gradients), -1))
        flat = torch.cat(found, dim=1) if found else gradients.new_zeros(len(gradients), 0)
        constants = {name: flat.index_select(1, place) for name, place in self.constants.items()}
        if self.take is not None:
            return flat.index_select(1, self.take), constants
        return self._dense(gradients, table[: len(self.features.distinct)], memory), constants

    def _dense(self, gradients: Tensor, directions: Tensor, memory: int) -> Tensor:
        count, width = len(gradients), len(directions)
        token, row = self.features.token, self.features.row
        found, step = [], max(1, memory // (max(1, count * width) * gradients.element_size()))
        for start in range(0, self.n_tokens, step):
            stop = min(start + step, self.n_tokens)
            low, high = (int(torch.searchsorted(token, bound)) for bound in (start, stop))
            products = (gradients[:, start:stop] @ directions.T).view(count, -1)
            found.append(products.index_select(1, (token[low:high] - start) * width + row[low:high]))
        return torch.cat(found, dim=1)


def products(
    features: Features, n_tokens: int, constants: Mapping[str, Tensor], d_model: int, memory: int, itemsize: int
) -> Products:
    """The plan of the products of every token with its features and with `constants`, rows of the table (token,) by name."""
    device = features.token.device
    counts = torch.bincount(features.token, minlength=n_tokens)
    dense = n_tokens * len(features.distinct) <= DENSE_PAYS * len(features.token)
    starts, kept = counts.cumsum(0) - counts, torch.zeros_like(counts) if dense else counts
    order = torch.argsort(kept, descending=True, stable=True)
    sizes, columns = kept[order].tolist(), list(constants.values())
    groups, features_at, constants_at, begin = [], features.token.new_zeros(len(features.token)), {}, 0
    places = features.token.new_zeros(len(columns), n_tokens)
    for first, last in _cuts(sizes, len(columns), d_model * itemsize, memory):
        tokens, widest = order[first:last], sizes[first]
        slots = starts[tokens, None] + torch.arange(widest, device=device)
        there = torch.arange(widest, device=device) < kept[tokens, None]
        rows = torch.where(there, features.row[slots.clamp(max=max(0, len(features.row) - 1))], 0) if widest else slots
        groups.append(Group(tokens, torch.cat([rows, *(column[tokens, None] for column in columns)], dim=1)))
        total = widest + len(columns)
        at = begin + torch.arange(last - first, device=device)[:, None] * total + torch.arange(total, device=device)
        features_at[slots[there]] = at[:, :widest][there]
        places[:, tokens] = at[:, widest:].T
        begin += (last - first) * total
    constants_at = {name: places[number] for number, name in enumerate(constants)}
    return Products(tuple(groups), None if dense else features_at, constants_at, features, n_tokens)


def _cuts(sizes: list[int], constants: int, row_bytes: int, memory: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, of falling size, whose rows fit `memory` and of which the last has at least half of the first's."""
    first = 0
    while first < len(sizes):
        width = sizes[first] + constants
        if width == 0:
            return
        most = min(len(sizes), first + max(1, memory // (width * row_bytes)))
        last = first + 1
        while last < most and 2 * (sizes[last] + constants) >= width:
            last += 1
        yield first, last
        first = last
