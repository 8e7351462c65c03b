"""What both ways of tracing a circuit are measured on: inputs and transcoders at random, nodes, and the operations counted.

Imports torch and what needs no more than torch: `bench.gpu_circuits` uses it too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.plain_flux import Shape
from bench.reference_circuits import STREAMS, Recording
from store.sites import Site, Stream
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary, build

SIGMA, TIME_EMBEDDING = 0.75, 256


@dataclass(frozen=True)
class Node:
    """A feature at a token."""

    site: Site
    token: int
    feature: int


@dataclass(frozen=True)
class Case:
    """Sizes of a model, its trace and its transcoders."""

    shape: Shape
    n_txt: int
    grid: tuple[int, int]
    traced: int
    """double blocks from 0 on"""
    n_features: int
    share: float
    """of the features that are active at a token, on the average"""

    @property
    def tokens(self) -> dict[Stream, int]:
        return {"txt": self.n_txt, "img": self.grid[0] * self.grid[1]}


def random_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Arguments of the transformer's `forward`, normally distributed, in the default dtype and on the default device."""
    generator = torch.Generator().manual_seed(seed)
    shape, (rows, columns) = case.shape, case.grid

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cpu", dtype=torch.float32).to(torch.empty(0))

    ids = torch.zeros(rows * columns, 3)
    ids[:, 1] = torch.arange(rows).repeat_interleave(columns)
    ids[:, 2] = torch.arange(columns).repeat(rows)
    return {
        "hidden_states": normal(1, rows * columns, shape.in_channels),
        "encoder_hidden_states": normal(1, case.n_txt, shape.text_channels),
        "pooled_projections": normal(1, shape.pooled_channels),
        "timestep": torch.full((1,), SIGMA),
        "img_ids": ids,
        "txt_ids": torch.zeros(case.n_txt, 3),
    }


@torch.no_grad()
def random_transcoders(recording: Recording, n_features: int, share: float, seed: int = 0) -> dict[Site, Dictionary]:
    """A ReLU transcoder for every recorded site; each of its features is active at `share` of the site's tokens."""
    found = {}
    for layer in range(recording.n_blocks):
        for number, stream in enumerate(STREAMS):
            site, rows = Site("double", layer, stream), recording.tensors[layer][f"mlp_in.{stream}"].float()
            d_model = rows.shape[1]
            config = DictionaryConfig("transcoder", site, d_model, n_features, time_embed_dim=TIME_EMBEDDING)
            dictionary = build(config, empty=True).to_empty(device=rows.device).requires_grad_(False)
            dictionary.initialise(
                0
            )  # time MLP and modulation; the matrices are drawn where they are, by the device's generator
            generator = torch.Generator(rows.device).manual_seed(1000 * seed + 2 * layer + number)
            for matrix, spread in ((dictionary.encoder.weight, d_model**-0.5), (dictionary.mod_linear.weight, 0.02)):
                matrix.normal_(std=spread, generator=generator)
            dictionary.decoder.weight.normal_(generator=generator)
            dictionary.normalise_decoder()
            dictionary.encoder.bias.zero_()
            sigma = torch.full((len(rows),), recording.sigma, device=rows.device)
            pre = dictionary.preactivation(rows, sigma)
            rank = max(1, round((1 - share) * len(rows)))
            dictionary.encoder.bias.copy_(-torch.kthvalue(pre, rank, dim=0).values)
            found[site] = dictionary
    return found


@dataclass(frozen=True)
class Work:
    """Operations (a multiplication and an addition are two) that tracing some nodes takes."""

    ours: float
    reference: float


def operations(
    case: Case, nodes: Sequence[Node], active: Mapping[Site, int], batch: int, double_blocks: int, single_blocks: int
) -> Work:
    """What each way must do for these nodes, edges included; `active`: features active at each site, summed over its tokens.

    Ours, for a node of block b: one row of attention in b (a rank-one gradient a head); in every block below both projections and the
    transposed pattern for all tokens, but in block 0 one of them, since only the product with the inputs is wanted; for every active
    feature and every error below a product of d_model.  Each batch computes the patterns once.
    The reference: the forward pass to the end, the backward pass from b down, and all features of all tokens below.
    """
    d, heads, total = case.shape.d_model, case.shape.heads, sum(case.tokens.values())
    linear, pattern = (
        4 * total * d * d,
        2 * total * total * d,
    )  # value and output projections; one product with P or q k^T
    ours = reference = 0.0
    forward = case.traced * (linear + pattern)
    forward += (double_blocks - case.traced) * (24 * total * d * d + 2 * pattern)
    forward += single_blocks * (24 * total * d * d + 2 * pattern)
    for start in range(0, len(nodes), batch):
        ours += pattern * (max(node.site.layer for node in nodes[start : start + batch]) + 1)
    for layer, count in Counter(node.site.layer for node in nodes).items():
        below = sum(number for site, number in active.items() if site.layer < layer)
        ours += count * (6 * d * d + 2 * total * heads * d)
        if layer:
            ours += count * (layer * (linear + pattern) - linear / 2 + 2 * d * (below + layer * total))
        dense = 2 * d * case.n_features * total * layer
        reference += count * (forward + (layer + 1) * (linear + pattern) + dense)
    return Work(ours, reference)
